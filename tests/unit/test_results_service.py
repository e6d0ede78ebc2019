"""What is computed of results before they are stored."""

import hashlib
import json
import struct
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from service.results.service import QUANTILE_PERCENTS, distribution, publish
from winnow.merkle import chunk_sha256, merkle_root


def test_distribution_of_known_values() -> None:
    found = distribution(np.arange(101, dtype=np.float32))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["quantiles"] == {f"p{p}": float(p) for p in QUANTILE_PERCENTS}
    assert found["mean"] == 50.0
    assert found["std"] == pytest.approx(np.sqrt((101**2 - 1) / 12))
    histogram = found["histogram"]
    assert (len(histogram["edges"]), len(histogram["counts"]), sum(histogram["counts"])) == (65, 64, 101)
    assert (histogram["edges"][0], histogram["edges"][-1]) == (0.0, 100.0)
    np.testing.assert_allclose(np.diff(histogram["edges"]), 100 / 64)


def test_a_distribution_leaves_out_what_has_no_value() -> None:
    values = np.arange(101, dtype=np.float32)
    assert distribution(np.insert(values, [0, 50, 101], np.nan)) == distribution(values)


@pytest.mark.parametrize("value", [0.0, -3.5, 1e-45, 3.4e38])
def test_distribution_of_equal_values(value: float) -> None:
    found = distribution(np.full(5, value, np.float32))
    assert sum(found["histogram"]["counts"]) == 5
    assert found["quantiles"]["p0"] == found["quantiles"]["p100"] == pytest.approx(value)
    assert found["std"] == 0.0


@pytest.mark.parametrize(
    "values", [np.zeros(0, np.float32), np.zeros((2, 2), np.float32), np.array([1, np.inf]), np.array([np.nan])]
)
def test_distribution_refuses_what_has_none(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"^values: "):
        distribution(values)


def test_chunk_hash_by_hand() -> None:
    found = chunk_sha256(np.array([1.5, -2.0], np.float32), np.array([0.0, 0.25], np.float32), np.array([True, False]))
    assert found == hashlib.sha256(struct.pack("<ff ff BB", 1.5, -2.0, 0.0, 0.25, 1, 0)).digest()


def test_an_influence_that_is_none_is_hashed_as_one_nan() -> None:
    other = np.array([0x7FC00000, 0xFFC00001, 0x7F800001], np.uint32).view(np.float32)
    zeros = np.zeros(3, np.float32), np.zeros(3, np.bool_)
    expected = struct.pack("<III", *[0x7FC00000] * 3) + bytes(15)
    assert chunk_sha256(other, *zeros) == hashlib.sha256(expected).digest()


def test_merkle_root_by_hand() -> None:
    a, b, c, d, e = (hashlib.sha256(bytes([i])).digest() for i in range(5))

    def node(left: bytes, right: bytes) -> bytes:
        return hashlib.sha256(b"\x01" + left + right).digest()

    assert merkle_root([a]) == a
    assert merkle_root([a, b]) == node(a, b)
    assert merkle_root([a, b, c]) == node(node(a, b), c)
    assert merkle_root([a, b, c, d, e]) == node(node(node(a, b), node(c, d)), e)
    with pytest.raises(ValueError, match="leaves"):
        merkle_root([])


LEFT_OUT = np.array([0, np.nan, 0], np.float32)


def arguments(**changed: Any) -> dict[str, Any]:
    return {
        "job_id": "job_1",
        "influence": np.zeros(3, np.float32),
        "weight": np.zeros(3, np.float32),
        "exact": np.zeros(3, np.bool_),
        "selected": np.array([2, 0]),
        "sample_ids": ["c", "a"],
        "sources": [None, "s"],
        "summary": {},
        "provenance": {},
    } | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"influence": np.zeros(0, np.float32)}, "influence: a job has at least one"),
        ({"influence": np.zeros(3)}, "influence: must be float32, not float64"),
        ({"influence": np.array([0, -np.inf, np.inf], np.float32)}, "influence: 2 of 3 .* first at index 1"),
        ({"influence": LEFT_OUT, "weight": np.ones(3, np.float32)}, "weight: 1 of 3 have no influence, .* index 1"),
        ({"influence": LEFT_OUT, "exact": np.ones(3, np.bool_)}, "exact: 1 of 3 have no influence, .* index 1"),
        ({"influence": LEFT_OUT, "selected": np.array([2, 1])}, "selected: holds a sample that has no influence"),
        ({"influence": np.zeros((3, 1), np.float32)}, r"influence: must have shape \(3,\)"),
        ({"weight": np.zeros(2, np.float32)}, r"weight: must have shape \(3,\)"),
        ({"weight": np.array([0, -1, 0], np.float32)}, "weight: 1 of 3 are negative, the first at index 1"),
        ({"exact": np.zeros(3, np.uint8)}, "exact: must be bool"),
        ({"selected": np.array([], np.int64)}, "selected: must be a vector of at least one"),
        ({"selected": np.array([1, 2], np.int32)}, "selected: must be .* not int32"),
        ({"selected": np.array([0, 3])}, r"selected: must lie in \[0, 3\)"),
        ({"selected": np.array([-1, 0])}, r"selected: must lie in \[0, 3\)"),
        ({"selected": np.array([1, 1])}, "selected: holds an index more than once"),
        ({"sample_ids": ["c"]}, "sample_ids: must have 2 entries"),
        ({"sources": []}, "sources: must have 2 entries"),
        ({"summary": {"fidelity": float("nan")}}, "summary: is not JSON"),
        ({"summary": {"job_id": "x"}}, "summary: .*job_id.* choose other names"),
        ({"provenance": {"seed": np.int64(1)}}, "provenance: is not JSON"),
    ],
)
def test_publish_names_the_wrong_argument_and_writes_nothing(changed: dict[str, Any], message: str) -> None:
    session = Mock()
    with pytest.raises(ValueError, match=message):
        publish(session, **arguments(**changed))
    assert session.mock_calls == []
