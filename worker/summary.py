"""What the stages found, for the summary of the result: fidelity, embedding, weights, validation; and in sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

from service.datasets.storage import read_samples
from service.plan.stages import Stage
from service.storage.artifacts import ArtifactStore
from worker.errors import in_words

_MAX_NAMED = 100
_KKT_RESIDUAL = 1e-8  # guaranteed for the weights

# By the codes of `Rendered.notes`: what the rendered text does not say as the messages do.
RENDERING = {
    "system_folded": "the system message became part of the first user message: the chat template has no system role",
    "user_turns_merged": "user messages in a row were joined: the chat template wants the roles to alternate",
    "trailing_messages": "the messages after the last reply were left out",
    "reasoning_not_rendered": "the chat template leaves out reasoning",
    "tools_not_rendered": "the chat template leaves out the tools",
    "content_not_rendered": "the chat template leaves out content of messages",
    "content_rewritten": "the chat template rewrites content of messages",
}

Results = Mapping[Stage, Sequence[Mapping[str, Any] | None]]
"""The results of each stage's units, in the order of their shards."""


def of_method(results: Results) -> dict[str, Any]:
    """The part of the summary that the method decides, ready for JSON."""
    prepared, selected = _last(results, Stage.PREPARE), _last(results, Stage.SELECT)
    propagated, chosen = _last(results, Stage.PROPAGATE), _last(results, Stage.CHOOSE_EMBEDDING)
    warmup = _last(results, Stage.WARMUP)
    found = {
        "landmark_count": _landmark_count(results),
        "refined_count": sum(result["rows"] for result in _all(results, Stage.REFINE)),
        "refinement": _refinement(results),
        "fidelity": propagated.get("fidelity"),
        "kernel": {name: propagated.get(name) for name in ("sigma", "delta")},
        "embedding": {"chosen": chosen.get("chosen"), "candidates": chosen.get("candidates")},
        "scaling_error": next((r["scaling_error"] for r in _all(results, Stage.LANDMARK_GRADIENTS)), None),
        "warmup": {name: warmup[name] for name in ("samples", "steps", "loss_first", "loss_last", "losses")}
        if warmup
        else None,
        "solution": selected.get("solution"),
        "validation": _last(results, Stage.VALIDATE).get("validation"),
        "notes": [
            *_of_unusable(prepared.get("unusable", {})),
            *_of_exclusions(prepared.get("exclusions")),
            *_of_rendering(prepared.get("rendering", {})),
            *prepared.get("notes", ()),
            *_of_growth(results),
            *(note for result in _all(results, Stage.PROPAGATE) for note in result.get("notes", ())),
            *_of_solver(selected.get("solution")),
            *_of_nonfinite(selected),
        ],
    }
    return {**found, "sentences": _sentences(found)}


def nonfinite(store: ArtifactStore, pool: str, target: str, selected: Mapping[str, Any]) -> dict[str, Any]:
    """How many samples of `pool` and `target`, by fingerprint, have no finite loss, gradient or embedding by the result of the
    select stage; the first hundred of each by id."""
    found = {"pool": (pool, selected["nonfinite"]), "target": (target, selected["nonfinite_targets"])}
    return {
        name: {
            "count": len(rows),
            "samples": [{"index": s.index, "id": s.id} for s in read_samples(store, dataset, rows[:_MAX_NAMED])],
        }
        for name, (dataset, rows) in found.items()
    }


def _all(results: Results, stage: Stage) -> list[Mapping[str, Any]]:
    return [result for result in results.get(stage, ()) if result]


def _last(results: Results, stage: Stage) -> Mapping[str, Any]:
    found = _all(results, stage)
    return found[-1] if found else {}


def _landmark_count(results: Results) -> int:
    prepared = _last(results, Stage.PREPARE)
    if prepared.get("all_exact"):  # gradient units then hold unusable samples too, which are no landmarks
        return int(prepared["landmark_count"])
    return sum(result["rows"] for result in _all(results, Stage.LANDMARK_GRADIENTS))


def _refinement(results: Results) -> dict[str, Any] | None:
    """How far the last round came, and the promise after each; None where nothing was refined."""
    found = [result["refinement"] for result in _all(results, Stage.PROPAGATE) if result.get("refinement")]
    if not found or not found[-1]["refined"]:
        return None
    rounds = [
        {name: each[name] for name in ("refined", "times_budget", "promise")} for each in found if each["refined"]
    ]
    return {**found[-1], "rounds": rounds}


def _of_growth(results: Results) -> list[str]:
    """How good the earlier rounds of landmarks were, each of which was not enough."""
    return [
        f"Before the number of landmarks was raised to {result['grow']['count']}, the leave-one-out Spearman correlation was"
        f" {result['fidelity']['mean_spearman']:.3f}."
        for result in _all(results, Stage.PROPAGATE)
        if "grow" in result
    ]


def _of_solver(solution: Mapping[str, Any] | None) -> list[str]:
    """Where the certificate of the weights falls short."""
    if solution is None:
        return []
    notes = []
    if solution["restricted"]:
        notes.append("No ridge gives the budget exactly; the weights are optimal among the samples that were kept.")
    if not solution["converged"] or solution["kkt_residual"] > _KKT_RESIDUAL:
        notes.append(
            f"The solver for the weights did not converge: the KKT residual is {solution['kkt_residual']:.1e}."
        )
    return notes


def _of_unusable(unusable: Mapping[str, Any]) -> list[str]:
    return [
        f"Left out because they cannot be used (listed in unusable): {found['count']} of the {name}"
        f" ({in_words(found['by_reason'])})."
        for name, found in unusable.items()
        if found["count"]
    ]


def _of_exclusions(excluded: Mapping[str, Any] | None) -> list[str]:
    """What the options `duplicates` and `overlap` left out."""
    said = {"duplicate": "repeat another sample of the pool", "overlap": "repeat one of the target"}
    if excluded is None:
        return []
    counts = ", ".join(f"{count} {said[reason]}" for reason, count in excluded["by_reason"].items() if count)
    return [f"Left out of the pool by duplicates or overlap (listed in excluded): {counts}."]


def _of_rendering(rendering: Mapping[str, Any]) -> list[str]:
    return [
        f"In {count} sample{'' if count == 1 else 's'} of the {name}, {RENDERING.get(note, note)}."
        for name, counts in rendering.items()
        for note, count in sorted(counts.items())
    ]


def _of_nonfinite(selected: Mapping[str, Any]) -> list[str]:
    counts = {"pool": len(selected.get("nonfinite", ())), "target": len(selected.get("nonfinite_targets", ()))}
    return [
        f"Excluded because the loss, gradient or embedding is not finite (listed in nonfinite): {count} of the {name}."
        for name, count in counts.items()
        if count
    ]


_TRAINING_WITH_WEIGHTS = (
    "Training with the weights is not known to help: the method's authors gained 1.48 points of accuracy over random with them,"
    " and 1.93 with equal weights."
)


def _sentences(found: Mapping[str, Any]) -> list[str]:
    """What a reader should know first."""
    sentences = [_of_fidelity(found["fidelity"], found["landmark_count"]), *found["notes"]]
    if found["embedding"]["candidates"] and found["fidelity"]:
        chosen = found["embedding"]["chosen"]
        sentences.append(
            f"Embedding {chosen['kind']} was chosen from {len(found['embedding']['candidates'])} candidates."
        )
    if found["warmup"]:
        warmup = found["warmup"]
        sentences.append(
            f"The warm-up moved the loss from {warmup['loss_first']:.4f} to {warmup['loss_last']:.4f} in {warmup['steps']} steps."
        )
    if found["scaling_error"] is not None:
        sentences.append(f"The optimiser's scaling is factored, with a relative error of {found['scaling_error']:.2f}.")
    if found["refinement"]:
        sentences.append(_of_refinement(found["refinement"]))
    if found["solution"]:
        sentences.append(_TRAINING_WITH_WEIGHTS)
    if found["validation"]:
        sentences.append(found["validation"]["sentence"])
    return [sentence for sentence in sentences if sentence]


_STOPPED = {
    "promised": "",
    "max_cost": " It ended there because refine.max_cost allows no more; a higher one refines further.",
    "size": "",
    "pool": " Every sample of the pool is exact by now.",
}


def _of_refinement(found: Mapping[str, Any]) -> str:
    rounds = len(found["rounds"])
    text = (
        f"Exact gradients were computed for another {found['refined']} samples, {found['times_budget']:g} times the budget,"
        f" in {rounds} round{'' if rounds == 1 else 's'}."
    )
    if found["promise"] is not None:
        text += (
            f" The selection is expected to have {found['promise']:.0%} of the influence, beyond the pool's mean, that the"
            " selection from exact gradients of the whole pool would have."
        )
    return text + _STOPPED[found["stopped"]]


def _of_fidelity(fidelity: Mapping[str, Any] | None, landmarks: int) -> str:
    """How far the approximation can be trusted."""
    if fidelity is None:
        return ""
    if fidelity["mean_r2"] is None or fidelity["mean_spearman"] is None:
        return "Leave-one-out fidelity is undefined, because every landmark has the same influence."
    return (
        f"Leave-one-out fidelity over {landmarks} landmarks: for left-out samples, the propagated influence"
        f" has Spearman correlation {fidelity['mean_spearman']:.2f} and R² {fidelity['mean_r2']:.2f} with the exact one."
    )
