"""An endpoint of webhooks: a real TLS server on loopback, with a certificate of an authority of its own."""

import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import trustme

NAME = "hooks.example"
Answer = Callable[[BaseHTTPRequestHandler], None]


@dataclass(frozen=True)
class Received:
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """Answers 204, or as it is told to."""

    port: int
    ca_file: Path
    ended: Event
    requests: list[Received] = field(default_factory=list)
    connections: int = 0
    answer: Answer = lambda handler: status(204)(handler)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}/hook?token=secret-of-the-receiver"

    def forget(self) -> None:
        self.requests.clear()
        self.connections = 0
        self.answer = status(204)


def status(code: int, **headers: str) -> Answer:
    """Keyword `Retry_After` is the header `Retry-After`."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()

    return answer


def answers(*given: Answer) -> Answer:
    """One after the other; the last again and again."""
    left = list(given)
    return lambda handler: (left.pop(0) if len(left) > 1 else left[0])(handler)


@contextmanager
def receiving(folder: Path) -> Iterator[Receiver]:
    authority = trustme.CA()
    ca_file = folder / "ca.pem"
    authority.cert_pem.write_to_path(ca_file)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(NAME, "127.0.0.1").configure_cert(context)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.requests.append(Received(self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            receiver.answer(self)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def get_request(self) -> Any:
            # The handshake is for the connection's own thread: one that fails must not hold up the next.
            receiver.connections += 1
            connection, address = self.socket.accept()
            return context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False), address

        def handle_error(self, *_: Any) -> None:
            pass  # who breaks off, as tests do

    with Server(("127.0.0.1", 0), Handler) as server:
        receiver = Receiver(server.server_address[1], ca_file, Event())
        thread = Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield receiver
        finally:
            receiver.ended.set()
            server.shutdown()
            thread.join()


def drip(handler: BaseHTTPRequestHandler) -> None:
    """A head that never ends, a byte now and then."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    try:
        while True:
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.02)
    except OSError:
        pass
