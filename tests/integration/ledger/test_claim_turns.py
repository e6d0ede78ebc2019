"""The order between tenants in a claim: few running units first, then turns; nobody starves, and no row is waited for."""

from collections import Counter

import pytest
from sqlalchemy import text
from support.ledger_world import LedgerWorld, at_once, new_owner, unit

from service import ledger
from service.ledger import Claim
from service.plan.stages import Stage

Owner = dict[str, str]


@pytest.fixture
def two(world: LedgerWorld) -> tuple[Owner, Owner]:
    return new_owner(world.sessions), new_owner(world.sessions)


def tenant_of(world: LedgerWorld, claim: Claim) -> str:
    return world.row(claim.job_id).tenant_id


def do_next(world: LedgerWorld) -> str:
    """A worker's step: the tenant of the unit that it claimed and finished."""
    claim = world.claim()
    world.finish(claim)
    return tenant_of(world, claim)


def add_jobs(world: LedgerWorld, owner: Owner, count: int) -> None:
    with world.sessions.begin() as session:
        job = world.row(world.job(owner=owner))
        columns = "tenant_id, key_id, pool_id, target_id, model, budget, parameters, request, job_metadata"
        session.execute(
            text(f"""
                WITH made AS (
                    INSERT INTO selection_jobs (id, status, {columns})
                    SELECT id || n, 'queued', {columns} FROM selection_jobs, generate_series(2, :count) n WHERE id = :id
                    RETURNING id
                )
                INSERT INTO job_units (job_id, stage, shard, artifact_key, spec, state, progress_total)
                SELECT id, 'prepare', 0, id, '{{}}', 'pending', 1 FROM made
            """),
            {"id": job.id, "count": count},
        )


@pytest.mark.parametrize("workers", [1, 2])
def test_a_thousand_jobs_of_one_tenant_do_not_starve_the_only_one_of_another(
    world: LedgerWorld, two: tuple[Owner, Owner], workers: int
) -> None:
    many, single = two
    add_jobs(world, many, 1_000)
    claim = world.claim()
    job_id = world.job(owner=single)
    assert world.claimable_count() == 1_000
    if workers == 1:
        world.finish(claim)
        assert do_next(world) == many["tenant_id"], "its turn lasts"
        world.end_turns()
    assert world.claim().job_id == job_id


def test_a_worker_stays_with_a_tenant_for_a_turn_and_then_it_is_the_next_ones(
    world: LedgerWorld, two: tuple[Owner, Owner]
) -> None:
    for _ in range(6):
        for owner in two:
            world.job(owner=owner)
    a, b = (owner["tenant_id"] for owner in sorted(two, key=lambda owner: owner["tenant_id"]))
    order = []
    for _ in range(4):
        order += [do_next(world), do_next(world)]
        world.end_turns()
    assert order == [a, a, b, b, a, a, b, b]


def test_a_tenant_in_turn_with_nothing_to_do_leaves_its_workers_to_others(
    world: LedgerWorld, two: tuple[Owner, Owner]
) -> None:
    a, b = two
    world.job(owner=a)
    assert do_next(world) == a["tenant_id"]
    world.job(owner=b)
    assert do_next(world) == b["tenant_id"]


def test_workers_are_shared_out_whatever_the_turn(world: LedgerWorld, two: tuple[Owner, Owner]) -> None:
    third = new_owner(world.sessions)
    for owner in (*two, third):
        world.job(*(unit(Stage.EMBED, shard) for shard in range(8)), owner=owner)
    claims = [world.claim() for _ in range(7)]
    running = Counter(tenant_of(world, claim) for claim in claims)
    assert sorted(running.values()) == [2, 2, 3]
    back = next(claim for claim in claims if running[tenant_of(world, claim)] == 2)
    world.finish(back)
    assert tenant_of(world, world.claim()) == tenant_of(world, back)


def test_a_tenant_whose_jobs_are_held_holds_up_no_other(world: LedgerWorld, two: tuple[Owner, Owner]) -> None:
    held = world.job(unit(Stage.EMBED, 0), unit(Stage.EMBED, 1), owner=two[0])
    claim = world.claim()
    assert claim.job_id == held
    other = world.job(owner=two[1])
    world.job(unit(Stage.EMBED, 0), owner=world.owner)
    world.claim()
    world.claim()
    last = world.job(owner=two[1])
    with world.sessions() as stalled:
        ledger.lock_claim(stalled, claim)
        assert world.claim().job_id == last != other
        stalled.rollback()


def test_a_claim_waits_for_no_tenants_row(world: LedgerWorld, two: tuple[Owner, Owner]) -> None:
    """Whoever holds it: the claim is made, and the turn starts with a later one."""
    jobs = [world.job(owner=two[0]) for _ in range(2)]
    with world.engine.begin() as holder:
        holder.execute(text("SELECT FROM tenants WHERE id = :id FOR UPDATE"), {"id": two[0]["tenant_id"]})
        assert world.claim().job_id == jobs[0]
    assert turn(world, two[0]) is None
    assert world.claim().job_id == jobs[1]
    assert turn(world, two[0]) is not None


def turn(world: LedgerWorld, owner: Owner) -> object:
    with world.engine.connect() as connection:
        return connection.scalar(
            text("SELECT last_scheduled_at FROM tenants WHERE id = :id"), {"id": owner["tenant_id"]}
        )


def test_many_claims_at_once_share_out_all_units_without_a_deadlock(
    world: LedgerWorld, two: tuple[Owner, Owner]
) -> None:
    for _ in range(4):
        for owner in two:
            world.job(*(unit(Stage.EMBED, shard) for shard in range(3)), owner=owner)

    def claim_all() -> list[Claim]:
        claims = []
        while (claim := world.try_claim()) is not None:
            claims.append(claim)
        return claims

    outcomes = at_once([claim_all] * 6)
    assert not [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    claimed = [claim.unit_id for claims in outcomes for claim in claims]
    assert len(claimed) == len(set(claimed)) == 24
