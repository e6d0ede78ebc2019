"""The compute child as its supervisor meets it: a real process, its environment, its answers and its ends."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file
from support.tiny import make_tokenizer, turns

from service.datasets.storage import Sample
from service.ledger import Claim
from service.plan.parameters import Parameters
from service.plan.stages import JobInputs, Stage
from service.settings import (
    ArtifactSettings,
    BrokerSettings,
    DatabaseSettings,
    ModelSettings,
    Settings,
    WorkerSettings,
)
from service.storage.artifacts import ArtifactStore
from worker.errors import ArtifactMissing, ComputeDied, OutOfMemory, ParameterError, StorageFull
from worker.influence import UnusableInput
from worker.loading import folders
from worker.process.compute_process import ComputeProcess, _environment
from worker.process.machine import limit_memory
from worker.process.main import Compute
from worker.process.memory import available_memory
from worker.supervisor import Supervisor
from worker.text import token_files, tokenization

ROWS = 4_000
SPEC: dict[str, Any] = {
    "tokens": "tokens",
    "start": 0,
    "stop": ROWS,
    "of": ROWS,
    "checkpoint": None,
    "options": {"kind": "hidden", "pooling": "response", "blocks": 2, "tangents": 1},
}
WARMUP = {"samples": ROWS, "batch_size": 16}
_PATIENCE = 120.0


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Settings:
    """A store that holds the tokens of 4,000 samples, and batches of few of them: work that lasts some seconds."""
    folder = tmp_path_factory.mktemp("child")
    store = ArtifactStore(str(folder))
    samples = (Sample(i, f"row-{i}", None, turns(f"question {i}", "answer " * 5), None) for i in range(ROWS))
    rows = tokenization.tokenise(samples, make_tokenizer(), max_length=128, report=lambda _: None)
    token_files.write_tokens(store, "tokens", rows)
    return Settings(
        database=DatabaseSettings(url="postgresql://nobody:hidden@nowhere/none"),
        broker=BrokerSettings(url="redis://nowhere"),
        artifacts=ArtifactSettings(url=str(folder)),
        models=ModelSettings(folder=tiny_llama.parent),
        worker=WorkerSettings(device="cpu", threads=1, token_budget=64),
    )


@pytest.fixture(scope="module")
def unit(tiny_llama: Path) -> dict[str, Any]:
    model = {"kind": "registered", "name": tiny_llama.name}
    parameters = Parameters(method="exact_influence", warmup=WARMUP).model_dump(mode="json")
    fingerprint = folders.find(model, tiny_llama.parent).fingerprint
    return {
        "stage": "embed",
        "artifact_key": "embeddings",
        "spec": SPEC,
        "job": JobInputs(model=model, pool="p", target="t", budget=2, parameters=parameters).as_dict(),
        "prepared": {
            "dtype": "float32",
            "model_fingerprint": fingerprint,
            "is_adapter": False,
            "pool_tokens": "tokens",
        },
        "halvings": 0,
    }


@pytest.fixture(scope="module")
def child(settings: Settings) -> Iterator[ComputeProcess]:
    """One for all tests that leave it alive; its environment is made of one that holds secrets."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WINNOW_SECRET_KEY", "WINNOW_DATABASE__URL", "DATABASE_URL", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "hidden")
        started = ComputeProcess(settings)
    assert answer(started)["type"] == "ready"
    yield started
    started.close(grace_seconds=5)
    assert not started.is_alive


def answer(child: ComputeProcess) -> dict[str, Any]:
    """The next message that is neither progress nor an event."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        message = child.receive(1)
        if message is not None and message["type"] not in ("alive", "progress", "event"):
            return message
    raise AssertionError("the child did not answer")


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


def test_the_environment_holds_no_credentials_of_ours(child: ComputeProcess) -> None:
    environment = Path(f"/proc/{child.pid}/environ").read_bytes().decode().split("\0")
    names = {entry.partition("=")[0] for entry in environment if entry}
    assert not any(name.startswith("WINNOW_") or "DATABASE" in name for name in names)
    assert not any("hidden" in entry for entry in environment)
    assert "PATH" in names


@pytest.mark.parametrize(
    ("store", "from_hub", "credentials"),
    [
        ("/a/folder", False, set()),
        ("/a/folder", True, {"HF_TOKEN", "HTTPS_PROXY"}),
        ("s3://bucket/prefix", False, {"AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY"}),
        ("s3://bucket/prefix", True, {"AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "HTTPS_PROXY"}),
    ],
)
def test_credentials_are_given_for_what_is_to_be_reached_only(
    monkeypatch: pytest.MonkeyPatch, store: str, from_hub: bool, credentials: set[str]
) -> None:
    given = ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "HTTPS_PROXY", "WINNOW_DATABASE__URL", "WINNOW_SECRET_KEY")
    for name in (*given, "HF_HOME"):
        monkeypatch.setenv(name, "x")
    seen = _environment(store, from_hub)
    assert seen.keys() & set(given) == credentials
    assert seen["HF_HOME"] == "x"
    assert (seen.get("HF_HUB_OFFLINE") == "1") is not from_hub


def test_the_memory_is_limited_unless_it_is_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []
    monkeypatch.setattr("resource.setrlimit", lambda _, limit: limits.append(limit[0]))
    monkeypatch.setattr(Path, "write_text", lambda *_: 0)
    for memory_bytes in (0, -1, 2**33):
        limit_memory(WorkerSettings(device="cpu", memory_bytes=memory_bytes))
    assert limits == [available_memory() * 9 // 10, 2**33]
    monkeypatch.setattr(Path, "read_text", lambda path: {"memory.max": "4096\n"}.get(path.name, "max"))
    assert available_memory() == 4096


def test_a_unit_is_done_and_its_result_stands_beside_the_artifact(
    child: ComputeProcess, unit: dict[str, Any], settings: Settings
) -> None:
    child.send(type="run", **{**unit, "artifact_key": "few", "spec": {**SPEC, "start": 10, "stop": 14}})
    message = answer(child)
    assert message["type"] == "done"
    store = ArtifactStore(settings.artifacts.url)
    assert store.read_json("few.json") == message["result"]
    with store.local("few") as path:
        assert load_file(path)["embeddings"].shape == (4, 32)


def test_a_cancel_is_seen_between_batches_and_the_child_stays(
    child: ComputeProcess, unit: dict[str, Any], settings: Settings
) -> None:
    child.send(type="run", **{**unit, "artifact_key": "cancelled"})
    deadline = time.monotonic() + _PATIENCE
    while (message := child.receive(1) or {"type": "alive"})["type"] == "alive":
        assert time.monotonic() < deadline
    assert message["type"] == "progress"
    assert 0 < message["done"] < ROWS
    child.send(type="cancel")
    assert answer(child) == {"type": "cancelled"}
    assert child.is_alive
    assert not ArtifactStore(settings.artifacts.url).exists("cancelled")


def test_a_warm_up_reports_its_steps_and_is_cancelled_between_batches(
    child: ComputeProcess, unit: dict[str, Any], settings: Settings
) -> None:
    spec = {"tokens": "tokens"}
    child.send(type="run", **{**unit, "stage": "warmup", "artifact_key": "warm.safetensors", "spec": spec})
    deadline, steps, done = time.monotonic() + _PATIENCE, [], 0
    while not (len(steps) > 1 and done):
        assert time.monotonic() < deadline
        message = child.receive(1) or {"type": "none"}
        assert message["type"] in ("none", "alive", "event", "progress"), message
        if message["type"] == "event":
            assert message["kind"] == "warmup.step"
            steps.append(message["data"])
        done = message.get("done", done)
    child.send(type="cancel")
    assert answer(child) == {"type": "cancelled"}
    assert [step["steps"] for step in steps] == [ROWS // 16] * len(steps)
    assert all(2 < step["loss"] < 20 and step["learning_rate"] > 0 for step in steps)
    assert 0 < done < ROWS
    assert not ArtifactStore(settings.artifacts.url).exists("warm.safetensors")


def with_option(**changes: Any) -> dict[str, Any]:
    return {"spec": {**SPEC, "options": {**SPEC["options"], **changes}}}


@pytest.mark.parametrize(
    ("changes", "code", "retryable", "detail"),
    [
        ({"spec": {}}, "internal_error", True, r"KeyError: 'tokens' \(embed.py:\d+\)"),
        ({"spec": {**SPEC, "tokens": "absent"}}, "artifact_missing", True, r"absent"),
        ({"prepared": {"dtype": "float32", "model_fingerprint": "old"}}, "model_not_here", True, "files"),
        (with_option(kind="unknown"), "internal_error", True, r"ValueError: kind must be .*\(embeddings.py:\d+\)"),
        (with_option(blocks=9), "parameters_not_usable", False, "blocks"),
    ],
)
def test_a_failure_has_its_code_and_place(
    child: ComputeProcess, unit: dict[str, Any], changes: dict[str, Any], code: str, retryable: bool, detail: str
) -> None:
    child.send(type="run", **{**unit, **changes})
    message = answer(child)
    assert (message["type"], message["error"]["code"], message["retryable"]) == ("failed", code, retryable)
    assert re.search(detail, message["error"]["detail"]), message["error"]["detail"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (UnusableInput("lower it"), ParameterError),
        (ValueError("zip() argument 2 is shorter than argument 1"), ValueError),
        (json.JSONDecodeError("Expecting value", "", 0), json.JSONDecodeError),
    ],
)
def test_only_input_that_the_core_refuses_is_the_jobs_fault(
    settings: Settings, unit: dict[str, Any], monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type[Exception]
) -> None:
    def stage(*_: object) -> dict[str, Any]:
        raise error

    monkeypatch.setattr(Compute, "_stage", stage)
    compute = Compute(artifacts=settings.artifacts.url, models=settings.models.folder, settings=settings.worker)
    with pytest.raises(raised) as caught:
        compute.run(unit, lambda _: None, lambda *_: None)
    assert type(caught.value) is raised


def test_a_killed_child_is_reported_as_such(settings: Settings) -> None:
    child = ComputeProcess(settings)
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(ComputeDied, match=r"killed \(signal 9\), by a person or for lack of memory") as caught:
        answer(child)
    assert (caught.value.code, caught.value.retryable) == ("compute_died", True)
    assert not child.is_alive
    child.send(type="cancel")  # to a child that is gone: no error
    child.close(grace_seconds=5)


@pytest.mark.parametrize(
    ("counted", "code"), [([4, 5], "out_of_memory"), ([4, 4], "compute_died")], ids=["by the kernel", "by someone"]
)
def test_a_kill_by_the_kernel_is_told_apart_from_one_by_a_person(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, counted: list[int], code: str
) -> None:
    """The kernel's count of its own kills, which no test may raise on a machine that it shares, says which it was."""
    counts = iter(counted)
    monkeypatch.setattr("worker.process.compute_process._oom_kills", lambda: next(counts))
    child = ComputeProcess(settings)
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(ComputeDied) as caught:
        answer(child)
    assert caught.value.code == code
    child.close(grace_seconds=5)


def test_a_child_without_its_device_says_so_and_that_it_exits_is_reported_as_such(settings: Settings) -> None:
    child = ComputeProcess(settings.model_copy(update={"worker": WorkerSettings(device="cuda")}))
    assert answer(child)["error"]["code"] == "device_not_here"
    with pytest.raises(ComputeDied, match=r"exited with status 0; see its log"):
        answer(child)
    child.close(grace_seconds=5)


def test_a_child_that_ignores_a_cancel_is_ended(settings: Settings) -> None:
    child = ComputeProcess(settings)
    os.kill(child.pid, signal.SIGSTOP)
    started = time.monotonic()
    child.stop(grace_seconds=0.5)
    assert not child.is_alive
    assert time.monotonic() - started < 10


def test_it_ends_with_its_supervisor_whatever_killed_that(settings: Settings) -> None:
    program = (
        "import sys, time\nfrom service.settings import Settings\nfrom worker.process.compute_process import ComputeProcess\n"
        "child = ComputeProcess(Settings.model_validate_json(sys.argv[1]))\nprint(child.pid, flush=True)\ntime.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, settings.model_dump_json()], stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        parent.kill()
    wait_until_gone(pid)


@pytest.fixture
def limited(settings: Settings) -> Iterator[ComputeProcess]:
    """A child of the test's own, under a limit on its memory."""
    worker = settings.worker.model_copy(update={"memory_bytes": 4 * 2**30})
    started = ComputeProcess(settings.model_copy(update={"worker": worker}))
    yield started
    started.stop(grace_seconds=2)
    assert not started.is_alive


def test_a_cancel_right_behind_its_unit_counts(limited: ComputeProcess, unit: dict[str, Any]) -> None:
    """The child is still starting when both have been written."""
    limited.send(type="run", **unit)
    limited.send(type="cancel")
    ready = answer(limited)
    assert ready["type"] == "ready"
    assert ready["device"].startswith("cpu")
    assert ready["memory_bytes"] > 2**30
    assert set(ready["matmul_rates"]) == {"float32", "bfloat16"}
    assert min(ready["matmul_rates"].values()) > 1e6
    assert answer(limited) == {"type": "cancelled"}
    _is_held_to(limited, 4 * 2**30)


def _is_held_to(child: ComputeProcess, memory_bytes: int) -> None:
    """Its memory is limited, and the kernel takes it before its supervisor."""
    process = Path(f"/proc/{child.pid}")
    limit = next(line for line in (process / "limits").read_text().splitlines() if line.startswith("Max data size"))
    assert limit.split()[3] == str(memory_bytes)
    assert int((process / "oom_score_adj").read_text()) > int(Path("/proc/self/oom_score_adj").read_text())


def test_a_stalled_one_is_ended(settings: Settings, limited: ComputeProcess) -> None:
    """While it runs it says so, with nothing else to say. Its supervisor goes on beating: the lease alone would never end it."""
    assert answer(limited)["type"] == "ready"
    deadline = time.monotonic() + _PATIENCE
    while limited.receive(1) != {"type": "alive"}:
        assert time.monotonic() < deadline
    worker = settings.worker.model_copy(update={"stall_seconds": 5.0})
    supervisor = Supervisor(settings.model_copy(update={"worker": worker}))
    claim = Claim(unit_id=1, job_id="job", attempt=1, stage=Stage.EMBED, shard=0, artifact_key="a", spec={}, total=1)
    os.kill(limited.pid, signal.SIGSTOP)
    with pytest.raises(ComputeDied, match=r"sent nothing for \d+ seconds"):
        supervisor._await_result(claim, limited)
    supervisor.close()


@pytest.mark.parametrize(
    ("raised", "kind", "told"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/store/x"),
            StorageFull,
            "No space left on device: /store/x",
        ),
        (SafetensorError("I/O: No space left on device (os error 28)"), StorageFull, "No space left on device: the"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/store/x"), ArtifactMissing, "missing from the store: x."),
        (MemoryError(), OutOfMemory, "memory is used up. The compute process"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), OutOfMemory, "can't allocate"),
        (OSError(errno.EIO, "Input/output error"), OSError, "Input/output error"),
        (SafetensorError("header too large"), SafetensorError, "header too large"),
        (RuntimeError("of ours"), RuntimeError, "of ours"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_machine_lacks_is_told_apart_from_a_bug(
    tmp_path: Path, unit: dict[str, Any], monkeypatch: pytest.MonkeyPatch, raised: Exception, kind: type, told: str
) -> None:
    compute = Compute(artifacts=str(tmp_path), models=tmp_path, settings=WorkerSettings(device="cpu"))

    def fail(*_: Any) -> None:
        raise raised

    monkeypatch.setattr(compute, "_stage", fail)
    with pytest.raises(kind, match=re.escape(told)) as caught:
        compute.run(unit, lambda _: None, lambda *_: None)
    assert type(caught.value) is kind
    assert caught.value.__cause__ is (None if caught.value is raised else raised)
