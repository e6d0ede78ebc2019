"""What the routes of results answer with."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.datasets.schemas import Messages
from service.http.pagination import NumberedPage
from service.results.summary_schemas import Summary

_JOB = "job_0193a1b2c3d4e5f60718293a4b5c6d7e"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Finding(_Strict):
    about: Literal["choice", "fidelity", "step", "rows", "duplicates", "overlap", "repeats", "sources"] = Field(
        description="`choice`: how near the selection is to the one from exact gradients. `fidelity`: whether propagation knows"
        " more than guessing. `step`: what a step on the selection does to the loss, beside one on random samples. `rows`: what"
        " took no part, was cut or rendered otherwise. `duplicates`: selected samples that say the same. `overlap`: selected"
        " samples that are of the target too. `repeats`: both, in results of earlier versions. `sources`: whether nearly all"
        " are of one"
    )
    level: Literal["ok", "look", "bad"] = Field(
        description="`look`: worth a look before training on it; `bad`: not to be trained on before it is understood"
    )
    figure: float | None = Field(description="What the level was decided by; null: there is none", examples=[0.93])
    meaning: str = Field(
        examples=[
            "The selection is expected to have 93% of the influence, beyond the pool's mean, that the exact selection has."
        ]
    )
    advice: str | None = Field(description="What to do; null: nothing", examples=[None])


class _Head(BaseModel):
    """What stands first in the summary."""

    object: Literal["selection_result"] = "selection_result"
    job_id: str = Field(examples=[_JOB])
    name: str | None = Field(description="Of the job, now; null: it has none", examples=["gsm8k, lr 3e-4"])
    labels: dict[str, str] = Field(description="Of the job, now", examples=[{"team": "search"}])
    created_at: datetime
    sample_count: int = Field(description="Number of samples in the pool, each with a weight", examples=[600])
    selected_count: int = Field(description="Number of selected samples", examples=[60])
    verdict: list[Finding] = Field(
        default=[],
        description="What to know before training on the selection, the worst first; empty in results of earlier versions",
    )


class SelectionResult(Summary, _Head):
    """The summary of a succeeded job."""


class WeightOut(_Strict):
    index: int = Field(description="Position in the pool, from 0", examples=[17])
    id: str = Field(description="The sample's own id in the pool", examples=["word_problem-0017"])
    source: str | None = Field(examples=["word_problem"])
    influence: float | None = Field(
        description="How much training on it helps the target; higher is better. null: it took no part, because it is unusable,"
        " not finite or left out by `duplicates` or `overlap`",
        examples=[0.4375],
    )
    weight: float = Field(description="0 if it was not selected", examples=[1.0])
    exact: bool = Field(description="true: the influence was computed; false: propagated from landmarks")
    text: str | None = Field(
        default=None,
        exclude_if=lambda text: text is None,
        description="How what it says begins, each message under its role; not there unless `include=text` asks for it, or"
        " once the pool's rows have been removed",
        examples=["user: What is 7 times 6?\nassistant: 42"],
    )


class SelectedOut(WeightOut):
    influence: float = Field(
        description="How much training on it helps the target; higher is better", examples=[0.4375]
    )
    rank: int = Field(description="0 is the first selected", examples=[0])


class WeightsPage(NumberedPage[WeightOut]):
    """Weights in the order asked for; `last_id` is the index of the last that was looked at."""


class SelectedPage(NumberedPage[SelectedOut]):
    """Selected samples in the order asked for; `last_id` is the rank of the last that was looked at."""


Excerpt = Annotated[
    str | None,
    Field(
        description="The first 300 characters of what it says; null: its rows have been removed",
        examples=["user: What is 7 times 6?\nassistant: 42"],
    ),
]


class TargetInfluence(_Strict):
    index: int = Field(description="Position in the target, from 0", examples=[3])
    id: str = Field(description="The target sample's own id", examples=["dev-3"])
    excerpt: Excerpt
    influence: float | None = Field(
        description="The sample's influence on this target sample; null: it does not count", examples=[0.5]
    )
    counts: bool = Field(description="false: it is unusable or has no finite gradient and is excluded from the mean")


class TargetsPage(NumberedPage[TargetInfluence]):
    """The influence on each sample of the target, in order; `last_id` is the index of the last, for `targets_after`."""


class LandmarkOut(_Strict):
    """An exact sample near to the one that is explained: a landmark, or one of the shortlist."""

    index: int = Field(description="Position in the pool, from 0", examples=[912])
    id: str = Field(description="Its own id in the pool", examples=["word_problem-0912"])
    source: str | None = Field(examples=["word_problem"])
    excerpt: Excerpt
    influence: float = Field(description="Its own influence, from its gradient; on `target` if given", examples=[0.61])
    kernel: float = Field(
        description="Similarity of the embeddings of the two samples; unless the kernel is linear, 1 if they are equal",
        examples=[0.83],
    )
    weight: float = Field(
        description="Its share of the similarity of all that are listed: 0 to 1, 1 together", examples=[0.35]
    )
    contribution: float = Field(
        description="`weight` times what its influence differs from `average`", examples=[0.021]
    )


class TakenBy(_Strict):
    """What took the sample into the selection."""

    target: int = Field(
        description="Position of the target sample whose turn it was: of what was left, this sample had the largest influence on"
        " it",
        examples=[3],
    )
    id: str = Field(description="The target sample's own id", examples=["dev-3"])
    pick: int = Field(description="0: it was the first sample that this target took", examples=[2])


class Explanation(_Strict):
    """The parts of the sample's influence. Of a propagated one, `average`, the contributions of `landmarks` and `correction`
    add up to `influence`."""

    explained_by: Literal["own_gradient", "landmarks", "embedding_similarity", "none"] = Field(
        description="Where the influence comes from. `none`: the sample has none, or the method computes none"
    )
    sentence: str = Field(description="The same in words")
    target: int | None = Field(description="The requested target sample; null: the mean over those that count")
    reason: str | None = Field(
        default=None,
        description="Why the sample took no part: a reason of `unusable` in the result, or `not_finite`; null: it took part",
    )
    influence: float | None = Field(
        description="What is explained: the sample's influence, or its influence on `target`; null: there is none"
    )
    targets: TargetsPage | None = Field(description="null if the sample has no influence")
    average: float | None = Field(
        default=None,
        description="Mean influence of the landmarks, which are a random part of the pool: what any sample would be given; null"
        " unless it was propagated",
        examples=[0.042],
    )
    landmarks: list[LandmarkOut] = Field(
        default=[], description="The nearest exact samples, the nearest first; empty unless it was propagated"
    )
    correction: float | None = Field(
        default=None,
        description="What the regression on all exact samples adds to the average and the nearest; where it is larger than they"
        " are, they do not explain the influence. null unless it was propagated",
        examples=[-0.006],
    )


class SampleOut(WeightOut):
    """One sample of the pool: its content, its influence and weight, and why."""

    object: Literal["sample"] = "sample"
    job_id: str = Field(examples=[_JOB])
    selected: bool
    rank: int | None = Field(description="0 is the first selected; null if it was not selected", examples=[0])
    taken_by: TakenBy | None = Field(
        description="null if it was not selected, not by round robin, or by a version that did not keep it"
    )
    messages: Messages
    tools: list[dict[str, Any]] | None
    text: str | None
    content_missing: str | None = Field(description="Why messages and text are missing")
    explanation: Explanation | None
    explanation_missing: str | None = Field(description="Why there is no explanation, and what to do")


class ProvenanceOut(_Strict):
    """The immutable audit record."""

    object: Literal["provenance"] = "provenance"
    job_id: str = Field(examples=[_JOB])
    created_at: datetime
    weights_root: str = Field(
        pattern="^[0-9a-f]{64}$",
        description="Merkle root of the weights, 16,384 samples per leaf. leaf = sha256 of the influences (float32; null is the"
        " NaN 0x7fc00000), weights (float32) and exact flags (one byte, 0 or 1), little-endian; node = sha256(0x01 || left ||"
        " right); the last node of an odd level is promoted.",
    )
    chunk_sha256: list[str] | None = Field(description="With `chunks`: the leaves; null if the job has been deleted")
    record: dict[str, Any] = Field(description="Request, inputs, code, environment, parameters and units of the job")
