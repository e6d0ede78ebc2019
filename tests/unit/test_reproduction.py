"""What a reproduction says of its circumstances, and what the comparison of two jobs finds."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr

from service.plan.stages import Stage
from service.plan.versions import code_version
from winnow.client import WinnowError
from winnow.comparison import compare, is_within
from worker.errors import ModelError
from worker.publish import differences

RECORD: dict[str, Any] = {
    "model": {"fingerprint": "f", "files": {"config.json": "1", "model.safetensors": "2"}},
    "device": "cpu (1 threads, AVX2)",
    "versions": {"torch": "2.13.0", "numpy": "2.4.6"},
    "code": {stage.value: code_version(stage) for stage in (Stage.PREPARE, Stage.SELECT)},
}
PREPARED: dict[str, Any] = {
    "model_fingerprint": "f",
    "model_files": RECORD["model"]["files"],
    "device": RECORD["device"],
    "versions": RECORD["versions"],
}


class TestDifferences:
    def test_there_are_none_where_all_is_as_it_was(self) -> None:
        assert differences(RECORD, PREPARED) == {}

    def test_another_device_version_and_code_are_named(self) -> None:
        record = copy.deepcopy(RECORD)
        record["code"]["select"] = "another"
        record["code"]["a stage of before"] = "gone"
        prepared = PREPARED | {"device": "NVIDIA H200", "versions": {"torch": "2.14.0", "numpy": "2.4.6", "peft": "1"}}
        assert differences(record, prepared) == {
            "device": {"recorded": RECORD["device"], "now": "NVIDIA H200"},
            "versions.torch": {"recorded": "2.13.0", "now": "2.14.0"},
            "versions.peft": {"recorded": None, "now": "1"},
            "code.select": {"recorded": "another", "now": code_version(Stage.SELECT)},
            "code.a stage of before": {"recorded": "gone", "now": None},
        }

    def test_another_model_is_refused_and_its_files_are_named(self) -> None:
        files = {"config.json": "1", "model.safetensors": "3", "more.json": "4"}
        with pytest.raises(ModelError, match=r"model\.safetensors, more\.json\. Register") as raised:
            differences(RECORD, PREPARED | {"model_fingerprint": "g", "model_files": files})
        assert not raised.value.retryable


class Jobs:
    """A client of two jobs, "a" and "b"."""

    def __init__(self, *influences: np.ndarray, weights: Any = None, root: str = "", missing: str = "") -> None:
        self._influences = dict(zip("ab", influences, strict=True))
        self._weights = weights or dict.fromkeys("ab", np.ones(influences[0].size))
        self._root, self._missing = root, missing

    def provenance(self, job_id: str) -> dict[str, Any]:
        record = {"units": [{"artifact": "common"}, {"artifact": job_id}], "device": job_id, "versions": {"torch": "1"}}
        return {"weights_root": self._root or job_id, "record": record}

    def export(self, job_id: str, path: Path, **_: object) -> Path:
        if job_id == self._missing:
            raise WinnowError(404, "not_found", f"No selection job {job_id!r}.")
        influence, weight = self._influences[job_id], self._weights[job_id]
        order = np.argsort(-influence, kind="stable")[:10]
        rank = np.full(influence.size, -1)
        rank[order] = np.arange(order.size)
        columns = {name: np.asarray(v, np.float32) for name, v in (("influence", influence), ("weight", weight))}
        columns["influence"] = pa.array(columns["influence"], mask=np.isnan(influence))
        pq.write_table(pa.table({**columns, "rank": pa.array(rank, mask=rank < 0)}), path)
        return path


def compared(jobs: Any) -> dict[str, Any]:
    return compare(jobs, "a", "b")


class TestComparison:
    def test_jobs_of_one_root_are_equal(self) -> None:
        found = compared(Jobs(np.ones(3), np.ones(3), root="00"))
        assert found["equal"]
        assert is_within(found, 0.0)
        assert (found["shared_artifacts"], found["differs"]) == (1, {"device": ["a", "b"]})

    @pytest.mark.parametrize("decimals", [6, 0])  # 0: many values are equal
    def test_figures_are_those_of_the_arrays(self, decimals: int) -> None:
        random = np.random.default_rng(5)
        one = random.normal(size=20_000).round(decimals).astype(np.float32)
        other = (one + random.normal(scale=0.3, size=one.size)).astype(np.float32)
        found = compared(Jobs(one, other))
        gap = np.abs(one.astype(np.float64) - other)
        assert found["influence"]["largest_difference"] == pytest.approx(gap.max())
        assert found["influence"]["mean_difference"] == pytest.approx(gap.mean())
        assert found["influence"]["largest_value"] == pytest.approx(np.abs(one).max())
        assert found["rank_correlation"] == pytest.approx(spearmanr(one, other).statistic, abs=1e-4)
        chosen = [set(np.argsort(-side, kind="stable")[:10].tolist()) for side in (one, other)]
        assert found["selection"] == {"of": 10, "in_both": len(chosen[0] & chosen[1]), "same_order": False}

    def test_the_tolerance_is_a_part_of_the_largest_value(self) -> None:
        one = np.linspace(-100, 100, 50)
        found = compared(Jobs(one, one + np.float32(0.01)))
        assert is_within(found, 1.1e-4)
        assert not is_within(found, 0.9e-4)
        assert found["rank_correlation"] == pytest.approx(1, abs=1e-6)
        weights = {"a": np.ones(50), "b": np.append(np.ones(49), 1.5)}
        assert not is_within(compared(Jobs(one, one, weights=weights)), 0.4)

    def test_samples_without_an_influence_are_compared_by_having_none(self) -> None:
        one, other = np.arange(6.0), np.arange(6.0) + 0.5
        one[[1, 2]], other[2] = np.nan, np.nan
        found = compared(Jobs(one, other))
        assert found["in_one_only"] == 1
        assert found["influence"] == {"largest_difference": 0.5, "mean_difference": 0.5, "largest_value": 5.0}
        assert found["rank_correlation"] == pytest.approx(1)
        assert not is_within(found, 1.0)
        other[1] = np.nan
        assert is_within(compared(Jobs(one, other)), 0.5)
        with pytest.raises(ValueError, match="no sample has an influence in both"):
            compared(Jobs(one, np.full(6, np.nan)))

    def test_zeros_of_both_signs_rank_the_same_and_equal_values_have_no_correlation(self) -> None:
        found = compared(Jobs(np.array([0.0, -0.0, 1.0]), np.array([-0.0, 0.0, 1.0])))
        assert found["rank_correlation"] == pytest.approx(1)
        assert compared(Jobs(np.ones(3), np.arange(3)))["rank_correlation"] is None

    def test_what_cannot_be_compared_is_said(self) -> None:
        found = compared(Jobs(np.ones(3), np.ones(3), missing="a"))
        assert "No selection job 'a'" in found["missing"]
        assert not is_within(found, 1.0)
        with pytest.raises(ValueError, match="different sizes"):
            compared(Jobs(np.ones(3), np.ones(4), weights={"a": np.ones(3), "b": np.ones(4)}))
