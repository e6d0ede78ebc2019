"""Tiny models of every family, and plain one-sample-at-a-time references for what the core computes in batches.

transformers computes norms and the eager softmax in float32 in most families, so that a float64 model carries errors of
1e-9 to 1e-7. GPT-2 is float64 throughout, and `llama_float64` has its norms and softmax replaced: these two are EXACT.
"""

import warnings

import numpy as np
import torch
import transformers as tf
from torch import nn
from torch.func import functional_call, jvp

from worker.influence import OptimizerState, Samples

VOCAB = 61
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2, "head_dim": 8}
EXACT = ("gpt2", "llama_float64")
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "gpt2", "gpt_neox")

with warnings.catch_warnings():  # torch's own deprecated call on the first use of forward mode
    warnings.simplefilter("ignore", DeprecationWarning)
    jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))


class Norm64(nn.Module):
    """RMSNorm in the dtype of its input."""

    def __init__(self, like):
        super().__init__()
        self.weight, self.eps = like.weight, like.variance_epsilon

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def plain_attention(module, query, key, value, mask, scaling=None, **_):
    """Causal attention in the dtype of its input, differentiable in forward mode."""
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).mT * scaling
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), None


tf.AttentionInterface.register("plain_float64", plain_attention)


def build(family, dtype=torch.float64, **changes):
    """A model of random weights of a size that makes every part matter, in eval mode."""
    configs = {
        "llama": lambda: tf.LlamaConfig(**{**GROUPED, **changes}),
        "qwen2": lambda: tf.Qwen2Config(**{**GROUPED, **changes}),
        "qwen3": lambda: tf.Qwen3Config(**{**GROUPED, **changes}),
        "mistral": lambda: tf.MistralConfig(**{**GROUPED, "sliding_window": 4, **changes}),
        "gemma": lambda: tf.GemmaConfig(**{**GROUPED, **changes}),
        "gemma2": lambda: tf.Gemma2Config(
            **{**GROUPED, "sliding_window": 4, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, **changes}
        ),
        "gemma3": lambda: tf.Gemma3TextConfig(
            **{**GROUPED, "sliding_window": 4, "sliding_window_pattern": 2, **changes}
        ),
        "gpt2": lambda: tf.GPT2Config(
            vocab_size=VOCAB, n_embd=24, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2, **changes
        ),
        "gpt_neox": lambda: tf.GPTNeoXConfig(**{**SHAPE, **changes}),
    }
    model = tf.AutoModelForCausalLM.from_config(configs[family.removesuffix("_float64")](), dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    model = model.to(dtype).eval()
    if family == "llama_float64":
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if type(child).__name__ == "LlamaRMSNorm":
                    setattr(module, name, Norm64(child))
    return model


def ragged(*texts, seed=0):
    """Samples from strings: `r` a response token, `.` another one; the tokens are random."""
    generator = np.random.default_rng(seed)
    flat = "".join(texts)
    return Samples(
        input_ids=generator.integers(0, VOCAB, len(flat)).astype(np.int32),
        response=np.array([mark == "r" for mark in flat], dtype=bool),
        offsets=np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64),
    )


MIXED = (
    "....rrr",
    "..rr...rrr..rr",  # several turns
    "......",  # no response
    "...r",  # one token
    "r",  # marked, but nothing predicts it
    "",
    "rrrrrr",  # the first is not predicted
    ".rr......",  # ends in a prompt
    "..........rrrrrrrrr",
    "....rrr",
)


def one_by_one_loss(model, samples, i):
    """Mean response cross-entropy of sample i alone from the model's own logits; None where nothing is predicted."""
    ids = torch.from_numpy(samples.input_ids[samples.offsets[i] : samples.offsets[i + 1]].astype(np.int64))
    response = samples.response[samples.offsets[i] : samples.offsets[i + 1]]
    positions = [j for j in range(1, len(ids)) if response[j]]
    if not positions:
        return None
    logits = model(ids[None]).logits[0]
    return nn.functional.cross_entropy(logits[[j - 1 for j in positions]], ids[positions])


def role_layers(model):
    """MLP output projections by name, and whether their weight is stored (in, out)."""
    ends = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h")
    return {
        name: (module, type(module).__name__ == "Conv1D")
        for name, module in model.base_model.named_modules()
        if name.endswith(ends)
    }


def with_adapters(model, seed=11):
    """The model with peft LoRA adapters of random values on its MLPs, injected in place."""
    from peft import LoraConfig, inject_adapter_in_model

    transposed = type(model).__name__.startswith("GPT2")
    targets = ["mlp.c_fc", "mlp.c_proj"] if transposed else ["up_proj", "down_proj"]
    config = LoraConfig(r=3, lora_alpha=5, lora_dropout=0.5, target_modules=targets, fan_in_fan_out=transposed)
    model = inject_adapter_in_model(config, model).train()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.3).to(parameter.dtype)
    return model


def adapter_layers(model):
    """Every adapter layer by name, as `role_layers`."""
    named = model.base_model.named_modules()
    return {name: (module, False) for name, module in named if name.endswith(("lora_A.default", "lora_B.default"))}


def random_state(model, seed=5, spread=3.0):
    """An Adam state after 7 steps: first moments of any sign, second moments over `spread` decades."""
    generator = torch.Generator().manual_seed(seed)
    first, second = {}, {}
    for name, parameter in model.named_parameters():
        first[name] = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.1
        second[name] = 10 ** (-spread * torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype) - 2)
    return OptimizerState(step=7, first=first, second=second)


def one_by_one_gradients(model, samples, projection=None, layers=None, scale=None):
    """Gradients by autograd.grad, one sample at a time, scaled and then projected by explicit matrices.

    layers: as from `role_layers`, the default.  scale: (O, I) by layer name.
    """
    layers = role_layers(model) if layers is None else layers
    rows, losses = [], []
    for i in range(len(samples)):
        loss = one_by_one_loss(model, samples, i)
        weights = [module.weight for module, _ in layers.values()]
        full = [torch.zeros_like(w) for w in weights] if loss is None else torch.autograd.grad(loss, weights)
        losses.append(0.0 if loss is None else loss.item())
        row = []
        for (name, (_, transposed)), gradient in zip(layers.items(), full, strict=True):
            G = gradient.T if transposed else gradient
            if scale is not None:
                G = G * scale[name]
            row.append((name, G))
        rows.append(flattened(row, projection))
    return torch.stack(rows), torch.tensor(losses, dtype=rows[0].dtype)


def flattened(row, projection):
    """Gradients (name, (O, I)) of one sample as one vector; projected by adding up entry by entry."""
    if projection is None or sum(G.numel() for _, G in row) <= projection.dim:
        return torch.cat([G.flatten() for _, G in row])
    values = torch.zeros(projection.dim, dtype=row[0][1].dtype)
    for name, G in row:
        found = projection.layer(name, *G.shape, dtype=G.dtype)
        if found.P_Iq is not None:
            G = G @ found.P_Iq / found.P_Iq.shape[1] ** 0.5
        place = (found.first + torch.arange(G.numel())) % projection.dim
        values.index_add_(0, place, (G * found.S_Oq).flatten())
    return values


def state_function(model, samples, i, blocks, pooling):
    """Function of {parameter: value} to the pooled, normed state of block `blocks` of sample i, from a plain forward."""
    base = model.base_model
    ids = torch.from_numpy(samples.input_ids[samples.offsets[i] : samples.offsets[i + 1]].astype(np.int64))[None]
    response = torch.from_numpy(samples.response[samples.offsets[i] : samples.offsets[i + 1]].copy())
    layers = next(child for child in base.children() if isinstance(child, nn.ModuleList))
    norm = next(child for name, child in base.named_children() if name in ("norm", "ln_f", "final_layer_norm"))

    class Stop(Exception):
        pass

    def state(values):
        caught = []

        def catch(module, args, output):
            caught.append(output if isinstance(output, torch.Tensor) else output[0])
            raise Stop

        handle = layers[blocks - 1].register_forward_hook(catch)
        try:
            functional_call(base, values, (ids,))
        except Stop:
            pass
        finally:
            handle.remove()
        hidden = norm(caught[0])[0]
        return hidden[-1] if pooling == "last" else hidden[response].mean(0)

    return state


def poolable(samples, i, pooling):
    part = samples.response[samples.offsets[i] : samples.offsets[i + 1]]
    return part.size > 0 and (pooling == "last" or part.any())


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())
