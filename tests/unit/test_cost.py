"""The plan of a job: operations against those counted on loaded models, and what follows from counts, rates and artifacts."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from service.artifacts import ArtifactStore
from service.jobs import cost, operations, planning, stage_cost
from service.jobs.cost import Rates
from service.jobs.ledger import UnitSpec
from service.jobs.operations import Shape, TokenCounts
from service.jobs.parameters import Parameters
from service.jobs.stage_cost import JobCounts, StageCosts, stages_of
from service.jobs.state import Stage
from service.settings import ModelSettings
from worker import units
from worker.influence import (
    EmbeddingOptions,
    GradientProjection,
    Samples,
    candidates,
    embedding_flops,
    gradient_flops,
    propagation,
)
from worker.influence.second_order import second_order_terms
from worker.stages import curvature, prepare
from worker.stages.keys import result_key
from worker.stages.plan import VALIDATION_SAMPLES

PLAIN = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = {**PLAIN, "num_key_value_heads": 2}
SIZES: dict[str, dict[str, int]] = {
    "gpt2": {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_inner": 40},
    "gpt_neox": PLAIN,
    "llama": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "gemma2": {**GROUPED, "head_dim": 8},
}

# SmolLM2-135M and a pool as in benchmarks/results/corpus_job.json.
SHAPE = Shape.of_config(
    {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    }
)
COUNTS = JobCounts(
    pool=TokenCounts(3000, 532_377, 1.5e8, 250_000),
    target=TokenCounts(48, 9_000, 1.7e6, 4_500),
    budget=150,
    estimated=False,
)
MEASURED = Rates(matmul={"float32": 1e11, "bfloat16": 2e11}, device="cpu", memory_bytes=2**36)


def parameters(**given: Any) -> dict[str, Any]:
    return Parameters.model_validate(given).model_dump(mode="json")


def planned(counts: JobCounts = COUNTS, rates: Rates = MEASURED, **given: Any) -> dict[str, Any]:
    return cost.plan(SHAPE, parameters(**given), counts, rates, {})


def stages(plan: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["stage"]: entry for entry in plan["stages"]}


@pytest.fixture(scope="module", params=list(SIZES))
def loaded(request: pytest.FixtureRequest) -> tuple[Any, Shape]:
    config = AutoConfig.for_model(
        request.param, vocab_size=61, bos_token_id=0, eos_token_id=1, pad_token_id=2, **SIZES[request.param]
    )
    return AutoModelForCausalLM.from_config(config), Shape.of_config(json.loads(config.to_json_string(use_diff=True)))


@pytest.fixture
def samples() -> tuple[Samples, TokenCounts]:
    lengths = np.array([20, 20, 17, 9])
    response = np.concatenate([np.arange(length) >= length // 3 for length in lengths])
    found = Samples(
        input_ids=np.zeros(lengths.sum(), dtype=np.int32), response=response, offsets=np.r_[0, np.cumsum(lengths)]
    )
    counts = TokenCounts(4, float(lengths.sum()), float((lengths**2).sum()), float(found.predicted().sum()))
    return found, counts


@pytest.mark.parametrize("dim", [None, 48, 10_000])
def test_gradients_count_as_on_the_loaded_model(
    loaded: tuple[Any, Shape], samples: tuple[Samples, TokenCounts], dim: int | None
) -> None:
    model, shape = loaded
    projection = None if dim is None else GradientProjection(dim=dim)
    counted = gradient_flops(model, samples[0], projection=projection).total
    assert operations.gradients(shape, samples[1], modules="down_proj", projection_dim=dim) == pytest.approx(counted)


@pytest.mark.parametrize("pooling", ["last", "response"])
@pytest.mark.parametrize("kind", ["jvp", "hidden", "rds"])
def test_embeddings_count_as_on_the_loaded_model(
    loaded: tuple[Any, Shape], samples: tuple[Samples, TokenCounts], kind: Any, pooling: Any
) -> None:
    model, shape = loaded
    options = {"kind": kind, "pooling": pooling, "blocks": 2, "tangents": 3}
    counted = embedding_flops(model, samples[0], options=EmbeddingOptions(**options)).total
    assert operations.embedding(shape, samples[1], options) == pytest.approx(counted)


def test_weights_are_those_of_the_loaded_model(loaded: tuple[Any, Shape]) -> None:
    model, shape = loaded
    matrices = [p.numel() for name, p in model.base_model.named_parameters() if p.ndim == 2 and "wpe" not in name]
    assert shape.weights == sum(matrices)


class Products(TorchDispatchMode):
    """Adds up the operations of every matrix product. (torch's own counter cannot look into second derivatives.)"""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            left, right = args[-2:]
            self.total += 2 * left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_second_order_terms_count_about_as_many_products_as_really_run(kind: Any) -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=128, bos_token_id=0, eos_token_id=1, pad_token_id=2, **{**GROUPED, "num_hidden_layers": 6}
    )
    rank, dim, length = 8, 96, 24
    counts = {n: TokenCounts(n, n * length, n * length**2, n * length / 2) for n in (6, 12)}
    targets, landmarks = (
        Samples(
            input_ids=np.full(n * length, 5, dtype=np.int32),
            response=np.tile(np.arange(length) >= length // 2, n),
            offsets=np.arange(n + 1) * length,
        )
        for n in counts
    )
    with Products() as counter:
        second_order_terms(
            AutoModelForCausalLM.from_config(config),
            landmarks,
            targets,
            kind=kind,
            coefficients=torch.randn(12, rank, dtype=torch.float64),
            scaling=None,
            offset=None,
            projection=GradientProjection(dim=dim),
        )
    given = parameters(
        method="exact_influence",
        selection="weighted",
        optimizer={"type": "sgd"},
        curvature={"type": kind, "rank": rank},
        gradient={"projection_dim": dim},
    )
    about = JobCounts(pool=counts[12], target=counts[6], budget=1, estimated=False)
    shape = Shape.of_config(config.to_dict())
    estimate = StageCosts(shape, given, about, "float32").all()[Stage.CURVATURE].operations
    assert estimate == pytest.approx(counter.total, rel=0.25)


def test_the_passes_are_multiples_of_2_n_t() -> None:
    long = TokenCounts(1, 1e6, 1.0, 0.0)  # without attention and head
    unit = 2 * 1e6 * SHAPE.blocks * SHAPE.block_weights
    assert operations.forward(SHAPE, long) == pytest.approx(unit, rel=1e-4)
    gradient = operations.gradients(SHAPE, long, modules="down_proj", projection_dim=64)
    assert gradient == pytest.approx(2 * unit, rel=0.05)
    warm = parameters(warmup={"samples": 3000, "epochs": 2})
    pool = TokenCounts(3000, 1e6, 1.0, 0.0)
    costs = StageCosts(SHAPE, warm, JobCounts(pool=pool, target=pool, budget=1, estimated=False), "float32").all()
    assert costs[Stage.WARMUP].operations == pytest.approx(2 * 3 * unit, rel=0.03)


def test_exact_scaling_costs_the_whole_gradient_of_each_layer() -> None:
    plain = operations.gradients(SHAPE, COUNTS.pool, modules="down_proj", projection_dim=16_384)
    scaled = operations.gradients(
        SHAPE, COUNTS.pool, modules="down_proj", projection_dim=16_384, is_scaled_exactly=True
    )
    formed = 2 * COUNTS.pool.seen.tokens * SHAPE.blocks * 576 * 1536
    assert scaled - plain == pytest.approx(formed, rel=0.5)
    adam = stages(planned(optimizer={"type": "adamw"}, warmup={}, method="exact_influence"))
    factored = stages(planned(optimizer={"type": "adamw", "scaling": "factored"}, warmup={}, method="exact_influence"))
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


ALWAYS = ["prepare", "select", "validate", "publish"]
SCALED = {"optimizer": {"type": "adamw"}, "warmup": {}, "selection": "weighted"}


@pytest.mark.parametrize(
    ("given", "more"),
    [
        ({"landmarks": {"count": 64}}, {"candidates", "choose_embedding", "embed", "propagate", "refine", "gradients"}),
        ({"landmarks": {"count": 64}, "embedding": {"kind": "jvp"}, "refine": 0}, {"embed", "propagate", "gradients"}),
        ({}, {"propagate", "gradients"}),  # 4096 landmarks are all of the pool
        ({"method": "exact_influence"}, {"propagate", "gradients"}),
        ({"method": "rds_plus"}, {"embed", "embed_target", "propagate"}),
        ({"method": "random"}, set()),
        ({**SCALED, "curvature": {"type": "hessian"}}, {"warmup", "curvature", "propagate", "gradients"}),
        ({**SCALED, "curvature": {"type": "fisher"}}, {"warmup", "curvature", "propagate", "gradients"}),
        (
            {"optimizer": {"type": "sgd"}, "selection": "weighted", "curvature": {"type": "fisher"}},
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
    assert plan["exact_operations"] == pytest.approx(planned(method="exact_influence")["totals"]["operations"])
    assert (plan["estimated"], plan["tokens"]) == (False, {"pool": 532_377, "target": 9_000})


def test_a_second_order_plan_costs_its_directions() -> None:
    def curvature(kind: str, rank: int) -> float:
        given = {**SCALED, "landmarks": {"count": 64}, "curvature": {"type": kind, "rank": rank}}
        found = stages(planned(**given))["curvature"]["operations"]
        assert isinstance(found, float)
        return found

    assert curvature("hessian", 32) > curvature("ggn", 32) > 1.8 * curvature("ggn", 16) > 0


def test_seconds_come_from_the_stage_then_from_the_machine_then_from_nowhere() -> None:
    given: dict[str, Any] = {"landmarks": {"count": 256}, "embedding": {"kind": "jvp"}}
    by_machine = stages(planned(**given))
    embed = by_machine["embed"]
    assert embed["seconds"] == pytest.approx(embed["operations"] / (cost.RATE_SHARE * 2e11), abs=1e-3), (
        "auto: the faster"
    )
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
    half = cost.plan(SHAPE, parameters(), COUNTS, MEASURED, {Stage.LANDMARK_GRADIENTS: 0.5})
    found = stages(half)["landmark_gradients"]
    assert (found["already_there"], found["operations"]) == (0.5, whole["landmark_gradients"]["operations"])
    assert found["seconds"] == pytest.approx(whole["landmark_gradients"]["seconds"] / 2, abs=1e-3)


def test_the_exact_method_is_named_where_it_would_cost_less_than_twice() -> None:
    note = planned(landmarks={"count": 1500})["note"]
    assert note.startswith("method exact_influence would cost 1.2 times the operations of this job")
    dearer = planned(landmarks={"count": 700}, embedding={"kind": "hidden"})
    assert 1.2 < dearer["exact_operations"] / dearer["totals"]["operations"] < 2
    assert dearer["note"] is not None
    assert planned(landmarks={"count": 64}, validate=False, embedding={"kind": "hidden"}, refine=0)["note"] is None
    assert planned(landmarks={"count": 4096})["note"] is None, "every sample is a landmark already"
    assert planned(method="exact_influence")["note"] is None
    assert planned(method="rds_plus")["note"] is None


def test_a_shortlist_holds_no_landmarks() -> None:
    found = stages(planned(landmarks={"count": 2900}, refine=1.0))
    assert found["refine"]["operations"] == pytest.approx(found["landmark_gradients"]["operations"] / 29)


def test_a_validation_holds_the_weights_in_float32_unless_they_are_quantised() -> None:
    memory = [
        stages(planned(dtype="bfloat16", quantization=quantization))["validate"]["memory_bytes"]
        for quantization in ("none", "int8")
    ]
    assert memory[0] - memory[1] == pytest.approx(3 * SHAPE.weights)  # 4 bytes each, not 1


def test_landmarks_above_the_pool_are_said_to_be_lowered() -> None:
    assert "landmarks.count is 4096; lowered to the 3000 usable samples of the pool." in planned()["warnings"][0]
    assert planned(landmarks={"count": 3000})["warnings"][0].startswith("Every sample is a landmark")
    assert planned(landmarks={"count": 2999})["warnings"] == []


def test_what_does_not_fit_the_worker_is_said() -> None:
    small = Rates(matmul={"float32": 1e11}, device="cpu", memory_bytes=2**30)
    assert "GiB; the worker seen last has 1.0 GiB" in planned(rates=small)["warnings"][0]


def test_a_model_of_unknown_shape_has_a_plan_without_figures_and_the_reason() -> None:
    plan = cost.plan("the model's config.json has no hidden_size", parameters(), COUNTS, MEASURED, {})
    assert "the model's config.json has no hidden_size" in plan["warnings"][0]
    assert {entry["operations"] for entry in plan["stages"]} == {None}
    assert set(plan["totals"].values()) == {None}
    assert (plan["exact_operations"], plan["note"]) == (None, None)
    unknown = planned(gradient={"modules": "experts"})
    assert "experts is none of the block layers" in unknown["warnings"][0]


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
    known, guessed = (stages(planned(c, landmarks={"count": 64})) for c in (counts, COUNTS))
    assert known["candidates"]["operations"] < guessed["candidates"]["operations"] / 4
    assert known["embed"]["operations"] < guessed["embed"]["operations"] / 4


@pytest.mark.parametrize("pooling", [None, "last"])
def test_the_candidates_of_a_plan_are_those_of_the_worker(pooling: str | None) -> None:
    offered = [each for each in candidates(EmbeddingOptions(), SHAPE.blocks) if pooling in (None, each[0].pooling)]
    as_json = [{name: getattr(one, name) for name in ("kind", "pooling", "blocks", "tangents")} for one, _ in offered]
    told = JobCounts(pool=COUNTS.pool, target=COUNTS.target, budget=150, estimated=False, candidates=as_json)
    given: dict[str, Any] = {"landmarks": {"count": 64}, "embedding": {"kind": "auto", "pooling": pooling}}
    assert planned(told, **given)["stages"] == planned(**given)["stages"]


# What a stage depends on


def inputs(stage: Stage, *, pool: str = "p", target: str = "t", budget: int = 5, **given: Any) -> dict[str, Any]:
    return cost.stage_inputs(stage, pool, target, budget, parameters(**given))


def test_every_computed_stage_has_its_inputs_in_the_table() -> None:
    assert set(cost.STAGE_INPUTS) == set(Stage) - {Stage.PREPARE, Stage.PUBLISH}
    for stage in cost.STAGE_INPUTS:
        assert inputs(stage) == inputs(stage)
        assert inputs(stage) != inputs(stage, seed=1)
        assert inputs(stage) != inputs(stage, max_length=64)


def test_another_target_and_budget_leave_the_pools_part_as_it_is() -> None:
    jvp = {"kind": "jvp"}
    for stage in (Stage.LANDMARK_GRADIENTS, Stage.WARMUP, Stage.CANDIDATES):
        assert inputs(stage) == inputs(stage, target="u", budget=9, selection="top_k", kernel={"ridge": 1})
    assert inputs(Stage.EMBED, embedding=jvp) == inputs(Stage.EMBED, embedding=jvp, target="u", landmarks={"count": 3})
    assert inputs(Stage.EMBED) != inputs(Stage.EMBED, target="u"), "which one `auto` takes depends on the target"
    assert inputs(Stage.SELECT) != inputs(Stage.SELECT, budget=6)


def test_what_depends_on_a_warm_up_depends_on_its_pool_and_optimizer() -> None:
    assert inputs(Stage.TARGET_GRADIENTS) == inputs(Stage.TARGET_GRADIENTS, pool="q")
    warm: dict[str, Any] = {"warmup": {}}
    assert inputs(Stage.TARGET_GRADIENTS, **warm) != inputs(Stage.TARGET_GRADIENTS, pool="q", **warm)
    adam = {"optimizer": {"type": "adamw", "weight_decay": 0.1}}
    assert inputs(Stage.TARGET_GRADIENTS, **warm) != inputs(Stage.TARGET_GRADIENTS, **warm, **adam)


def test_the_plan_counts_with_the_workers_own_numbers() -> None:
    assert stage_cost._MOST_COMPARED == prepare._MOST_COMPARED
    assert stage_cost._LANDMARKS_A_DIRECTION == curvature._LANDMARKS_A_DIRECTION
    assert len(propagation.RIDGES) == stage_cost._RIDGES


def test_a_validation_takes_as_many_samples_as_the_worker() -> None:
    assert stage_cost.VALIDATION_SAMPLES == VALIDATION_SAMPLES
    few, many, more = (
        stages(planned(JobCounts(pool=COUNTS.pool, target=COUNTS.target, budget=budget, estimated=False)))
        for budget in (8, 16, 2000)
    )
    assert few["validate"]["operations"] < many["validate"]["operations"] == more["validate"]["operations"]


def test_samples_without_a_response_are_no_landmarks() -> None:
    counts = JobCounts(pool=COUNTS.pool, target=COUNTS.target, budget=5, estimated=False, usable=900)
    assert "embed" not in stages(planned(counts, landmarks={"count": 1000}))
    assert "embed" in stages(planned(counts, landmarks={"count": 899}))


def test_stages_of_needs_no_shape() -> None:
    assert stages_of(parameters(method="random", validate=False), COUNTS) == [
        Stage.PREPARE,
        Stage.SELECT,
        Stage.PUBLISH,
    ]


def test_the_plan_after_the_count_tells_what_is_there_of_the_first_wave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, job = ArtifactStore(str(tmp_path)), SimpleNamespace(id="j", budget=5, model={})
    job.parameters = parameters(method="rds_plus")
    counted = {"samples": 30, "tokens": 900, "response_tokens": 300}
    prepared = {"pool_counts": counted, "target_counts": counted, "dtype": "float32"}
    monkeypatch.setattr(units, "prepared_result", lambda *_: prepared)
    monkeypatch.setattr(planning, "measured_rates", lambda _: MEASURED)
    monkeypatch.setattr(planning, "shape_of", lambda *_: SHAPE)
    first = [UnitSpec(stage=stage, shard=i, artifact_key=f"{stage}-{i}", spec={}, total=1)
             for stage in (Stage.EMBED, Stage.EMBED_TARGET) for i in range(20)]  # fmt: skip
    for unit in first[:20]:
        store.write_json(result_key(unit.artifact_key), {})
    unknown: Any = None
    found = stages(units.exact_plan(unknown, store, unknown, job, first))  # type: ignore[arg-type]
    assert (found["embed"]["already_there"], found["embed_target"]["already_there"]) == (1.0, 0.0)


# The shape of a job's model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    configs = {
        "base": {"config.json": {"model_type": "llama", "vocab_size": 61, **SIZES["llama"]}},
        "lora": {"adapter_config.json": {"r": 4, "target_modules": ["q_proj", "mlp.up_proj"]}},
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
    assert of("thin") == "the model's config.json has no hidden_size"
    assert of("gone") == "the model's config.json could not be read (FileNotFoundError)"
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
