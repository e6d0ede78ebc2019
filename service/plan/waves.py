"""Which units a job has: one function from what is finished to what comes next.

    prepare -> warmup -> landmark_gradients, target_gradients, candidates -> choose_embedding, curvature -> embed
            -> propagate (asks for more landmarks, or to refine, and follows again) -> select -> validate

A job goes through the stages that its parameters need. The units of a wave are independent of each other; the next wave is
planned from the results of those before, by the service and by `winnow select` alike. A unit's spec says all that it needs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from service.plan.artifact_keys import artifact_key, content_key, rendering
from service.plan.landmark_count import landmark_count
from service.plan.limits import HELD_OUT_FROM, LANDMARKS_PER_DIRECTION, MAX_CENTRES, VALIDATION_SAMPLES
from service.plan.preparing import remaining_units
from service.plan.stages import Done, History, JobInputs, Stage, UnitSpec

Bounds = Sequence[Sequence[int]]
"""[start, stop) of each shard."""


def next_units(job: JobInputs, done: History) -> list[UnitSpec]:
    """The next units once all planned so far are done; none after the last stage."""
    return remaining_units(job, done[Stage.PREPARE]) or _next_units(job, done, artifact_key)


def is_last(stage: Stage, parameters: Mapping[str, Any]) -> bool:
    """Whether the job is done with the stage, which has one unit then."""
    return stage == Stage.VALIDATE or (stage == Stage.SELECT and not parameters["validate"])


def rehearse(job: JobInputs, selectable: float) -> dict[Stage, list[str]]:
    """The names of the units of each stage that a job would go through, `selectable` samples of whose pool are usable.

    Made-up results are used, so no real artifact has these names: two jobs have equal names where they can share artifacts.
    """
    parameters, one = job.parameters, [[0, 1]]
    text = f"{rendering(parameters) or ''} cut to {parameters['max_length']}"
    pool, target = (f"{dataset} {text}" for dataset in (job.pool, job.target))
    is_exact = parameters["method"] == "exact_influence"
    all_exact = is_exact or landmark_count(parameters, int(selectable)) >= selectable
    propagates = parameters["method"] == "influence_distillation" and not all_exact
    options = {name: parameters.get(name, "keep") for name in ("duplicates", "overlap")}
    left_out = {name: option for name, option in options.items() if option != "keep"}
    some = f"{pool} without {left_out} of {target}" if left_out else pool
    landmarks = pool if is_exact else f"{parameters['landmarks']} of {some}"
    prepared = {
        "model_fingerprint": "",
        "is_adapter": False,
        "dtype": parameters["dtype"],
        "all_exact": all_exact,
        "pool_tokens": pool,
        "target_tokens": target,
        "landmarks": landmarks,
        "candidate_tokens": landmarks,
        "scaled_on": f"some of {some}",
        "exclusions": {"key": some} if left_out else None,
        **dict.fromkeys(("embed_shards", "target_shards", "landmark_shards", "candidate_shards"), one),
        **dict.fromkeys(("n", "t", "landmark_count", "warmup_total"), 1),
        "candidates": [parameters["embedding"]],
    }
    done = {Stage.PREPARE: [Done(artifact_key=f"{pool}, {target}", spec={}, result=prepared)]}
    while units := _next_units(job, done, lambda _, kind, suffix, **on: content_key(kind, on, suffix)):
        for unit in units:
            name, result = unit.artifact_key, {}
            match unit.stage:
                case Stage.WARMUP:
                    result = {
                        "checkpoint": name,
                        "optimizer_state": name,
                        "adapter": bool(parameters["warmup"]["lora"]),
                    }
                case Stage.CHOOSE_EMBEDDING:
                    result = {"chosen": {"kind": name}}
                case Stage.PROPAGATE if propagates and parameters["refine"]["size"] and Stage.REFINE not in done:
                    result = {"shortlist": {"tokens": f"best of {name}", "shards": one}}
            done.setdefault(unit.stage, []).append(Done(artifact_key=name, spec=unit.spec, result=result))
    return {stage: [unit.artifact_key for unit in done[stage]] for stage in Stage if stage in done}


def _next_units(job: JobInputs, done: History, name: Callable[..., str]) -> list[UnitSpec]:
    planner = _Planner(job, done, name)
    for wave in (
        *(planner.warmup, planner.measure, planner.decide, planner.embed),
        *(planner.propagate, planner.select, planner.validate),
    ):
        if units := wave():
            return units
    return []


class _Planner:
    """Each wave returns the units that it still needs, none where it is done or not part of the job. `name` is `artifact_key`."""

    def __init__(self, job: JobInputs, done: History, name: Callable[..., str]) -> None:
        self._job = job
        self._done = done
        self._name = name
        self._parameters = job.parameters
        self._prepared = done[Stage.PREPARE][-1].result
        self._method = job.parameters["method"]
        # Where every usable sample is a landmark there is nothing to propagate, and no embedding is needed.
        self._propagates = self._method == "influence_distillation" and not self._prepared["all_exact"]
        self._has_gradients = self._method in ("influence_distillation", "exact_influence")
        warmup = self._of(Stage.WARMUP)
        self._warmup = warmup[0].result if warmup else None

    def _of(self, stage: Stage) -> Sequence[Done]:
        return self._done.get(stage, ())

    def _keys(self, stage: Stage) -> list[str]:
        return [unit.artifact_key for unit in self._of(stage)]

    def _only(self, *names: str) -> dict[str, Any]:
        """Those of the parameters."""
        return {name: self._parameters[name] for name in names}

    def _unit(
        self,
        stage: Stage,
        kind: str,
        suffix: str,
        spec: Mapping[str, Any],
        depends_on: Mapping[str, Any],
        total: int,
        shard: int = 0,
    ) -> UnitSpec:
        key = self._name(stage, kind, suffix, **depends_on)
        return UnitSpec(stage=stage, shard=shard, artifact_key=key, spec=spec, total=total)

    def warmup(self) -> list[UnitSpec]:
        if self._parameters["warmup"] is None or self._warmup is not None:
            return []
        spec = {"tokens": self._prepared["pool_tokens"]}
        depends_on = {
            **spec,
            "model": self._prepared["model_fingerprint"],
            "dtype": self._prepared["dtype"],  # of the base below adapters
            **self._only("quantization", "warmup", "optimizer", "seed"),
            **self._exclusions(),
        }
        total = self._prepared["warmup_total"]
        return [self._unit(Stage.WARMUP, "checkpoints", ".safetensors", spec, depends_on, total)]

    def _exclusions(self) -> dict[str, str]:
        """What names the rows that the job leaves out, where it leaves out any."""
        found = self._prepared.get("exclusions")
        return {} if found is None else {"exclusions": found["key"]}

    def _model(self) -> dict[str, Any]:
        """What a unit needs to know of the model, beyond its files: the warm-up's checkpoint, and the layers measured on."""
        is_adapter = self._prepared["is_adapter"] or bool(self._warmup and self._warmup["adapter"])
        return {
            "checkpoint": self._warmup["checkpoint"] if self._warmup else None,
            "modules": "lora" if is_adapter else self._parameters["gradient"]["modules"],
        }

    def _state(self) -> str | None:
        """Where the optimiser's state is: the warm-up's artifact, `registered` with the model, or nowhere."""
        optimizer = self._parameters["optimizer"]
        if optimizer["type"] not in ("adam", "adamw") and not optimizer["momentum"]:
            return None
        return self._warmup["optimizer_state"] if self._warmup else "registered"

    def _model_dependence(self) -> dict[str, Any]:
        return {
            "model": self._prepared["model_fingerprint"],
            "dtype": self._prepared["dtype"],
            **self._only("quantization", "seed"),
            **self._model(),
        }

    def measure(self) -> list[UnitSpec]:
        """What is measured with the model before anything is approximated."""
        prepared, embedding = self._prepared, self._parameters["embedding"]
        units: list[UnitSpec] = []
        if self._has_gradients and not self._of(Stage.LANDMARK_GRADIENTS):
            units += self._gradients(Stage.LANDMARK_GRADIENTS, prepared["landmarks"], prepared["landmark_shards"])
            units += self._gradients(Stage.TARGET_GRADIENTS, prepared["target_tokens"], prepared["target_shards"])
            if self._propagates and embedding["kind"] == "auto":
                shards = prepared["candidate_shards"]
                for number, options in enumerate(prepared["candidates"]):
                    first = number * len(shards)
                    units += self._embeddings(Stage.CANDIDATES, prepared["candidate_tokens"], shards, options, first)
            elif self._propagates:
                units += self._pool_embeddings(embedding)
        if self._method == "rds_plus" and not self._of(Stage.EMBED):
            options = {**embedding, "kind": "rds"}
            units += self._pool_embeddings(options)
            units += self._embeddings(Stage.EMBED_TARGET, prepared["target_tokens"], prepared["target_shards"], options)
        return units

    def _gradients(self, stage: Stage, tokens: str, bounds: Bounds) -> list[UnitSpec]:
        """Gradients of a shard each; those of pool samples are scaled as the optimiser scales its step."""
        gradient, optimizer = self._parameters["gradient"], self._parameters["optimizer"]
        is_scaled = stage != Stage.TARGET_GRADIENTS and optimizer["type"] in ("adam", "adamw")
        state = self._state() if is_scaled else None
        also = {"state": state, "round": len(self._of(Stage.PROPAGATE))}
        depends_on = {
            **self._model_dependence(),
            "projection_dim": gradient["projection_dim"],
            "scaling": {name: optimizer[name] for name in ("type", "betas", "eps", "scaling")} if is_scaled else None,
            "state": state,
        }
        return self._shards(stage, "gradients", tokens, bounds, also, depends_on, len(self._of(stage)))

    def _pool_embeddings(self, options: Mapping[str, Any]) -> list[UnitSpec]:
        return self._embeddings(Stage.EMBED, self._prepared["pool_tokens"], self._prepared["embed_shards"], options)

    def _embeddings(
        self, stage: Stage, tokens: str, bounds: Bounds, options: Mapping[str, Any], first: int = 0
    ) -> list[UnitSpec]:
        """Those of text alone depend on no model, only on the tokens: models of one tokenizer share them."""
        is_text = options["kind"] == "text"
        chosen: dict[str, Any] = {"options": {"kind": "text"} if is_text else dict(options)}
        if options["kind"] in ("text", "text_hidden"):
            chosen["scaled_on"] = self._prepared["scaled_on"]
        depends_on = {**(self._only("seed") if is_text else self._model_dependence()), **chosen}
        return self._shards(stage, "embeddings", tokens, bounds, chosen, depends_on, first)

    def _shards(
        self,
        stage: Stage,
        kind: str,
        tokens: str,
        bounds: Bounds,
        also: Mapping[str, Any],
        depends_on: Mapping[str, Any],
        first: int,
    ) -> list[UnitSpec]:
        """A unit for each shard, numbered from `first` on; `also` goes into its spec."""
        spec = {"tokens": tokens, "of": bounds[-1][1], **self._model(), **also}
        return [
            self._unit(
                stage,
                kind,
                ".safetensors",
                {**spec, "start": start, "stop": stop},
                {**depends_on, "tokens": tokens, "rows": [start, stop]},
                stop - start,
                shard,
            )
            for shard, (start, stop) in enumerate(bounds, first)
        ]

    def decide(self) -> list[UnitSpec]:
        """What is decided from the landmarks' gradients: the embedding, and the curvature's directions."""
        units = []
        if self._of(Stage.CANDIDATES) and not self._of(Stage.CHOOSE_EMBEDDING):
            units.append(self._choose_embedding())
        if self._needs_curvature() and not self._of(Stage.CURVATURE):
            units.append(self._curvature())
        return units

    def _choose_embedding(self) -> UnitSpec:
        candidates: list[dict[str, Any]] = []
        for unit in self._of(Stage.CANDIDATES):
            if unit.spec["start"] == 0:
                candidates.append({"options": unit.spec["options"], "embeddings": []})
            candidates[-1]["embeddings"].append(unit.artifact_key)
        spec = {**self._measured(), "tokens": self._prepared["candidate_tokens"], "candidates": candidates}
        depends_on = {**spec, **self._only("kernel"), "normalize": self._parameters["gradient"]["normalize"]}
        return self._unit(Stage.CHOOSE_EMBEDDING, "choices", "", spec, depends_on, self._prepared["landmark_count"])

    def _needs_curvature(self) -> bool:
        """`fisher` is in the gradients already, but for its part in the optimiser's own offset (momentum, weight decay)."""
        kind, optimizer = self._parameters["curvature"]["type"], self._parameters["optimizer"]
        has_offset = bool(self._state() or optimizer["weight_decay"])
        return kind in ("ggn", "hessian") or (kind == "fisher" and has_offset)

    def _curvature(self) -> UnitSpec:
        spec = {**self._measured(), "targets": self._prepared["target_tokens"], **self._model(), "state": self._state()}
        depends_on = {
            **spec,
            **self._model_dependence(),
            **self._only("curvature", "optimizer"),
            "projection_dim": self._parameters["gradient"]["projection_dim"],
            "landmarks_per_direction": LANDMARKS_PER_DIRECTION,
            "held_out_from": HELD_OUT_FROM,
        }
        return self._unit(Stage.CURVATURE, "curvatures", ".safetensors", spec, depends_on, self._prepared["t"])

    def _measured(self) -> dict[str, Any]:
        """The gradients that there are: of each round's landmarks, of what was refined in each round, and of the targets."""
        return {
            "landmarks": self._rounds(Stage.LANDMARK_GRADIENTS),
            "refined": self._rounds(Stage.REFINE),
            "target_gradients": self._keys(Stage.TARGET_GRADIENTS),
        }

    def _rounds(self, stage: Stage) -> list[dict[str, Any]]:
        rounds: list[dict[str, Any]] = []
        for unit in self._of(stage):
            if unit.spec["start"] == 0:
                rounds.append({"tokens": unit.spec["tokens"], "gradients": []})
            rounds[-1]["gradients"].append(unit.artifact_key)
        return rounds

    def embed(self) -> list[UnitSpec]:
        if not self._propagates or self._of(Stage.EMBED):
            return []
        chosen = self._of(Stage.CHOOSE_EMBEDDING)
        return self._pool_embeddings(chosen[0].result["chosen"] if chosen else self._parameters["embedding"])

    def _data(self) -> dict[str, Any]:
        """The data of a selection."""
        prepared = self._prepared
        return {"pool": prepared["pool_tokens"], "targets": prepared["target_tokens"], "budget": self._job.budget}

    def propagate(self) -> list[UnitSpec]:
        """Every sample's influence; and then what the last round asked for: more landmarks, or a shortlist's gradients."""
        rounds = self._of(Stage.PROPAGATE)
        asked = rounds[-1].result if rounds else {}
        wanted = asked.get("grow") or asked.get("shortlist")
        if self._method == "random" or (rounds and wanted is None):
            return []
        measured = self._measured()
        if wanted is not None and len(measured["landmarks"]) + len(measured["refined"]) == len(rounds):
            stage = Stage.LANDMARK_GRADIENTS if asked.get("grow") else Stage.REFINE
            return self._gradients(stage, wanted["tokens"], wanted["shards"])
        spec = {
            **measured,
            "embeddings": self._keys(Stage.EMBED),
            "target_embeddings": self._keys(Stage.EMBED_TARGET),
            "curvature": self._curvature_key(),
            "most_refined": self._most_refined(),
        }
        names = ("kernel", "selection", "refine", "min_fidelity", "seed", "gradient", "curvature")
        # The parameters apart: a name may be one of the spec's.
        depends_on = {
            **spec,
            "parameters": self._only(*names),
            "max_centres": MAX_CENTRES,
            **self._data(),
            **self._exclusions(),
        }
        return [
            self._unit(Stage.PROPAGATE, "influence", ".npy", spec, depends_on, self._prepared["n"], shard=len(rounds))
        ]

    def _most_refined(self) -> int | None:
        """By what the pool is embedded with; None where nothing is refined."""
        cap, chosen = self._prepared.get("refine_cap"), self._of(Stage.CHOOSE_EMBEDDING)
        if cap is None:
            return None
        most: int = cap["with"][chosen[0].result["chosen"]["kind"]] if chosen else cap["samples"]
        return most

    def _curvature_key(self) -> str | None:
        keys = self._keys(Stage.CURVATURE)
        return keys[0] if keys else None

    def select(self) -> list[UnitSpec]:
        if self._of(Stage.SELECT):
            return []
        propagated = self._of(Stage.PROPAGATE)
        spec = {
            **self._measured(),
            "embeddings": self._keys(Stage.EMBED),
            "target_units": [*self._keys(Stage.TARGET_GRADIENTS), *self._keys(Stage.EMBED_TARGET)],
            "influence": propagated[-1].artifact_key if propagated else None,
            "curvature": self._curvature_key(),
        }
        depends_on = {
            **spec,
            "parameters": self._only("method", "selection", "curvature", "optimizer", "seed"),
            "normalize": self._parameters["gradient"]["normalize"],
            "held_out_from": HELD_OUT_FROM,
            **self._data(),
            **self._exclusions(),
        }
        return [self._unit(Stage.SELECT, "selections", ".safetensors", spec, depends_on, self._prepared["n"])]

    def validate(self) -> list[UnitSpec]:
        if not self._parameters["validate"] or self._of(Stage.VALIDATE):
            return []
        spec = {"selection": self._keys(Stage.SELECT)[0], **self._model(), "state": self._state()}
        depends_on = {
            **spec,
            **self._model_dependence(),
            **self._only("optimizer", "curvature"),
            "samples": VALIDATION_SAMPLES,
            "pool": self._prepared["pool_tokens"],
            "targets": self._prepared["target_tokens"],
        }
        total = 3 * min(self._job.budget, VALIDATION_SAMPLES)
        return [self._unit(Stage.VALIDATE, "validations", "", spec, depends_on, total)]
