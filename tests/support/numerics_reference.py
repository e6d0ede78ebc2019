"""Tiny models of every family, ragged samples and optimiser states for the tests of the core.

transformers computes norms and the eager softmax in float32 in most families, so that a float64 model carries errors of
1e-9 to 1e-7. GPT-2 is float64 throughout, and `llama_float64` has its norms and softmax replaced: these two are EXACT.
"""

import warnings

import numpy as np
import torch
import transformers as tf
from torch import nn
from torch.func import jvp

from worker.influence import OptimizerState, Samples
from worker.influence.exact_gradients import plain_loss

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


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def plain_losses(model, samples):
    """(n,), 0 where nothing is predicted."""
    found = [plain_loss(model, samples, i) for i in range(len(samples))]
    return torch.tensor([0.0 if loss is None else loss.item() for loss in found], dtype=torch.float64)
