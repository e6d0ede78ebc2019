"""What the API takes and says of imports from the hub."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.datasets.bad_rows import OnBadRow
from service.datasets.rows.forms import Form
from service.datasets.rows.options import RowOptions
from service.datasets.rows.template import MAX_LENGTH
from service.names import Name, Text

_Short = Annotated[Text, Field(min_length=1, max_length=200)]


class HubSource(BaseModel):
    """A split of a dataset on the Hugging Face Hub, and how its rows are read: as those of an upload."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"id": "openai/gsm8k", "config": "main", "split": "train", "limit": 1000}]},
    )

    id: Annotated[
        str,
        Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$", examples=["openai/gsm8k"]),
    ]
    revision: _Short = Field(
        default="main", description="A branch, a tag, refs/pr/N or a commit; resolved to a commit now"
    )
    config: _Short | None = Field(default=None, description="null: the dataset's default, or its only one")
    split: _Short | None = Field(default=None, description="null: its only one", examples=["train"])
    format: Form = Field(default=Form.AUTO, description="As `format` of an upload")
    columns: dict[str, str] | None = Field(
        default=None, description="As `columns` of an upload", examples=[{"prompt": "question", "completion": "answer"}]
    )
    template: dict[str, str] | None = Field(default=None, description="As `template` of an upload")
    on_bad_row: OnBadRow = Field(default=OnBadRow.REFUSE, description="As `on_bad_row` of an upload")
    limit: Annotated[int, Field(ge=1)] | None = Field(default=None, description="Only the first rows, so many")

    def row_options(self) -> RowOptions:
        """
        Raises:
            Unprocessable: one of them cannot be used; the error names it.
        """
        columns, template = (None if given is None else json.dumps(given) for given in (self.columns, self.template))
        if template is not None and len(template) > MAX_LENGTH:
            template = template[: MAX_LENGTH + 1]  # which is refused as too long
        return RowOptions.parse(self.format, columns, template)


class ImportRequest(BaseModel):
    """A dataset to import from the hub, sent as application/json to a call without a query."""

    model_config = ConfigDict(extra="forbid")

    hub: HubSource
    name: Name | None = Field(
        default=None, min_length=1, max_length=256, description="null: made of id, config and split"
    )


class ImportedFile(BaseModel):
    path: str
    size: int
    sha256: str


class Read(BaseModel):
    """What an import has read."""

    config: str
    split: str
    files: list[ImportedFile] = Field(description="Those that rows were taken of, in order")


class Choice(BaseModel):
    """Of a ready-made target, how many samples were to be taken, and which."""

    name: str = Field(examples=["gsm8k"])
    count: int
    seed: int


class Origin(BaseModel):
    """Where an imported dataset comes from: what was asked, and the commit."""

    model_config = ConfigDict(extra="allow")

    id: str
    revision: str
    commit: str
    config: str | None
    split: str | None
    format: Form = Form.AUTO
    columns: dict[str, str] | None = None
    template: dict[str, str] | None = None
    on_bad_row: OnBadRow = OnBadRow.REFUSE
    limit: int | None = None
    preset: Choice | None = Field(default=None, description="Of a ready-made target: only chosen rows were taken")
    read: Read | None = Field(default=None, description="null before it is ready")


class ImportProgress(BaseModel):
    """How far an import is."""

    rows: int = Field(description="Rows read")
    bytes: int = Field(description="Bytes downloaded")
    total_bytes: int | None = Field(description="Of all files of the split; with `limit` fewer may be needed")


class ImportFailure(BaseModel):
    """Why an import has failed."""

    code: str = Field(examples=["split_not_found"])
    detail: str
    errors: list[dict[str, Any]] | None = Field(default=None, description="Rows that cannot be used, as of an upload")


Status = Literal["importing", "ready", "failed"]
