"""What the API says of uploads in parts."""

from datetime import datetime
from typing import Annotated, Literal

from fastapi import Path, Query
from pydantic import BaseModel, ConfigDict, Field

from service.http.pagination import Page

UploadQuery = Annotated[
    str | None,
    Query(
        alias="upload",
        pattern="^up_[0-9a-f]{32}$",
        description="In place of a body: the id of a whole upload (POST /v1/uploads). It goes once the dataset is there; after a"
        " refusal it stays, for another attempt with other parameters.",
    ),
]
PartNumber = Annotated[int, Path(ge=0, lt=100_000, description="From 0; the upload's `received` is the next")]


class UploadRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    bytes: int = Field(ge=1, lt=2**53, description="Size of the file")
    sha256: str = Field(
        pattern="^[0-9a-f]{64}$",
        description="Of the whole file, in hexadecimal digits",
        examples=["9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"],
    )


class UploadOut(BaseModel):
    """A file that is sent in parts."""

    model_config = ConfigDict(extra="forbid", from_attributes=True)

    object: Literal["upload"] = "upload"
    id: str = Field(examples=["up_0199f3a2b6c41f2e3d4c5b6a79880716"])
    bytes: int
    sha256: str
    part_bytes: int = Field(description="Size of each part but the last, which has the rest")
    parts: int = Field(description="How many there are to send")
    received: int = Field(description="How many have come; the number of the next one")
    rows_read: int = Field(description="While a dataset is made of it: rows read so far")
    created_at: datetime
    expires_at: datetime | None = Field(description="When it is removed if nothing is sent; null: never")


class UploadPage(Page[UploadOut]):
    """Uploads, newest first."""
