"""Samples of a result, and its provenance. Made of docs/openapi.json by `make openapi`: change that."""

from datetime import datetime
from typing import Any, Literal

from winnow.answers.base import Answer
from winnow.answers.datasets import Message


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
    text: str | None
    """How what it says begins, each message under its role; not there unless `include=text` asks for it, or once the
    pool's rows have been removed"""


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
    text: str | None
    """How what it says begins, each message under its role; not there unless `include=text` asks for it, or once the
    pool's rows have been removed"""
    rank: int
    """0 is the first selected"""


class TakenBy(Answer):
    """What took the sample into the selection."""

    target: int
    """Position of the target sample whose turn it was: of what was left, this sample had the largest influence on it"""
    id: str
    """The target sample's own id"""
    pick: int
    """0: it was the first sample that this target took"""


class TargetInfluence(Answer):
    """The object `TargetInfluence` of the API."""

    index: int
    """Position in the target, from 0"""
    id: str
    """The target sample's own id"""
    excerpt: str | None
    """The first 300 characters of what it says; null: its rows have been removed"""
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
    """An exact sample near to the one that is explained: a landmark, or one of the shortlist."""

    index: int
    """Position in the pool, from 0"""
    id: str
    """Its own id in the pool"""
    source: str | None
    excerpt: str | None
    """The first 300 characters of what it says; null: its rows have been removed"""
    influence: float
    """Its own influence, from its gradient; on `target` if given"""
    kernel: float
    """Similarity of the embeddings of the two samples; unless the kernel is linear, 1 if they are equal"""
    weight: float
    """Its share of the similarity of all that are listed: 0 to 1, 1 together"""
    contribution: float
    """`weight` times what its influence differs from `average`"""


class Explanation(Answer):
    """The parts of the sample's influence. Of a propagated one, `average`, the contributions of `landmarks` and
    `correction` add up to `influence`."""

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
    average: float | None
    """Mean influence of the landmarks, which are a random part of the pool: what any sample would be given; null unless
    it was propagated"""
    landmarks: list[Landmark]
    """The nearest exact samples, the nearest first; empty unless it was propagated"""
    correction: float | None
    """What the regression on all exact samples adds to the average and the nearest; where it is larger than they are,
    they do not explain the influence. null unless it was propagated"""


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
    text: str | None
    object: Literal["sample"] | str
    job_id: str
    selected: bool
    rank: int | None
    """0 is the first selected; null if it was not selected"""
    taken_by: TakenBy | None
    """null if it was not selected, not by round robin, or by a version that did not keep it"""
    messages: list[Message] | None
    tools: list[dict[str, Any]] | None
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
