"""To which address the command line and the client send which key."""

import asyncio
import fcntl
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from typer.testing import CliRunner, Result

from winnow import AsyncWinnow, NoAddress, Winnow, WinnowError
from winnow.address import origin
from winnow.cli.main import app
from winnow.stack import LOCK, STACK, Stack


class Server:
    """Any server; it keeps the keys that it was sent."""

    def __init__(self) -> None:
        self.keys: list[str | None] = []
        self.redirect: str | None = None
        keys, server = self.keys, self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                keys.append(self.headers["Authorization"])
                self.send_response(200 if server.redirect is None else 307)
                if server.redirect is not None:
                    self.send_header("Location", server.redirect + self.path)
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


LOGINS = {"WINNOW_LOGINS": "/nowhere"}


def jobs(home: Path, **environment: str) -> Result:
    given = {"WINNOW_URL": None, "WINNOW_API_KEY": None, "WINNOW_HOME": str(home), **LOGINS, **environment}
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


@pytest.fixture
def logins_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of logins, of a user who has nothing else set, in a folder without a stack."""
    for name in ("WINNOW_URL", "WINNOW_API_KEY", "WINNOW_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "settings" / "logins.json"
    monkeypatch.setenv("WINNOW_LOGINS", str(path))
    return path


def run(*words: str, input: str = "") -> Result:
    return CliRunner().invoke(app, words, input=input)


def test_a_login_is_kept_for_its_service_and_readable_to_its_owner_alone(
    logins_file: Path, servers: tuple[Server, Server]
) -> None:
    own, foreign = servers
    for server, key in ((foreign, "wnw_theirs"), (own, "wnw_mine")):
        done = run("login", server.url + "/", input=f"{key}\n")
        assert done.exit_code == 0, done.output
        assert key not in done.output
    assert logins_file.stat().st_mode & 0o777 == 0o600
    assert logins_file.parent.stat().st_mode & 0o777 == 0o700
    own.keys.clear(), foreign.keys.clear()
    assert run("jobs").exit_code == 0, "the last login is the default"
    assert run("--url", foreign.url, "jobs").exit_code == 0
    with Winnow() as winnow:
        assert winnow.url == own.url
        assert list(winnow.jobs()) == []
        assert "wnw_" not in repr(winnow)
    assert (own.keys, foreign.keys) == (["Bearer wnw_mine"] * 2, ["Bearer wnw_theirs"])
    assert run("logout").exit_code == 0
    assert run("jobs").exit_code == 1
    assert run("jobs", "--url", own.url).exit_code == 1
    assert run("jobs", "--url", foreign.url).exit_code == 0
    assert "wnw_mine" not in logins_file.read_text()


def test_a_key_that_is_refused_or_missing_is_not_kept(
    logins_file: Path, servers: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("login", servers[0].url, input="\n").exit_code == 1
    servers[0].redirect = servers[1].url
    assert run("login", servers[0].url, input="wnw_mine\n").exit_code == 1
    assert not logins_file.exists()
    assert servers[1].keys == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_logins_that_others_can_read_are_not_used(logins_file: Path, servers: tuple[Server, Server], mode: int) -> None:
    assert run("login", servers[0].url, input="wnw_mine\n").exit_code == 0
    servers[0].keys.clear()
    logins_file.chmod(mode)
    done = run("jobs")
    assert (done.exit_code, servers[0].keys) == (1, [])
    assert "chmod 600" in done.stderr


def test_a_damaged_file_of_logins_is_named(logins_file: Path) -> None:
    logins_file.parent.mkdir()
    logins_file.touch(0o600)
    logins_file.write_text("{")
    done = run("jobs")
    assert done.exit_code == 1
    assert str(logins_file) in done.stderr
    assert "validation error" not in done.output


def test_a_key_beside_a_url_in_the_environment_is_that_urls(
    logins_file: Path, servers: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, foreign = servers
    monkeypatch.setenv("WINNOW_URL", own.url)
    monkeypatch.setenv("WINNOW_API_KEY", "wnw_mine")
    assert run("jobs", "--url", foreign.url).exit_code == 1
    with pytest.raises(NoAddress):
        Winnow(foreign.url)
    with Winnow(own.url + "/") as winnow:
        list(winnow.jobs())
    assert (own.keys, foreign.keys) == (["Bearer wnw_mine"], [])


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_redirect_takes_the_key_nowhere(servers: tuple[Server, Server], kind: str) -> None:
    own, foreign = servers
    own.redirect = foreign.url

    async def ask() -> None:
        async with AsyncWinnow(own.url, "wnw_mine") as winnow:
            await winnow.job("job_1")

    def blocking() -> None:
        with Winnow(own.url, "wnw_mine") as winnow:
            winnow.job("job_1")

    with pytest.raises(WinnowError) as caught:
        blocking() if kind == "sync" else asyncio.run(ask())
    assert (caught.value.code, caught.value.status) == ("redirected", 307)
    assert foreign.url in caught.value.detail
    assert (own.keys, foreign.keys) == (["Bearer wnw_mine"], [])


@pytest.mark.parametrize(
    "url",
    [
        "winnow.example.com",
        "ftp://a",
        "http://",
        "http://u:p@host",
        "http://host:x",
        "http://host?a=1",
        "http://host#a",
    ],
)
def test_what_is_no_url_of_a_service_is_refused(url: str) -> None:
    with pytest.raises(NoAddress):
        Winnow(url, "wnw_key")


@pytest.mark.parametrize(("one", "other"), [("http://HOST", "http://host:80/"), ("https://host/a", "https://host:443")])
def test_an_origin_has_one_spelling(one: str, other: str) -> None:
    assert origin(one) == origin(other)
    assert origin("http://host") != origin("https://host") != origin("https://host:444")
