"""Keyset pagination: a page follows the last entry of the page before, so entries added meanwhile shift nothing."""

from typing import Any, TypeVar

from sqlalchemy import Select
from sqlalchemy.orm import InstrumentedAttribute, Session

Entity = TypeVar("Entity")


def paginate(
    session: Session,
    entities: Select[Entity],
    key: InstrumentedAttribute[Any],
    *,
    after: str | int | None,
    limit: int,
    ascending: bool = False,
) -> tuple[list[Entity], bool]:
    """At most `limit` of the selected entities, and whether there are more.

    Args:
        key: unique among them; they come in its order, the greatest first unless `ascending`.
        after: the key of the last entity of the page before; None for the first page.
    """
    if after is not None:
        entities = entities.where(key > after if ascending else key < after)
    ordered = entities.order_by(key.asc() if ascending else key.desc())
    found = list(session.scalars(ordered.limit(limit + 1)))
    return found[:limit], len(found) > limit
