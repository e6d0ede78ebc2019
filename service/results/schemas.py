"""What the routes of results answer with."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

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


class WeightsPage(_Strict):
    """Weights in pool order."""

    object: Literal["list"] = "list"
    data: list[WeightOut]
    has_more: bool
    next_start: int | None = Field(description="`start` of the next page; null after the last", examples=[1000])


class SelectedPage(_Strict):
    """Selected samples in rank order."""

    object: Literal["list"] = "list"
    data: list[SelectedOut]
    has_more: bool
    last_rank: int | None = Field(description="`after_rank` of the next page", examples=[99])


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
    record: dict[str, Any] = Field(description="Request, inputs, code, environment, parameters and units of the job")
