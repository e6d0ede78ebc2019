"""What a job is expected to cost: what follows from its parameters, counts, rates and the artifacts that there are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.counts import COUNTS, SHAPE, parameters

from service.jobs import planning
from service.plan import estimate, operations, stage_costs
from service.plan.artifact_keys import result_key
from service.plan.job_counts import JobCounts
from service.plan.limits import VALIDATION_SAMPLES, default_token_budget
from service.plan.operations import Shape, TokenCounts
from service.plan.rates import RATE_SHARE, Rates
from service.plan.stage_costs import StageCosts, stages_of
from service.plan.stages import JobInputs, Stage, UnitSpec
from service.plan.waves import rehearse
from service.settings import ModelSettings
from service.storage.artifacts import ArtifactStore
from worker import influence
from worker.influence import EmbeddingOptions, GradientProjection, embedding_candidates, kernel_ridge, second_order
from worker.loading.folders import ModelFolder
from worker.loading.model_shape import shape_in_files
from worker.units import FirstWave

LLAMA = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2}
MEASURED = Rates(matmul={"float32": 1e11, "bfloat16": 2e11}, device="cpu", memory_bytes=2**36)


def planned(counts: JobCounts = COUNTS, rates: Rates = MEASURED, **given: Any) -> dict[str, Any]:
    return estimate.plan(SHAPE, parameters(**given), counts, rates, {})


def stages(plan: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["stage"]: entry for entry in plan["stages"]}


def test_the_passes_are_multiples_of_2_n_t() -> None:
    long = TokenCounts(1, 1e6, 1.0, 0.0)  # without attention and head
    unit = 2 * 1e6 * SHAPE.blocks * SHAPE.block_weights
    assert operations.forward(SHAPE, long) == pytest.approx(unit, rel=1e-4)
    gradient = operations.gradients(SHAPE, long, modules="down_proj", projection_dim=64)
    assert gradient == pytest.approx(2 * unit, rel=0.05)
    warm = parameters(warmup={"samples": 3000, "epochs": 2})
    pool = TokenCounts(3000, 1e6, 1.0, 0.0)
    costs = StageCosts(SHAPE, warm, JobCounts(pool=pool, target=pool, budget=1, estimated=False), "float32", 512).all()
    assert costs[Stage.WARMUP].operations == pytest.approx(2 * 3 * unit, rel=0.03)


def test_exact_scaling_costs_the_whole_gradient_of_each_layer() -> None:
    sized = {"modules": "down_proj", "projection_dim": 16_384}
    plain, scaled = (
        operations.gradients(SHAPE, COUNTS.pool, **sized, is_scaled_exactly=exactly) for exactly in (False, True)
    )
    formed = 2 * COUNTS.pool.seen.tokens * SHAPE.blocks * 576 * 1536
    assert scaled - plain == pytest.approx(formed, rel=0.5)
    adam, factored = (
        stages(planned(optimizer={"type": "adamw", "scaling": scaling}, warmup={}, method="exact_influence"))
        for scaling in ("exact", "factored")
    )
    assert adam["landmark_gradients"]["operations"] == pytest.approx(scaled)
    assert factored["landmark_gradients"]["operations"] == pytest.approx(plain)
    assert adam["target_gradients"]["operations"] == factored["target_gradients"]["operations"]


@pytest.mark.parametrize(
    ("modules", "sizes"),
    [
        ("down_proj", [(576, 1536)] * 30),
        ("o_proj", [(576, 576)] * 30),
        ("self_attn.k_proj", [(192, 576)] * 30),
        ("layers.7.mlp.up_proj", [(1536, 576)]),
    ],
)
def test_the_measured_layers_are_found_by_role_or_end_of_name(modules: str, sizes: list[tuple[int, int]]) -> None:
    assert [size for _, size in SHAPE.measured(modules)] == sizes


def test_adapters_are_what_is_measured_where_there_are_any() -> None:
    adapted = SHAPE.with_adapters(8, "attention")
    assert len(adapted.measured("down_proj")) == 30 * 4 * 2
    assert SHAPE.with_adapters(8, ["q_proj"]).measured("x")[:2] == [(0, (8, 576)), (0, (576, 8))]
    assert adapted.block_weights == SHAPE.block_weights + 8 * (4 * 576 + 4 * 576 - 2 * 384)
    lora = planned(warmup={"lora": {"modules": "attention"}}, landmarks={"count": 256})
    assert stages(lora)["warmup"]["artifact_bytes"] < stages(planned(warmup={}))["warmup"]["artifact_bytes"] / 10


ALWAYS = ["prepare", "select", "validate"]
WHOLE = {"landmarks": {"count": 4096}}  # all of the pool
SCALED = {"optimizer": {"type": "adamw"}, "warmup": {}, "selection": "weighted"}
REFINED = {"embed", "propagate", "refine", "gradients"}


@pytest.mark.parametrize(
    ("given", "more"),
    [
        ({"embedding": {"kind": "hidden"}}, REFINED),
        ({"embedding": {"kind": "text"}}, REFINED),
        ({"embedding": {"kind": "auto"}}, {"candidates", "choose_embedding", *REFINED}),
        ({"landmarks": {"count": 64}, "embedding": {"kind": "jvp"}, "refine": 0}, {"embed", "propagate", "gradients"}),
        (WHOLE, {"propagate", "gradients"}),
        ({"method": "exact_influence"}, {"propagate", "gradients"}),
        ({"method": "rds_plus"}, {"embed", "embed_target", "propagate"}),
        ({"method": "random"}, set()),
        ({**SCALED, **WHOLE, "curvature": {"type": "hessian"}}, {"warmup", "curvature", "propagate", "gradients"}),
        ({**SCALED, **WHOLE, "curvature": {"type": "fisher"}}, {"warmup", "curvature", "propagate", "gradients"}),
        (
            {"optimizer": {"type": "sgd"}, **WHOLE, "selection": "weighted", "curvature": {"type": "fisher"}},
            {"propagate", "gradients"},
        ),
    ],
)
def test_a_plan_has_the_stages_that_its_parameters_need(given: dict[str, Any], more: set[str]) -> None:
    gradients = {"landmark_gradients", "target_gradients"} if "gradients" in more else set()
    found = [entry["stage"] for entry in planned(**given)["stages"]]
    assert set(found) == {*ALWAYS, *more, *gradients} - {"gradients"}
    assert found == [stage.value for stage in Stage if stage.value in found]
    assert "validate" not in [entry["stage"] for entry in planned(**given, validate=False)["stages"]]


def test_a_plan_is_json_and_its_totals_are_of_its_stages() -> None:
    plan = planned(landmarks={"count": 256})
    assert json.loads(json.dumps(plan)) == plan
    for name in ("operations", "seconds", "artifact_bytes"):
        known = [entry[name] for entry in plan["stages"] if entry[name] is not None]
        assert plan["totals"][name] == pytest.approx(sum(known))
    assert plan["totals"]["memory_bytes"] == max(entry["memory_bytes"] for entry in plan["stages"])
    assert (plan["estimated"], plan["tokens"]) == (False, {"pool": 532_377, "target": 9_000})


def test_a_second_order_plan_costs_its_directions() -> None:
    def curvature(kind: str, rank: int) -> float:
        given = {**SCALED, "landmarks": {"count": 64}, "curvature": {"type": kind, "rank": rank}}
        found = stages(planned(**given))["curvature"]["operations"]
        assert isinstance(found, float)
        return found

    assert curvature("hessian", 32) > curvature("ggn", 32) > 1.8 * curvature("ggn", 16) > 0


def test_seconds_come_from_the_rate_of_the_stage_else_of_the_machine() -> None:
    given: dict[str, Any] = {"landmarks": {"count": 256}, "embedding": {"kind": "jvp"}}
    by_machine = stages(planned(**given))
    embed = by_machine["embed"]
    fastest = RATE_SHARE * max(MEASURED.matmul.values())  # dtype auto
    assert embed["seconds"] == pytest.approx(embed["operations"] / fastest, abs=1e-3)
    slow = stages(planned(**given, dtype="float32"))
    assert slow["embed"]["seconds"] == pytest.approx(2 * embed["seconds"], abs=1e-2)
    assert by_machine["prepare"]["seconds"] is None
    rates = Rates(operations={Stage.EMBED: 1e12}, samples={Stage.PREPARE: 508.0, Stage.EMBED: 1.0}, device="x")
    measured = stages(planned(rates=rates, **given))
    assert measured["embed"]["seconds"] == pytest.approx(embed["operations"] / 1e12, abs=1e-3)
    assert measured["prepare"]["seconds"] == 6.0
    assert measured["landmark_gradients"]["seconds"] is None
    unseen = planned(rates=Rates(), **given)
    assert unseen["totals"]["seconds"] is None
    assert "No worker has computed anything" in unseen["warnings"][0]


def test_what_is_there_already_takes_no_time() -> None:
    whole = stages(planned())
    half = estimate.plan(SHAPE, parameters(), COUNTS, MEASURED, {Stage.LANDMARK_GRADIENTS: 0.5})
    found = stages(half)["landmark_gradients"]
    assert (found["already_there"], found["operations"]) == (0.5, whole["landmark_gradients"]["operations"])
    assert found["seconds"] == pytest.approx(whole["landmark_gradients"]["seconds"] / 2, abs=1e-3)


def test_the_exact_method_is_named_where_it_would_cost_less_than_twice() -> None:
    plan = planned(landmarks={"count": 1500}, embedding={"kind": "hidden"}, refine=0.2)
    exact = planned(method="exact_influence")["totals"]["operations"]
    ratio = exact / plan["totals"]["operations"]
    assert 1.2 < ratio < 1.9
    assert plan["note"].startswith(f"method exact_influence would cost {ratio:.1f} times the operations of this job")
    assert planned(landmarks={"count": 64}, validate=False, embedding={"kind": "hidden"}, refine=0)["note"] is None
    assert planned(landmarks={"count": 4096})["note"] is None, "every sample is a landmark already"
    assert planned(method="exact_influence")["note"] is None
    assert planned(method="rds_plus")["note"] is None


def test_landmarks_above_the_pool_are_said_to_be_lowered() -> None:
    assert "landmarks.count is 4096; lowered to the 3000 usable samples of the pool." in planned(**WHOLE)["warnings"][0]
    assert planned(landmarks={"count": 3000})["warnings"][0].startswith("Every sample is a landmark")
    assert planned(landmarks={"count": 2999}, refine={"size": 1})["warnings"] == []


def test_what_does_not_fit_the_worker_is_said() -> None:
    small = Rates(matmul={"float32": 1e11}, device="cpu", memory_bytes=2**30)
    assert "GiB; the most recent worker has 1.0 GiB" in planned(rates=small)["warnings"][0]


def test_a_model_of_unknown_shape_has_a_plan_without_figures_and_the_reason() -> None:
    plan = estimate.plan("of the model, its config.json has no hidden_size", parameters(), COUNTS, MEASURED, {})
    assert "of the model, its config.json has no hidden_size" in plan["warnings"][0]
    assert {entry["operations"] for entry in plan["stages"]} == {None}
    assert set(plan["totals"].values()) == {None}
    assert (plan["costs"], plan["note"]) == (None, None)
    unknown = planned(gradient={"modules": "experts"})
    assert "experts matches none of the block layers" in unknown["warnings"][0]


def test_tokens_are_counted_where_they_were_and_estimated_from_bytes_before() -> None:
    assert TokenCounts.of_bytes(10, 4_000, 2048) == TokenCounts(10, 1000, 100_000, 500)
    assert TokenCounts.of_bytes(10, 4_000_000, 2048).tokens == 20_480, "clipped by max_length"
    summary = {"samples": 4, "tokens": 40, "response_tokens": 12}
    prepared = {"pool_counts": summary, "target_counts": {**summary, "squares": 500}, "dtype": "float32"}
    counts = JobCounts.of_prepared(prepared, 2)
    assert (counts.pool, counts.target) == (TokenCounts(4, 40, 400, 12), TokenCounts(4, 40, 500, 12))
    assert (counts.estimated, counts.dtype, counts.budget) == (False, "float32", 2)


def test_candidates_are_the_workers_where_it_has_said_them() -> None:
    cheap = [{"kind": "hidden", "pooling": "last", "blocks": 1, "tangents": 2}]
    counts = JobCounts(pool=COUNTS.pool, target=COUNTS.target, budget=1, estimated=False, candidates=cheap)
    given: dict[str, Any] = {"landmarks": {"count": 64}, "embedding": {"kind": "auto"}}
    known, guessed = (stages(planned(c, **given)) for c in (counts, COUNTS))
    assert known["candidates"]["operations"] < guessed["candidates"]["operations"] / 3
    assert known["embed"]["operations"] < guessed["embed"]["operations"] / 3


def test_the_candidates_of_a_plan_are_those_of_the_worker() -> None:
    offered = [{**options, "tangents": 2} for options, _ in embedding_candidates(4, SHAPE.blocks)]
    known = JobCounts(pool=COUNTS.pool, target=COUNTS.target, budget=150, estimated=False, candidates=offered)
    given: dict[str, Any] = {"landmarks": {"count": 64}, "embedding": {"kind": "auto"}}
    assert planned(known, **given)["stages"] == planned(**given)["stages"]
    offered.append(embedding_candidates(4, SHAPE.blocks, with_output=True)[-1][0] | {"tangents": 2})
    dear = JobCounts(pool=COUNTS.pool, target=COUNTS.target, budget=150, estimated=False, candidates=offered)
    given["refine"] = {"max_cost": 3}
    assert planned(dear, **given)["stages"] == planned(**given)["stages"]


def test_an_embedding_from_text_costs_no_pass_through_the_model() -> None:
    found = {
        kind: stages(planned(embedding={"kind": kind}, landmarks={"count": 64}))
        for kind in ("text", "text_hidden", "hidden")
    }
    assert found["text"]["embed"]["operations"] == 0
    assert found["text_hidden"]["embed"]["operations"] == found["hidden"]["embed"]["operations"] > 0


# What a stage depends on


def names(*, pool: str = "p", target: str = "t", budget: int = 5, **given: Any) -> dict[Stage, list[str]]:
    job = JobInputs(model={}, pool=pool, target=target, budget=budget, parameters=parameters(**given))
    return rehearse(job, 10_000)


AUTO = {"embedding": {"kind": "auto"}}
ALL = {"warmup": {}, "optimizer": {"type": "adamw"}, "selection": "weighted", "curvature": {"type": "ggn"}}


@pytest.mark.parametrize("given", [ALL, {"method": "rds_plus"}])
def test_every_stage_depends_on_the_seed_and_the_length_of_samples(given: dict[str, Any]) -> None:
    assert names(**given) == names(**given)
    for changed in (names(**given, seed=1), names(**given, max_length=64), names(**given, pool="q", target="u")):
        assert changed.keys() == names(**given).keys()
        same = {stage for stage in changed if changed[stage] == names(**given)[stage]}
        assert same <= {Stage.PREPARE}  # which no plan looks up by its name


@pytest.mark.parametrize(
    ("given", "changed", "stages"),
    [
        (AUTO, {"target": "u", "budget": 9, "kernel": {"ridge": 1}}, {"landmark_gradients", "candidates"}),
        ({**AUTO, "warmup": {}}, {"target": "u", "selection": "top_k"}, {"warmup", "landmark_gradients", "candidates"}),
        ({"embedding": {"kind": "jvp"}}, {"target": "u", "landmarks": {"count": 3}}, {"embed"}),
        ({"embedding": {"kind": "jvp"}}, {"target": "u"}, {"embed", "landmark_gradients"}),
        ({}, {"pool": "q"}, {"target_gradients"}),
        ({"warmup": {}}, {"pool": "q"}, set()),
        (
            {"warmup": {}, "optimizer": {"type": "adamw"}, "embedding": {"kind": "hidden"}},
            {"optimizer": {"type": "adamw", "weight_decay": 0.1}},
            set(),
        ),
        ({"warmup": {}}, {"warmup": {"epochs": 2}}, {"embed"}),  # of the text alone
        (AUTO, {"budget": 6}, {"landmark_gradients", "target_gradients", "candidates", "choose_embedding", "embed"}),
    ],
)  # fmt: skip
def test_what_a_change_leaves_as_it_is(given: dict[str, Any], changed: dict[str, Any], stages: set[str]) -> None:
    before, after = names(**given), names(**{**given, **changed})
    assert {stage.value for stage in before if before[stage] == after.get(stage)} - {"prepare"} == stages


def test_the_plan_counts_with_the_cores_own_numbers() -> None:
    assert len(kernel_ridge.RIDGES) == stage_costs._RIDGES
    assert second_order.DIRECTION_BYTES == stage_costs._DIRECTION_BYTES
    assert EmbeddingOptions().max_dim == operations.MAX_EMBEDDING
    assert GradientProjection().directions == operations.INPUT_DIRECTIONS
    for device in ("cpu", "cuda"):
        assert influence.default_token_budget(torch.device(device)) == default_token_budget(device)


def test_a_validation_takes_a_bounded_number_of_samples() -> None:
    few, many, more = (
        stages(planned(JobCounts(pool=COUNTS.pool, target=COUNTS.target, budget=budget, estimated=False)))
        for budget in (8, VALIDATION_SAMPLES, 2000)
    )
    assert few["validate"]["operations"] < many["validate"]["operations"] == more["validate"]["operations"]


def test_samples_without_a_response_are_no_landmarks() -> None:
    counts = JobCounts(pool=COUNTS.pool, target=COUNTS.target, budget=5, estimated=False, usable=900)
    assert "embed" not in stages(planned(counts, landmarks={"count": 1000}))
    assert "embed" in stages(planned(counts, landmarks={"count": 899}))


def test_stages_of_needs_no_shape() -> None:
    assert stages_of(parameters(method="random", validate=False), COUNTS) == [Stage.PREPARE, Stage.SELECT]


def test_the_plan_after_the_count_says_what_is_there_of_the_first_wave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, unread = ArtifactStore(str(tmp_path)), ModelSettings(folder=tmp_path)
    job = JobInputs(model={}, pool="p", target="t", budget=5, parameters=parameters(method="rds_plus"))
    counted = {"samples": 30, "tokens": 900, "response_tokens": 300}
    monkeypatch.setattr(planning, "measured_rates", lambda _: MEASURED)
    monkeypatch.setattr(planning, "shape_of", lambda *_: SHAPE)
    first = [UnitSpec(stage=stage, shard=i, artifact_key=f"{stage}-{i}", spec={}, total=1)
             for stage in (Stage.EMBED, Stage.EMBED_TARGET) for i in range(20)]  # fmt: skip
    for unit in first[:20]:
        store.write_json(result_key(unit.artifact_key), {})
    session: Any = None
    prepared = {"pool_counts": counted, "target_counts": counted, "dtype": "float32"}
    found = stages(FirstWave.read(store, unread, job, first).plan(session, job, prepared))
    assert (found["embed"]["already_there"], found["embed_target"]["already_there"]) == (1.0, 0.0)


# The shape of a job's model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    configs = {
        "base": {"config.json": {"model_type": "llama", "vocab_size": 61, **LLAMA}},
        "lora": {
            "adapter_config.json": {
                "base_model_name_or_path": "base",
                "r": 4,
                "target_modules": ["q_proj", "mlp.up_proj"],
            }
        },
        "thin": {"config.json": {"model_type": "llama", "num_hidden_layers": 3}},
    }
    for name, files in configs.items():
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_text(json.dumps(content))
    return tmp_path


def test_the_shape_is_read_from_the_registered_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(name: str, **more: Any) -> Shape | str:
        return planning.shape_of(ModelSettings(folder=folder), {"kind": "registered", "name": name, **more})

    base, adapted = of("base"), of("lora", base={"kind": "registered", "name": "base"})
    assert isinstance(base, Shape)
    assert base.attention_width == 24
    assert isinstance(adapted, Shape)
    assert (adapted.rank, adapted.adapters) == (4, {"self_attn.q_proj", "mlp.up_proj"})
    assert shape_in_files(ModelFolder(folder / "base", {}, ())) == base
    assert shape_in_files(ModelFolder(folder / "lora", {}, (), ModelFolder(folder / "base", {}, ()))) == adapted
    assert of("thin") == "of the model, its config.json has no hidden_size"
    assert of("gone") == "of the model, its config.json cannot be read (No such file or directory)"
    (folder / "thin" / "config.json").write_text("[]")
    assert isinstance(of("thin"), str)

    asked = []

    def download(*args: str, **options: Any) -> str:
        asked.append((args, options["revision"]))
        return str(folder / "base" / "config.json")

    hub = {"kind": "hub", "id": "a/b", "revision": "main", "commit": "c0ffee"}
    monkeypatch.setattr(planning, "hf_hub_download", download)
    assert planning.shape_of(ModelSettings(folder=folder), hub) == base
    assert asked == [(("a/b", "config.json"), "c0ffee")]

    def away(*args: str, **options: Any) -> str:
        raise ConnectionError

    monkeypatch.setattr(planning, "hf_hub_download", away)
    assert planning.shape_of(ModelSettings(folder=folder), hub) == (
        "the model's config.json could not be read (ConnectionError)"
    )
