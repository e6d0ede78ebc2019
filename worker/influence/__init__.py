"""The numerical core: tensors in, tensors out (METHOD sections 1 to 5; arXiv 2505.19051).

It knows no job, file or database, and imports nothing else of the project.
"""

from .batching import Progress, default_token_budget
from .embeddings import EmbeddingOptions, embed
from .flops import Operations, embedding_flops, gradient_flops, measured_matmul_rate
from .gradients import Gradients, directional_derivatives, per_sample_gradients, sample_losses, weighted_gradients
from .influence import cosine_influence
from .optimizers import (
    OptimizerOptions,
    OptimizerState,
    Scaling,
    gradient_scaling,
    load_state,
    save_state,
    state_of,
    step_offset,
)
from .projection import FactoredProjection
from .propagation import Fidelity, KernelRidge, fidelity
from .samples import Samples, token_batches
from .selection import FirstOrderWeights, first_order_weights, mean_one_over_selected, round_robin, top_k

__all__ = [
    "EmbeddingOptions",
    "FactoredProjection",
    "Fidelity",
    "FirstOrderWeights",
    "Gradients",
    "KernelRidge",
    "Operations",
    "OptimizerOptions",
    "OptimizerState",
    "Progress",
    "Samples",
    "Scaling",
    "cosine_influence",
    "default_token_budget",
    "directional_derivatives",
    "embed",
    "embedding_flops",
    "fidelity",
    "first_order_weights",
    "gradient_flops",
    "gradient_scaling",
    "load_state",
    "mean_one_over_selected",
    "measured_matmul_rate",
    "per_sample_gradients",
    "round_robin",
    "sample_losses",
    "save_state",
    "state_of",
    "step_offset",
    "token_batches",
    "top_k",
    "weighted_gradients",
]
