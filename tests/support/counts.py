"""Jobs' sizes to count costs with: SmolLM2-135M, and the pool and target of benchmarks/results/corpus_job.json; and Llama2-7B
with 200,000 samples of 300 tokens, half of them reply, the size that the paper states its costs at."""

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

LLAMA = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32}
PAPER_SHAPE = Shape.of_config(LLAMA | {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32_000})
PAPER_COUNTS = JobCounts(
    pool=TokenCounts(200_000, 6e7, 2e10, 3e7),
    target=TokenCounts(48, 14_400, 4.6e6, 7_200),
    budget=10_000,
    estimated=False,
    usable=200_000,
    dtype="bfloat16",
)


def parameters(**given: Any) -> dict[str, Any]:
    return Parameters.model_validate(given).model_dump(mode="json")
