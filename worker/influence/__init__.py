"""The numerical core: tensors in, tensors out (METHOD sections 1 to 5; arXiv 2505.19051).

It knows no job, file or database, and imports nothing else of the project.
"""

from .auto import candidates, choose
from .batching import Progress, default_token_budget
from .curvature import curvature_products, stepped
from .embeddings import EmbeddingOptions, embed
from .flops import Operations, embedding_flops, gradient_flops, measured_matmul_rate
from .gradients import Gradients, directional_derivatives, per_sample_gradients, sample_losses, weighted_gradients
from .influence import cosine_influence
from .landmarks import landmark_order
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
from .projection import GradientProjection
from .propagation import Fidelity, KernelRidge, fidelity
from .samples import Samples, token_batches
from .second_order import SecondOrder, low_rank, offset_influence, quadratic_factors, second_order_terms
from .selection import FirstOrderWeights, first_order_weights, mean_one_over_selected, round_robin, shortlist, top_k
from .solver import WeightedSolution, weighted_selection
from .step import StepMeasure, measure_step, optimizer_step, predicted_change

__all__ = [
    "EmbeddingOptions",
    "Fidelity",
    "FirstOrderWeights",
    "GradientProjection",
    "Gradients",
    "KernelRidge",
    "Operations",
    "OptimizerOptions",
    "OptimizerState",
    "Progress",
    "Samples",
    "Scaling",
    "SecondOrder",
    "StepMeasure",
    "WeightedSolution",
    "candidates",
    "choose",
    "cosine_influence",
    "curvature_products",
    "default_token_budget",
    "directional_derivatives",
    "embed",
    "embedding_flops",
    "fidelity",
    "first_order_weights",
    "gradient_flops",
    "gradient_scaling",
    "landmark_order",
    "load_state",
    "low_rank",
    "mean_one_over_selected",
    "measure_step",
    "measured_matmul_rate",
    "offset_influence",
    "optimizer_step",
    "per_sample_gradients",
    "predicted_change",
    "quadratic_factors",
    "round_robin",
    "sample_losses",
    "save_state",
    "second_order_terms",
    "shortlist",
    "state_of",
    "step_offset",
    "stepped",
    "token_batches",
    "top_k",
    "weighted_gradients",
    "weighted_selection",
]
