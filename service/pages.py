"""Cursor pages: `{object: "list", data, has_more, last_id}`, newest first, `after` = the last id of the page before."""

from typing import Annotated, Generic, Literal, TypeVar

from fastapi import Query
from pydantic import BaseModel

Item = TypeVar("Item")


class Page(BaseModel, Generic[Item]):
    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    last_id: str | None


Limit = Annotated[int, Query(ge=1, le=1000, description="Most entries of one page")]
After = Annotated[str | None, Query(description="`last_id` of the page before")]
