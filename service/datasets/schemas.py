"""What the API says of datasets."""

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import Query
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from service.datasets.bad_rows import OnBadRow
from service.datasets.import_schemas import ImportFailure, ImportProgress, Origin, Status
from service.datasets.rows.forms import Form
from service.datasets.rows.template import MAX_LENGTH
from service.http.pagination import Page
from service.names import Name

DatasetName = Annotated[
    Name,
    Query(
        min_length=1,
        max_length=256,
        description="Name of the dataset in lists; need not be unique",
        examples=["tulu-v2-unfiltered"],
    ),
]
FormQuery = Annotated[
    Form,
    Query(
        alias="format",
        description="The form of the rows. With `auto` the fields of each row decide; where they fit several forms, the first of"
        " this list is taken.",
    ),
]
ColumnsQuery = Annotated[
    str | None,
    Query(
        max_length=8_192,
        description="Columns whose names are not known: `slot:column,slot:column`, or a JSON object. A slot is `messages`,"
        " `prompt`, `completion`, `context`, `system`, `history`, `tools`, `text`, `source` or `id`, or a known column's name.",
        examples=["prompt:frage,completion:antwort,source:korpus"],
    ),
]
TemplateQuery = Annotated[
    str | None,
    Query(
        max_length=MAX_LENGTH,
        description="What makes messages of any row, as a JSON object with `user`, `assistant` and optionally `system`: each is"
        " Jinja over the columns of the row, all of which `row` has too. The whole address may have 65,535 bytes, of which a"
        " character beyond ASCII takes up to twelve; long text of that kind can be a column of the rows.",
        examples=['{"user": "{{ question }}", "assistant": "{{ choices[answer] }}"}'],
    ),
]
OnBadRowQuery = Annotated[
    OnBadRow,
    Query(
        description="With `refuse` one row that cannot be used refuses the upload. With `skip` the others are kept, and"
        " GET /v1/datasets/{id}/skipped names those that were left out and why; if none is left, the upload is refused."
    ),
]


class DetectedForm(BaseModel):
    """Rows of which the same columns were taken."""

    model_config = ConfigDict(extra="forbid")

    form: str
    columns: dict[str, str] = Field(description="The column that each part was taken from, also `id` and `source`")
    rows: int


class Note(BaseModel):
    """What is worth knowing of rows that were kept."""

    model_config = ConfigDict(extra="forbid")

    code: str
    rows: int
    message: str


class Detected(BaseModel):
    """What an upload was found to be, and what was taken of it. Lists are limited; the rest is counted."""

    model_config = ConfigDict(extra="forbid")

    container: str = Field(description="Of the file: jsonl, parquet, ...")
    compression: str | None
    forms: list[DetectedForm] = Field(description="The most frequent first, at most 50")
    more_forms: int
    source_columns: list[str]
    left_alone: list[str] = Field(
        description="Columns, and keys of messages (`messages[].score`), that had values and were not taken; at most 100"
    )
    more_left_alone: int = Field(description="Further ones, counted up to 10,000")
    notes: list[Note]
    sha256: str | None = Field(
        default=None,
        description="Of the file as it was uploaded; null: it was imported, or uploaded to a version that did not keep it",
    )


class SkippedRow(BaseModel):
    """A row of an upload that the dataset does not have."""

    unit: Literal["line", "row"]
    number: int = Field(description="The line or row of the file, from 1", examples=[17])
    reason: str


class DatasetOut(BaseModel):
    """An uploaded dataset, or one that is imported from the hub: until it is `ready`, what describes its rows is null."""

    model_config = ConfigDict(
        extra="forbid",
        from_attributes=True,
        json_schema_extra={
            "example": {
                "object": "dataset",
                "status": "ready",
                "id": "ds_0199f3a2b6c41f2e3d4c5b6a79880716",
                "name": "pool",
                "fingerprint": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
                "row_count": 3,
                "byte_count": 1480,
                "sources": {"flan": 2, "(none)": 1},
                "detected": {
                    "container": "jsonl",
                    "compression": "gzip",
                    "forms": [
                        {
                            "form": "prompt_completion",
                            "columns": {"source": "dataset", "prompt": "question", "completion": "answer"},
                            "rows": 3,
                        }
                    ],
                    "more_forms": 0,
                    "source_columns": ["dataset"],
                    "left_alone": ["difficulty"],
                    "more_left_alone": 0,
                    "notes": [],
                },
                "skipped": 1,
                "created_at": "2026-01-31T12:00:00Z",
            }
        },
    )

    object: Literal["dataset"] = "dataset"
    id: str
    name: str
    status: Status = "ready"
    fingerprint: str | None = Field(
        description="sha256 of the rows in their canonical form: equal content, equal fingerprint"
    )
    row_count: int | None
    byte_count: int | None = Field(description="Bytes of the rows in their canonical form")
    sources: dict[str, int] | None = Field(
        description="Rows by source: at most 1,000 by name, the others under `(other)`; rows without a source under `(none)`"
    )
    detected: Detected | None = Field(description="What was taken of the upload; null where that was not yet recorded")
    skipped: int = Field(
        description="Rows of the upload that could not be used and were left out (`on_bad_row=skip`); GET .../skipped names them"
    )
    hub: Origin | None = Field(default=None, description="Where an imported dataset comes from; null: it was uploaded")
    progress: ImportProgress | None = Field(default=None, description="While it is imported")
    error: ImportFailure | None = Field(default=None, description="Why its import has failed")
    created_at: datetime


class DatasetPage(Page[DatasetOut]):
    """Datasets, newest first."""


class FunctionCall(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    arguments: dict[str, Any] | str = Field(description="An object, or a string that is not the JSON of one")


class ToolCall(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["function"] = "function"
    id: str | None = None
    function: FunctionCall


class Message(BaseModel):
    """A message; what it does not have is null."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    counts: bool = Field(description="Whether the loss counts it: the model learns it")
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None


def _counted(messages: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """What is stored says it only of the assistant's messages that do not count."""
    return messages and [{"counts": message["role"] == "assistant", **message} for message in messages]


Messages = Annotated[list[Message] | None, BeforeValidator(_counted)]
"""The messages of a stored sample."""


class DatasetRow(BaseModel):
    """A row: either `messages`, with the `tools` that they may call, or `text`; what it does not have is null."""

    model_config = ConfigDict(extra="forbid", from_attributes=True)

    index: int = Field(description="Position in the dataset, from 0", examples=[0])
    id: str = Field(description="The row's own id, or its index if it has none", examples=["flan-17"])
    source: str | None = Field(examples=["flan"])
    messages: Messages = Field(
        examples=[
            [
                {"role": "user", "content": "Name a prime.", "counts": False},
                {"role": "assistant", "content": "Seven.", "counts": True},
            ]
        ]
    )
    tools: list[dict[str, Any]] | None = Field(examples=[None])
    text: str | None = Field(examples=[None])
