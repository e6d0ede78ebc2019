"""Whose kills of the kernel count as those of our compute process."""

from pathlib import Path

import pytest

from worker.process.compute_process import _oom_kills

V1 = "7:pids:/\n4:memory:/pod/ours\n0::/\n"
OWN, ABOVE, MACHINE = "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n", "oom_kill 5\n", "pgfault 1\noom_kill 9\n"


@pytest.mark.parametrize(
    ("groups", "files", "count"),
    [
        (V1, {"memory/pod/ours/memory.oom_control": OWN, "memory/memory.oom_control": ABOVE}, 2),
        (V1, {"memory/memory.oom_control": ABOVE}, 5),
        ("0::/pod/ours\n", {"pod/ours/memory.events": "high 0\noom_kill 3\n", "memory.events": ABOVE}, 3),
        ("0::/pod/ours\n", {"memory.events": ABOVE}, 5),
        (V1, {}, 9),
        (None, {}, 9),
    ],
    ids=["v1", "v1 in a container", "v2", "v2 in a container", "no group to be seen", "no groups"],
)
def test_the_count_is_that_of_our_own_group(
    tmp_path: Path, groups: str | None, files: dict[str, str], count: int
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/vmstat").write_text(MACHINE)
    if groups is not None:
        (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert _oom_kills(tmp_path) == count


def test_a_system_without_counts_has_none(tmp_path: Path) -> None:
    assert _oom_kills(tmp_path) == 0
    assert _oom_kills() >= 0
