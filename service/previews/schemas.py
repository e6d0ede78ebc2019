"""What the API says of the rows of a dataset, and of what a model makes of them."""

from typing import Annotated, Literal

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field

from service.datasets.schemas import DatasetRow
from service.http.pagination import NumberedPage

# Rows may have a megabyte each: fewer of them than of other entries make a page.
RowLimit = Annotated[
    int, Query(ge=1, le=100, description="Maximum number of rows per page; fewer where rendered texts are long")
]
ModelQuery = Annotated[
    str | None,
    Query(
        max_length=200,
        description="A model as a job names it, a registered name or `owner/name` on the hub: each row comes with its `rendered`"
        " text, computed by a worker and kept for an hour. While it is computed the answer is 202",
        examples=["smollm2-135m-instruct"],
    ),
]
ReasoningQuery = Annotated[
    Literal["keep", "strip"] | None, Query(description="As of a job; default: keep. Needs `model`")
]
TemplateArgumentsQuery = Annotated[
    str | None,
    Query(
        max_length=8_192,
        description="As of a job, as a JSON object. Needs `model`",
        examples=['{"enable_thinking": false}'],
    ),
]
MaxLengthQuery = Annotated[
    int | None, Query(ge=16, le=131_072, description="As of a job; default: 2048. Needs `model`", examples=[1024])
]
WaitQuery = Annotated[
    int, Query(ge=0, le=60, description="With `model`: seconds to wait for the rows before the answer is 202")
]

Span = tuple[int, int]


class TokenCounts(BaseModel):
    """The tokens of a row for a job."""

    model_config = ConfigDict(extra="forbid")

    total: int = Field(description="Before the row is cut to `max_length`")
    kept: int = Field(description="After it")
    prompt: int = Field(description="Of those that are kept: what is only read")
    counted: int = Field(description="Of those that are kept: what the loss counts")


class Unusable(BaseModel):
    """Why a row would take no part in a job."""

    model_config = ConfigDict(extra="forbid")

    reason: str = Field(description="A code, as in a job's `unusable`", examples=["template_refuses"])
    detail: str


class Rendered(BaseModel):
    """A row as a job with the model would read it. Places are in characters of `text`, from 0; the end is excluded."""

    model_config = ConfigDict(extra="forbid")

    text: str | None = Field(
        description="What the model's chat template makes of the row; null where it makes nothing of it",
        examples=["<|im_start|>user\nName a prime.<|im_end|>\n<|im_start|>assistant\nSeven.<|im_end|>\n"],
    )
    spans: list[Span] = Field(description="What the loss counts: [start, end)", examples=[[[68, 84]]])
    kept: Span | None = Field(
        description="What is left of the text after the cut to `max_length`; null for an unusable row",
        examples=[[0, 85]],
    )
    tokens: TokenCounts | None = Field(description="null for an unusable row")
    truncated: bool = Field(description="Whether the row is cut")
    response_truncated: bool = Field(description="Whether some of what the loss would count is cut")
    notes: list[str] = Field(
        description="Codes of what the text does not say as the messages do, as in a job's `rendering`",
        examples=[["reasoning_not_rendered"]],
    )
    unusable: Unusable | None = Field(description="null: the row takes part")


class Row(DatasetRow):
    """A row, and with `model` what the model makes of it."""

    rendered: Rendered | None = Field(default=None, description="null without `model`")


class RenderedBy(BaseModel):
    """The model that rendered the rows."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(examples=["smollm2-135m-instruct"])
    chat_template: str = Field(description="`the model's own`, or `default` where it has none")
    max_length: int = Field(
        description="Tokens that rows are cut to: of the request or of the model, whichever is less"
    )


class RowPage(NumberedPage[Row]):
    """Rows in the dataset's order; `last_id` is the index of the last."""

    rendered_by: RenderedBy | None = Field(default=None, description="null without `model`")


class PendingRows(BaseModel):
    """The rows are not rendered yet: repeat the request."""

    object: Literal["dataset.rows.pending"] = "dataset.rows.pending"
    status: Literal["pending", "running"] = Field(description="`pending`: no worker has begun")
    detail: str = Field(description="What it waits for")
