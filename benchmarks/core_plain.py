"""Plain implementations of the stages: one sample and one direction at a time, with torch's own derivatives.

The stages are timed against these, and their results are compared.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from worker.influence import EmbeddingOptions, GradientProjection, Samples, Scaling
from worker.influence.causal_lm import first_blocks, frozen, layer_size, linear_layers
from worker.influence.embeddings import pooled_tokens
from worker.influence.forward_mode import attention_named, random_tangents
from worker.influence.output_embedding import LAYER


def ids_of(samples: Samples, i: int, device: torch.device) -> Tensor:
    """(1, T)"""
    ids = samples.input_ids[samples.offsets[i] : samples.offsets[i + 1]].astype(np.int64)
    return torch.from_numpy(ids)[None].to(device)


def marked(samples: Samples, i: int, tokens: np.ndarray, device: torch.device) -> Tensor:
    """The part of bool (N,) that belongs to one sample, as (1, T)."""
    return torch.from_numpy(tokens[samples.offsets[i] : samples.offsets[i + 1]].copy())[None].to(device)


def loss(model: Any, samples: Samples, i: int) -> Tensor:
    ids = ids_of(samples, i, model.device)
    labels = ids.masked_fill(~marked(samples, i, samples.response, model.device), -100)
    value: Tensor = model(ids, labels=labels, use_cache=False).loss
    return value


@torch.no_grad()
def losses(model: Any, samples: Samples) -> Tensor:
    return torch.tensor([float(loss(model, samples, i)) for i in range(len(samples))])


def gradients(
    model: Any, samples: Samples, projection: GradientProjection | None, scaling: Scaling | None = None
) -> Tensor:
    """(n, k): autograd.grad one sample at a time, scaled and projected afterwards."""
    layers = linear_layers(model, "down_proj")
    if projection is not None and not projection.reduces(map(layer_size, layers.values())):
        projection = None
    made = {
        name: projection.layer(name, *layer_size(layer), device=model.device)
        for name, layer in layers.items()
        if projection is not None
    }
    rows = [torch.zeros(0)] * len(samples)
    with frozen(model):
        weights = [layer.weight.requires_grad_() for layer in layers.values()]
        for i in range(len(samples)):
            parts = []
            for name, found in zip(layers, torch.autograd.grad(loss(model, samples, i), weights), strict=True):
                gradient = found.float() if scaling is None else scaling.times(name, found.float())
                parts.append(made[name].apply(gradient) if projection else gradient.flatten())
            rows[i] = (torch.stack(parts).sum(dim=0) if projection else torch.cat(parts)).cpu()
        for weight in weights:
            weight.requires_grad_(False)
    return torch.stack(rows) if rows else torch.zeros(0, 0)


def weighted_gradient(model: Any, samples: Samples, weights_n1: Tensor) -> Tensor:
    """(d,), layer after layer: one backward pass per sample; the gradients are multiplied by their weights and summed."""
    whole = gradients(model, samples, None)
    return (weights_n1.float() * whole).sum(dim=0)


@torch.no_grad()
def embeddings(model: Any, samples: Samples, options: EmbeddingOptions) -> Tensor:
    """(n, e): torch.func.jvp for `jvp`, otherwise the plain forward pass; pooled and normalised to unit length."""
    if options.kind == "output":
        return _of_output_layer(model, samples, options)
    total = len(model.base_model.layers)
    base = first_blocks(model.base_model, total if options.kind == "rds" else options.blocks)
    directions = random_tangents(base, options.blocks, options.tangents, options.seed) if options.kind == "jvp" else {}
    parameters = {name: p.detach() for name, p in base.named_parameters() if name in directions}
    pooled_N = pooled_tokens(samples, options)
    rows = []
    # Fused attention has no forward-mode derivative.
    with attention_named(base.config, "eager" if directions else base.config._attn_implementation):
        for i in range(len(samples)):
            state = _state_of(base, ids_of(samples, i, model.device))
            states = (
                [
                    jvp(state, (parameters,), ({n: t[j] for n, t in directions.items()},))[1]
                    for j in range(options.tangents)
                ]
                if directions
                else [state({})]
            )
            weights = marked(samples, i, pooled_N, model.device)[0].float()
            if options.kind == "rds":
                weights *= torch.arange(1, len(weights) + 1, device=weights.device)
            means = [(weights / weights.sum()) @ one[0].float() for one in states]
            rows.append(nn.functional.normalize(torch.cat(means), dim=0).cpu())
    return torch.stack(rows) if rows else torch.zeros(0, 0)


def _of_output_layer(model: Any, samples: Samples, options: EmbeddingOptions) -> Tensor:
    """The residual of each logit, back through the head, times the state: the whole matrix, projected at the end."""
    head = model.lm_head.weight
    projection = GradientProjection(dim=options.max_dim, seed=options.seed)
    made = projection.layer(LAYER, head.shape[1], head.shape[1], device=head.device)
    rows = []
    for i in range(len(samples)):
        ids_1T = ids_of(samples, i, model.device)
        predicted_T = marked(samples, i, samples.response, model.device)[0]
        predicted_T[0] = False
        h_RD = model.model(ids_1T, use_cache=False).last_hidden_state[0][predicted_T.roll(-1)]
        r_RV = model.lm_head(h_RD).float().softmax(dim=-1)
        r_RV[torch.arange(len(r_RV)), ids_1T[0, predicted_T]] -= 1
        G_DD = (r_RV @ head.float()).T @ h_RD.float()
        whole = made.apply(G_DD) if projection.reduces([tuple(G_DD.shape)]) else G_DD.flatten()
        rows.append(nn.functional.normalize(whole, dim=0).cpu())
    return torch.stack(rows) if rows else torch.zeros(0, 0)


def _state_of(base: Any, ids: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    def state(values: dict[str, Tensor]) -> Tensor:
        hidden: Tensor = functional_call(base, values, (ids,), {"use_cache": False}).last_hidden_state
        return hidden

    return state
