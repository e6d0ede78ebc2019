"""Uploads of the real client to the real API, each in a process that is killed in the midst, or over a line that breaks."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from support.cutting_proxy import CuttingProxy
from support.processes import ROOT, Process, running
from support.servers import Servers, free_port
from support.waiting import until
from support.world import World, own_settings, serving

from service.datasets import repository
from service.datasets.uploads import files
from service.db.locks import advisory_lock
from winnow import UploadProgress, Winnow

PART = 20_000
CONTENT = b"".join(b'{"id": "%d", "prompt": "%s", "completion": "c"}\n' % (i, b"p" * (i % 200)) for i in range(3_000))


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("winnow.uploading.PARTS_FROM", 1)


@pytest.fixture
def world(servers: Servers, tmp_path: Path) -> Iterator[World]:
    with (
        own_settings(servers, tmp_path, uploads={"part_bytes": PART}) as settings,
        World.made(settings) as world,
    ):
        yield world


@pytest.fixture
def expected(world: World) -> dict[str, Any]:
    """What the file becomes where nothing is interrupted, as another tenant has it."""
    return dict(world.other.post("/v1/datasets", params={"name": "pool"}, content=CONTENT).json())


class Api:
    """In a process of its own, with a folder for its temporary files."""

    def __init__(self, process: Process, url: str, temporary: Path) -> None:
        self.process, self.url, self.temporary = process, url, temporary

    def until_ready(self) -> None:
        until("the API answers", self._is_ready)

    def _is_ready(self) -> bool:
        assert self.process.is_alive, self.process.log.read_text()[-2000:]
        try:
            return httpx.get(f"{self.url}/healthz").is_success
        except httpx.TransportError:
            return False

    def restart(self) -> None:
        self.process.kill()
        self.process.start()
        self.until_ready()


@pytest.fixture
def api(world: World, tmp_path: Path) -> Iterator[Api]:
    port, temporary = free_port(), tmp_path / "temporary"
    temporary.mkdir()
    log = tmp_path / "api.log"
    with running(Process.api(world.settings, port, log, TMPDIR=str(temporary))) as process:
        api = Api(process, f"http://127.0.0.1:{port}", temporary)
        api.until_ready()
        yield api


def assert_is_there_once(world: World, dataset: dict[str, Any], expected: dict[str, Any]) -> None:
    assert (dataset["fingerprint"], dataset["row_count"]) == (expected["fingerprint"], 3_000)
    assert [entry["id"] for entry in world.client.get("/v1/datasets").json()["data"]] == [dataset["id"]]
    assert world.client.get("/v1/uploads").json()["data"] == []
    used = world.client.get("/v1/usage").json()
    assert used["stored_bytes"]["used"] == expected["byte_count"]
    until("the parts are removed", lambda: not [f for f in world.store.files() if files.upload_of(f.key)])
    assert not list(world.store.temporary_folder.iterdir()), "nothing half-written is left"


def test_an_api_that_is_killed_while_it_receives_costs_a_part(world: World, api: Api, expected: dict[str, Any]) -> None:
    sent: list[int] = []

    def kill(at: UploadProgress) -> None:
        if at.step != "send":
            return
        sent.append(at.done)
        if len(sent) in (1, 4):  # in the midst of a part: what is said was sent has not all arrived
            api.restart()

    with Winnow(api.url, world.key) as winnow:
        dataset = winnow.upload_dataset(CONTENT, "pool", on_progress=kill)
    assert len(sent) <= -(-len(CONTENT) // PART) + 4, "at most the part in which it was killed is sent again"
    assert_is_there_once(world, dataset, expected)
    assert not list(api.temporary.iterdir())


def test_an_api_that_is_killed_before_it_commits_the_dataset_is_asked_again(
    world: World, api: Api, expected: dict[str, Any]
) -> None:
    with ThreadPoolExecutor(1) as pool, Winnow(api.url, world.key, retries=20) as winnow:
        with world.sessions.begin() as session:
            advisory_lock(session, repository.content_lock(expected["fingerprint"]))
            uploading = pool.submit(winnow.upload_dataset, CONTENT, "pool")
            waiting = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
            until("the dataset is converted, and waits to be published", lambda: session.scalar(waiting))
            api.process.kill()
        api.process.start()
        api.until_ready()
        until("nobody reads the upload any more", lambda: forget_reader(world))
        dataset = uploading.result()
    assert_is_there_once(world, dataset, expected)
    assert not list(api.temporary.iterdir())


def forget_reader(world: World) -> bool:
    """As a minute does; whether there was one."""
    with world.engine.begin() as connection:
        return bool(connection.execute(text("UPDATE uploads SET read_until = NULL")).rowcount)


CLIENT = """
import sys
from winnow import Winnow, uploading
url, key, path = sys.argv[1:]
uploading.PARTS_FROM = 1

def on_progress(at):
    print(at.step, at.done, flush=True)
    if at.step == "send" and at.done > {stops_after}:
        sys.stdin.read()

with Winnow(url, key) as winnow:
    winnow.upload_dataset(path, "pool", on_progress=on_progress)
"""


def test_a_client_that_is_killed_goes_on_where_it_was(world: World, tmp_path: Path, expected: dict[str, Any]) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_bytes(CONTENT)
    with serving(world.app) as url:
        command = [sys.executable, "-c", CLIENT.format(stops_after=2 * PART), url, world.key, str(path)]
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout is not None
            for line in client.stdout:
                if line.split() == ["send", str(3 * PART)]:
                    break
            client.kill()
        seen: list[UploadProgress] = []
        with Winnow(url, world.key) as winnow:
            dataset = winnow.upload_dataset(path, "pool", on_progress=seen.append)
        until("every request has ended", lambda: world.app.state.shares.uploads.held == 0)
    sent = [at.done for at in seen if at.step == "send"]
    assert sent[0] in (3 * PART, 4 * PART), "two parts had come, or three: the last one's answer was not read"
    assert_is_there_once(world, dataset, expected)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client hardly waits before it tries again."""
    monkeypatch.setattr("winnow.transport.random.uniform", lambda *_: 0.01)


def test_a_line_that_breaks_again_and_again_costs_the_parts_in_which_it_breaks(
    world: World, expected: dict[str, Any], impatient: None
) -> None:
    # In the head of the first request, in its body, in heads and bodies of parts, and in the request that makes the dataset.
    cuts = [1, 200, 500, 700, 900, PART, PART + 200, 2 * PART, 3 * PART + 1, 5 * PART, 7 * PART + 77, 9 * PART]
    with serving(world.app) as url, CuttingProxy.before(url, cuts) as line:
        with Winnow(line.url, world.key, retries=len(cuts)) as winnow:
            dataset = winnow.upload_dataset(CONTENT, "pool")
        until("every request has ended", lambda: world.app.state.shares.uploads.held == 0)
    assert line.broken >= 8
    assert line.from_client < len(CONTENT) + (line.broken + 1) * (PART + 2_000)
    assert_is_there_once(world, dataset, expected)


# The last one is in the last of the content, after the head.
@pytest.mark.parametrize("cut", [1, 100, 450, 1_000, len(CONTENT) // 2, len(CONTENT)])
def test_a_file_in_one_request_is_there_whole_or_not_at_all(
    world: World, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, impatient: None, cut: int
) -> None:
    monkeypatch.setattr("winnow.uploading.PARTS_FROM", 2**30)
    with serving(world.app) as url, CuttingProxy.before(url, [cut]) as line:
        with Winnow(line.url, world.key) as winnow:
            dataset = winnow.upload_dataset(CONTENT, "pool")
        until("every request has ended", lambda: world.app.state.shares.uploads.held == 0)
    assert line.broken == 1
    assert_is_there_once(world, dataset, expected)
