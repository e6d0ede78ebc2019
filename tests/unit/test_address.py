"""To which address the command line sends which key."""

import fcntl
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from typer.testing import CliRunner, Result

from winnow.cli.main import app
from winnow.stack import LOCK, STACK, Stack


class Server:
    """Any server; it keeps the keys that it was sent."""

    def __init__(self) -> None:
        self.keys: list[str | None] = []
        keys = self.keys

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                keys.append(self.headers["Authorization"])
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b'{"data": [], "has_more": false}')

            def log_message(self, *_: object) -> None:
                pass

        self._http = HTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._http.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


@pytest.fixture
def servers() -> Iterator[tuple[Server, Server]]:
    """The stack's own, and a foreign one."""
    own, foreign = Server(), Server()
    yield own, foreign
    own.stop()
    foreign.stop()


@pytest.fixture
def home(tmp_path: Path, servers: tuple[Server, Server]) -> Iterator[Path]:
    """The home of a stack that runs at the first server."""
    stack = Stack(url=servers[0].url, api_key="wnw_own", database_url="", broker_url="", home=tmp_path)
    (tmp_path / STACK).write_text(stack.model_dump_json())
    with (tmp_path / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield tmp_path


def jobs(home: Path, **environment: str) -> Result:
    given = {"WINNOW_URL": None, "WINNOW_API_KEY": None, "WINNOW_HOME": str(home), **environment}
    return CliRunner().invoke(app, ["jobs"], env=given)


def test_the_key_of_the_running_stack_goes_to_no_other_address(home: Path, servers: tuple[Server, Server]) -> None:
    own, foreign = servers
    for url in (foreign.url, f"http://127.0.0.1:{own.port}@127.0.0.1:{foreign.port}", own.url.replace("http", "https")):
        done = jobs(home, WINNOW_URL=url)
        assert done.exit_code == 1, url
        assert "--api-key" in done.output
    assert own.keys == foreign.keys == []
    assert jobs(home, WINNOW_URL=foreign.url, WINNOW_API_KEY="wnw_theirs").exit_code == 0
    assert foreign.keys == ["Bearer wnw_theirs"]


def test_it_goes_to_the_running_stack(home: Path, servers: tuple[Server, Server]) -> None:
    for environment in ({}, {"WINNOW_URL": servers[0].url + "/"}):
        assert jobs(home, **environment).exit_code == 0
    assert jobs(home, WINNOW_API_KEY="wnw_other").exit_code == 0
    assert servers[0].keys == ["Bearer wnw_own", "Bearer wnw_own", "Bearer wnw_other"]
    assert servers[1].keys == []


def test_without_a_stack_a_key_is_asked_for(tmp_path: Path, servers: tuple[Server, Server]) -> None:
    assert jobs(tmp_path, WINNOW_URL=servers[1].url).exit_code == 1
    assert jobs(tmp_path).exit_code == 1
    assert servers[1].keys == []
