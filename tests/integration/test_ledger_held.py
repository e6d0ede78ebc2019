"""A worker that stands still in the midst of a write holds its job's row; the others go on with other jobs."""

from collections.abc import Iterator

import pytest
from ledger_world import LedgerWorld, ledger_world, unit

from service.jobs import ledger
from service.jobs.state import Stage


@pytest.fixture(scope="module")
def world(postgres_url: str) -> Iterator[LedgerWorld]:
    with ledger_world(postgres_url) as made:
        yield made


def test_a_claim_passes_over_a_job_that_is_held(world: LedgerWorld) -> None:
    held = world.job(unit(Stage.EMBED, 0), unit(Stage.EMBED, 1))
    other = world.job()
    claim = world.claim()
    assert claim.job_id == held
    with world.sessions() as stalled:
        ledger.lock_claim(stalled, claim)
        found = world.claim()
        assert found.job_id == other
        assert world.try_claim() is None
        stalled.rollback()
    assert world.claim().job_id == held


def test_a_claim_passes_over_an_artifact_that_a_claim_without_end_makes(world: LedgerWorld) -> None:
    world.empty()
    first, second = world.job(unit(Stage.EMBED, key="embed/shared")), world.job(unit(Stage.EMBED, key="embed/shared"))
    other = world.job()
    with world.sessions() as stalled:
        claim = ledger.claim_unit(stalled, worker_id="stalled", lease_seconds=60)
        assert claim is not None
        assert claim.job_id == first
        assert world.claim().job_id == other != second
        stalled.rollback()
