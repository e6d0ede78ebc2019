"""Validate: what one optimiser step on the selection does to the target loss, beside one on random samples (METHOD 8).

The step is the optimiser's true one, measured in float32. The half of the targets that is held out took no part in the choice of
the selection that is measured on it, nor in its weights; only what it was chosen among is of all targets: the shortlist, the
embedding, and the directions (not the curvature) of second order.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file

from service.plan.artifact_keys import result_key
from service.plan.limits import VALIDATION_SAMPLES
from worker.duplicates.exclusions import taking_part
from worker.influence import Samples, StepMeasure, measure_step, sample_losses
from worker.stages import optimizer
from worker.stages.context import StageContext
from worker.text import token_files

Rows = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]


def run(context: StageContext, spec: dict[str, Any]) -> dict[str, Any]:
    """Returns the changes of the mean target loss, measured and predicted; writes no other artifact."""
    with context.store.local(spec["selection"]) as path:
        arrays = load_file(path)
    known = context.store.read_json(result_key(spec["selection"]))
    generator = np.random.default_rng([context.job.parameters["seed"], 0x7E57])
    eligible = _finite(taking_part(context.store, context.prepared), known["nonfinite"])
    selected, held_out = arrays["selected"], arrays["held_out_targets"]
    drawn = generator.choice(eligible, size=min(len(selected), VALIDATION_SAMPLES), replace=False)
    arms = {
        "selection": _drawn(selected, arrays["weight"][selected], generator),
        "random": (drawn, np.ones(len(drawn))),
    }
    if len(held_out):
        arms["held_out_selection"] = _drawn(arrays["held_out_selected"], arrays["held_out_weight"], generator)
    targets = token_files.read_all(context.store, context.prepared["target_tokens"])
    usable = token_files.read_counts(context.store, context.prepared["target_tokens"]).usable
    valid = _finite(usable, known["nonfinite_targets"])
    sets = [targets.take(rows) for rows in ((valid, held_out) if len(held_out) else (valid,))]
    measured = _measure(context, spec, arms, {"random": sets, "selection": sets[:1], "held_out_selection": sets[1:]})
    found: dict[str, Any] = {
        "samples": len(arms["selection"][0]),
        "learning_rate": context.job.parameters["optimizer"]["learning_rate"],
        "loss": measured["selection"][0].loss_before,
        "selection": _change(measured["selection"][0]),
        "random": _change(measured["random"][0]),
        "held_out": None,
    }
    if len(held_out):
        found["held_out"] = {
            "targets": len(held_out),
            "loss": measured["random"][1].loss_before,
            "selection": _change(measured["held_out_selection"][0]),
            "random": _change(measured["random"][1]),
        }
    return {
        "validation": {**found, "sentence": _sentence(found, is_adam=optimizer.options(context.job.parameters).is_adam)}
    }


def _finite(taking_part: npt.NDArray[np.bool_], nonfinite: Sequence[int]) -> Rows:
    """Those rows that are not known to be without a finite gradient or embedding."""
    taking_part[list(nonfinite)] = False
    return np.flatnonzero(taking_part)


def _drawn(rows: Rows, weight: Weights, generator: np.random.Generator) -> tuple[Rows, Weights]:
    """At most so many of the selection, in rising order, each with its weight."""
    places = np.arange(len(rows))
    if len(rows) > VALIDATION_SAMPLES:
        places = generator.choice(places, size=VALIDATION_SAMPLES, replace=False)
    order = places[np.argsort(rows[places])]
    return rows[order], weight[order].astype(np.float64)


def _measure(
    context: StageContext,
    spec: dict[str, Any],
    arms: dict[str, tuple[Rows, Weights]],
    targets: dict[str, list[Samples]],
) -> dict[str, list[StepMeasure]]:
    """One true step for each arm, from the same state, measured on its sets of targets."""
    parameters = context.job.parameters
    # In bfloat16 a small step drowns in the rounding of the loss. A quantised model stays what it is.
    model = context.model(spec["checkpoint"], dtype="float32" if parameters["quantization"] == "none" else None)
    state = optimizer.state(context, spec["state"])
    measured, before = {}, 0
    for arm, (rows, weight) in arms.items():
        samples = token_files.read_rows(context.store, context.prepared["pool_tokens"], rows)
        # Not every sample's gradient was computed before: one that is not finite would end a job that is all but done.
        finite = torch.isfinite(sample_losses(model, samples, token_budget=context.token_budget))
        measured[arm] = measure_step(
            model,
            samples.take(torch.nonzero(finite).flatten().numpy()),
            torch.from_numpy(weight)[finite],
            targets[arm],
            options=optimizer.options(parameters),
            state=state,
            curvature=parameters["curvature"]["type"],
            modules=spec["modules"],
            token_budget=context.token_budget,
            progress=lambda done, _, before=before: context.report(before + done),  # type: ignore[misc]
        )
        before += len(rows)
    return measured


def _change(measure: StepMeasure) -> dict[str, float | None]:
    """Of the mean target loss, in nats a response token; below 0 is better."""
    return {
        "measured": measure.measured,
        "predicted": measure.predicted_first,
        "predicted_second_order": measure.predicted_second,
    }


def _sentence(found: dict[str, Any], *, is_adam: bool) -> str:
    selection, random = found["selection"], found["random"]
    predicted = selection["predicted_second_order"]
    predicted = selection["predicted"] if predicted is None else predicted
    held = " with Adam's second moment held constant" if is_adam else ""
    text = (
        f"One step on the selection changed the mean target loss of {found['loss']:.4f} by {selection['measured']:+.2e}"
        f" (predicted {predicted:+.2e}{held}); one step on as many random samples changed it by {random['measured']:+.2e}"
    )
    if found["held_out"]:
        held_out = found["held_out"]
        text += (
            f"; on the {held_out['targets']} held-out targets the changes are {held_out['selection']['measured']:+.2e}"
            f" and {held_out['random']['measured']:+.2e}"
        )
    return text + "."
