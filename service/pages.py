"""Cursor pages: `{object: "list", data, has_more, last_id}`; `after` = the `last_id` of the page before."""

from typing import Annotated, Any, Generic, Literal, TypeVar

from fastapi import Query
from pydantic import BaseModel, Field

Item = TypeVar("Item")


class Page(BaseModel, Generic[Item]):
    """Entries that have an id."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    last_id: str | None = Field(description="`after` of the next page; null where this one is empty")


class NumberedPage(BaseModel, Generic[Item]):
    """Entries that have a number, by which they are in order."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    last_id: int | None = Field(description="`after` of the next page; null where this one is empty", examples=[999])


Limit = Annotated[int, Query(ge=1, le=1000, description="Most entries of one page")]


def _after(prefix: str) -> Any:
    return Query(pattern=f"^{prefix}_[0-9a-f]{{32}}$", description="`last_id` of the page before")


AfterJob = Annotated[str | None, _after("job")]
AfterDataset = Annotated[str | None, _after("ds")]
AfterKey = Annotated[str | None, _after("key")]
AfterWebhook = Annotated[str | None, _after("whk")]
AfterDelivery = Annotated[str | None, _after("msg")]
AfterNumber = Annotated[
    int | None, Query(ge=0, lt=2**63, description="`last_id` of the page before; without it from the first on")
]
