"""The parameters of a job: how to compute. Combinations that a method cannot use are refused, with the reason.

Some defaults depend on other parameters (`gradient.normalize`, `optimizer.learning_rate`); they are written out when the
request is read, so that the job's echo and its provenance hold the values that were used.
"""

from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
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
from service.plan.parameter_objects import (
    Curvature,
    Embedding,
    Gradient,
    Kernel,
    Landmarks,
    Optimizer,
    Refine,
    Strict,
    Warmup,
    write_out,
)

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
    ("embedding.kind", ("jvp", "hidden"), ("embedding.pooling",)),
    ("embedding.kind", ("auto", "jvp", "hidden", "text_hidden"), ("embedding.blocks",)),
    ("kernel.kind", ("auto", "laplacian", "rbf"), ("kernel.bandwidth",)),
    ("optimizer.type", ("sgd",), ("optimizer.momentum",)),
    ("optimizer.type", ("sgd", "adam", "adamw"), ("optimizer.weight_decay",)),
    ("optimizer.type", ("adam", "adamw"), ("optimizer.betas", "optimizer.eps", "optimizer.scaling")),
    ("curvature.type", ("ggn", "hessian"), ("curvature.rank",)),
    ("selection", ("weighted",), ("curvature.type",)),
)


class Parameters(Strict):
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
    refine: Annotated[Refine, Field(description='Also `"auto"`, or a number: the share of the pool, in one round')] = (
        Refine()
    )
    min_fidelity: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Before anything is refined, landmarks are doubled until the leave-one-out Spearman correlation of the mean"
        " influence reaches this, or exact gradients of the whole pool are cheaper",
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
    duplicates: Literal["keep", "one"] = Field(
        default="keep",
        description="`one`: of samples of the pool that say the same, exactly or but for some words, the first takes part and the"
        " others are left out, with weight 0; `keep`: all take part, and the verdict says how many the selection has",
    )
    overlap: Literal["keep", "exclude"] = Field(
        default="keep",
        description="`exclude`: samples of the pool that say the same as one of the target, exactly or but for some words, are"
        " left out, with weight 0; `keep`: they take part, and the verdict says how many the selection has",
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
            write_out(gradient, normalize=self.curvature.type == "none")
            write_out(self, gradient=gradient)
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
        if self.refine.share is not None and self.refine.size != "auto":
            yield "refine.share", "takes the place of refine.size; omit one of them"
        if not self.refine.is_auto:
            for name in ("min_captured", "max_cost"):
                if getattr(self.refine, name) != _default(f"refine.{name}"):
                    yield f"refine.{name}", "is only used with refine.size auto; omit it"
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
