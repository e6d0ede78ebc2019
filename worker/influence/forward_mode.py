"""Forward-mode derivative of a stack of decoder blocks along several parameter directions in one pass (METHOD 4).

A batch of B samples is run as F = (1 + c) B samples: the primal first, then c tangents. What is linear in the hidden state
(residual sums, rotary embedding, reshapes) is right as it stands; linear layers, norms, activations, gated MLPs and attention get
forward-mode rules here. All tangents share the primal, and every linear layer is one product with the weight for the whole
stack plus one with each weight tangent. `check_forward_mode` compares with torch.func.jvp before any result is used.

The suffix _S alone is a stack (S, B, ...) of any layout behind.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.pytorch_utils import Conv1D

from .causal_lm import accumulation_dtype, block_list, hidden_states, linear_size, parameter_device, parameter_dtype
from .errors import UnusableInput
from .projection import seeded_generator

Tangents = Mapping[str, Tensor]
"""Directions (c, *shape) by name of the parameter in the base model."""

Forward = Callable[[Tensor], Tensor]
FloatArray = npt.NDArray[np.float32]

ATTENTION = "winnow_forward_mode"


def random_tangents(base: Any, blocks: int, count: int, seed: int) -> dict[str, Tensor]:
    """Gaussian directions for every parameter of the first `blocks` blocks, from (seed, parameter name, tangent index)."""
    prefix, _ = block_list(base)
    beginnings = tuple(f"{prefix}.{block}." for block in range(blocks))
    chosen = {name: parameter for name, parameter in base.named_parameters() if name.startswith(beginnings)}

    def drawn(name: str) -> FloatArray:
        stacked = np.empty((count, *chosen[name].shape), dtype=np.float32)
        for index in range(count):
            generator = seeded_generator(seed, name, str(index))
            generator.standard_normal(dtype=np.float32, out=stacked[index])
        return stacked

    # In several threads, as many parameters at a time: one alone would draw the billion numbers of a large model's blocks for
    # longer than an accelerator embeds with them.
    names, threads = list(chosen), torch.get_num_threads()
    tangents: dict[str, Tensor] = {}
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(names), threads):
            part = names[start : start + threads]
            for name, stacked in zip(part, pool.map(drawn, part), strict=True):
                tangents[name] = torch.from_numpy(stacked).to(chosen[name].device, chosen[name].dtype)
    return tangents


@contextmanager
def replaced_forward(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Run modules with other forward functions for a while; may be nested."""
    before: dict[nn.Module, Callable[..., Any] | None] = {m: m.__dict__.get("forward") for m in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            module.__dict__.pop("forward", None)
            if own is not None:
                module.__dict__["forward"] = own


@contextmanager
def attention_named(config: Any, name: str) -> Iterator[None]:
    """Have the model use the registered attention implementation `name` for a while."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def forward_mode(base: Any, tangents: Tangents) -> Iterator[None]:
    """Make the base model's blocks and final norm take B samples and return the stack of (1 + c) B."""
    _, blocks = block_list(base)
    copies = next(iter(tangents.values())).shape[0] + 1
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    inside_gated: set[nn.Module] = set()
    for name, module in base.named_modules():
        if _is_gated_mlp(module):
            inside_gated.add(module.act_fn)
            forwards[module] = partial(_gated_mlp, module, copies)
        elif not any(True for _ in module.children()) and module not in inside_gated:
            forward = _leaf_forward(name, module, tangents, copies)
            if forward is not None:
                forwards[module] = forward

    def stack(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x_BTD = args[0]
        x_FTD = x_BTD.new_zeros(copies * x_BTD.shape[0], *x_BTD.shape[1:])
        x_FTD[: x_BTD.shape[0]] = x_BTD
        return (x_FTD, *args[1:]), kwargs

    AttentionInterface.register(ATTENTION, partial(_attention, copies))
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    handle = blocks[0].register_forward_pre_hook(stack, with_kwargs=True)
    try:
        with replaced_forward(forwards), attention_named(base.config, ATTENTION):
            yield
    finally:
        handle.remove()


def _leaf_forward(name: str, module: nn.Module, tangents: Tangents, copies: int) -> Forward | None:
    """Forward-mode rule of a module without children, None where its own is right on the stack or runs before it."""
    own = {key: tangents[f"{name}.{key}"] for key, _ in module.named_parameters() if f"{name}.{key}" in tangents}
    parameters = list(module.parameters())
    if linear_size(module) is not None:
        return partial(_linear, module, own, copies)
    if isinstance(module, nn.Embedding | nn.Dropout | nn.Identity) or "rotary" in type(module).__name__.lower():
        return None
    if parameters and all(p.ndim == 1 for p in parameters):
        own = {
            key: own.get(key, torch.zeros_like(p).expand(copies - 1, *p.shape)) for key, p in module.named_parameters()
        }
        return partial(_norm, module, module.forward, own, copies)
    if not parameters:
        return partial(_activation, module.forward, copies)
    raise UnusableInput(f"jvp does not know the derivative of {name} ({type(module).__name__}): use kind='hidden'")


def _stacked(x: Tensor, copies: int) -> Tensor:
    """(S B, ...) -> (S, B, ...)."""
    return x.view(copies, -1, *x.shape[1:])


def _is_gated_mlp(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))


def _linear(module: nn.Module, tangents: Tangents, copies: int, x: Tensor) -> Tensor:
    """y = W x + b, dy = W dx + dW x + db, on a stack (F, ..., I) -> (F, ..., O)."""
    weight: Any = module.weight
    bias: Any = module.bias
    transposed = isinstance(module, Conv1D)
    W_IO = weight if transposed else weight.T
    x_NI = x.reshape(-1, x.shape[-1])
    y_NO: Tensor = x_NI @ W_IO
    x_SNI, y_SNO = _stacked(x_NI, copies), _stacked(y_NO, copies)
    for dy_NO, dW in zip(y_SNO[1:], tangents["weight"], strict=True):
        dy_NO.addmm_(x_SNI[0], dW if transposed else dW.T)
    if bias is not None:
        y_SNO[0] += bias
        y_SNO[1:] += tangents["bias"][:, None]
    return y_NO.view(*x.shape[:-1], -1)


def _norm(module: nn.Module, own_forward: Forward, tangents: Tangents, copies: int, x: Tensor) -> Tensor:
    """Any norm, from its own forward function: derivative with respect to the input and the parameters."""
    x_S = _stacked(x, copies)
    parameters = dict(module.named_parameters())

    def apply(values: dict[str, Tensor], inputs: Tensor) -> Tensor:
        with replaced_forward({module: own_forward}):
            result: Tensor = functional_call(module, values, (inputs,))
        return result

    def derivative(values: dict[str, Tensor], inputs: Tensor) -> tuple[Tensor, Tensor]:
        primal, tangent = jvp(apply, (parameters, x_S[0]), (values, inputs))[:2]
        return primal, tangent

    y, dy_c = vmap(derivative, out_dims=(None, 0))(dict(tangents), x_S[1:])  # type: ignore[arg-type]
    return torch.cat([y.unsqueeze(0), dy_c]).flatten(0, 1)


def _activation(own_forward: Forward, copies: int, x: Tensor) -> Tensor:
    """An elementwise function: its value and slope at the primal, the slope times each tangent."""
    x_S = _stacked(x, copies)
    y, slope = _value_and_slope(own_forward, x_S[0])
    return torch.cat([y.unsqueeze(0), x_S[1:] * slope]).flatten(0, 1)


def _value_and_slope(function: Forward, x: Tensor) -> tuple[Tensor, Tensor]:
    y, slope = jvp(function, (x,), (torch.ones_like(x),))[:2]
    return y, slope


def _gated_mlp(module: Any, copies: int, x: Tensor) -> Tensor:
    """down(act(gate(x)) * up(x)) with the product rule, in place where the value is not needed again."""
    gate_S = _stacked(module.gate_proj(x), copies)
    up_F = module.up_proj(x)
    up_S = _stacked(up_F, copies)
    y, slope = _value_and_slope(module.act_fn, gate_S[0])
    slope *= up_S[0]
    up_S[0] *= y
    for dup, dgate in zip(up_S[1:], gate_S[1:], strict=True):
        dup.mul_(y).addcmul_(dgate, slope)
    result: Tensor = module.down_proj(up_F)
    return result


def _attention(
    copies: int,
    _module: nn.Module,
    query_FHTh: Tensor,
    key_FKTh: Tensor,
    value_FKTh: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Softmax attention and its derivative on a stack, (F, heads, T, h) each -> (F, T, H, h)."""
    heads, tokens, size = query_FHTh.shape[1:]
    groups = heads // key_FKTh.shape[1]
    scale = size**-0.5 if scaling is None else scaling
    q_SBHTh, k_SBKTh, v_SBKTh = (_stacked(x, copies) for x in (query_FHTh, key_FKTh, value_FKTh))
    batch = q_SBHTh.shape[1]
    out_SBTHh = query_FHTh.new_empty(copies, batch, tokens, heads, size)
    if attention_mask is None:
        blocked = torch.ones(tokens, tokens, dtype=torch.bool, device=query_FHTh.device).triu(1)[None, None]
    else:
        blocked = ~attention_mask if attention_mask.dtype == torch.bool else attention_mask < 0
    step = max(attention_chunk_bytes(query_FHTh.device) // (heads * tokens * tokens * query_FHTh.element_size()), 1)
    for start in range(0, batch, step):
        part = slice(start, start + step)
        q_SZQh = (q_SBHTh[:, part] * scale).reshape(copies, -1, groups * tokens, size)
        k_SZTh = k_SBKTh[:, part].reshape(copies, -1, tokens, size)
        v_SZTh = v_SBKTh[:, part].reshape(copies, -1, tokens, size)
        mask = blocked if blocked.shape[0] == 1 else blocked[part]
        o_SZQh = _attention_chunk(q_SZQh, k_SZTh, v_SZTh, mask, heads, softcap)
        out_SBTHh[:, part] = o_SZQh.view(copies, -1, heads, tokens, size).transpose(2, 3)
    return out_SBTHh.flatten(0, 1), None


def attention_chunk_bytes(device: torch.device) -> int:
    """Attention scores are made for as many samples at a time as this holds: on a processor what stays in its cache, on an
    accelerator, which would be idle between the short products of one sample, what bounds memory."""
    return (4 if device.type == "cpu" else 256) * 2**20


def _attention_chunk(
    q_SZQh: Tensor, k_SZTh: Tensor, v_SZTh: Tensor, blocked: Tensor, heads: int, softcap: float | None
) -> Tensor:
    """Attention of Z key-value heads with Q queries each, scaled already."""
    tokens = k_SZTh.shape[2]
    scores_ZQT = torch.bmm(q_SZQh[0], k_SZTh[0].mT)
    slope_ZQT = None
    if softcap is not None:
        capped_ZQT = torch.tanh(scores_ZQT / softcap)
        scores_ZQT, slope_ZQT = capped_ZQT * softcap, 1 - capped_ZQT.square()
    scores_ZQT.view(-1, heads, tokens, tokens).masked_fill_(blocked, float("-inf"))
    A_ZQT = torch.softmax(scores_ZQT, dim=-1, dtype=accumulation_dtype(q_SZQh.dtype)).to(q_SZQh.dtype)
    out_SZQh = torch.empty_like(q_SZQh)
    torch.bmm(A_ZQT, v_SZTh[0], out=out_SZQh[0])
    for index in range(1, q_SZQh.shape[0]):
        dscores_ZQT = torch.bmm(q_SZQh[index], k_SZTh[0].mT).baddbmm_(q_SZQh[0], k_SZTh[index].mT)
        if slope_ZQT is not None:
            dscores_ZQT *= slope_ZQT
        dA_ZQT = dscores_ZQT.mul_(A_ZQT)
        dA_ZQT.addcmul_(A_ZQT, dA_ZQT.sum(dim=-1, keepdim=True), value=-1)
        torch.bmm(dA_ZQT, v_SZTh[0], out=out_SZQh[index])
        out_SZQh[index].baddbmm_(A_ZQT, v_SZTh[index])
    return out_SZQh


@cache
def _load_forward_mode() -> None:
    """torch compiles derivative rules on the first use of forward mode, with a deprecated call of its own that warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))


_checked: WeakKeyDictionary[Any, set[tuple[str, ...]]] = WeakKeyDictionary()


def check_forward_mode(model: Any, base: Any, tangents: Tangents) -> None:
    """Compare with torch.func.jvp on one short sample, once for each model object and set of parameters.

    Raises UnusableInput for an architecture that the rules do not cover.
    """
    _load_forward_mode()
    if tuple(tangents) in _checked.get(model, ()):
        return
    ids_BT = torch.arange(1, 7, device=parameter_device(model)).unsqueeze(0)
    ours_SBTD: Tensor
    with forward_mode(base, tangents):
        ours_SBTD = hidden_states(model, base, ids_BT)
    parameters = dict(base.named_parameters())
    varied = {name: parameters[name] for name in tangents}

    def plain(values: dict[str, Tensor]) -> Tensor:
        embedded_BTD = model.get_input_embeddings()(ids_BT)
        result: Tensor = functional_call(
            base, values, kwargs={"inputs_embeds": embedded_BTD, "use_cache": False}
        ).last_hidden_state
        return result

    with attention_named(base.config, "eager"):
        expected = jvp(plain, (varied,), ({name: tangents[name][0] for name in varied},))
    tolerance = 0.25 if parameter_dtype(model) in (torch.bfloat16, torch.float16) else 1e-3
    for ours, wanted in zip(ours_SBTD[:2], expected, strict=True):
        error = float((ours - wanted[0]).norm() / wanted.norm().clamp_min(torch.finfo(wanted.dtype).tiny))
        if error > tolerance:
            raise UnusableInput(
                f"the jvp embedding does not cover the architecture of {type(model).__name__} "
                f"(relative error {error:.1e} against torch.func.jvp): use kind='hidden'"
            )
    _checked.setdefault(model, set()).add(tuple(tangents))
