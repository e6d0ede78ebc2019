"""The units of the prepare stage: one, or, for a dataset larger than a shard, three waves of them.

The first unit prepares the job, and where a dataset is too large for it and not tokenised yet, asks for that in shards. The last
one puts the shards together and prepares the job. Its result is the stage's: the last unit's, whichever that is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from service.plan.artifact_keys import rendering, tokens_key
from service.plan.stages import Done, JobInputs, Stage, UnitSpec


def prepare_unit(job_id: str, samples: int) -> UnitSpec:
    """The first unit of every job; `samples` of pool and target together."""
    return UnitSpec(stage=Stage.PREPARE, shard=0, artifact_key=f"prepare/{job_id}", spec={}, total=samples)


def is_shard(spec: Mapping[str, Any]) -> bool:
    """Whether a unit of the stage tokenises a part of a dataset."""
    return "dataset" in spec


def is_prepared(result: Mapping[str, Any]) -> bool:
    """Whether a result of the stage is that of its last unit."""
    return "pool_tokens" in result


def remaining_units(job: JobInputs, done: Sequence[Done]) -> list[UnitSpec]:
    """The next units of the stage once those so far are done, in order; none after the last one."""
    first = done[0]
    if is_prepared(done[-1].result):
        return []
    if len(done) == 1:
        return _shards(job, first.result)
    key = f"prepare_merged/{first.artifact_key.removeprefix('prepare/')}"
    return [UnitSpec(stage=Stage.PREPARE, shard=len(done), artifact_key=key, spec={"merges": True}, total=0)]


def _shards(job: JobInputs, asked: Mapping[str, Any]) -> list[UnitSpec]:
    how = rendering(job.parameters)
    datasets = {"pool": job.pool, "target": job.target}
    tokenizer, max_length = asked["tokenizer_fingerprint"], asked["max_length"]
    wanted = [(name, rows, bounds[-1][1]) for name, bounds in asked["shards"].items() for rows in bounds]
    return [
        UnitSpec(
            stage=Stage.PREPARE,
            shard=number,
            artifact_key=tokens_key(datasets[name], tokenizer, max_length, job.salt, how, (start, stop)),
            spec={
                "dataset": name,
                "start": start,
                "stop": stop,
                "of": of,
                "model": asked["model_fingerprint"],
                "max_length": max_length,
            },
            total=stop - start,
        )
        for number, (name, (start, stop), of) in enumerate(wanted, 1)
    ]
