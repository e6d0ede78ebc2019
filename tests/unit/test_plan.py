"""Which units a job has, wave after wave, and what the names of their artifacts depend on."""

import copy
from typing import Any

import numpy as np
import pytest

from service.plan import artifact_keys
from service.plan import waves as planner
from service.plan.artifact_keys import rows_key, tokens_key
from service.plan.parameters import Parameters
from service.plan.stages import Done, JobInputs, Stage, UnitSpec
from service.plan.waves import next_units, rehearse

HIDDEN = {"kind": "hidden", "pooling": "response", "blocks": 4, "tangents": 2}
JVP = {**HIDDEN, "kind": "jvp"}
PREPARED: dict[str, Any] = {
    "model_fingerprint": "m",
    "is_adapter": False,
    "dtype": "float32",
    "pool_tokens": "tokens/pool",
    "target_tokens": "tokens/target",
    "landmarks": "tokens/landmarks",
    "landmark_count": 20,
    "all_exact": False,
    "embed_shards": [[0, 60], [60, 100]],
    "landmark_shards": [[0, 12], [12, 20]],
    "candidate_tokens": "tokens/landmarks",
    "candidate_shards": [[0, 20]],
    "candidates": [HIDDEN, JVP],
    "scaled_on": "tokens/scaled_on",
    "target_shards": [[0, 5]],
    "warmup_total": 30,
    "refine_cap": {"samples": 24, "with": {"hidden": 23, "jvp": 22}},
    "n": 100,
    "t": 5,
}
SHORTLIST = {"tokens": "tokens/shortlist"}
ADAM = {"optimizer": {"type": "adamw"}, "warmup": {"samples": 30}}


def job(**parameters: Any) -> JobInputs:
    values = Parameters(**parameters).model_dump(mode="json")
    return JobInputs(model={"kind": "registered", "name": "m"}, pool="p", target="t", budget=10, parameters=values)


def result_of(unit: UnitSpec, inputs: JobInputs, grow: int, refine: int, results: dict[Stage, Any]) -> dict[str, Any]:
    propagates = inputs.parameters["method"] == "influence_distillation" and "all_exact" not in results
    match unit.stage:
        case stage if stage in results:
            return dict(results[stage])
        case Stage.WARMUP:
            return {"checkpoint": unit.artifact_key, "optimizer_state": f"{unit.artifact_key}.state", "adapter": False}
        case Stage.CHOOSE_EMBEDDING:
            return {"chosen": JVP}
        case Stage.PROPAGATE if unit.shard < grow:
            return {"grow": {"tokens": f"tokens/more-{unit.shard}", "shards": [[0, 20]]}}
        case Stage.PROPAGATE if unit.shard < grow + refine and propagates:
            tokens = f"{SHORTLIST['tokens']}-{unit.shard}"
            return {"shortlist": {"tokens": tokens, "shards": [[0, 9], [9, 18]]}}
        case Stage.PROPAGATE:
            return {"shortlist": None}
    return {}


def waves(
    inputs: JobInputs,
    *,
    grow: int = 0,
    refine: int = 1,
    prepared: dict[str, Any] | None = None,
    results: dict[Stage, Any] | None = None,
) -> list[list[UnitSpec]]:
    """All waves of the job, each unit finishing with a plausible result."""
    done = {Stage.PREPARE: [Done(artifact_key="prepare", spec={}, result={**PREPARED, **(prepared or {})})]}
    found: list[list[UnitSpec]] = []
    while units := next_units(inputs, done):
        found.append(units)
        assert len(found) < 30, "the plan does not end"
        for unit in units:
            result = result_of(unit, inputs, grow, refine, results or {})
            done.setdefault(unit.stage, []).append(Done(artifact_key=unit.artifact_key, spec=unit.spec, result=result))
    numbers = [(unit.stage, unit.shard) for wave in found for unit in wave]
    assert len(set(numbers)) == len(numbers), "the ledger knows a unit by its stage and shard"
    return found


def names(found: list[list[UnitSpec]]) -> list[str]:
    """The stages of each wave."""
    return [" ".join(sorted({unit.stage.value for unit in wave})) for wave in found]


NAMED = {"embedding": {"kind": "hidden"}}
EXACT = ["landmark_gradients target_gradients", "propagate", "select"]


class TestWaves:
    @pytest.mark.parametrize(("parameters", "prepared", "expected"), [
        ({"embedding": {"kind": "text"}}, {}, [
            "embed landmark_gradients target_gradients", "propagate", "refine", "propagate", "select", "validate",
        ]),
        ({"embedding": {"kind": "auto"}, "validate": False}, {}, [
            "candidates landmark_gradients target_gradients", "choose_embedding", "embed", "propagate", "refine", "propagate",
            "select",
        ]),
        # A named embedding is computed beside the gradients.
        (NAMED | {"validate": False}, {}, [
            "embed landmark_gradients target_gradients", "propagate", "refine", "propagate", "select",
        ]),
        ({"method": "exact_influence", "validate": False}, {"all_exact": True}, EXACT),
        ({"validate": False, "refine": 0}, {"all_exact": True}, EXACT),
        ({"method": "rds_plus", "validate": False}, {}, ["embed embed_target", "propagate", "select"]),
        ({"method": "random"}, {}, ["select", "validate"]),
    ], ids=["text", "auto", "hidden", "exact", "all landmarks", "rds_plus", "random"])  # fmt: skip
    def test_a_job_has_the_waves_that_its_parameters_need(
        self, parameters: dict[str, Any], prepared: dict[str, Any], expected: list[str]
    ) -> None:
        found = waves(job(**parameters), prepared=prepared, refine=0 if prepared else 1)
        assert names(found) == expected
        if parameters.get("method") == "rds_plus":
            assert {unit.spec["options"]["kind"] for unit in found[0]} == {"rds"}

    def test_the_warm_up_comes_first_and_all_measure_its_checkpoint(self) -> None:
        found = waves(job(**ADAM))
        assert names(found)[0] == "warmup"
        checkpoint = found[0][0].artifact_key
        measured = [unit for wave in found[1:] for unit in wave if "checkpoint" in unit.spec]
        assert {unit.stage for unit in measured} >= {Stage.EMBED, Stage.REFINE, Stage.TARGET_GRADIENTS, Stage.VALIDATE}
        assert {unit.spec["checkpoint"] for unit in measured} == {checkpoint}

    def test_adam_scales_pool_samples_and_not_targets(self) -> None:
        found = [unit for wave in waves(job(**ADAM)) for unit in wave]
        states = {unit.stage: unit.spec["state"] for unit in found if "state" in unit.spec}
        state = f"{found[0].artifact_key}.state"
        assert states[Stage.LANDMARK_GRADIENTS] == states[Stage.REFINE] == states[Stage.VALIDATE] == state
        assert states[Stage.TARGET_GRADIENTS] is None

    def test_without_a_warm_up_the_state_is_the_registered_one(self) -> None:
        assert waves(job(optimizer={"type": "adam"}))[0][0].spec["state"] == "registered"

    def test_landmarks_grow_round_by_round(self) -> None:
        found = waves(job(**NAMED, min_fidelity=0.9, validate=False), grow=2, refine=0)
        assert names(found)[1:] == [*["propagate", "landmark_gradients"] * 2, "propagate", "select"]
        rounds = found[-1][0].spec["landmarks"]
        assert [round_["tokens"] for round_ in rounds] == ["tokens/landmarks", "tokens/more-0", "tokens/more-1"]
        assert [len(round_["gradients"]) for round_ in rounds] == [2, 1, 1]

    def test_each_round_is_propagated_from_all_that_is_exact_by_then(self) -> None:
        found = waves(job(**NAMED, validate=False), refine=3)
        assert names(found)[1:] == [*["propagate", "refine"] * 3, "propagate", "select"]
        fits = [unit.spec for wave in found for unit in wave if unit.stage == Stage.PROPAGATE]
        assert [len(spec["refined"]) for spec in fits] == [0, 1, 2, 3]
        select = found[-1][0].spec
        assert [len(round_["gradients"]) for round_ in select["refined"]] == [2, 2, 2]
        assert select["refined"] == fits[-1]["refined"]

    def test_the_embedding_that_was_chosen_decides_how_many_are_refined(self) -> None:
        for given, most in ((NAMED, 24), ({"embedding": {"kind": "auto"}}, 22)):
            found = [unit for wave in waves(job(**given), refine=2) for unit in wave]
            assert {unit.spec["most_refined"] for unit in found if unit.stage == Stage.PROPAGATE} == {most}

    def test_landmarks_grow_before_anything_is_refined(self) -> None:
        found = waves(job(**NAMED, min_fidelity=0.9, validate=False), grow=1, refine=2)
        assert names(found)[1:] == [
            *["propagate", "landmark_gradients"], *["propagate", "refine"] * 2, "propagate", "select",
        ]  # fmt: skip

    @pytest.mark.parametrize(("kind", "optimizer", "expected"), [
        ("fisher", {"type": "sgd"}, False),  # it is in the gradients already
        ("fisher", {"type": "sgd", "weight_decay": 0.1}, True),
        ("fisher", {"type": "sgd", "momentum": 0.9}, True),
        ("fisher", {"type": "adam"}, True),
        ("ggn", {"type": "sgd"}, True),
        ("hessian", {"type": "sgd"}, True),
    ])  # fmt: skip
    def test_curvature_is_measured_where_gradients_do_not_hold_it(
        self, kind: str, optimizer: dict[str, Any], expected: bool
    ) -> None:
        found = waves(job(selection="weighted", curvature={"type": kind}, optimizer=optimizer))
        assert any(unit.stage == Stage.CURVATURE for wave in found for unit in wave) == expected
        select = next(unit for wave in found for unit in wave if unit.stage == Stage.SELECT)
        assert (select.spec["curvature"] is not None) == expected

    def test_a_lora_model_is_measured_on_its_adapters(self) -> None:
        lora = {"checkpoint": "c", "optimizer_state": "s", "adapter": True}
        for found in (
            waves(job(), prepared={"is_adapter": True}),
            waves(job(warmup={"lora": {}}), results={Stage.WARMUP: lora}),
        ):
            modules = {unit.spec["modules"] for wave in found for unit in wave if "modules" in unit.spec}
            assert modules == {"lora"}

    def test_every_shard_is_a_unit(self) -> None:
        found = waves(job(**NAMED))
        units = [unit for wave in found for unit in wave]
        assert len({unit.artifact_key for unit in units}) == len(units)
        first = {(unit.stage, unit.shard): (unit.spec["start"], unit.spec["stop"]) for unit in found[0]}
        assert first[Stage.EMBED, 1] == (60, 100)
        assert first[Stage.LANDMARK_GRADIENTS, 1] == (12, 20)
        assert [unit.total for wave in found for unit in wave if unit.stage == Stage.REFINE] == [9, 9]


def artifacts(inputs: JobInputs, **changes: Any) -> dict[Stage, set[str]]:
    found: dict[Stage, set[str]] = {}
    for wave in waves(inputs, prepared=changes):
        for unit in wave:
            found.setdefault(unit.stage, set()).add(unit.artifact_key)
    return found


def changed(before: JobInputs, after: JobInputs, **prepared: Any) -> set[str]:
    old, new = artifacts(before), artifacts(after, **prepared)
    assert set(old) == set(new)
    return {stage.value for stage in old if old[stage] != new[stage]}


DECIDED = {"propagate", "refine", "select", "validate"}
MEASURED = {"embed", "landmark_gradients", "target_gradients"}
AUTO = {"embedding": {"kind": "auto"}}
WARM = {"warmup": {"samples": 30, "lora": {}}}
CURVED = {"optimizer": {"type": "adam"}, "selection": "weighted", "curvature": {"type": "ggn"}}


class TestKeys:
    def test_equal_jobs_have_equal_names(self) -> None:
        assert artifacts(job(**NAMED)) == artifacts(copy.deepcopy(job(**NAMED)))

    def test_another_target_costs_the_targets_gradients_and_the_solve(self) -> None:
        after = changed(job(**NAMED), job(**NAMED), target_tokens="tokens/other")
        # The shortlist is another one where the target is; here its tokens are given, and so are their gradients.
        assert after == {"target_gradients", "propagate", "select", "validate"}

    @pytest.mark.parametrize(("parameters", "expected"), [
        ({"kernel": {"kind": "linear"}}, DECIDED - {"refine"}),
        ({"selection": "top_k"}, DECIDED - {"refine"}),
        ({"gradient": {"normalize": False}}, DECIDED - {"refine"}),
        ({"gradient": {"projection_dim": 1024}}, {"landmark_gradients", "target_gradients", *DECIDED}),
        ({"gradient": {"modules": "o_proj"}}, MEASURED | DECIDED),
        ({"seed": 1}, MEASURED | DECIDED),
        ({"quantization": "int8"}, MEASURED | DECIDED),
        ({"optimizer": {"type": "adam"}}, {"landmark_gradients", *DECIDED}),
        ({"embedding": {"kind": "jvp"}}, {"embed", "propagate", "select", "validate"}),
        ({"refine": 0.3}, {"propagate", "select", "validate"}),
        ({"min_fidelity": 0.5}, {"propagate", "select", "validate"}),
    ])  # fmt: skip
    def test_a_parameter_changes_the_names_of_what_depends_on_it(
        self, parameters: dict[str, Any], expected: set[str]
    ) -> None:
        assert changed(job(**NAMED), job(**{**NAMED, **parameters})) == expected

    @pytest.mark.parametrize(("kind", "change", "expected"), [
        *(("adam", change, {"landmark_gradients", *DECIDED})
          for change in ({"betas": [0.8, 0.99]}, {"eps": 1e-6}, {"scaling": "factored"})),
        ("sgd", {"learning_rate": 0.5}, {"select", "validate"}),
    ])  # fmt: skip
    def test_options_of_the_optimiser_change_only_what_depends_on_them(
        self, kind: str, change: dict[str, Any], expected: set[str]
    ) -> None:
        before, after = (job(**NAMED, optimizer={"type": kind, **more}) for more in ({}, change))
        assert changed(before, after) == expected

    @pytest.mark.parametrize(("prepared", "expected"), [
        ({"model_fingerprint": "other"}, MEASURED | DECIDED),
        ({"dtype": "bfloat16"}, MEASURED | DECIDED),
        ({"pool_tokens": "tokens/other"}, {"embed", "propagate", "select", "validate"}),
        ({"landmarks": "tokens/other"}, {"landmark_gradients", "propagate", "select", "validate"}),
    ])  # fmt: skip
    def test_what_was_prepared_changes_the_names(self, prepared: dict[str, Any], expected: set[str]) -> None:
        assert changed(job(**NAMED), job(**NAMED), **prepared) == expected

    def test_an_embedding_from_text_is_that_of_every_model_with_these_tokens(self) -> None:
        text = job(embedding={"kind": "text"})
        for change in ({"model_fingerprint": "other"}, {"dtype": "bfloat16"}):
            assert "embed" not in changed(text, text, **change)
        for change in ({"pool_tokens": "tokens/other"}, {"scaled_on": "tokens/other"}):
            assert "embed" in changed(text, text, **change)
        beside = job(embedding={"kind": "text_hidden"})
        assert "embed" in changed(beside, beside, model_fingerprint="other")

    def test_the_budget_changes_the_selection(self) -> None:
        before, after = job(**NAMED), job(**NAMED)
        other = JobInputs(**{**after.as_dict(), "budget": 11})
        assert changed(before, other) == {"propagate", "select", "validate"}

    @pytest.mark.parametrize(("job_of", "change", "stage"), [
        (WARM, {"seed": 1}, Stage.WARMUP),
        (WARM, {"quantization": "int8"}, Stage.WARMUP),
        (WARM, {"warmup": {"samples": 30, "lora": {"rank": 2}}}, Stage.WARMUP),
        (CURVED, {"optimizer": {"type": "adam", "weight_decay": 0.1}}, Stage.CURVATURE),
        (CURVED, {"curvature": {"type": "hessian"}}, Stage.CURVATURE),
        (CURVED, {"curvature": {"type": "ggn", "rank": 8}}, Stage.CURVATURE),
        (AUTO, {"kernel": {"ridge": 1}}, Stage.CHOOSE_EMBEDDING),
        (AUTO, {"gradient": {"normalize": False}}, Stage.CHOOSE_EMBEDDING),
    ])  # fmt: skip
    def test_what_is_made_once_a_job_has_all_that_it_depends_on_in_its_name(
        self, job_of: dict[str, Any], change: dict[str, Any], stage: Stage
    ) -> None:
        assert stage in changed(job(**job_of), job(**{**job_of, **change}))

    @pytest.mark.parametrize("job_of", [NAMED, WARM, {**CURVED, "embedding": {"kind": "hidden"}}])
    def test_a_plan_takes_no_other_work_for_that_of_a_job(self, job_of: dict[str, Any]) -> None:
        kind = job_of.get("optimizer", {"type": "adamw"})
        for change in (
            *({"seed": 1}, {"quantization": "int8"}, {"refine": 0.3}, {"min_fidelity": 0.5}, {"kernel": {"ridge": 1}}),
            *({"gradient": {"projection_dim": 1024}}, {"selection": "weighted"}, {"embedding": {"kind": "rds"}}),
            *(
                {"optimizer": {**kind, **one}}
                for one in ({}, {"eps": 1e-6}, {"betas": (0.8, 0.9)}, {"scaling": "factored"})
            ),
        ):
            jobs = (job(**{**job_of, "optimizer": kind}), job(**{**job_of, "optimizer": kind, **change}))
            found = [artifacts(one) for one in jobs]
            rehearsed = [rehearse(one, 10_000) for one in jobs]
            for stage in found[0].keys() & found[1].keys():
                if found[0][stage] != found[1][stage]:
                    assert rehearsed[0][stage] != rehearsed[1][stage], f"{stage}, {change}"

    @pytest.mark.parametrize("prepared", [
        {"dtype": "bfloat16"}, {"model_fingerprint": "other"}, {"pool_tokens": "tokens/other"},
    ])  # fmt: skip
    def test_a_warm_up_depends_on_what_it_trains(self, prepared: dict[str, Any]) -> None:
        assert Stage.WARMUP in changed(job(**WARM), job(**WARM), **prepared)

    def test_the_code_of_a_stage_is_in_its_names(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = artifacts(job())
        monkeypatch.setattr(artifact_keys, "code_version", lambda stage: f"{stage} of another day")
        after = artifacts(job())
        assert not any(before[stage] & after[stage] for stage in before)

    def test_the_size_of_a_validation_step_is_in_its_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = artifacts(job())
        monkeypatch.setattr(planner, "VALIDATION_SAMPLES", 64)
        assert artifacts(job())[Stage.VALIDATE] != before[Stage.VALIDATE]

    def test_a_salt_changes_the_name_of_the_tokens(self) -> None:
        named = {"dataset": "d", "tokenizer": "t", "max_length": 9}
        unsalted = tokens_key(**named, salt=None)
        assert unsalted == artifact_keys.artifact_key(Stage.PREPARE, "tokens", ".parquet", **named)
        assert len({unsalted, *(tokens_key(**named, salt=salt) for salt in ("job_1", "job_2"))}) == 3

    @pytest.mark.parametrize("parameters", [
        NAMED, WARM, CURVED, {"optimizer": {"type": "adam"}, "min_fidelity": 0.5}, {"method": "exact_influence"},
        {"method": "rds_plus"}, {"method": "random"}, {"embedding": {"kind": "jvp"}, "refine": 0.3},
    ])  # fmt: skip
    def test_all_names_follow_from_those_of_the_tokens(
        self, monkeypatch: pytest.MonkeyPatch, parameters: dict[str, Any]
    ) -> None:
        """So that a salt in these makes a job find nothing of any other."""
        tokens = {name: f"{key}/salted" for name, key in PREPARED.items() if str(key).startswith("tokens/")}
        before = artifacts(job(**parameters))
        monkeypatch.setitem(SHORTLIST, "tokens", "tokens/shortlist/salted")  # named after the pool's tokens
        after = artifacts(job(**parameters), **tokens)
        assert before.keys() == after.keys()
        assert not set().union(*before.values()) & set().union(*after.values())

    def test_chosen_rows_have_a_name_of_their_own(self) -> None:
        rows = np.array([1, 5, 9])
        assert rows_key("a", rows) == rows_key("a", rows.copy())
        assert len({rows_key("a", rows), rows_key("b", rows), rows_key("a", rows[:2])}) == 3
