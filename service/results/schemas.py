"""What the routes of results answer with."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from service.datasets.schemas import Message
from service.pages import NumberedPage

_JOB = "job_0193a1b2c3d4e5f60718293a4b5c6d7e"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SelectionResult(BaseModel):
    """The summary. Beside the fields named here it has those that the job's method computed, null where it did not:

    * `sentences`: what to know first, in words; `notes`: of these, what was lowered, left out or not reached
    * `influence`, `weight`: histogram (64 bins), quantiles, mean and std, of all samples and of the selected
    * `sources`: of each source, samples in the pool, selected, and the sum of their weights
    * `landmark_count`, `refined_count`: samples whose gradients were computed, as landmarks and as the shortlist
    * `fidelity`: leave-one-out `mean_r2` and `mean_spearman`, and `r2` and `spearman` of each target
    * `embedding`: what `auto` has `chosen`, and the `candidates` with their cost and fidelity
    * `kernel`: `sigma` (width) and `delta` (ridge) that were used
    * `scaling_error`: relative error of the factored scaling of Adam
    * `warmup`: samples, steps, loss of the first and the last step, and `losses` (200 means at most)
    * `solution`: certificate of the weights: `support`, `ridge`, `threshold`, `objective`, `kkt_residual`, `duality_gap`,
      `iterations`, `clipped_eigenvalues`, `clipped_mass`, `restricted`
    * `validation`: measured and predicted change of the mean target loss by one step on the selection, on random samples, and
      on the targets held out, and its `sentence`
    * `nonfinite`: of pool and target, how many have no finite loss, gradient or embedding, and the first hundred by id
    * `pool`, `target`: samples, tokens, how many were truncated or have no response
    * `dtype`, `device`, `stages`: where and how long it was computed
    """

    # The one open model: the method decides what there is to say, and publish refuses names that are taken.
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)

    object: Literal["selection_result"] = "selection_result"
    job_id: str = Field(examples=[_JOB])
    created_at: datetime
    sample_count: int = Field(description="Samples of the pool, each with a weight", examples=[600])
    selected_count: int = Field(description="Samples of the selection", examples=[60])


class WeightOut(_Strict):
    index: int = Field(description="Position in the pool, from 0", examples=[17])
    id: str = Field(description="The sample's own id in the pool", examples=["word_problem-0017"])
    source: str | None = Field(examples=["word_problem"])
    influence: float = Field(description="What training on it does for the target; more is better", examples=[0.4375])
    weight: float = Field(description="0 where it was not selected", examples=[1.0])
    exact: bool = Field(description="The influence was computed; false: propagated from landmarks")


class SelectedOut(WeightOut):
    rank: int = Field(description="0 was taken first", examples=[0])


class WeightsPage(NumberedPage[WeightOut]):
    """Weights in pool order; `last_id` is the index of the last."""


class SelectedPage(NumberedPage[SelectedOut]):
    """Selected samples in rank order; `last_id` is the rank of the last."""


class TargetInfluence(_Strict):
    index: int = Field(description="Position in the target, from 0", examples=[3])
    id: str = Field(description="The target sample's own id", examples=["dev-3"])
    influence: float = Field(description="The sample's influence on this target sample", examples=[0.5])
    counts: bool = Field(description="False: has no response or no finite gradient, and takes no part in the mean")


class TargetsPage(NumberedPage[TargetInfluence]):
    """The influence on each sample of the target, in order; `last_id` is the index of the last, for `targets_after`."""


class LandmarkOut(_Strict):
    index: int = Field(description="Position in the pool, from 0", examples=[912])
    id: str = Field(description="The landmark's own id in the pool", examples=["word_problem-0912"])
    source: str | None = Field(examples=["word_problem"])
    influence: float = Field(description="Its own, computed from its gradient, on what `target` says", examples=[0.61])
    kernel: float = Field(
        description="How alike the embeddings of sample and landmark are: with the Gaussian kernel 1 where they are equal",
        examples=[0.83],
    )
    contribution: float = Field(
        description="What it added to the sample's influence: the kernel times the landmark's coefficient of the kernel ridge"
        " regression, which may have the other sign than its influence",
        examples=[0.21],
    )
    share: float = Field(
        description="Its contribution as a part of all contributions, signs left aside: 0 to 1", examples=[0.35]
    )


class OtherLandmarks(_Strict):
    """All landmarks that are not named, together."""

    count: int = Field(examples=[4086])
    contribution: float
    share: float


class Explanation(_Strict):
    """What the sample's influence consists of. The contributions of `landmarks` and `others` add up to `influence`."""

    explained_by: Literal["own_gradient", "landmarks", "embedding_similarity", "none"] = Field(
        description="Where the influence is from. `none`: the sample has none, or the method computes none"
    )
    sentence: str = Field(description="The same in words")
    target: int | None = Field(description="The target sample asked for; null: the mean over those that count")
    influence: float = Field(description="What is explained: the sample's influence, or its influence on `target`")
    targets: TargetsPage | None = Field(description="null where the sample has no influence")
    landmarks: list[LandmarkOut] = Field(
        default=[],
        description="Largest contribution first, whatever its sign; empty unless landmarks spoke for the sample",
    )
    others: OtherLandmarks | None = Field(default=None, description="null unless landmarks spoke for the sample")


class SampleOut(WeightOut):
    """One sample of the pool: what it is, what it was given, and why."""

    object: Literal["sample"] = "sample"
    job_id: str = Field(examples=[_JOB])
    selected: bool
    rank: int | None = Field(description="0 was taken first; null where it was not selected", examples=[0])
    messages: list[Message] | None
    text: str | None
    content_missing: str | None = Field(description="Why neither messages nor text are there")
    explanation: Explanation | None
    explanation_missing: str | None = Field(description="Why there is no explanation, and what to do")


class ProvenanceOut(_Strict):
    """The audit record, immutable."""

    object: Literal["provenance"] = "provenance"
    job_id: str = Field(examples=[_JOB])
    created_at: datetime
    weights_root: str = Field(
        pattern="^[0-9a-f]{64}$",
        description="Merkle root of the weights, 16,384 samples a leaf. leaf = sha256 of the influences (float32), weights"
        " (float32) and exact flags (one byte, 0 or 1), little-endian; node = sha256(0x01 || left || right); the last"
        " node of an odd level is promoted.",
    )
    chunk_sha256: list[str] | None = Field(description="With `chunks`: the leaves; null where the job was deleted")
    record: dict[str, Any] = Field(description="Request, inputs, code, environment, parameters and units of the job")
