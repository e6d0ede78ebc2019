"""A job's size to count costs with: SmolLM2-135M, and the pool and target of benchmarks/results/corpus_job.json."""

from typing import Any

from service.plan.job_counts import JobCounts
from service.plan.operations import Shape, TokenCounts
from service.plan.parameters import Parameters

SMOL = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
SHAPE = Shape.of_config(SMOL | {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152})
COUNTS = JobCounts(
    pool=TokenCounts(3000, 532_377, 1.5e8, 250_000),
    target=TokenCounts(48, 9_000, 1.7e6, 4_500),
    budget=150,
    estimated=False,
)


def parameters(**given: Any) -> dict[str, Any]:
    return Parameters.model_validate(given).model_dump(mode="json")
