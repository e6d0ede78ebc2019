"""The parameters of a job. Made of docs/openapi.json by `make openapi`: change that."""

from typing import Literal

from pydantic import Field

from winnow.answers.base import Answer


class Landmarks(Answer):
    """The samples whose gradients are computed exactly."""

    count: int | None
    """null: a fiftieth of the pool, from 128 to 4,096. Lowered to the number of usable samples of the pool"""
    choice: Literal["uniform", "stratified"] | str
    """`uniform`: random by the seed; `stratified`: each source in proportion to its size"""


class Embedding(Answer):
    """The cheap embedding of every sample (docs/method.md, Embeddings)."""

    kind: Literal["text", "auto", "text_hidden", "hidden", "jvp", "rds", "output"] | str
    """`text`: from the tokens, without a pass through the model; `text_hidden`: `text` beside `hidden`; `output`: from
    a pass through the whole model, the gradient of a layer before its output head; `auto`: the cheapest of `text`,
    `text_hidden` and `hidden`, and of `output` where `refine.max_cost` leaves room for it, that is close to the best on
    the landmarks"""
    pooling: Literal["last", "response"] | str
    """Of `hidden` and `jvp`: `last` token, or mean over the `response`"""
    blocks: int
    """Number of leading blocks that are run; not used by `text`, `rds` and `output`"""
    tangents: int
    """Random directions; `jvp` only"""


class Gradient(Answer):
    """Exact per-sample gradients."""

    modules: str
    """The layers that influence is measured on: `down_proj` is the MLPs' output projection, whatever its name; anything
    else is the end of a layer's name. Ignored for LoRA models, which are measured on their adapters."""
    projection_dim: int | None
    """Size for all layers together; null: no projection, for small models"""
    normalize: bool | None
    """true: influence is a cosine; false: the plain inner product. null: true, but false with a curvature, whose
    quadratic form is of plain gradients"""


class Kernel(Answer):
    """Kernel ridge regression that maps embeddings to influence."""

    kind: Literal["auto", "laplacian", "rbf", "linear"] | str
    """`laplacian`: exp(-d/σ); `rbf`: exp(-d²/2σ²); `auto`: the one of the two that predicts left-out landmarks best;
    `linear`"""
    ridge: float | None
    """As a share of the kernel's mean diagonal; null: the one of 0.01, 0.03, 0.1, 0.3 and 1 that predicts left-out
    landmarks best"""
    bandwidth: float | None
    """null: the median distance between landmarks"""


class Optimizer(Answer):
    """The optimiser whose step the selection optimises. Its state comes from the warm-up or is registered with the
    model."""

    type: Literal["none", "sgd", "adam", "adamw"] | str
    """`none`: plain gradients, like `sgd`"""
    learning_rate: float | None
    """null: 0.001 for `none` and `sgd`, 0.00002 for `adam` and `adamw`"""
    betas: tuple[float, float]
    """`adam` and `adamw` only, like `eps` and `scaling`"""
    eps: float
    momentum: float
    """`sgd` only"""
    weight_decay: float
    """Decoupled for `adamw`; not for `none`"""
    scaling: Literal["exact", "factored"] | str
    """How `adam` and `adamw` scale gradients: by every entry of the state, or by its rank-one factors"""


class Lora(Answer):
    """Low-rank adapters (peft) instead of the whole model."""

    rank: int
    alpha: float
    modules: Literal["all-linear", "attention", "mlp"] | str


class Warmup(Answer):
    """Train the model on a random part of the pool first; influence is then measured on the trained model."""

    samples: int
    """Lowered to the number of usable samples"""
    epochs: int
    learning_rate: float
    batch_size: int
    lora: Lora | None
    """null: the whole model is trained"""


class Refine(Answer):
    """Exact gradients of the samples that look best, in rounds; after each, the regression is fitted again."""

    size: Literal["auto"] | str | float
    """Times the budget, at least 1; `auto`: until `min_captured` is promised, or `max_cost` is reached. 0: the
    propagated influence decides"""
    share: float | None
    """In place of `size`: a share of the pool"""
    rounds: int
    min_captured: float
    """Stop once the selection is promised to have this share of the influence that the best one has, beyond the pool's
    mean; `size: auto` only"""
    max_cost: float
    """What the job may cost, as a share of method `rds_plus` on the same pool and model, but that twice the budget may
    always be refined; `size: auto` only"""


class Curvature(Answer):
    """How the Hessian of the target loss is approximated for second-order weights; `selection: weighted` only."""

    type: Literal["none", "fisher", "ggn", "hessian"] | str
    rank: int
    """Directions; `ggn` and `hessian` only"""


class JobParameters(Answer):
    """The parameters of a job that was accepted, maybe by an older version that did not refuse what is refused by now."""

    method: Literal["influence_distillation", "exact_influence", "rds_plus", "random"] | str
    """`influence_distillation`: gradients of landmarks, propagated by embeddings; `exact_influence`: every sample's
    gradient; `rds_plus`: cosine of hidden states; `random`: from the seed"""
    landmarks: Landmarks
    embedding: Embedding
    gradient: Gradient
    kernel: Kernel
    optimizer: Optimizer
    warmup: Warmup | None
    """null: none"""
    refine: Refine
    """Also `"auto"`, or a number: the share of the pool, in one round"""
    min_fidelity: float | None
    """Before anything is refined, landmarks are doubled until the leave-one-out Spearman correlation of the mean
    influence reaches this, or exact gradients of the whole pool are cheaper"""
    curvature: Curvature
    selection: Literal["round_robin", "top_k", "weighted"] | str
    """`round_robin`: targets take turns; `top_k`: by mean influence; both weight the selected equally. `weighted`: the
    weights that lower the target loss most in one step, first or second order (`curvature`)."""
    validate_: bool = Field(alias="validate")
    """Measure the effect of one step on the selection on the target loss"""
    quantization: Literal["none", "int8", "nf4"] | str
    """Load the base model in 8 or 4 bits; needs bitsandbytes on the workers"""
    dtype: Literal["auto", "float32", "bfloat16"] | str
    """auto: bfloat16 if the worker's device computes it faster, otherwise float32"""
    reasoning: Literal["keep", "strip"] | str
    """`strip`: replies lose their reasoning, be it in a field of its own or in <think> tags; `keep`: the model's chat
    template gets it, and may leave it out, which the result counts"""
    template_arguments: dict[str, bool | int | float | str | None]
    """What else the model's chat template is given, by name, such as `enable_thinking` (docs/chat-templates.md)"""
    max_length: int
    """Maximum tokens per sample; longer ones are truncated, and counted"""
    max_unusable: float
    """Largest share of the pool, and of the target, that may be unusable: samples that the model's chat template cannot
    render or that have nothing to learn from. They are left out and listed; beyond this share the job fails early"""
    duplicates: Literal["keep", "one"] | str
    """`one`: of samples of the pool that say the same, exactly or but for some words, the first takes part and the
    others are left out, with weight 0; `keep`: all take part, and the verdict says how many the selection has"""
    overlap: Literal["keep", "exclude"] | str
    """`exclude`: samples of the pool that say the same as one of the target, exactly or but for some words, are left
    out, with weight 0; `keep`: they take part, and the verdict says how many the selection has"""
    seed: int
