"""No connection is held, hence no transaction open, during what may take long: the hub, the store, a conversion, a look-up."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from support.jobs import plain_rows
from support.world import DATASETS, JOBS, World, make_settings

from service.datasets import router as datasets
from service.ids import new_id
from service.jobs import planning
from service.models import registry
from service.plan.parameters import JobParameters
from service.plan.stages import Stage
from service.storage.artifacts import ArtifactStore


@pytest.fixture(scope="module")
def world(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    settings = make_settings(
        postgres_url,
        folder := tmp_path_factory.mktemp("transactions"),
        models={"folder": folder, "hub": ["owner/*"]},
        webhooks={"allowed_networks": ["127.0.0.0/8"]},
    )
    with World.made(settings) as world:
        yield world


@pytest.fixture
def waits(world: World, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """The connections of the API's pool that were in use at each call that waits for others, by its name."""
    seen: dict[str, list[int]] = {}

    def spy(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **options: Any) -> Any:
            seen.setdefault(name, []).append(world.engine.pool.checkedout())  # type: ignore[attr-defined]
            return call(*args, **options)

        return noted

    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename="model.safetensors")], sha="a" * 40)
    monkeypatch.setattr(registry, "HfApi", lambda: SimpleNamespace(model_info=spy("hub", lambda *_, **__: info)))
    monkeypatch.setattr(planning, "hf_hub_download", spy("config", lambda *_, **__: "/nonexistent"))
    monkeypatch.setattr(ArtifactStore, "exists", spy("store", ArtifactStore.exists))
    monkeypatch.setattr(datasets, "convert", spy("convert", datasets.convert))
    outbound = world.app.state.outbound
    monkeypatch.setattr(outbound, "check", spy("lookup", outbound.check))
    return seen


@pytest.fixture
def dataset(world: World) -> str:
    return world.upload(plain_rows(4))


def request(dataset: str, **more: Any) -> dict[str, Any]:
    return {"model": "owner/model", "pool": dataset, "target": dataset, "budget": 1, **more}


@pytest.mark.parametrize("has_key", [False, True])
@pytest.mark.parametrize("dry_run", [False, True])
def test_no_transaction_while_a_job_is_planned(
    world: World, dataset: str, waits: dict[str, list[int]], has_key: bool, dry_run: bool
) -> None:
    headers = {"Idempotency-Key": new_id("key")} if has_key else {}
    posted = world.client.post(JOBS, json=request(dataset, dry_run=dry_run), headers=headers)
    assert posted.is_success, posted.text
    assert waits == {"hub": [0], "config": [0]}


def test_no_transaction_while_a_job_is_posted_again(world: World, dataset: str, waits: dict[str, list[int]]) -> None:
    job_id = world.post(**request(dataset))
    world.cancel(job_id)
    waits.clear()
    world.call("POST", f"{JOBS}/{job_id}/retry")
    assert waits == {"config": [0]}


def test_no_transaction_while_rows_are_to_be_rendered(world: World, dataset: str, waits: dict[str, list[int]]) -> None:
    answer = world.client.get(f"{DATASETS}/{dataset}/rows", params={"model": "owner/model"})
    assert answer.status_code == 202, answer.text
    assert waits == {"hub": [0]}


def test_no_transaction_while_artifacts_are_looked_for(
    world: World, dataset: str, waits: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    look_up = planning._look_up

    def with_artifacts(*args: Any) -> Any:
        return replace(look_up(*args), artifacts={Stage.PREPARE: [("tokens/a", 4), (None, 4), ("tokens/b", 4)]})

    monkeypatch.setattr(planning, "_look_up", with_artifacts)
    world.post(**request(dataset))
    assert waits["store"] == [0, 0]


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "an-upload"}])
def test_no_transaction_while_an_upload_is_converted(
    world: World, waits: dict[str, list[int]], headers: dict[str, str]
) -> None:
    content = b'{"text": "a"}\n'
    for _ in range(2 if headers else 1):  # what was answered is not converted again
        answer = world.client.post(DATASETS, params={"name": "d"}, content=content, headers=headers)
        assert answer.status_code == 201, answer.text
    assert waits["convert"] == [0]


def test_no_transaction_while_the_name_of_a_webhook_is_looked_up(world: World, waits: dict[str, list[int]]) -> None:
    body = {"url": "https://127.0.0.1:8443/"}
    webhook = world.call("POST", "/v1/webhooks", json=body).json()["id"]
    world.call("PATCH", f"/v1/webhooks/{webhook}", json=body)
    assert waits == {"lookup": [0, 0]}


def test_the_pool_of_a_draft_may_be_deleted_before_it_is_written(
    world: World, dataset: str, monkeypatch: pytest.MonkeyPatch, waits: dict[str, list[int]]
) -> None:
    resolve = registry.resolve

    def meanwhile(*args: Any) -> Any:
        assert world.client.delete(f"{DATASETS}/{dataset}").status_code == 204
        return resolve(*args)

    monkeypatch.setattr(registry, "resolve", meanwhile)
    answer = world.client.post(JOBS, json=request(dataset))
    assert (answer.status_code, answer.json()["code"], answer.json()["param"]) == (422, "dataset_not_found", "pool")


def test_parameters_are_not_validated_again_when_a_job_is_read(
    world: World, dataset: str, waits: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = world.post(**request(dataset, seed=7))
    stored = JobParameters(seed=7).model_dump(mode="json")
    monkeypatch.setattr(JobParameters, "_refuses", property(lambda _: pytest.fail("the parameters are validated")))
    assert world.get(job_id)["parameters"] == stored
    assert world.client.get(JOBS).json()["data"][0]["parameters"] == stored
