"""Jobs on a pool that has the rows of a file of every kind: none fails, and each row that took no part is explained."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.servers import Servers
from support.templates import THINKING
from support.tiny import save_model, target_rows
from support.upload_kinds import KINDS
from support.worker_jobs import MODEL, SharedWorker, computing_world
from support.world import DATASETS, Json, World

REASONING = "tiny-qwen3"
# What the template of the model cannot say of a kind's rows; the plain one writes roles and contents, and nothing else.
CALLS = {"calls as text", "calls as objects", "conversations with calls", "parquet of calls"}
UNUSABLE: dict[str, dict[str, str]] = {MODEL: dict.fromkeys(CALLS, "tool_calls_not_rendered"), REASONING: {}}
RENDERING = {
    MODEL: {"trailing_messages": 1, "reasoning_not_rendered": 2},
    REASONING: {"trailing_messages": 1, "reasoning_not_rendered": 1},  # that of the last turn is rendered
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(servers: Servers, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[World]:
    with computing_world(servers, tmp_path_factory.mktemp("kinds"), tiny_llama) as made:
        save_model(made.settings.models.folder / REASONING, "qwen3", template=THINKING.plain)
        yield made


@pytest.fixture(scope="module")
def rows(world: World) -> list[Json]:
    """Those that each file became, as the API gives them; each is named by its kind, which is its source too."""
    found = []
    for kind, upload in KINDS.items():
        params = {"name": upload.name, **upload.params}
        dataset = world.call("POST", DATASETS, params=params, content=upload.file).json()
        page = world.call("GET", f"{DATASETS}/{dataset['id']}/rows", params={"limit": 100}).json()
        assert len(page["data"]) == dataset["row_count"] > 0
        found += [{**row, "id": f"{kind} {row['index']}", "source": kind} for row in page["data"]]
    return found


@pytest.fixture(scope="module")
def job(world: World, rows: list[Json], shared: SharedWorker, request: pytest.FixtureRequest) -> tuple[str, str]:
    """Model and job."""
    shared.running()
    target = world.upload(target_rows(4, "python_function"))
    small = {"landmarks": {"count": 30}, "max_length": 128}
    job_id = world.post(model=request.param, pool=world.upload(rows), target=target, budget=20, **small)
    world.succeeded(job_id)
    return request.param, job_id


@pytest.mark.parametrize("job", [MODEL, REASONING], indirect=True)
def test_a_job_explains_every_row_that_took_no_part(world: World, rows: list[Json], job: tuple[str, str]) -> None:
    model, job_id = job
    reasons = UNUSABLE[model]
    expected = {row["id"]: reasons[row["source"]] for row in rows if row["source"] in reasons and _calls(row)}
    assert set(reasons) == {row["source"] for row in rows if row["id"] in expected}
    weights = world.get(f"{job_id}/weights", limit=1000)["data"]
    assert [row["id"] for row in weights] == [row["id"] for row in rows]
    summary = world.get(f"{job_id}/results")
    unusable = summary["unusable"]["pool"]
    assert {row["id"]: row["reason"] for row in unusable["first"]} == expected
    assert unusable["count"] == len(expected)
    assert summary["rendering"]["pool"] == RENDERING[model]
    without = [row for row in weights if row["influence"] is None]
    assert {row["id"] for row in without} == set(expected)
    for row in without:
        explanation = world.get(f"{job_id}/samples/{row['index']}")["explanation"]
        assert (explanation["explained_by"], explanation["reason"]) == ("none", expected[row["id"]])
        assert row["weight"] == 0
    assert not {row["id"] for row in world.selected(job_id)} & {row["id"] for row in without}
    assert len(world.selected(job_id)) == 20


def _calls(row: Json) -> bool:
    return any(message["tool_calls"] for message in row["messages"] or ())
