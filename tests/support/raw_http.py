"""HTTP by hand, for what no client library sends: heads without an end, bodies that do not come, bodies that trickle."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any
from urllib.parse import urlsplit

from support.waiting import PATIENCE


class Connection:
    def __init__(self, peer: socket.socket, answers: IO[bytes]) -> None:
        self._peer, self._answers = peer, answers

    def send(self, data: bytes) -> None:
        self._peer.sendall(data)

    def head(self, method: str, path: str, **headers: str) -> None:
        """Sends the head of a request; `content_length` becomes Content-Length."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [f"{method} {path} HTTP/1.1", "host: x", *(f"{name}: {value}" for name, value in named.items())]
        self.send("\r\n".join([*lines, "", ""]).encode())

    def status(self) -> int:
        """Of the next answer, of which nothing else is read."""
        return int(self._answers.readline().split()[1])

    def answer(self) -> tuple[int, dict[str, Any]]:
        """Status and JSON of the next answer, which has a length."""
        status = self.status()
        headers = {}
        while line := self._answers.readline().strip().decode():
            name, _, value = line.partition(": ")
            headers[name.lower()] = value
        return status, json.loads(self._answers.read(int(headers["content-length"])) or b"{}")

    def read_line(self) -> bytes:
        return self._answers.readline()

    def rest(self) -> bytes:
        """All that comes until the connection ends."""
        return self._answers.read()

    def is_closed_by_peer(self) -> bool:
        """Waits for the end of the connection, whatever comes before it."""
        try:
            self._answers.read()
        except ConnectionError:
            return True
        except TimeoutError:
            return False
        return True


@contextmanager
def connected(url: str) -> Iterator[Connection]:
    where = urlsplit(url)
    with (
        socket.create_connection((where.hostname or "", where.port or 80), timeout=PATIENCE) as peer,
        peer.makefile("rb") as answers,
    ):
        yield Connection(peer, answers)
