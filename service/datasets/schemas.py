"""What the API says of datasets."""

from datetime import datetime
from typing import Annotated, Literal

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field

from service.datasets.formats import Form
from service.pages import NumberedPage, Page

Name = Annotated[
    str,
    Query(
        min_length=1,
        max_length=256,
        pattern=r"^[^\x00-\x1f\x7f]+$",
        description="What the dataset is called in lists; need not be unique",
        examples=["tulu-v2-unfiltered"],
    ),
]
FormQuery = Annotated[
    Form,
    Query(
        alias="format",
        description="The form of the rows. With `auto` each row is told by its fields; one that fits more than one form is"
        " refused unless the form is named.",
    ),
]
# Rows may have a megabyte each: fewer of them than of other entries make a page.
RowLimit = Annotated[int, Query(ge=1, le=100, description="Most rows of one page")]


class DatasetObject(BaseModel):
    """An uploaded dataset."""

    model_config = ConfigDict(
        extra="forbid",
        from_attributes=True,
        json_schema_extra={
            "example": {
                "object": "dataset",
                "id": "ds_0199f3a2b6c41f2e3d4c5b6a79880716",
                "name": "pool",
                "fingerprint": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
                "row_count": 3,
                "byte_count": 1480,
                "sources": {"flan": 2, "(none)": 1},
                "created_at": "2026-01-31T12:00:00Z",
            }
        },
    )

    object: Literal["dataset"] = "dataset"
    id: str
    name: str
    fingerprint: str = Field(description="sha256 of the rows in their canonical form: equal content, equal fingerprint")
    row_count: int
    byte_count: int = Field(description="Bytes of the rows in their canonical form")
    sources: dict[str, int] = Field(
        description="Rows by source: at most 1,000 by name, the rest under `(other)`; rows without a source under `(none)`"
    )
    created_at: datetime


class DatasetPage(Page[DatasetObject]):
    """Datasets, newest first."""


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class DatasetRow(BaseModel):
    """A row: `messages`, or `text`, and the other null."""

    model_config = ConfigDict(extra="forbid", from_attributes=True)

    index: int = Field(description="Its place in the dataset, from 0", examples=[0])
    id: str = Field(description="The row's own id; its index where it came without one", examples=["flan-17"])
    source: str | None = Field(examples=["flan"])
    messages: list[Message] | None = Field(
        examples=[[{"role": "user", "content": "Name a prime."}, {"role": "assistant", "content": "Seven."}]]
    )
    text: str | None = Field(examples=[None])


class RowPage(NumberedPage[DatasetRow]):
    """Rows in the dataset's order; `last_id` is the index of the last."""
