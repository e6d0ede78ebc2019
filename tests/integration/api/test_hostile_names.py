"""Names that look like others, break lines, or are calculated by a spreadsheet."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.jobs import published, write_pool
from support.world import DATASETS, JOBS, World, make_settings, serving

from service.auth.principal import Scope
from winnow.client import Winnow
from winnow.verify import NotVerified, Record, verify

HOSTILE = ["\u202e", "\u2066", "\u200f", "\u061c", "\u2028", "\u2029", "\x85", "\0"]
FORMULA = "=cmd|' /C calc'!A0"


@pytest.fixture(scope="module")
def world(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("names")
    settings = make_settings(postgres_url, folder, webhooks={"allowed_networks": ["127.0.0.0/8"]})
    with World.made(settings, scopes=Scope) as world:
        yield world


def row(**fields: str) -> dict[str, Any]:
    return {"url": DATASETS, "params": {"name": "d"}, "content": json.dumps({"text": "t", **fields})}


@pytest.mark.parametrize("character", HOSTILE, ids=ascii)
def test_a_name_that_deceives_is_refused_where_it_stands(world: World, character: str) -> None:
    name = f"invoice{character}gpj.exe"
    job = {"model": "small", "pool": "p", "target": "t", "budget": 1}
    before = world.client.get(DATASETS).json()
    calls: dict[str, dict[str, Any]] = {
        "name": {"url": DATASETS, "params": {"name": name}, "content": '{"text": "t"}'},
        "name ": {"url": "/v1/keys", "json": {"name": name}},
        "description": {"url": "/v1/webhooks", "json": {"url": "https://127.0.0.1:8443/", "description": name}},
        " name": {"url": JOBS, "json": {**job, "name": name}},
        "labels.a": {"url": JOBS, "json": {**job, "labels": {"a": name}}},
        "metadata.a": {"url": JOBS, "json": {**job, "metadata": {"a": name}}},
    }
    for param, call in calls.items():
        answer = world.client.post(**call)
        assert (answer.status_code, answer.json()["param"]) == (422, param.strip()), call
    for field in ("metadata", "labels"):
        in_key = world.client.post(JOBS, json={**job, field: {name: "a"}})
        assert (in_key.status_code, in_key.json()["param"]) == (422, field)
    for field in ("id", "source"):
        answer = world.client.post(**row(**{field: name}))
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_rows")
        assert [error["param"] for error in answer.json()["errors"]] == ["line 1"]
    assert world.client.get(DATASETS).json() == before


def test_names_in_any_script_and_texts_of_several_lines_are_taken(world: World) -> None:
    name = "Größe 模型 שלום 👩‍💻 नमस्ते"
    made = world.call("POST", "/v1/keys", json={"name": name}).json()
    assert made["name"] == name
    url = "https://127.0.0.1:8443/"
    hook = world.call("POST", "/v1/webhooks", json={"url": url, "description": "two\nlines\t"}).json()
    assert hook["description"] == "two\nlines\t"


@pytest.fixture(scope="module")
def job(world: World) -> str:
    samples = [(id, "@SUM(A1)", {"text": "x"}) for id in ("plain", FORMULA, "-5", "'=x")]
    return published(world.sessions, world.key, write_pool(world.store, world.folder / "pool", samples))


def exported(world: World, job: str, **params: str) -> list[tuple[str, str]]:
    """(id, source) of each row of a CSV."""
    answer = world.call("GET", f"{JOBS}/{job}/export", params={"format": "csv", **params})
    return [(row["id"], row["source"]) for row in csv.DictReader(io.StringIO(answer.text, newline=""))]


def test_a_spreadsheet_calculates_nothing_of_an_export_unless_that_was_asked_for(world: World, job: str) -> None:
    plain = [(id, "@SUM(A1)") for id in ("plain", FORMULA, "-5", "'=x")]
    assert exported(world, job) == [(id, "'@SUM(A1)") for id in ("plain", f"'{FORMULA}", "-5", "''=x")]
    assert exported(world, job, escape_formulas="false") == plain
    url, tags = f"{JOBS}/{job}/export?format=csv&escape_formulas=", set()
    for value in ("true", "false"):
        tags.add(world.client.get(url + value).headers["etag"])
    assert len(tags) == 2
    lines = world.call("GET", f"{JOBS}/{job}/export", params={"format": "jsonl"}).text.splitlines()
    assert [json.loads(line)["id"] for line in lines] == [id for id, _ in plain]
    refused = world.client.get(f"{JOBS}/{job}/export?format=jsonl&escape_formulas=true")
    assert (refused.status_code, refused.json()["param"]) == (422, "escape_formulas")


@pytest.mark.parametrize("escape_formulas", [True, False])
def test_an_escaped_export_is_verified_as_any_other(
    world: World, job: str, tmp_path: Path, escape_formulas: bool
) -> None:
    with serving(world.app) as url, Winnow(url, world.key) as winnow:
        path = winnow.export(
            job, tmp_path / "all.csv", selected_only=False, include=None, escape_formulas=escape_formulas
        )
        record = Record.of_provenance(winnow.provenance(job))
    assert verify(path, record).samples == 4
    with path.open("a") as file:
        file.write("x")
    with pytest.raises(NotVerified):
        verify(path, record)
