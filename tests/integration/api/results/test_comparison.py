"""Two results beside each other, and the check of what is stored against the audit record."""

from typing import Any

import numpy as np
import pytest
from sqlalchemy import text
from support.jobs import published, write_pool
from support.results import Published
from support.world import SECRET

from service.auth.authentication import authenticate
from service.db.engine import Sessions
from service.results import verification
from service.results.comparison import MOST_PAIRS, Comparison, compare, differences
from service.results.service import finished_job
from winnow.merkle import CHUNK_SIZE

N = 2 * CHUNK_SIZE + 5_000


@pytest.fixture(scope="module")
def pools(world: Published, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Two pools, the second without the first hundred samples of the first."""
    folder = tmp_path_factory.mktemp("pools")
    rows = [(f"id {i}", None, {"text": f"text {i}"}) for i in range(N)]
    return [write_pool(world.store, folder / str(start), rows[start:]) for start in (0, 100)]


def job(world: Published, pool: Any, first: int, influence: np.ndarray, *selected: int, **record: Any) -> str:
    """`first`: of the pool's ids."""
    weight = np.zeros(pool.row_count, np.float32)
    weight[list(selected)] = 1
    return published(
        world.sessions,
        world.key,
        pool,
        influence=influence,
        weight=weight,
        selected=np.array(selected),
        sample_ids=[f"id {first + index}" for index in selected],
        sources=[None] * len(selected),
        provenance=record,
    )


def compared(world: Published, first: str, second: str) -> Comparison:
    with world.sessions() as session:
        tenant = authenticate(session, world.key, SECRET).tenant_id
        return compare(session, finished_job(session, tenant, first), finished_job(session, tenant, second))


def test_two_jobs_on_one_pool(world: Published, pools: list[Any]) -> None:
    influence = np.arange(N, dtype=np.float32)
    changed = influence.copy()
    changed[:10] = np.nan
    first = job(world, pools[0], 0, influence, 7, N - 1, 20_000, budget=3)
    second = job(world, pools[0], 0, -changed, N - 1, 20_000, 11, 12, budget=4)
    found = compared(world, first, second)
    assert (found.is_same_pool, found.selected, found.in_both, found.jaccard) == (True, (3, 4), 2, 2 / 5)
    assert found.expected == 12 / N
    a, b = found.influence
    assert np.array_equal(a, -b), "of the same samples"
    assert 0.9 * MOST_PAIRS < a.size <= MOST_PAIRS
    assert a.min() >= 10, "those with an influence in both"
    assert a.max() > N - 100, "from the whole pool"
    assert np.histogram(a, bins=10, range=(0, N))[0].min() > 0.05 * MOST_PAIRS
    assert found.rank_correlation == pytest.approx(-1)
    assert found.differs == [("budget", 3, 4)]


def test_two_jobs_on_different_pools_are_compared_by_ids(world: Published, pools: list[Any]) -> None:
    influence = np.arange(N, dtype=np.float32)
    first = job(world, pools[0], 0, influence, 7, 150, 160, 20_000)
    second = job(world, pools[1], 100, influence[100:] * 2, 19_900, 7, 50)
    found = compared(world, first, second)
    assert (found.is_same_pool, found.expected, found.in_both) == (False, None, 2)
    assert [values.tolist() for values in found.influence] == [[150, 20_000], [300, 40_000]]


def test_two_jobs_that_have_nothing_in_common(world: Published, pools: list[Any]) -> None:
    influence = np.ones(N, np.float32)
    first, second = job(world, pools[0], 0, influence, 7), job(world, pools[1], 100, influence[100:], 8)
    found = compared(world, first, second)
    assert (found.in_both, found.jaccard, found.rank_correlation, found.influence[0].size) == (0, 0, None, 0)


def test_what_differs_is_named_and_what_names_only_a_copy_is_not() -> None:
    one = {
        "pool": {"id": "ds_1", "fingerprint": "f", "rows": 3},
        "parameters": {"method": "random", "landmarks": {"count": 4}},
        "versions": {"torch": "2.1"},
        "units": [1],
    }
    other = {
        "pool": {"id": "ds_2", "fingerprint": "f", "rows": 3},
        "parameters": {"method": "random", "landmarks": {"count": 5}, "new": []},
        "units": [2],
    }
    assert differences(one, other) == [
        ("parameters.landmarks.count", 4, 5),
        ("parameters.new", None, []),
        ("versions.torch", "2.1", None),
    ]


def verified(sessions: Sessions, tenant: str, job_id: str) -> verification.Verified:
    with sessions() as session:
        return verification.verify(session, finished_job(session, tenant, job_id))


@pytest.fixture
def tenant(world: Published) -> str:
    with world.sessions() as session:
        return authenticate(session, world.key, SECRET).tenant_id


def test_what_was_published_is_intact(world: Published, tenant: str) -> None:
    found = verified(world.sessions, tenant, world.job_id)
    assert found == verification.Verified(chunks=3, damaged=[], is_root=True, is_selection=True)
    assert found.is_intact


@pytest.mark.parametrize(
    ("change", "damaged", "is_root", "is_selection"),
    [
        ("UPDATE weight_chunks SET influence[3] = 0.5 WHERE job_id = :job AND chunk_no = 1", 1, False, True),
        ("UPDATE weight_chunks SET exact[1] = NOT exact[1] WHERE job_id = :job AND chunk_no = 2", 2, False, True),
        (
            "UPDATE weight_chunks SET influence = influence[2:], weight = weight[2:], exact = exact[2:]"
            " WHERE job_id = :job AND chunk_no = 0",
            0,
            False,
            True,
        ),
        ("UPDATE selected_samples SET weight = 7 WHERE job_id = :job AND rank = 0", None, True, False),
        ("DELETE FROM selected_samples WHERE job_id = :job AND rank = 0", None, True, False),
        ("DELETE FROM weight_chunks WHERE job_id = :job AND chunk_no = 2", None, False, True),
    ],
)
def test_what_was_changed_since_is_found(
    world: Published, pools: list[Any], tenant: str, change: str, damaged: int | None, is_root: bool, is_selection: bool
) -> None:
    changed = job(world, pools[0], 0, np.arange(N, dtype=np.float32), 3, 40, 500)
    assert verified(world.sessions, tenant, changed).is_intact
    with world.sessions.begin() as session:
        session.execute(text(change), {"job": changed})
    found = verified(world.sessions, tenant, changed)
    start = None if damaged is None else damaged * CHUNK_SIZE
    assert [span[0] for span in found.damaged] == ([] if start is None else [start])
    assert (found.is_root, found.is_selection, found.is_intact) == (is_root, is_selection, False)


def test_all_chunks_gone_is_not_intact(world: Published, pools: list[Any], tenant: str) -> None:
    changed = job(world, pools[0], 0, np.arange(N, dtype=np.float32), 3)
    with world.sessions.begin() as session:
        session.execute(text("DELETE FROM weight_chunks WHERE job_id = :job"), {"job": changed})
    assert not verified(world.sessions, tenant, changed).is_intact
