"""Jobs from the request to the result: the real API, PostgreSQL and broker, and real Celery workers with their children."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file as torch_file
from safetensors.torch import save_file
from sqlalchemy import select
from support.processes import Process
from support.results import undeclared
from support.tiny import pool_rows, save_model, target_rows
from support.worker_jobs import (
    BUDGET,
    LANDMARKS,
    MODEL,
    POOL,
    SMALL,
    TARGET,
    Datasets,
    SharedWorker,
    post,
    same_selection,
)
from support.world import Json, World, stage

from service.datasets.storage import Sample
from service.ledger.tables import Worker as WorkerRow
from service.results.schemas import SelectionResult
from worker.influence import GradientProjection, Samples, cosine_influence, per_sample_gradients
from worker.loading.folders import find
from worker.loading.models import load_model, load_tokenizer
from worker.text.tokenization import tokenise


@pytest.fixture(scope="module")
def job_id(world: World, shared: SharedWorker, datasets: Datasets) -> str:
    """A job of the default method that has succeeded."""
    shared.running()
    job_id = post(world, datasets.pool, datasets.target)
    world.succeeded(job_id)
    return job_id


@pytest.fixture(scope="module")
def weights(world: World, job_id: str) -> list[Json]:
    """What the pages of its weights hold together."""
    rows: list[Json] = []
    while len(rows) < POOL:
        page = world.get(f"{job_id}/weights", limit=1000, **({"after": rows[-1]["index"]} if rows else {}))
        rows += page["data"]
        assert page["has_more"] == (len(rows) < POOL)
    return rows


@pytest.mark.usefixtures("worker")
class TestJob:
    def test_weights_selection_and_summary_agree(self, world: World, job_id: str, weights: list[Json]) -> None:
        selected, summary = world.selected(job_id), world.get(f"{job_id}/results")
        assert [row["index"] for row in weights] == list(range(POOL))
        assert [row["rank"] for row in selected] == list(range(BUDGET))
        assert summary["sample_count"] == POOL
        assert summary["selected_count"] == BUDGET
        assert {r["index"] for r in selected} == {r["index"] for r in weights if r["weight"] > 0}
        assert sum(row["weight"] for row in selected) == pytest.approx(BUDGET, rel=1e-5)
        for row in selected:
            whole = weights[row["index"]]
            assert all(row[name] == whole[name] for name in ("weight", "influence", "exact"))
            assert row["id"] == f"row-{row['index']}"
        assert sum(source["selected"] for source in summary["sources"].values()) == BUDGET

    def test_the_schema_has_every_field_of_the_summary(self, world: World, job_id: str) -> None:
        found = SelectionResult.model_validate(world.get(f"{job_id}/results"))
        assert list(undeclared(found)) == []
        assert found.fidelity is not None
        assert found.refinement is not None
        assert found.validation is not None

    def test_charts_are_published_with_the_result(self, world: World, job_id: str, weights: list[Json]) -> None:
        charts, summary = world.get(f"{job_id}/results/charts"), world.get(f"{job_id}/results")
        assert charts["influence"]["edges"][0] == pytest.approx(min(row["influence"] for row in weights), rel=1e-6)
        assert charts["landmarks"]["count"] == summary["landmark_count"]
        assert charts["shortlist"]["count"] == summary["refined_count"]
        assert {each["source"]: each["selected"] for each in charts["sources"] if each["selected"]} == {
            name: each["selected"] for name, each in summary["sources"].items()
        }
        spent = {each["stage"]: (each["wall_seconds"], each["compute_seconds"]) for each in summary["stages"]}
        assert {each["stage"]: (each["wall_seconds"], each["compute_seconds"]) for each in charts["stages"]} == spent
        plan = {each["stage"]: each["seconds"] for each in world.events(job_id, "job.planned")[-1]["stages"]}
        planned = {each["stage"]: each["planned_seconds"] for each in charts["stages"]}
        assert {name: planned[name] for name in plan} == plan
        assert BUDGET in charts["budgets"]["count"]

    def test_exact_rows_are_the_landmarks_and_the_shortlist(
        self, world: World, job_id: str, weights: list[Json]
    ) -> None:
        exact, summary = {row["index"] for row in weights if row["exact"]}, world.get(f"{job_id}/results")
        landmarks = world.get(f"{job_id}/provenance")["record"]["landmarks"]
        assert len(landmarks) == summary["landmark_count"] == LANDMARKS
        assert exact >= set(landmarks)
        assert len(exact) == LANDMARKS + summary["refined_count"]
        assert exact >= {row["index"] for row in world.selected(job_id)}

    def test_the_verdict_judges_what_the_job_found(self, world: World, job_id: str) -> None:
        summary = world.get(f"{job_id}/results")
        found = {each["about"]: each for each in summary["verdict"]}
        assert found.keys() == {"choice", "fidelity", "step", "rows", "duplicates", "overlap", "sources"}
        assert found["choice"]["figure"] == summary["refinement"]["promise"]
        assert found["fidelity"]["figure"] == summary["fidelity"]["mean_spearman"]
        for kind, repeats in summary["repeats"].items():
            assert found[kind]["figure"] == repeats["count"] / BUDGET
            assert repeats["count"] <= repeats["pool"]["exact"] + repeats["pool"]["near"]
        assert found["rows"]["level"] == "ok"
        assert summary["conversations"] == BUDGET

    def test_the_summary_says_how_far_to_trust_it(self, world: World, job_id: str) -> None:
        summary = world.get(f"{job_id}/results")
        assert -1 <= summary["fidelity"]["mean_spearman"] <= 1
        assert len(summary["fidelity"]["spearman"]) == TARGET
        refinement = summary["refinement"]
        assert refinement["refined"] == summary["refined_count"] == refinement["rounds"][-1]["refined"]
        assert refinement["stopped"] in ("promised", "max_cost", "pool")
        assert 0 < refinement["promise"] <= 1
        validation = summary["validation"]
        assert validation["held_out"]["targets"] == TARGET // 2
        assert validation["selection"]["measured"] < 0
        assert validation["sentence"] in summary["sentences"]
        assert summary["nonfinite"] == {name: {"count": 0, "samples": []} for name in ("pool", "target")}
        (note,) = summary["notes"]
        assert note.startswith("refine.max_cost leaves less than 2 times the budget")
        assert [one["stage"] for one in summary["stages"]] == [
            *("prepare", "landmark_gradients", "target_gradients"),
            *("embed", "propagate", "refine", "select", "validate"),
        ]

    def test_the_plan_is_told_twice_and_the_worker_has_measured_itself(
        self, world: World, job_id: str, worker: Process
    ) -> None:
        first, second = world.events(job_id, "job.planned")
        assert (first["estimated"], second["estimated"]) == (True, False)
        assert second["tokens"]["pool"] == world.get(f"{job_id}/results")["pool"]["tokens"]
        with world.sessions() as session:
            rows = {row.worker_id.rpartition(":")[2]: row for row in session.scalars(select(WorkerRow))}
        assert min(rows[str(worker.pid)].matmul_rates.values()) > 0

    def test_exact_influence_is_the_cosine_of_exact_gradients(self, world: World, weights: list[Json]) -> None:
        """Computed here from the uploaded rows, by way of neither artifacts nor shards."""
        folder = find({"kind": "registered", "name": MODEL}, world.settings.models.folder)
        model = load_model(folder, torch.float32, torch.device("cpu"))
        projection = GradientProjection(dim=1024, seed=0)

        def gradients(rows: list[Json]) -> torch.Tensor:
            samples = [Sample(i, row["id"], None, row["messages"], None) for i, row in enumerate(rows)]
            tokens = list(tokenise(samples, load_tokenizer(folder), max_length=128, report=lambda _: None))
            lengths = [len(row.input_ids) for row in tokens]
            joined = Samples(
                input_ids=np.concatenate([row.input_ids for row in tokens]),
                response=np.concatenate([row.response for row in tokens]),
                offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            )
            return per_sample_gradients(model, joined, projection=projection).values

        exact = [row for row in weights if row["exact"]]
        rows = pool_rows(POOL)
        expected = cosine_influence(
            gradients([rows[row["index"]] for row in exact]), gradients(target_rows(TARGET, "python_function"))
        ).mean(dim=1)
        assert [row["influence"] for row in exact] == pytest.approx(expected.tolist(), abs=1e-5)
        assert expected.std() > 1e-3

    def test_every_kind_of_sample_is_explained(self, world: World, job_id: str, weights: list[Json]) -> None:
        record = world.get(f"{job_id}/provenance")["record"]
        landmarks = set(record["landmarks"])
        exact = [row["index"] for row in weights if row["exact"]]
        propagated = [row["index"] for row in weights if not row["exact"]]
        refined = [index for index in exact if index not in landmarks]
        for index in (min(landmarks), refined[0], refined[-1]):
            explanation = world.get(f"{job_id}/samples/{index}")["explanation"]
            assert explanation["explained_by"] == "own_gradient"
            values = [each["influence"] for each in explanation["targets"]["data"]]
            assert len(values) == TARGET
            assert np.mean(values) == pytest.approx(weights[index]["influence"], abs=1e-6)
            alone = world.get(f"{job_id}/samples/{index}", target=3)["explanation"]
            assert (alone["target"], alone["influence"]) == (3, values[3])
            page = world.get(f"{job_id}/samples/{index}", targets_after=3, targets_limit=2)["explanation"]["targets"]
            assert [each["influence"] for each in page["data"]] == values[4:6]
            assert (page["has_more"], page["last_id"]) == (True, 5)
        for index in (propagated[0], propagated[-1]):
            sample = world.get(f"{job_id}/samples/{index}", landmarks=20)
            assert sample["influence"] == weights[index]["influence"]
            assert (sample["id"], sample["explanation_missing"]) == (f"row-{index}", None)
            explanation = sample["explanation"]
            assert explanation["explained_by"] == "landmarks"
            near = explanation["landmarks"]
            assert {each["index"] for each in near} <= set(exact)
            for each in near:
                assert each["influence"] == pytest.approx(weights[each["index"]]["influence"], rel=1e-6)
            parts = [explanation["average"], *(each["contribution"] for each in near), explanation["correction"]]
            assert sum(parts) == pytest.approx(sample["influence"], abs=1e-9)
        first = world.selected(job_id)[0]
        taken = world.get(f"{job_id}/samples/{first['index']}")
        targets = taken["explanation"]["targets"]["data"]
        best = max(
            each["influence"] for row in [taken] for each in targets if each["index"] == row["taken_by"]["target"]
        )
        rivals = (world.get(f"{job_id}/samples/{i}")["explanation"]["targets"]["data"] for i in exact[:20])
        assert all(each[taken["taken_by"]["target"]]["influence"] <= best for each in rivals)
        assert world.get(f"{job_id}/samples", id=f"row-{first['index']}") == taken

    def test_it_is_the_selection_of_the_same_job_without_servers(
        self, world: World, job_id: str, tmp_path: Path
    ) -> None:
        same_selection(world, job_id, tmp_path)

    def test_the_same_job_again_gives_the_same_bits(self, world: World, job_id: str, datasets: Datasets) -> None:
        again = post(world, datasets.pool, datasets.target)
        job = world.succeeded(again)
        assert world.selected(again) == world.selected(job_id)
        assert world.get(f"{again}/provenance")["weights_root"] == world.get(f"{job_id}/provenance")["weights_root"]
        assert all(s["units_reused"] == s["units"] for s in job["stages"] if s["stage"] != "prepare")

    def test_another_target_pays_for_the_target_alone(self, world: World, job_id: str, datasets: Datasets) -> None:
        job = world.succeeded(post(world, datasets.pool, world.upload(target_rows(5, "polite_email"))))
        for name, all_reused in (("embed", True), ("landmark_gradients", True), ("target_gradients", False)):
            report = stage(job, name)
            assert report is not None
            assert (report["units_reused"] == report["units"]) is all_reused
        assert {r["index"] for r in world.selected(job["id"])} != {r["index"] for r in world.selected(job_id)}

    def test_no_unit_failed_and_provenance_tells_who_did_what(self, world: World, job_id: str, worker: Process) -> None:
        units = world.get(f"{job_id}/provenance")["record"]["units"]
        assert len([u for u in units if u["stage"] == "embed"]) > 1
        assert {u["attempt"] for u in units} == {1}
        assert {u["worker"].rpartition(":")[2] for u in units} == {str(worker.pid)}


@pytest.mark.usefixtures("worker")
class TestMethods:
    """Each of the others once, on a small pool; what it computes is for the tests of the stages."""

    @pytest.mark.parametrize("method", ["exact_influence", "rds_plus", "random"])
    def test_one_that_approximates_nothing(self, world: World, datasets: Datasets, method: str) -> None:
        request = {"model": MODEL, "pool": datasets.small, "target": datasets.target, "budget": 7, "max_length": 128}
        job = world.succeeded(world.post(**request, method=method))
        summary, record = world.get(f"{job['id']}/results"), world.get(f"{job['id']}/provenance")["record"]
        assert list(undeclared(SelectionResult.model_validate(summary))) == []
        assert summary["selected_count"] == 7
        assert summary["fidelity"] is None
        assert summary["validation"]["sentence"]
        assert record["landmarks"] == ("all" if method == "exact_influence" else [])
        exported = world.client.get(f"/v1/selection-jobs/{job['id']}/export", params={"format": "csv"})
        assert len(exported.text.splitlines()) == SMALL + 1

    def test_a_warm_up_and_second_order_weights(self, world: World, datasets: Datasets, tmp_path: Path) -> None:
        request = {
            "warmup": {"samples": 32, "batch_size": 4, "epochs": 2, "learning_rate": 1e-3},
            "optimizer": {"type": "adamw"},
            "selection": "weighted",
            "curvature": {"type": "fisher"},
            "landmarks": {"count": 20},
        }
        job = world.succeeded(post(world, datasets.small, datasets.target, **{"budget": 7, **request}))
        assert len(world.events(job["id"], "job.planned")) == 2
        steps = world.events(job["id"], "warmup.step")
        assert steps[-1]["step"] == steps[-1]["steps"] == 16
        assert steps[0]["stage"] == "warmup"
        assert all(2 < step["loss"] < 20 for step in steps)
        summary = world.get(f"{job['id']}/results")
        assert summary["warmup"]["loss_last"] < summary["warmup"]["loss_first"]
        assert summary["solution"]["kkt_residual"] < 1e-8
        same_selection(world, job["id"], tmp_path)

    @pytest.mark.slow
    def test_a_sample_without_a_finite_gradient_is_named(self, world: World, datasets: Datasets) -> None:
        folder = save_model(world.settings.models.folder / "broken")
        tensors = torch_file(folder / "model.safetensors")
        token = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]["~"]
        tensors["model.embed_tokens.weight"][token] = float("nan")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        rows = json.loads(json.dumps(pool_rows(110)).replace("~", "-"))
        rows[7]["messages"][-1]["content"] += " ~ ~"
        request = {
            "model": "broken",
            "target": datasets.target,
            "budget": 7,
            "max_length": 128,
            "method": "exact_influence",
        }
        job = world.succeeded(world.post(**request, pool=world.upload(rows)))
        named = world.get(f"{job['id']}/results")["nonfinite"]
        assert named["pool"] == {"count": 1, "samples": [{"index": 7, "id": "row-7"}]}
        assert named["target"]["count"] == 0


@pytest.mark.usefixtures("worker")
class TestFailures:
    """A job that cannot be computed fails once, with a code and a reason, and the worker goes on."""

    def failed(self, world: World, **request: Any) -> Json:
        job = world.ended(post(world, **request))
        assert job["status"] == "failed"
        assert job["error"]["attempts"] == 1
        return dict(job["error"])

    @pytest.mark.slow
    def test_a_model_without_weights(self, world: World, datasets: Datasets) -> None:
        shutil.copytree(
            world.settings.models.folder / MODEL,
            world.settings.models.folder / "empty",
            ignore=shutil.ignore_patterns("*.safetensors"),
        )
        error = self.failed(world, model="empty", pool=datasets.pool, target=datasets.target)
        assert (error["code"], error["stage"]) == ("model_not_usable", "prepare")
        assert "no safetensors weights" in error["detail"]

    def test_data_without_replies(self, world: World, datasets: Datasets) -> None:
        bare = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        save_model(world.settings.models.folder / "bare", template=bare)
        silent = target_rows(TARGET, "python_function")
        for row in silent:
            row["messages"][-1]["content"] = ""
        quiet = world.upload(silent)
        error = self.failed(world, model="bare", pool=datasets.pool, target=quiet)
        assert error["code"] == "too_many_unusable"
        assert error["unusable"]["target"]["by_reason"] == {"no_reply": TARGET}
        assert len(error["unusable"]["target"]["first"]) == 10
        error = self.failed(world, model="bare", pool=datasets.pool, target=quiet, max_unusable=1)
        assert error["code"] == "data_not_usable"

        half = world.upload([*pool_rows(7), *({**row, "id": f"{i}"} for i, row in enumerate(silent))])
        error = self.failed(world, model="bare", pool=half, target=datasets.target, budget=8, max_unusable=1)
        assert error["code"] == "parameters_not_usable"
        assert "budget is 8, but only 7 samples" in error["detail"]

    def test_a_sample_that_the_template_refuses_is_named(self, world: World) -> None:
        template = (
            "{% for m in messages %}{% if 'x' in m['content'] %}{{ raise_exception('no x') }}{% endif %}"
            "{{ m['content'] }}<|im_end|>{% endfor %}"
        )
        save_model(world.settings.models.folder / "refusing", template=template)
        rows = [
            {"id": f"n{i}", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": c}]}
            for i, c in enumerate(("fine", "boxes", "fine"))
        ]
        error = self.failed(world, model="refusing", pool=world.upload(rows), target=world.upload(rows[:1]), budget=1)
        assert error["code"] == "too_many_unusable"
        (refused,) = error["unusable"]["pool"]["first"]
        assert (refused["id"], refused["reason"]) == ("n1", "template_refuses")
        assert "no x" in refused["detail"]
