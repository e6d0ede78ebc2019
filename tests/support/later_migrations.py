"""Migrations of a later version, which the tests of upgrades run: they alter tables that are in use."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory

from service.db import migrate

HEADER = """
from alembic import op

revision, down_revision = "{revision}", "{before}"
branch_labels = depends_on = None


def upgrade():
"""
LATER = {
    "later_1": '    op.execute("CREATE TABLE later ()")\n',
    # Each of the tables in use is altered in a transaction of its own, as CONTRIBUTING.md asks for.
    "later_2": """
    with op.get_context().autocommit_block():
        op.execute("ALTER TABLE job_units ADD COLUMN IF NOT EXISTS note varchar")
    op.execute("ALTER TABLE selection_jobs ADD COLUMN note varchar NOT NULL DEFAULT ''")
""",
}
FIRST = ScriptDirectory.from_config(migrate.alembic_config("")).get_current_head()
HEAD = "later_2"


@contextmanager
def later_version(folder: Path) -> Iterator[None]:
    """`upgrade` is that of a later version; `folder` is new."""
    shutil.copytree(migrate.MIGRATIONS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for (revision, body), before in zip(LATER.items(), (FIRST, *LATER), strict=False):
        text = HEADER.format(revision=revision, before=before) + body
        (folder / "versions" / f"{revision}_later.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(migrate, "MIGRATIONS", folder)
        yield
