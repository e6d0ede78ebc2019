"""A bad line: a proxy that hands a client's bytes on and breaks the connection after so many of them."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Self
from urllib.parse import urlsplit


class CuttingProxy:
    """Each of the first connections is broken once the client has sent as many bytes as `cuts` says, the others never."""

    def __init__(self, url: str, cuts: list[int]) -> None:
        where = urlsplit(url)
        self._target = where.hostname or "", where.port or 80
        self._cuts = iter(cuts)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.broken = self.from_client = 0
        threading.Thread(target=self._accept, daemon=True).start()

    @classmethod
    @contextmanager
    def before(cls, url: str, cuts: list[int]) -> Iterator[Self]:
        proxy = cls(url, cuts)
        try:
            yield proxy
        finally:
            proxy._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client, next(self._cuts, None)), daemon=True).start()

    def _serve(self, client: socket.socket, cut: int | None) -> None:
        with client, socket.create_connection(self._target) as server:
            threading.Thread(target=_hand_on, args=(server, client), daemon=True).start()
            passed = 0
            with suppress(OSError):
                while data := client.recv(2**12):
                    if cut is not None and passed + len(data) >= cut:
                        server.sendall(data[: cut - passed])
                        self.from_client += cut - passed
                        self.broken += 1
                        break
                    server.sendall(data)
                    passed += len(data)
                    self.from_client += len(data)
            for end in (client, server):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


def _hand_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(2**16):
            target.sendall(data)
