"""What the stages found out, as the result's summary says it: fidelity, embedding, weights, validation; and in sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

from service.artifacts import ArtifactStore
from service.datasets.storage import read_samples
from service.jobs.state import Stage

_MOST_NAMED = 100
_KKT_RESIDUAL = 1e-8  # what the weights promise

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
            *prepared.get("notes", ()),
            *_of_growth(results),
            *propagated.get("notes", ()),
            *_of_solver(selected.get("solution")),
            *_of_nonfinite(selected),
        ],
    }
    return {**found, "sentences": _sentences(found)}


def nonfinite(store: ArtifactStore, pool: str, target: str, results: Results) -> dict[str, Any]:
    """How many samples of `pool` and `target`, by fingerprint, have no finite loss, gradient or embedding; the first hundred
    of each by id."""
    selected = _last(results, Stage.SELECT)
    found = {"pool": (pool, selected["nonfinite"]), "target": (target, selected["nonfinite_targets"])}
    return {
        name: {"count": len(rows), "samples": _named(store, dataset, rows)} for name, (dataset, rows) in found.items()
    }


def _named(store: ArtifactStore, dataset: str, rows: Sequence[int]) -> list[dict[str, Any]]:
    return [{"index": sample.index, "id": sample.id} for sample in read_samples(store, dataset, rows[:_MOST_NAMED])]


def _all(results: Results, stage: Stage) -> list[Mapping[str, Any]]:
    return [result for result in results.get(stage, ()) if result]


def _last(results: Results, stage: Stage) -> Mapping[str, Any]:
    found = _all(results, stage)
    return found[-1] if found else {}


def _landmark_count(results: Results) -> int:
    prepared = _last(results, Stage.PREPARE)
    if prepared.get("all_exact"):  # gradient units then hold samples without a response too, which are no landmarks
        return int(prepared["landmark_count"])
    return sum(result["rows"] for result in _all(results, Stage.LANDMARK_GRADIENTS))


def _of_growth(results: Results) -> list[str]:
    """How good the earlier rounds of landmarks were, each of which was not enough."""
    return [
        f"Before landmarks grew to {result['grow']['count']}, their leave-one-out Spearman was"
        f" {result['fidelity']['mean_spearman']:.3f}."
        for result in _all(results, Stage.PROPAGATE)
        if "grow" in result
    ]


def _of_solver(solution: Mapping[str, Any] | None) -> list[str]:
    """What the certificate of the weights does not promise."""
    if solution is None:
        return []
    notes = []
    if solution["restricted"]:
        notes.append("No ridge gives the budget exactly; the weights are the best among the samples that were kept.")
    if solution["kkt_residual"] > _KKT_RESIDUAL:
        notes.append(f"The weights are not solved to the end: their KKT residual is {solution['kkt_residual']:.1e}.")
    return notes


def _of_nonfinite(selected: Mapping[str, Any]) -> list[str]:
    counts = {"pool": len(selected.get("nonfinite", ())), "target": len(selected.get("nonfinite_targets", ()))}
    return [
        f"Left out, since the loss, gradient or embedding is not finite: {count} of the {name} (named in nonfinite)."
        for name, count in counts.items()
        if count
    ]


def _sentences(found: Mapping[str, Any]) -> list[str]:
    """What a reader should know first."""
    sentences = [_of_fidelity(found["fidelity"], found["landmark_count"]), *found["notes"]]
    if found["embedding"]["candidates"] and found["fidelity"]:
        chosen = found["embedding"]["chosen"]
        sentences.append(
            f"Embedding {chosen['kind']} was chosen of {len(found['embedding']['candidates'])} candidates."
        )
    if found["warmup"]:
        warmup = found["warmup"]
        sentences.append(
            f"The warm-up took the loss from {warmup['loss_first']:.4f} to {warmup['loss_last']:.4f} in {warmup['steps']} steps."
        )
    if found["scaling_error"] is not None:
        sentences.append(f"The optimiser's scaling is factored, with a relative error of {found['scaling_error']:.2f}.")
    if found["refined_count"]:
        sentences.append(f"Exact gradients were computed for a shortlist of {found['refined_count']} more samples.")
    if found["validation"]:
        sentences.append(found["validation"]["sentence"])
    return [sentence for sentence in sentences if sentence]


def _of_fidelity(fidelity: Mapping[str, Any] | None, landmarks: int) -> str:
    """How far the approximation can be trusted."""
    if fidelity is None:
        return ""
    if fidelity["mean_r2"] is None or fidelity["mean_spearman"] is None:
        return "Leave-one-out fidelity: not defined, since every landmark has the same influence."
    return (
        f"Leave-one-out fidelity over {landmarks} landmarks: propagated influence ranks left-out samples"
        f" like the exact one with Spearman {fidelity['mean_spearman']:.2f} and explains R² {fidelity['mean_r2']:.2f} of it."
    )
