"""The parameters of a job: how to compute. Combinations that a method cannot use are refused, with the reason.

Some defaults depend on other parameters (`gradient.normalize`, `optimizer.learning_rate`); they are written out when the
request is read, so that the job's echo and its provenance hold the values that were used.
"""

from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from service.names import Text


class _Strict(BaseModel):
    # Infinity and NaN are no JSON, so PostgreSQL would refuse the echo of them.
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def _write_out(model: BaseModel, **values: Any) -> None:
    """Writes a default out without marking it as set: what the client sent is kept as it was sent."""
    model.__dict__.update(values)


class Landmarks(_Strict):
    """The samples whose gradients are computed exactly."""

    count: int = Field(default=4096, ge=2, le=16_384, description="Lowered to the number of usable samples of the pool")
    choice: Literal["uniform", "stratified"] = Field(
        default="uniform",
        description="`uniform`: random by the seed; `stratified`: each source in proportion to its size",
    )


class Embedding(_Strict):
    """The cheap embedding of every sample (docs/method.md, Embeddings)."""

    kind: Literal["auto", "jvp", "hidden", "rds"] = Field(
        default="auto", description="`auto`: `hidden`, with the pooling of higher fidelity on the landmarks"
    )
    pooling: Literal["last", "response"] | None = Field(
        default=None,
        description="`last` token, or mean over the `response`; null: `auto` tries both, the others use `response`",
    )
    blocks: int = Field(default=4, ge=1, le=256, description="Number of leading blocks that are run; not used by `rds`")
    tangents: int = Field(default=2, ge=1, le=16, description="Random directions; `jvp` only")

    @model_validator(mode="after")
    def _settle(self) -> Self:
        if self.pooling is None and self.kind in ("jvp", "hidden"):
            _write_out(self, pooling="response")
        return self


class Gradient(_Strict):
    """Exact per-sample gradients."""

    modules: str = Field(
        default="down_proj",
        pattern=r"^[A-Za-z0-9_.]{1,100}$",
        description="The layers that influence is measured on: `down_proj` is the MLPs' output projection, whatever its name;"
        " anything else is the end of a layer's name. Ignored for LoRA models, which are measured on their adapters.",
    )
    projection_dim: int | None = Field(
        default=16_384,
        ge=64,
        le=1_048_576,
        description="Size for all layers together; null: no projection, for small models",
    )
    normalize: bool | None = Field(
        default=None,
        description="true: influence is a cosine; false: the plain inner product. null: false for `weighted`, otherwise true",
    )


class Kernel(_Strict):
    """Kernel ridge regression that maps embeddings to influence."""

    kind: Literal["rbf", "linear"] = "rbf"
    ridge: float | None = Field(
        default=None,
        gt=0,
        le=100,
        description="As a share of the kernel's mean diagonal; null: the one of 0.01, 0.03, 0.1, 0.3 and 1 that predicts"
        " left-out landmarks best",
    )
    bandwidth: float | None = Field(default=None, gt=0, description="null: the median distance between landmarks")


Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(_Strict):
    """The optimiser whose step the selection optimises. Its state comes from the warm-up or is registered with the model."""

    type: Literal["none", "sgd", "adam", "adamw"] = Field(
        default="none", description="`none`: plain gradients, like `sgd`"
    )
    learning_rate: float | None = Field(
        default=None, gt=0, le=100, description="null: 0.001 for `none` and `sgd`, 0.00002 for `adam` and `adamw`"
    )
    betas: tuple[Beta, Beta] = Field(
        default=(0.9, 0.999), description="`adam` and `adamw` only, like `eps` and `scaling`"
    )
    eps: float = Field(default=1e-8, gt=0, le=1)
    momentum: float = Field(default=0.0, ge=0, lt=1, description="`sgd` only")
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="Decoupled for `adamw`; not for `none`")
    scaling: Literal["exact", "factored"] = Field(
        default="exact",
        description="How `adam` and `adamw` scale gradients: by every entry of the state, or by its rank-one factors",
    )

    @model_validator(mode="after")
    def _settle(self) -> Self:
        if self.learning_rate is None:
            _write_out(self, learning_rate=2e-5 if self.is_adam else 1e-3)
        return self

    @property
    def is_adam(self) -> bool:
        return self.type in ("adam", "adamw")

    @property
    def needs_state(self) -> bool:
        return self.is_adam or self.momentum > 0


class Lora(_Strict):
    """Low-rank adapters (peft) instead of the whole model."""

    rank: int = Field(default=16, ge=1, le=512)
    alpha: float = Field(default=32.0, gt=0, le=4096)
    modules: Literal["all-linear", "attention", "mlp"] = "all-linear"


class Warmup(_Strict):
    """Train the model on a random part of the pool first; influence is then measured on the trained model."""

    samples: int = Field(default=1000, ge=1, le=1_000_000, description="Lowered to the number of usable samples")
    epochs: int = Field(default=1, ge=1, le=20)
    learning_rate: float = Field(default=2e-5, gt=0, le=1)
    batch_size: int = Field(default=16, ge=1, le=1024)
    lora: Lora | None = Field(default=None, description="null: the whole model is trained")


class Curvature(_Strict):
    """How the Hessian of the target loss is approximated for second-order weights; `selection: weighted` only."""

    type: Literal["none", "fisher", "ggn", "hessian"] = "none"
    rank: int = Field(default=32, ge=1, le=256, description="Directions; `ggn` and `hessian` only")


_GIVEN = (
    *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "strftime_now"),
    *("conversations", "chat_template", "return_assistant_tokens_mask"),
)


def _argument_name(name: str) -> str:
    if name in _GIVEN or name.endswith("_token"):
        raise ValueError(f"{name} is given to every chat template by the service; omit it")
    return name


ArgumentName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$"), AfterValidator(_argument_name)
]
ArgumentValue = (
    StrictBool
    | Annotated[StrictInt, Field(ge=-(2**53), le=2**53)]
    | Annotated[StrictFloat, Field(ge=-1e15, le=1e15)]
    | Annotated[Text, StringConstraints(strict=True, max_length=1000)]
    | None
)
TemplateArguments = dict[ArgumentName, ArgumentValue]

Method = Literal["influence_distillation", "exact_influence", "rds_plus", "random"]

# What a method cannot use; the named defaults are let through, since an echo holds them.
_APPROXIMATION = ("landmarks", "embedding", "kernel", "refine", "min_fidelity")
_UNUSED: Mapping[str, tuple[tuple[str, ...], str]] = {
    "influence_distillation": ((), ""),
    "exact_influence": (_APPROXIMATION, "it computes the gradient of every sample and approximates nothing"),
    "rds_plus": (
        (*_APPROXIMATION, "gradient", "optimizer", "curvature"),
        "it compares hidden states and uses no landmarks, gradients or optimiser",
    ),
    "random": (
        (*_APPROXIMATION, "gradient", "optimizer", "curvature", "warmup", "selection"),
        "it draws from the seed alone",
    ),
}

# What a choice cannot use: (the choice, the values that can, what only they can use).
_ONLY_OF: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("embedding.kind", ("jvp",), ("embedding.tangents",)),
    ("embedding.kind", ("auto", "jvp", "hidden"), ("embedding.blocks", "embedding.pooling")),
    ("kernel.kind", ("rbf",), ("kernel.bandwidth",)),
    ("optimizer.type", ("sgd",), ("optimizer.momentum",)),
    ("optimizer.type", ("sgd", "adam", "adamw"), ("optimizer.weight_decay",)),
    ("optimizer.type", ("adam", "adamw"), ("optimizer.betas", "optimizer.eps", "optimizer.scaling")),
    ("curvature.type", ("ggn", "hessian"), ("curvature.rank",)),
    ("selection", ("weighted",), ("curvature.type",)),
)


class Parameters(_Strict):
    """How to compute. All of it is echoed by the job and kept in its provenance."""

    method: Method = Field(
        default="influence_distillation",
        description="`influence_distillation`: gradients of landmarks, propagated by embeddings; `exact_influence`: every"
        " sample's gradient; `rds_plus`: cosine of hidden states; `random`: from the seed",
    )
    landmarks: Landmarks = Landmarks()
    embedding: Embedding = Embedding()
    gradient: Gradient = Gradient()
    kernel: Kernel = Kernel()
    optimizer: Optimizer = Optimizer()
    warmup: Warmup | None = Field(default=None, description="null: none")
    refine: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="Share of the pool with the best propagated influence whose gradients are"
        " computed exactly before the selection; 0: the propagated influence decides",
    )
    min_fidelity: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Landmarks are doubled until the leave-one-out Spearman correlation of the mean influence reaches this,"
        " or exact gradients of the whole pool are cheaper",
    )
    curvature: Curvature = Curvature()
    selection: Literal["round_robin", "top_k", "weighted"] = Field(
        default="round_robin",
        description="`round_robin`: targets take turns; `top_k`: by mean influence; both weight the selected equally."
        " `weighted`: the weights that lower the target loss most in one step, first or second order (`curvature`).",
    )
    validate_selection: bool = Field(
        default=True, alias="validate", description="Measure the effect of one step on the selection on the target loss"
    )
    quantization: Literal["none", "int8", "nf4"] = Field(
        default="none", description="Load the base model in 8 or 4 bits; needs bitsandbytes on the workers"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: bfloat16 if the worker's device computes it faster, otherwise float32"
    )
    reasoning: Literal["keep", "strip"] = Field(
        default="keep",
        description="`strip`: replies lose their reasoning, be it in a field of its own or in <think> tags; `keep`: the"
        " model's chat template gets it, and may leave it out, which the result counts",
    )
    template_arguments: TemplateArguments = Field(
        default={},
        max_length=32,
        description="What else the model's chat template is given, by name, such as `enable_thinking`"
        " (docs/chat-templates.md)",
    )
    max_length: int = Field(
        default=2048, ge=16, le=131_072, description="Maximum tokens per sample; longer ones are truncated, and counted"
    )
    max_unusable: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Largest share of the pool, and of the target, that may be unusable: samples that the model's chat template"
        " cannot render or that have nothing to learn from. They are left out and listed; beyond this share the job fails early",
    )
    seed: int = Field(default=0, ge=0, lt=2**63)

    model_config = ConfigDict(serialize_by_alias=True)
    _refuses: ClassVar[bool] = True

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        unused, _ = _UNUSED[self.method]
        if self._refuses:
            misfits = [one for one in (*self._misplaced(), *self._misfits()) if one[0].partition(".")[0] not in unused]
            refused = [*self._unused(), *misfits]
            if refused:
                raise ValidationError.from_exception_data("Parameters", [_error(*one) for one in refused])
        if "gradient" not in unused and self.gradient.normalize is None:
            gradient = self.gradient.model_copy()
            _write_out(gradient, normalize=self.selection != "weighted")
            _write_out(self, gradient=gradient)
        return self

    def _unused(self) -> Iterator[tuple[str, str]]:
        """What is set and the method cannot use: path and reason."""
        names, why = _UNUSED[self.method]
        for name in names:
            if getattr(self, name) != _default(name):
                yield name, f"cannot be used with method {self.method}: {why}; omit it"

    def _misplaced(self) -> Iterator[tuple[str, str]]:
        """What is set and a choice beside it cannot use."""
        for choice, able, paths in _ONLY_OF:
            value = attrgetter(choice)(self)
            for path in paths if value not in able else ():
                if attrgetter(path)(self) != _default(path):
                    yield path, f"is only used with {choice} {' or '.join(able)}, not {value}; omit it"

    def _misfits(self) -> Iterator[tuple[str, str]]:
        if self.curvature.type != "none" and self.optimizer.type == "none":
            yield "curvature.type", "requires an optimizer.type other than none: its effect depends on the step's size"
        if self.curvature.type != "none" and self.gradient.normalize:
            yield "gradient.normalize", "must be false with a curvature: the quadratic form is of plain gradients"
        if self.method == "rds_plus" and self.selection == "weighted":
            yield "selection", "weighted needs gradients, and rds_plus has none; use round_robin or top_k"
        if self.quantization != "none" and self.embedding.kind == "jvp":
            yield "embedding.kind", "jvp needs derivatives by the weights, which a quantised model does not have"
        if self.warmup is None:
            return
        if self.quantization != "none" and self.warmup.lora is None:
            yield "warmup.lora", "is required to warm up a quantised model: quantised weights cannot be trained"
        if self.optimizer.momentum:
            yield (
                "optimizer.momentum",
                "needs a registered sgd state, but the warm-up trains with Adam; omit one of them",
            )
        if self.warmup.lora is not None and self.gradient.modules not in ("down_proj", "lora"):
            yield "gradient.modules", "cannot be set with warmup.lora, on whose adapters influence is measured; omit it"


class JobParameters(Parameters):
    """The parameters of a job that was accepted, maybe by an older version that did not refuse what is refused by now."""

    _refuses: ClassVar[bool] = False


def _default(path: str) -> Any:
    name, _, rest = path.partition(".")
    default = Parameters.model_fields[name].default
    return attrgetter(rest)(default) if rest else default


def _error(path: str, reason: str) -> InitErrorDetails:
    """A refusal at the field itself, so that a client sees `curvature.type` and not the whole body at fault."""
    custom = PydanticCustomError("cannot_be_used", "{reason}", {"reason": reason})
    return InitErrorDetails(type=custom, loc=tuple(path.split(".")), input=None)
