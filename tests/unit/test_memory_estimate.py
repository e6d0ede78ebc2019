"""The memory that a plan estimates against that of a job that really runs, in batches as large as an accelerator's."""

import re
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress
from support.tiny import make_tokenizer, pool_rows, target_rows, write_jsonl
from transformers import AutoConfig, AutoModelForCausalLM

from service.plan.job_counts import JobCounts
from service.plan.operations import Shape
from service.plan.parameters import Parameters
from service.plan.stage_costs import StageCosts
from service.plan.stages import JobInputs, Stage
from service.settings import WorkerSettings
from worker import local_run
from worker.process.main import Compute

FEW, MANY = 256, 16_384  # tokens of a batch
SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}
CONFIG = AutoConfig.for_model(
    "llama", vocab_size=512, bos_token_id=0, eos_token_id=1, pad_token_id=2, num_key_value_heads=2, **SIZES
)


def peak_of(folder: Path, given: dict[str, Any], token_budget: int) -> tuple[int, dict[str, Any]]:
    """The peak memory of this process once the job is done, and the result of `prepare`."""
    settings = WorkerSettings(device="cpu", threads=1, token_budget=token_budget)
    compute = Compute(artifacts=str(folder / f"store-{token_budget}"), models=folder, settings=settings)
    pool, target = (local_run._register(compute.store, folder / f"{name}.jsonl") for name in ("pool", "target"))
    job = JobInputs(
        model={"kind": "registered", "name": "model"},
        pool=pool.fingerprint,
        target=target.fingerprint,
        budget=5,
        parameters=given,
    )
    done = local_run.LocalJob(compute, job, Progress(disable=True)).run(pool.row_count + target.row_count)
    # Not ru_maxrss, which begins with the size of the process that started this one.
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
    return peak, dict(done[Stage.PREPARE][-1].result)


def growth(folder: Path, given: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """The additional bytes that larger batches need."""
    before, _ = peak_of(folder, given, FEW)
    after, prepared = peak_of(folder, given, MANY)
    return after - before, prepared


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    write_jsonl(folder / "pool.jsonl", pool_rows(300))
    write_jsonl(folder / "target.jsonl", target_rows(2, "python_function"))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(
    ("stage", "given"),
    [
        (Stage.LANDMARK_GRADIENTS, {"method": "exact_influence", "gradient": {"projection_dim": 64}}),
        (Stage.EMBED, {"method": "rds_plus"}),
    ],
)
def test_the_estimate_follows_the_batches_that_are_really_made(
    folder: Path, stage: Stage, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The fresh process gives every tensor back at once: its peak is what is held, not what the allocator keeps.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    parameters = Parameters.model_validate(
        {**given, "validate": False, "max_length": 128, "dtype": "float32"}
    ).model_dump(mode="json")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:  # a process never forgets its peak
        measured, prepared = fresh.submit(growth, folder, parameters).result()
    counts, shape = JobCounts.of_prepared(prepared, 5), Shape.of_config(CONFIG.to_dict())
    few, many = (StageCosts(shape, parameters, counts, "float32", size).all()[stage] for size in (FEW, MANY))
    assert measured > 50 * 2**20
    assert many.memory_bytes - few.memory_bytes == pytest.approx(measured, rel=0.3)
