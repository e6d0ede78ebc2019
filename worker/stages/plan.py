"""Which units a job has: one function from what is finished to what comes next. Imports no torch.

    prepare -> warmup -> landmark_gradients, target_gradients, candidates -> choose_embedding, curvature -> embed
            -> propagate (which may ask for more landmarks) -> refine -> select -> validate -> publish

A job goes through the stages that its parameters need. The units of a wave are independent of each other; the next wave is
planned from the results of those before, by the service and by `winnow select` alike. A unit's spec says all that it needs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from service.jobs.ledger import UnitSpec
from service.jobs.state import Stage
from worker.stages.keys import artifact_key

VALIDATION_SAMPLES = 16
"""Samples of a validation step at most; of a larger selection as many are drawn: the proof costs little beside the job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobInputs:
    """What the stages know of a job: content and parameters, no tenant. Two jobs of another `salt` have no artifact in common."""

    model: dict[str, Any]
    pool: str
    target: str
    budget: int
    parameters: dict[str, Any]
    salt: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A finished unit."""

    artifact_key: str
    spec: Mapping[str, Any]
    result: Mapping[str, Any]


History = Mapping[Stage, Sequence[Done]]
"""The finished units of each stage, in the order of their shards."""


def next_units(job: JobInputs, done: History) -> list[UnitSpec]:
    """The units to do now that all planned so far are done; none once the selection is there and validated."""
    planner = _Planner(job, done)
    for wave in (
        *(planner.warmup, planner.measure, planner.decide, planner.embed, planner.propagate),
        *(planner.refine, planner.select, planner.validate),
    ):
        if units := wave():
            return units
    return []


class _Planner:
    """Each wave returns the units that it still needs, none where it is done or not part of the job."""

    def __init__(self, job: JobInputs, done: History) -> None:
        self._job = job
        self._done = done
        self._parameters = job.parameters
        self._prepared = done[Stage.PREPARE][0].result
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

    def warmup(self) -> list[UnitSpec]:
        if self._parameters["warmup"] is None or self._warmup is not None:
            return []
        spec = {"tokens": self._prepared["pool_tokens"]}
        depends_on = {
            **spec,
            "model": self._prepared["model_fingerprint"],
            "dtype": self._prepared["dtype"],  # of the base below adapters
            "quantization": self._parameters["quantization"],
            "warmup": self._parameters["warmup"],
            "optimizer": self._parameters["optimizer"],
            "seed": self._parameters["seed"],
        }
        key = artifact_key(Stage.WARMUP, "checkpoints", ".safetensors", **depends_on)
        return [
            UnitSpec(stage=Stage.WARMUP, shard=0, artifact_key=key, spec=spec, total=self._prepared["warmup_total"])
        ]

    def _model(self) -> dict[str, Any]:
        """What a unit is told of the model, beyond its files: the warm-up's checkpoint, and the layers measured on."""
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
            "quantization": self._parameters["quantization"],
            "seed": self._parameters["seed"],
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

    def _gradients(self, stage: Stage, tokens: str, bounds: Sequence[Sequence[int]]) -> list[UnitSpec]:
        """Gradients of a shard each; those of pool samples are scaled as the optimiser scales its step."""
        gradient, optimizer = self._parameters["gradient"], self._parameters["optimizer"]
        is_scaled = stage != Stage.TARGET_GRADIENTS and optimizer["type"] in ("adam", "adamw")
        scaling = {name: optimizer[name] for name in ("type", "betas", "eps", "scaling")} if is_scaled else None
        units = []
        first = len(self._of(stage))
        for shard, (start, stop) in enumerate(bounds, first):
            spec = {
                "tokens": tokens,
                "start": start,
                "stop": stop,
                "of": bounds[-1][1],
                **self._model(),
                "state": self._state() if is_scaled else None,
                "round": len(self._of(Stage.PROPAGATE)),
            }
            depends_on = {
                **self._model_dependence(),
                "tokens": tokens,
                "rows": [start, stop],
                "projection_dim": gradient["projection_dim"],
                "scaling": scaling,
                "state": spec["state"],
            }
            key = artifact_key(Stage.LANDMARK_GRADIENTS, "gradients", ".safetensors", **depends_on)
            units.append(UnitSpec(stage=stage, shard=shard, artifact_key=key, spec=spec, total=stop - start))
        return units

    def _pool_embeddings(self, options: Mapping[str, Any]) -> list[UnitSpec]:
        return self._embeddings(Stage.EMBED, self._prepared["pool_tokens"], self._prepared["embed_shards"], options)

    def _embeddings(
        self, stage: Stage, tokens: str, bounds: Sequence[Sequence[int]], options: Mapping[str, Any], first: int = 0
    ) -> list[UnitSpec]:
        units = []
        for shard, (start, stop) in enumerate(bounds, first):
            spec = {
                "tokens": tokens,
                "start": start,
                "stop": stop,
                "of": bounds[-1][1],
                "options": dict(options),
                **self._model(),
            }
            depends_on = {
                **self._model_dependence(),
                "tokens": tokens,
                "rows": [start, stop],
                "options": spec["options"],
            }
            key = artifact_key(Stage.EMBED, "embeddings", ".safetensors", **depends_on)
            units.append(UnitSpec(stage=stage, shard=shard, artifact_key=key, spec=spec, total=stop - start))
        return units

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
        depends_on = {
            **spec,
            "kernel": self._parameters["kernel"],
            "normalize": self._parameters["gradient"]["normalize"],
        }
        key = artifact_key(Stage.CHOOSE_EMBEDDING, "choices", "", **depends_on)
        total = self._prepared["landmark_count"]
        return UnitSpec(stage=Stage.CHOOSE_EMBEDDING, shard=0, artifact_key=key, spec=spec, total=total)

    def _needs_curvature(self) -> bool:
        """`fisher` is in the gradients already, but for its part in the optimiser's own drift (momentum, weight decay)."""
        kind, optimizer = self._parameters["curvature"]["type"], self._parameters["optimizer"]
        drifts = bool(self._state() or optimizer["weight_decay"])
        return kind in ("ggn", "hessian") or (kind == "fisher" and drifts)

    def _curvature(self) -> UnitSpec:
        spec = {**self._measured(), "targets": self._prepared["target_tokens"], **self._model(), "state": self._state()}
        depends_on = {
            **spec,
            **self._model_dependence(),
            "curvature": self._parameters["curvature"],
            "optimizer": self._parameters["optimizer"],
            "projection_dim": self._parameters["gradient"]["projection_dim"],
        }
        key = artifact_key(Stage.CURVATURE, "curvatures", ".safetensors", **depends_on)
        return UnitSpec(stage=Stage.CURVATURE, shard=0, artifact_key=key, spec=spec, total=self._prepared["t"])

    def _measured(self) -> dict[str, Any]:
        """The gradients that there are: of each round's landmarks, and of the targets."""
        rounds: list[dict[str, Any]] = []
        for unit in self._of(Stage.LANDMARK_GRADIENTS):
            if unit.spec["start"] == 0:
                rounds.append({"tokens": unit.spec["tokens"], "gradients": []})
            rounds[-1]["gradients"].append(unit.artifact_key)
        return {"landmarks": rounds, "target_gradients": self._keys(Stage.TARGET_GRADIENTS)}

    def embed(self) -> list[UnitSpec]:
        if not self._propagates or self._of(Stage.EMBED):
            return []
        return self._pool_embeddings(self._of(Stage.CHOOSE_EMBEDDING)[0].result["chosen"])

    def propagate(self) -> list[UnitSpec]:
        """Every sample's influence; before it, where the last round asked for more landmarks, their gradients."""
        rounds = self._of(Stage.PROPAGATE)
        grow = rounds[-1].result.get("grow") if rounds else None
        if self._method == "random" or (rounds and grow is None):
            return []
        measured = self._measured()
        if grow is not None and len(measured["landmarks"]) == len(rounds):
            return self._gradients(Stage.LANDMARK_GRADIENTS, grow["tokens"], grow["shards"])
        spec = {
            **measured,
            "embeddings": self._keys(Stage.EMBED),
            "target_embeddings": self._keys(Stage.EMBED_TARGET),
            "curvature": self._curvature_key(),
        }
        names = ("kernel", "selection", "refine", "min_fidelity", "seed", "gradient", "curvature")
        depends_on = {
            **spec,
            "parameters": {name: self._parameters[name] for name in names},  # apart: a name may be one of the spec's
            "pool": self._prepared["pool_tokens"],
            "targets": self._prepared["target_tokens"],
            "budget": self._job.budget,
        }
        key = artifact_key(Stage.PROPAGATE, "influence", ".npy", **depends_on)
        total = self._prepared["n"]
        return [UnitSpec(stage=Stage.PROPAGATE, shard=len(rounds), artifact_key=key, spec=spec, total=total)]

    def _curvature_key(self) -> str | None:
        keys = self._keys(Stage.CURVATURE)
        return keys[0] if keys else None

    def refine(self) -> list[UnitSpec]:
        """Exact gradients of the shortlist."""
        if self._method == "random" or self._of(Stage.REFINE):
            return []
        shortlist = self._of(Stage.PROPAGATE)[-1].result["shortlist"]
        return [] if shortlist is None else self._gradients(Stage.REFINE, shortlist["tokens"], shortlist["shards"])

    def select(self) -> list[UnitSpec]:
        if self._of(Stage.SELECT):
            return []
        refined = self._of(Stage.REFINE)
        propagated = self._of(Stage.PROPAGATE)
        shortlist = [{"tokens": refined[0].spec["tokens"], "gradients": self._keys(Stage.REFINE)}] if refined else []
        spec = {
            **self._measured(),
            "refined": shortlist,
            "embeddings": self._keys(Stage.EMBED),
            "target_units": [*self._keys(Stage.TARGET_GRADIENTS), *self._keys(Stage.EMBED_TARGET)],
            "influence": propagated[-1].artifact_key if propagated else None,
            "curvature": self._curvature_key(),
        }
        names = ("method", "selection", "curvature", "optimizer", "seed", "refine")
        depends_on = {
            **spec,
            "parameters": {name: self._parameters[name] for name in names},
            "normalize": self._parameters["gradient"]["normalize"],
            "pool": self._prepared["pool_tokens"],
            "targets": self._prepared["target_tokens"],
            "budget": self._job.budget,
        }
        key = artifact_key(Stage.SELECT, "selections", ".safetensors", **depends_on)
        return [UnitSpec(stage=Stage.SELECT, shard=0, artifact_key=key, spec=spec, total=self._prepared["n"])]

    def validate(self) -> list[UnitSpec]:
        if not self._parameters["validate"] or self._of(Stage.VALIDATE):
            return []
        spec = {"selection": self._keys(Stage.SELECT)[0], **self._model(), "state": self._state()}
        depends_on = {
            **spec,
            **self._model_dependence(),
            **{name: self._parameters[name] for name in ("optimizer", "curvature")},
            "samples": VALIDATION_SAMPLES,
            "pool": self._prepared["pool_tokens"],
            "targets": self._prepared["target_tokens"],
        }
        key = artifact_key(Stage.VALIDATE, "validations", "", **depends_on)
        total = 3 * min(self._job.budget, VALIDATION_SAMPLES)
        return [UnitSpec(stage=Stage.VALIDATE, shard=0, artifact_key=key, spec=spec, total=total)]


def publish_unit(job_id: str, selection_key: str, rows: int) -> UnitSpec:
    spec = {"selection": selection_key}
    return UnitSpec(stage=Stage.PUBLISH, shard=0, artifact_key=f"publish/{job_id}", spec=spec, total=rows)
