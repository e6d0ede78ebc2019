"""What coding agents read is made of the documentation as it is now, and leads to pages and commands that there are."""

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from support.doc_blocks import ROOT
from typer.main import get_command

from winnow.cli.main import app

MADE = ["llms.txt", "skills/winnow/SKILL.md"]


@pytest.mark.parametrize("name", MADE)
def test_it_is_made_of_the_documentation_as_it_is(name: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "ops/docs/agents.py", tmp_path], check=True)
    assert (tmp_path / name).read_text() == (ROOT / name).read_text(), "the documentation has changed: run `make docs`"


def test_the_skill_has_the_form_that_agents_read() -> None:
    _, head, body = (ROOT / "skills/winnow/SKILL.md").read_text().split("---\n", 2)
    front = yaml.safe_load(head)
    assert front["name"] == "winnow"
    assert 0 < len(front["description"]) <= 1024
    assert len(body.splitlines()) < 500
    assert "](" not in body, "a link leads nowhere where the file is installed alone"
    commands = re.findall(r"^winnow (\w+)", body, re.M)
    assert len(dict.fromkeys(commands[:5])) == 5
    program = get_command(app)
    assert set(commands) <= set(program.list_commands(click.Context(program)))


def test_every_page_is_listed_and_says_what_it_is() -> None:
    lines = re.findall(r"^- \[(.+?)\]\((.+?)\)(?:: (.+))?$", (ROOT / "llms.txt").read_text(), re.M)
    listed = {path: about for _, path, about in lines}
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= set(listed)
    assert all((ROOT / path).is_file() for path in listed)
    assert all(len(about) > 15 for path, about in listed.items() if not path.startswith("docs/decisions/"))
