"""Uploads in parts that were given up, and parts that belong to none."""

from sqlalchemy import text
from support.retention_world import MONTH, Kept

from service.datasets.uploads import repository as uploads
from service.datasets.uploads.files import part_key
from service.ids import new_id


def part(kept: Kept, upload: str, number: int = 0, *, days: float = 40) -> str:
    return kept.put(part_key(upload, number), days=days)


def begun(kept: Kept, *, hours_ago: float) -> str:
    """An upload of which one part has come."""
    owner = kept.ledger.owner
    upload = new_id("up")
    columns = {"id": upload, "tenant": owner["tenant_id"], "key": owner["key_id"], "sha256": f"{upload:>064}"}
    with kept.ledger.engine.begin() as connection:
        statement = (
            "INSERT INTO uploads (id, tenant_id, key_id, sha256, bytes, part_bytes, received, used_at)"
            " VALUES (:id, :tenant, :key, :sha256, 20, 10, 1, now() - interval '1 hour' * :hours)"
        )
        connection.execute(text(statement), {**columns, "hours": hours_ago})
    part(kept, upload)
    return upload


def test_an_upload_that_was_given_up_goes_with_its_parts(kept: Kept) -> None:
    old, young = begun(kept, hours_ago=25), begun(kept, hours_ago=23)
    found = kept.collect(MONTH, dry_run=True)
    assert found.uploads == [old]
    assert len(kept.keys()) == 2
    found = kept.collect()
    assert found.uploads == [old]
    assert kept.keys() == {part_key(young, 0)}
    with kept.ledger.sessions() as session:
        assert uploads.existing(session, [old, young]) == {young}
    never = MONTH.model_copy(update={"uploads_hours": 0.0})
    begun(kept, hours_ago=1_000)
    assert kept.collect(never).uploads == []


def test_a_part_that_came_when_its_upload_had_gone_goes_after_a_day(kept: Kept) -> None:
    part(kept, new_id("up"), days=2)
    young = part(kept, new_id("up"), days=0.5)
    found = kept.collect()
    assert found.removed["uploads"].files == 1
    assert kept.keys() == {young}
    assert found.unknown.files == 0
