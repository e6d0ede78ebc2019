"""Cursor pages: `{object: "list", data, has_more, last_id}`; `after` = the `last_id` of the page before."""

from collections.abc import Sequence
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from fastapi import Query
from pydantic import BaseModel, Field

Item = TypeVar("Item")


class Page(BaseModel, Generic[Item]):
    """Entries that have an id."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    last_id: str | None = Field(description="`after` for the next page; null if this page is empty")

    @classmethod
    def of(cls, data: Sequence[Any], has_more: bool) -> Self:
        """The page of these entries."""
        return cls(data=list(data), has_more=has_more, last_id=data[-1].id if data else None)


class NumberedPage(BaseModel, Generic[Item]):
    """Entries that have a number, by which they are in order."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    last_id: int | None = Field(description="`after` for the next page; null if this page is empty", examples=[999])

    @classmethod
    def of(cls, data: Sequence[Any], has_more: bool, number: str = "id") -> Self:
        """The page of these entries, whose numbers are in the named field."""
        return cls(data=list(data), has_more=has_more, last_id=getattr(data[-1], number) if data else None)


Limit = Annotated[int, Query(ge=1, le=1000, description="Maximum number of entries per page")]


def _after(prefix: str) -> Any:
    return Query(pattern=f"^{prefix}_[0-9a-f]{{32}}$", description="`last_id` of the previous page")


AfterJob = Annotated[str | None, _after("job")]
AfterDataset = Annotated[str | None, _after("ds")]
AfterUpload = Annotated[str | None, _after("up")]
AfterKey = Annotated[str | None, _after("key")]
AfterWebhook = Annotated[str | None, _after("whk")]
AfterDelivery = Annotated[str | None, _after("msg")]
AfterNumber = Annotated[
    int | None, Query(ge=0, lt=2**63, description="`last_id` of the previous page; omit it for the first page")
]
