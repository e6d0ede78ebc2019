"""A selection in the log of a training run: of Weights & Biases (without a network), and of MLflow (in a database file)."""

import asyncio
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.results import K, Published

from winnow.client import AsyncWinnow, Winnow
from winnow.pushing import DATA
from winnow.verify import Record, verify

# Both warn of what they themselves do.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    import wandb

    values = {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false"}
    folders = dict.fromkeys(("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR", "ARTIFACT_DIR"), str(tmp_path))
    for name, value in {**values, **folders}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    yield
    wandb.teardown()  # its process


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    yield str(tmp_path)
    mlflow.set_tracking_uri(None)


@pytest.mark.usefixtures("offline")
def test_an_artifact_holds_what_verifies(world: Published, url: str) -> None:
    import wandb

    with Winnow(url, world.key) as winnow, wandb.init(project="chosen") as run:
        results = winnow.results(world.job_id)
        artifact = results.log_to_wandb()
        root = results.provenance().weights_root
        assert results.log_to_wandb(run).digest == artifact.digest
    assert (artifact.type, artifact.name) == ("dataset", f"winnow-{world.job_id}")
    assert (artifact.metadata["selected"], artifact.metadata["weights_root"]) == (K, root)
    entries = {name: Path(entry.local_path) for name, entry in artifact.manifest.entries.items()}
    assert entries.keys() == {"README.md", "provenance.json", DATA}
    record = Record.of_provenance(json.loads(entries["provenance.json"].read_text()))
    assert verify(entries[DATA], record).selected == K


def test_an_artifact_needs_a_run(world: Published, url: str) -> None:
    with Winnow(url, world.key) as winnow, pytest.raises(ValueError, match="run"):
        winnow.results(world.job_id).log_to_wandb()


def test_an_input_of_a_run_names_where_it_is_from(world: Published, url: str, store: str) -> None:
    import mlflow

    with Winnow(url, world.key) as winnow, mlflow.start_run() as run:
        results = winnow.results(world.job_id)
        results.log_to_mlflow()
        root = results.provenance().weights_root
    (found,) = mlflow.get_run(run.info.run_id).inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest) == (f"winnow-{world.job_id}", root[:36])
    assert f"/selection-jobs/{world.job_id}/export" in found.dataset.source
    assert json.loads(found.dataset.profile)["num_rows"] == K
    tags = {tag.key: tag.value for tag in found.tags}
    assert (tags["mlflow.data.context"], tags["winnow.weights_root"]) == ("training", root)
    assert world.key not in found.dataset.source


def test_the_run_is_that_of_the_caller_with_asyncio_too(world: Published, url: str, store: str) -> None:
    import mlflow

    async def log() -> None:
        async with AsyncWinnow(url, world.key) as winnow:
            await (await winnow.results(world.job_id)).log_to_mlflow("evaluation")

    with mlflow.start_run() as run:
        asyncio.run(log())
    assert len(mlflow.get_run(run.info.run_id).inputs.dataset_inputs) == 1


@pytest.mark.parametrize(("library", "call"), [("wandb", "log_to_wandb"), ("mlflow", "log_to_mlflow")])
def test_a_library_that_is_missing_is_named_with_its_extra(
    world: Published, url: str, library: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("winnow.optional.find_spec", lambda name: None if name == library else find_spec(name))
    with Winnow(url, world.key) as winnow, pytest.raises(ModuleNotFoundError, match=rf"\[{library}\]"):
        getattr(winnow.results(world.job_id), call)()
