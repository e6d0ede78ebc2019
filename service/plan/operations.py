"""How many operations passes through a model need, from its config.json and counts of tokens: plain arithmetic (METHOD 3).

A multiply-add is two operations. Only what the method needs is counted: matrix products, causal attention as half of its square,
the output head on predicted positions. Padding, norms and elementwise work are not, so that a share of the machine's rate shows
what they cost. A test compares the counts with the products that really run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Self

Size = tuple[int, int]
"""(out, in) of a linear layer."""

# The layers of families with one product for query, key and value: that, the attention's output, and the MLP's two.
_FUSED = {
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "gpt_neox": ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
}
_MLP_OUTPUTS = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h")
_POSITIONWISE = ("mlp.", "self_attn.q_proj", "self_attn.o_proj", "attn.c_proj", "attention.dense")
MAX_EMBEDDING = 4096  # values; what is longer is projected
INPUT_DIRECTIONS = 128  # of a gradient's projection
TEXT_DIRECTIONS, TEXT_SCALARS = 256, 4  # of the reply and the prompt each, and beside them


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Of a dataset: samples, tokens, the sum of their squares over samples, and the tokens that the loss counts."""

    samples: float
    tokens: float
    squares: float
    predicted: float

    @classmethod
    def of_summary(cls, summary: Mapping[str, Any]) -> Self:
        """What the prepare stage has counted; without `squares`, that of samples of one length."""
        samples, tokens = summary["samples"], summary["tokens"]
        return cls(samples, tokens, summary.get("squares", tokens**2 / max(samples, 1)), summary["response_tokens"])

    @classmethod
    def of_bytes(cls, rows: int, size: int, max_length: int) -> Self:
        """An estimate: four bytes of JSON lines a token, the JSON standing for the chat template; half of it response."""
        length = min(size / rows / 4, float(max_length))
        return cls(rows, rows * length, rows * length**2, rows * length / 2)

    def scaled(self, samples: float) -> "TokenCounts":
        """Of as many samples like these."""
        share = samples / max(self.samples, 1)
        return TokenCounts(samples, self.tokens * share, self.squares * share, self.predicted * share)

    @property
    def seen(self) -> "TokenCounts":
        """Without each sample's last token, from which nothing is predicted."""
        squares = self.squares - 2 * self.tokens + self.samples
        return TokenCounts(self.samples, max(self.tokens - self.samples, 0), max(squares, 0), self.predicted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a decoder: `layers` are the linear layers of each of its `blocks` by name, `adapters` those with LoRA."""

    hidden: int
    blocks: int
    vocabulary: int
    attention_width: int
    layers: Mapping[str, Size]
    rank: int = 0
    adapters: frozenset[str] = frozenset()

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Self:
        """Of the content of a config.json.

        Raises:
            ValueError: names the entry that is missing.
        """

        def entry(*names: str) -> int:
            value = next((config[name] for name in names if config.get(name)), None)
            if not isinstance(value, int):
                raise ValueError(f"its config.json has no {names[0]}")
            return value

        hidden, heads = entry("hidden_size", "n_embd"), entry("num_attention_heads", "n_head")
        width = heads * int(config.get("head_dim") or hidden // heads)
        kind = config.get("model_type")
        inner = int(config.get("n_inner") or 4 * hidden) if kind == "gpt2" else entry("intermediate_size")
        if kind in _FUSED:
            sizes = ((3 * hidden, hidden), (hidden, hidden), (inner, hidden), (hidden, inner))
            layers = dict(zip(_FUSED[kind], sizes, strict=True))
        else:
            shared = int(config.get("num_key_value_heads") or heads) * width // heads
            layers = {
                "self_attn.q_proj": (width, hidden),
                "self_attn.k_proj": (shared, hidden),
                "self_attn.v_proj": (shared, hidden),
                "self_attn.o_proj": (hidden, width),
                "mlp.gate_proj": (inner, hidden),
                "mlp.up_proj": (inner, hidden),
                "mlp.down_proj": (hidden, inner),
            }
        return cls(
            hidden=hidden,
            blocks=entry("num_hidden_layers", "n_layer"),
            vocabulary=entry("vocab_size"),
            attention_width=width,
            layers=layers,
        )

    def with_adapters(self, rank: int, modules: str | Sequence[str]) -> "Shape":
        """With LoRA of this rank: on `all-linear`, `attention` or `mlp`, or on the layers whose names end so."""
        if isinstance(modules, str):
            chosen = {n for n in self.layers if modules == "all-linear" or n.startswith("mlp.") == (modules == "mlp")}
        else:
            chosen = {name for name in self.layers if any(f".{name}".endswith(f".{end}") for end in modules)}
        return replace(self, rank=rank, adapters=frozenset(chosen))

    def weights_of(self, *beginnings: str) -> int:
        """Of the layers of a block whose names begin so, with their adapters."""
        return sum(
            out * into + (self.rank * (out + into) if name in self.adapters else 0)
            for name, (out, into) in self.layers.items()
            if name.startswith(beginnings)
        )

    @property
    def block_weights(self) -> int:
        return self.weights_of("")

    @property
    def head_weights(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def weights(self) -> int:
        """With the embeddings counted once, as where they are tied."""
        return self.blocks * self.block_weights + self.head_weights

    def measured(self, modules: str) -> Sequence[tuple[int, Size]]:
        """(block, size) of each layer that influence is measured on. All adapters where there are any.

        Raises:
            ValueError: there is no such layer.
        """
        if self.adapters:
            sizes = [self.layers[name] for name in sorted(self.adapters)]
            pairs = [size for out, into in sizes for size in ((self.rank, into), (out, self.rank))]
            return [(block, size) for block in range(self.blocks) for size in pairs]
        found = _layers_named(tuple(self.layers.items()), self.blocks, modules)
        if not found:
            raise ValueError(f"gradient.modules {modules} matches none of the block layers {', '.join(self.layers)}")
        return found


@lru_cache(maxsize=256)  # a plan asks some thirty times, and most of its time was spent here
def _layers_named(layers: tuple[tuple[str, Size], ...], blocks: int, modules: str) -> tuple[tuple[int, Size], ...]:
    ends = _MLP_OUTPUTS if modules == "down_proj" else (modules,)
    return tuple(
        (block, size)
        for block in range(blocks)
        for name, size in layers
        if any(f".layers.{block}.{name}".endswith(f".{end}") for end in ends)
    )


def forward(shape: Shape, counts: TokenCounts) -> float:
    """Of the loss of every sample: 2 N T."""
    seen = counts.seen
    attention = 2 * seen.squares * shape.attention_width * shape.blocks
    return 2 * seen.tokens * shape.blocks * shape.block_weights + attention + 2 * counts.predicted * shape.head_weights


def backward(shape: Shape, counts: TokenCounts, first_block: int = 0) -> float:
    """Of the derivative by activations, down to the output of `first_block`: at most another 2 N T."""
    seen, blocks = counts.seen, shape.blocks - 1 - first_block
    attention = 4 * seen.squares * shape.attention_width * blocks
    return 2 * seen.tokens * blocks * shape.block_weights + attention + 2 * counts.predicted * shape.head_weights


def gradient_size(layers: Sequence[tuple[int, Size]], projection_dim: int | None) -> int:
    """Values of a sample's gradient."""
    weights = sum(out * into for _, (out, into) in layers)
    return weights if projection_dim is None else min(weights, projection_dim)


def gradients(
    shape: Shape, counts: TokenCounts, *, modules: str, projection_dim: int | None, is_scaled_exactly: bool = False
) -> float:
    """Of per-sample gradients: 4 N T, and their projection; scaled entry by entry, each is first formed in full."""
    layers = shape.measured(modules)
    tokens, total = counts.seen.tokens, forward(shape, counts) + backward(shape, counts, layers[0][0])
    is_reduced = projection_dim is not None and gradient_size(layers, None) > projection_dim
    for _, (out, into) in layers:
        q = min(into, INPUT_DIRECTIONS) if is_reduced else into
        total += 2 * tokens * out * (into if is_scaled_exactly else q)
        if q < into:
            total += 2 * into * q * (counts.samples * out if is_scaled_exactly else tokens)
    return total


def full_gradients(shape: Shape, counts: TokenCounts, *, modules: str, directions: int = 1) -> float:
    """Of unprojected gradients in one pass: weighted sums of them, or their products with directions."""
    layers = shape.measured(modules)
    weights = sum(out * into for _, (out, into) in layers)
    each = 2 * counts.samples * directions * weights if directions > 1 else 0.0
    return forward(shape, counts) + backward(shape, counts, layers[0][0]) + 2 * counts.seen.tokens * weights + each


def curvature(shape: Shape, targets: TokenCounts, *, kind: str, modules: str) -> tuple[float, float]:
    """Of the products of `ggn` or `hessian` with directions: what they share, and what each costs."""
    passes = forward(shape, targets) + backward(shape, targets)
    outer = full_gradients(shape, targets, modules=modules) - passes
    # Down to the hidden states and back, through the first derivative too for the exact Hessian. The factors are those of the
    # products that really ran.
    return passes + outer, (1.25 * passes + 2 * outer if kind == "ggn" else 2.1 * passes + 3 * outer)


def embedding(shape: Shape, counts: TokenCounts, options: Mapping[str, Any]) -> float:
    """Of one pass of the first blocks, and two for each tangent of `jvp`; all blocks for `rds` and `output`; none for `text`.

    What is positionwise in the last block is counted at pooled positions only; what `text` adds up is no product. `output` goes
    through the head and back, and forms a matrix of the hidden size for each sample.
    """
    kind = options["kind"]
    if kind == "text":
        return 0.0
    if kind == "output":
        return forward(shape, counts) + 2 * counts.predicted * (shape.head_weights + _outer_weights(shape.hidden))
    blocks = shape.blocks if kind == "rds" else min(options["blocks"], shape.blocks)
    passes = 1 + 2 * options["tangents"] if kind == "jvp" else 1
    pooled = counts.tokens
    if kind != "rds":
        pooled = counts.predicted if options["pooling"] == "response" else counts.samples
    late = shape.weights_of(*_POSITIONWISE)
    linear = 2 * (counts.tokens * (blocks * shape.block_weights - late) + pooled * late)
    return passes * (linear + 2 * counts.squares * shape.attention_width * blocks)


def _outer_weights(hidden: int) -> int:
    """Of the outer product of two hidden states, of which the second is projected first where the result is."""
    q = INPUT_DIRECTIONS if hidden**2 > MAX_EMBEDDING and hidden > INPUT_DIRECTIONS else hidden
    return hidden * q * (2 if q < hidden else 1)


def embedding_width(shape: Shape, options: Mapping[str, Any]) -> int:
    if options["kind"] in ("text", "text_hidden"):
        text = 2 * TEXT_DIRECTIONS + TEXT_SCALARS
        return text if options["kind"] == "text" else text + shape.hidden
    if options["kind"] == "output":
        return min(shape.hidden**2, MAX_EMBEDDING)
    vectors = int(options["tangents"]) if options["kind"] == "jvp" else 1
    return min(vectors * shape.hidden, MAX_EMBEDDING) if vectors > 1 else shape.hidden
