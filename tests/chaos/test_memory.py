"""Memory runs out in the compute child, by its own limit or by the kernel; or a sample makes it crash."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from scenario import COMPUTED, Told, errors, only_worker, struck, survived
from support.tiny import make_tokenizer, pool_rows, target_rows
from undisturbed import Undisturbed
from world import POOL, TARGET, World

pytestmark = pytest.mark.slow

# Bytes of a token, and a limit between what a batch of 512 tokens takes and one of 256. Only touched memory counts in a group.
_HALVED = 256
_UNTOUCHED, _LIMIT = 2**24, 13 * 2**29
_TOUCHED, _GROUP_LIMIT = 3 * 2**20, 7 * 2**28
_CGROUP = Path("/sys/fs/cgroup/memory")
_POISON = "zyx qqq vvv wkw"


def _halved(world: World, undisturbed: Undisturbed, job_id: str) -> None:
    """The first unit that ran out of memory succeeds with halved batches; those after it are given all that they want."""
    world.until(
        "a unit succeeds with halved batches",
        lambda: any(data["attempt"] == 2 for data in world.events(job_id, "unit.succeeded")),
    )
    assert max(world.faults.batch_sizes()) > _HALVED, "no batch was tried that is too large"
    world.faults.disarm()
    survived(world, undisturbed, job_id, to_the_bit=False)
    assert {each for _, each in errors(world, job_id)} == {"out_of_memory"}


def test_an_attempt_without_memory_is_followed_by_one_with_half_the_batches(
    pair: World, undisturbed: Undisturbed, record_property: Told
) -> None:
    with only_worker(pair, WINNOW_WORKER__MEMORY_BYTES=str(_LIMIT)):
        pair.faults.weigh_batches(_UNTOUCHED)
        job_id = pair.submit()
        record_property("fault", "an allocation beyond RLIMIT_DATA")
        _halved(pair, undisturbed, job_id)


def test_a_child_that_was_killed_once_is_tried_again_as_it_was(
    pair: World, undisturbed: Undisturbed, record_property: Told
) -> None:
    pair.faults.arm(COMPUTED)
    job_id = pair.submit()
    struck(pair)
    record_property("fault", "SIGKILL of a compute child")
    survived(pair, undisturbed, job_id)
    ((_, code),) = errors(pair, job_id)
    assert code == "compute_died"


@contextmanager
def _memory_group(limit: int) -> Iterator[Path]:
    group = _CGROUP / f"winnow-chaos-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
    except OSError as error:
        pytest.skip(f"a memory cgroup (v1) cannot be made: {error}")
    try:
        yield group
    finally:
        group.rmdir()


def test_the_kernel_takes_the_compute_child_and_no_other(
    pair: World, undisturbed: Undisturbed, record_property: Told
) -> None:
    with _memory_group(_GROUP_LIMIT) as group, only_worker(pair) as worker:
        pid = worker.pid
        (group / "cgroup.procs").write_text(str(pid))
        pair.faults.weigh_batches(_TOUCHED, touch=True)
        job_id = pair.submit()
        record_property("fault", "the kernel's out-of-memory killer")
        _halved(pair, undisturbed, job_id)
        assert worker.pid == pid, "the kernel has taken the worker"


def test_a_poison_sample_fails_its_own_job_and_no_other(
    pair: World, undisturbed: Undisturbed, record_property: Told
) -> None:
    row = 17
    clean = pool_rows(POOL)
    poisoned = [*clean]
    turns = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": f"a {_POISON} b"}]
    poisoned[row] = {"id": f"row-{row}", "source": "flan", "messages": turns}
    tokens = make_tokenizer()(_POISON, add_special_tokens=False)["input_ids"]
    pair.faults.weigh_batches(poison=tokens[1:-1])
    target = pair.upload(target_rows(TARGET, "python_function"))
    failing, beside = (pair.post_usual(pair.upload(rows), target) for rows in (poisoned, clean))
    record_property("fault", "a sample that crashes the compute child, always")
    pids = [worker.pid for worker in pair.workers]
    job = pair.ended(failing)
    survived(pair, undisturbed, beside)
    assert (job["status"], job["error"]["code"], job["error"]["attempts"]) == ("failed", "compute_died", 3)
    assert [reason["attempt"] for reason in job["error"]["history"]] == [1, 2, 3]
    stage = job["error"]["stage"]
    for reason in job["error"]["history"]:
        assert reason["code"] == "compute_died"
        assert "SIGABRT" in reason["detail"]
        assert f"It was processing {stage}, samples " in reason["detail"]
    assert [worker.pid for worker in pair.workers] == pids
