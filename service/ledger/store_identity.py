"""Which artifact store is this database's: both hold the same id, made by the API that first has the two of them.

A process that sees another id, or none, has another store: what it writes nobody finds, and what others wrote it does not find.
"""

from pathlib import Path

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from service.db.engine import Sessions
from service.ids import new_id
from service.ledger.tables import StoreIdentity
from service.storage.artifacts import ArtifactStore

MARKER = "winnow-store"  # the file at the store's root


class OtherStore(Exception):
    """The artifact store is not the one of this database; the message names no path."""


def recorded(session: Session) -> StoreIdentity | None:
    """None until an API has run on this database."""
    return session.scalar(select(StoreIdentity))


def check(identity: StoreIdentity, store: ArtifactStore) -> None:
    """
    Raises:
        OtherStore: the store is not the recorded one.
        OSError: it cannot be read.
    """
    found = _marker(store)
    if found != identity.id:
        holds = f"holds no file {MARKER}" if found is None else f"is marked {found!r}"
        raise OtherStore(f"the artifact store {holds}, but the database's is marked {identity.id!r}")


def establish(sessions: Sessions, store: ArtifactStore) -> None:
    """Marks the database and the store as a pair, if neither belongs to another yet; else checks that they are one.

    Raises:
        OtherStore: they are not.
        OSError: the store cannot be read or written.
    """
    found = _marker(store)
    with sessions.begin() as session:
        made = insert(StoreIdentity).values(id=found or new_id("store")).on_conflict_do_nothing()
        if recorded(session) is None:
            session.execute(made)
        identity = recorded(session)
        assert identity is not None
        session.expunge(identity)
    if not found and identity.marked_at is None:  # also where the process before ended between the two
        _mark(store, identity.id)
    check(identity, store)
    with sessions.begin() as session:
        now = func.coalesce(StoreIdentity.marked_at, func.clock_timestamp())
        session.execute(update(StoreIdentity).values(marked_at=now))


def _marker(store: ArtifactStore) -> str | None:
    """As an operator may write it: without the checksums that an artifact has."""
    try:
        content: bytes = store.fs.cat_file(f"{store.root}/{MARKER}", 0, 100)
    except FileNotFoundError:
        return None
    return content.decode(errors="replace").strip()


def _mark(store: ArtifactStore, identity: str) -> None:
    store.fs.makedirs(store.root, exist_ok=True)
    store.fs.pipe_file(f"{store.root}/{MARKER}", identity.encode())
    if store.is_local:
        Path(store.root, MARKER).chmod(0o600)
