"""The objects that a job's parameters consist of (`parameters.py`), each with its own defaults."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Strict(BaseModel):
    # Infinity and NaN are no JSON, so PostgreSQL would refuse the echo of them.
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def write_out(model: BaseModel, **values: Any) -> None:
    """Writes a default out without marking it as set: what the client sent is kept as it was sent."""
    model.__dict__.update(values)


class Landmarks(Strict):
    """The samples whose gradients are computed exactly."""

    count: int | None = Field(
        default=None,
        ge=2,
        le=16_384,
        description="null: a fiftieth of the pool, from 128 to 4,096. Lowered to the number of usable samples of the pool",
    )
    choice: Literal["uniform", "stratified"] = Field(
        default="uniform",
        description="`uniform`: random by the seed; `stratified`: each source in proportion to its size",
    )


class Embedding(Strict):
    """The cheap embedding of every sample (docs/method.md, Embeddings)."""

    kind: Literal["text", "auto", "text_hidden", "hidden", "jvp", "rds", "output"] = Field(
        default="text",
        description="`text`: from the tokens, without a pass through the model; `text_hidden`: `text` beside `hidden`;"
        " `output`: from a pass through the whole model, the gradient of a layer before its output head; `auto`: the cheapest of"
        " `text`, `text_hidden` and `hidden`, and of `output` where `refine.max_cost` leaves room for it, that is close to the"
        " best on the landmarks",
    )
    pooling: Literal["last", "response"] = Field(
        default="response", description="Of `hidden` and `jvp`: `last` token, or mean over the `response`"
    )
    blocks: int = Field(
        default=4,
        ge=1,
        le=256,
        description="Number of leading blocks that are run; not used by `text`, `rds` and `output`",
    )
    tangents: int = Field(default=2, ge=1, le=16, description="Random directions; `jvp` only")

    @field_validator("pooling", mode="before")
    @classmethod
    def _settle(cls, given: Any) -> Any:
        """Null, as jobs of older versions have it."""
        return "response" if given is None else given


class Gradient(Strict):
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
        description="true: influence is a cosine; false: the plain inner product. null: true, but false with a curvature, whose"
        " quadratic form is of plain gradients",
    )


class Kernel(Strict):
    """Kernel ridge regression that maps embeddings to influence."""

    kind: Literal["auto", "laplacian", "rbf", "linear"] = Field(
        default="auto",
        description="`laplacian`: exp(-d/σ); `rbf`: exp(-d²/2σ²); `auto`: the one of the two that predicts left-out landmarks"
        " best; `linear`",
    )
    ridge: float | None = Field(
        default=None,
        gt=0,
        le=100,
        description="As a share of the kernel's mean diagonal; null: the one of 0.01, 0.03, 0.1, 0.3 and 1 that predicts"
        " left-out landmarks best",
    )
    bandwidth: float | None = Field(default=None, gt=0, description="null: the median distance between landmarks")


RDS_PLUS_SHARE = 1 / 3.5
"""Of the cost of `rds_plus`, what a selection may cost by default: the paper's headline."""


class Refine(Strict):
    """Exact gradients of the samples that look best, in rounds; after each, the regression is fitted again."""

    size: Literal["auto"] | Annotated[float, Field(ge=0, le=1000)] = Field(
        default="auto",
        description="Times the budget, at least 1; `auto`: until `min_captured` is promised, or `max_cost` is reached. 0: the"
        " propagated influence decides",
    )
    share: float | None = Field(default=None, gt=0, le=1, description="In place of `size`: a share of the pool")
    rounds: int = Field(default=8, ge=1, le=64)
    min_captured: float = Field(
        default=0.95,
        gt=0,
        lt=1,
        description="Stop once the selection is promised to have this share of the influence that the best one has,"
        " beyond the pool's mean; `size: auto` only",
    )
    max_cost: float = Field(
        default=RDS_PLUS_SHARE,
        gt=0,
        le=10,
        description="What the job may cost, as a share of method `rds_plus` on the same pool and model, but that twice the budget"
        " may always be refined; `size: auto` only",
    )

    @field_validator("size")
    @classmethod
    def _holds_the_budget(cls, size: Any) -> Any:
        if isinstance(size, float) and 0 < size < 1:
            raise ValueError("must be 0, or at least 1: the budget is selected from what was refined")
        return size

    @model_validator(mode="before")
    @classmethod
    def _read_short_form(cls, given: Any) -> Any:
        """`auto`; or a number: the share of the pool that is computed in one round, 0 for none."""
        if given == "auto":
            return {}
        if isinstance(given, int | float) and not isinstance(given, bool):
            if given > 1:
                raise ValueError(
                    f'a number is a share of the pool, at most 1; {given:g} times the budget is {{"size": {given:g}}}'
                )
            return {"share": given, "rounds": 1} if given else {"size": 0}
        return given

    @property
    def is_auto(self) -> bool:
        return self.size == "auto" and self.share is None


Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Strict):
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
            write_out(self, learning_rate=2e-5 if self.is_adam else 1e-3)
        return self

    @property
    def is_adam(self) -> bool:
        return self.type in ("adam", "adamw")

    @property
    def needs_state(self) -> bool:
        return self.is_adam or self.momentum > 0


class Lora(Strict):
    """Low-rank adapters (peft) instead of the whole model."""

    rank: int = Field(default=16, ge=1, le=512)
    alpha: float = Field(default=32.0, gt=0, le=4096)
    modules: Literal["all-linear", "attention", "mlp"] = "all-linear"


class Warmup(Strict):
    """Train the model on a random part of the pool first; influence is then measured on the trained model."""

    samples: int = Field(default=1000, ge=1, le=1_000_000, description="Lowered to the number of usable samples")
    epochs: int = Field(default=1, ge=1, le=20)
    learning_rate: float = Field(default=2e-5, gt=0, le=1)
    batch_size: int = Field(default=16, ge=1, le=1024)
    lora: Lora | None = Field(default=None, description="null: the whole model is trained")


class Curvature(Strict):
    """How the Hessian of the target loss is approximated for second-order weights; `selection: weighted` only."""

    type: Literal["none", "fisher", "ggn", "hessian"] = "none"
    rank: int = Field(default=32, ge=1, le=256, description="Directions; `ggn` and `hessian` only")
