"""Results of jobs. Made of docs/openapi.json by `make openapi`: change that."""

from datetime import datetime
from typing import Any, Literal

from winnow.answers.base import Answer
from winnow.answers.datasets import Message
from winnow.answers.jobs import ComparedCosts


class Finding(Answer):
    """The object `Finding` of the API."""

    about: Literal["choice", "fidelity", "step", "rows", "duplicates", "overlap", "repeats", "sources"] | str
    """`choice`: how near the selection is to the one from exact gradients. `fidelity`: whether propagation knows more
    than guessing. `step`: what a step on the selection does to the loss, beside one on random samples. `rows`: what
    took no part, was cut or rendered otherwise. `duplicates`: selected samples that say the same. `overlap`: selected
    samples that are of the target too. `repeats`: both, in results of earlier versions. `sources`: whether nearly all
    are of one"""
    level: Literal["ok", "look", "bad"] | str
    """`look`: worth a look before training on it; `bad`: not to be trained on before it is understood"""
    figure: float | None
    """What the level was decided by; null: there is none"""
    meaning: str
    advice: str | None
    """What to do; null: nothing"""


class SelectionResult(Answer):
    """The summary."""

    object: Literal["selection_result"] | str
    job_id: str
    name: str | None
    """Of the job, now; null: it has none"""
    labels: dict[str, str]
    """Of the job, now"""
    created_at: datetime
    sample_count: int
    """Number of samples in the pool, each with a weight"""
    selected_count: int
    """Number of selected samples"""
    verdict: list[Finding]
    """What to know before training on the selection, the worst first; empty in results of earlier versions"""
    costs: ComparedCosts | None
    """What the job has cost beside other ways to choose, from its own counts of samples and tokens; null: the model's
    shape is unknown, or the job is of an earlier version"""


class Weight(Answer):
    """The object `WeightOut` of the API."""

    index: int
    """Position in the pool, from 0"""
    id: str
    """The sample's own id in the pool"""
    source: str | None
    influence: float | None
    """How much training on it helps the target; higher is better. null: it took no part, because it is unusable, not
    finite or left out by `duplicates` or `overlap`"""
    weight: float
    """0 if it was not selected"""
    exact: bool
    """true: the influence was computed; false: propagated from landmarks"""


class Selected(Answer):
    """The object `SelectedOut` of the API."""

    index: int
    """Position in the pool, from 0"""
    id: str
    """The sample's own id in the pool"""
    source: str | None
    influence: float
    """How much training on it helps the target; higher is better"""
    weight: float
    """0 if it was not selected"""
    exact: bool
    """true: the influence was computed; false: propagated from landmarks"""
    rank: int
    """0 is the first selected"""


class TargetInfluence(Answer):
    """The object `TargetInfluence` of the API."""

    index: int
    """Position in the target, from 0"""
    id: str
    """The target sample's own id"""
    influence: float | None
    """The sample's influence on this target sample; null: it does not count"""
    counts: bool
    """false: it is unusable or has no finite gradient and is excluded from the mean"""


class TargetsPage(Answer):
    """The influence on each sample of the target, in order; `last_id` is the index of the last, for `targets_after`."""

    object: Literal["list"] | str
    data: list[TargetInfluence]
    has_more: bool
    last_id: int | None
    """`after` for the next page; null if this page is empty"""


class Landmark(Answer):
    """The object `LandmarkOut` of the API."""

    index: int
    """Position in the pool, from 0"""
    id: str
    """The landmark's own id in the pool"""
    source: str | None
    influence: float
    """Its own influence, from its gradient; on `target` if given"""
    kernel: float
    """Similarity of the embeddings of sample and landmark; with the Gaussian kernel, 1 if they are equal"""
    contribution: float
    """Its contribution to the sample's influence: the kernel times the landmark's coefficient in the kernel ridge
    regression, whose sign may differ from that of its influence"""
    share: float
    """Absolute size of its contribution relative to all contributions: 0 to 1"""


class OtherLandmarks(Answer):
    """The sum over all landmarks that are not listed."""

    count: int
    contribution: float
    share: float


class Explanation(Answer):
    """The components of the sample's influence. The contributions of `landmarks` and `others` add up to `influence`."""

    explained_by: Literal["own_gradient", "landmarks", "embedding_similarity", "none"] | str
    """Where the influence comes from. `none`: the sample has none, or the method computes none"""
    sentence: str
    """The same in words"""
    target: int | None
    """The requested target sample; null: the mean over those that count"""
    reason: str | None
    """Why the sample took no part: a reason of `unusable` in the result, or `not_finite`; null: it took part"""
    influence: float | None
    """What is explained: the sample's influence, or its influence on `target`; null: there is none"""
    targets: TargetsPage | None
    """null if the sample has no influence"""
    landmarks: list[Landmark]
    """Largest contribution first, regardless of sign; empty unless landmarks contributed"""
    others: OtherLandmarks | None
    """null unless landmarks contributed"""


class Sample(Answer):
    """One sample of the pool: its content, its influence and weight, and why."""

    index: int
    """Position in the pool, from 0"""
    id: str
    """The sample's own id in the pool"""
    source: str | None
    influence: float | None
    """How much training on it helps the target; higher is better. null: it took no part, because it is unusable, not
    finite or left out by `duplicates` or `overlap`"""
    weight: float
    """0 if it was not selected"""
    exact: bool
    """true: the influence was computed; false: propagated from landmarks"""
    object: Literal["sample"] | str
    job_id: str
    selected: bool
    rank: int | None
    """0 is the first selected; null if it was not selected"""
    messages: list[Message] | None
    tools: list[dict[str, Any]] | None
    text: str | None
    content_missing: str | None
    """Why messages and text are missing"""
    explanation: Explanation | None
    explanation_missing: str | None
    """Why there is no explanation, and what to do"""


class Provenance(Answer):
    """The immutable audit record."""

    object: Literal["provenance"] | str
    job_id: str
    created_at: datetime
    weights_root: str
    """Merkle root of the weights, 16,384 samples per leaf. leaf = sha256 of the influences (float32; null is the NaN
    0x7fc00000), weights (float32) and exact flags (one byte, 0 or 1), little-endian; node = sha256(0x01 || left ||
    right); the last node of an odd level is promoted."""
    chunk_sha256: list[str] | None
    """With `chunks`: the leaves; null if the job has been deleted"""
    record: dict[str, Any]
    """Request, inputs, code, environment, parameters and units of the job"""
