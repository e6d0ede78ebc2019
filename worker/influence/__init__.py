"""The numerical core: tensors in, tensors out (METHOD 1 to 5; arXiv 2505.19051). It knows no job, file or database.

A suffix on a name gives its axes, one letter each, the same in every file: `grad_BTD` is (batch, tokens, hidden size).

    n  samples         m  of them, those of one block or shard
    t  targets         l  landmarks      z  of them, those that span a fit
    k  values of a gradient as it is kept: projected, or all weights of the chosen layers
    e  values of an embedding          E  before it is reduced
    c  directions, tangents or weightings that are computed together
    r  directions of curvature, all of them     s  those in which the clipped form is positive
    O  outputs and I  inputs of a linear layer  q  directions that its inputs are projected to
    B  samples of a batch    T  tokens of its longest    N  tokens of several samples, flat
    R  positions whose hidden state is read: the one before each predicted token, or the pooled ones
    D  hidden size     V  vocabulary
    S  copies in a stack, the primal and c tangents     F  samples of a stack, S B
    H  attention heads     K  key-value heads     h  size of a head
    Z  key-value heads of several samples, flat         Q  queries of one of them, T H / K
    1  an axis of length one

Matrices and vectors have the letters of METHOD: G gradients, P = G G_Tᵀ influence, E embeddings, H curvature (in products: Hv,
Hb), J = dh/dΔ, Q = B M Bᵀ, V directions and U their coefficients, w weights, p the linear part of the objective, a scaling and
b offset of an optimiser's step. A subscript says of what: G_T of targets, E_L of landmarks. ᵀ is the transpose.

A fast path has its plain twin beside it in the same file, `plain_...`: a few lines that do the same for one sample, one direction
or one choice at a time. Tests compare the two; nothing else calls the twins.
"""

from .batching import Progress, default_token_budget
from .embedding_selection import embedding_candidates, select_embedding
from .embeddings import EmbeddingOptions, embed
from .errors import UnusableInput
from .exact_gradients import Gradients, directional_derivatives, per_sample_gradients, sample_losses, weighted_gradients
from .fidelity import Fidelity, fidelity
from .first_order import cosine_influence
from .hessian_vector_products import curvature_products, stepped
from .kernel_ridge import KernelRidge
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
from .promise import Residuals, promise
from .samples import Samples, token_batches
from .second_order import SecondOrder, low_rank, offset_influence, quadratic_factors, second_order_terms
from .selection import (
    FirstOrderWeights,
    first_order_weights,
    mean_one_over_selected,
    round_robin,
    shortlist,
    top_k,
    turn_order,
)
from .solver import WeightedSolution, weighted_selection
from .step import StepMeasure, measure_step, optimizer_step, predicted_change
from .text_embedding import TextScales, text_embeddings

__all__ = [
    "EmbeddingOptions",
    "Fidelity",
    "FirstOrderWeights",
    "GradientProjection",
    "Gradients",
    "KernelRidge",
    "OptimizerOptions",
    "OptimizerState",
    "Progress",
    "Residuals",
    "Samples",
    "Scaling",
    "SecondOrder",
    "StepMeasure",
    "TextScales",
    "UnusableInput",
    "WeightedSolution",
    "cosine_influence",
    "curvature_products",
    "default_token_budget",
    "directional_derivatives",
    "embed",
    "embedding_candidates",
    "fidelity",
    "first_order_weights",
    "gradient_scaling",
    "landmark_order",
    "load_state",
    "low_rank",
    "mean_one_over_selected",
    "measure_step",
    "offset_influence",
    "optimizer_step",
    "per_sample_gradients",
    "predicted_change",
    "promise",
    "quadratic_factors",
    "round_robin",
    "sample_losses",
    "save_state",
    "second_order_terms",
    "select_embedding",
    "shortlist",
    "state_of",
    "step_offset",
    "stepped",
    "text_embeddings",
    "token_batches",
    "top_k",
    "turn_order",
    "weighted_gradients",
    "weighted_selection",
]
