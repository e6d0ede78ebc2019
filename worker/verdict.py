"""The verdict on a result: what a person who saw everything would point to, each finding with its figure and what to do.

The bounds are judgements, written beside each; docs/result.md ("The verdict") explains them.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "look", "bad"]
Found = Mapping[str, Any]

PROMISED, LITTLE_PROMISED = 0.9, 0.75
"""A promise errs by .06 to .08 (root mean square): what is promised .9 is rarely below three quarters."""
CLOSE = 0.5
"""Leave-one-out rank correlation from which a propagated ranking is of use by itself."""
NOISE = 1e-6
"""Nats: a difference of losses in float32 that is smaller than this is rounding."""
SOME_ROWS, MANY_ROWS = 0.01, 0.1
MANY_REPEATS = 0.1
ONE_SOURCE, MOST_OF_POOL = 0.9, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """about: `choice`, `fidelity`, `step`, `rows`, `duplicates`, `overlap` or `sources`.  level: `ok`; `look`, worth a look
    before training on it; `bad`, do not train on it before it is understood.  figure: what the level was decided by.
    meaning: in words.  advice: what to do, where there is something."""

    about: str
    level: Level
    figure: float | None
    meaning: str
    advice: str | None = None


def of(summary: Found) -> list[dict[str, Any]]:
    """The findings on a result as JSON, the worst first; of equal ones in the order in which one would ask.

    Args:
        summary: the summary of the result, with what `worker.chosen` read of the selection.
    """
    found = [finding for judge in (_choice, _fidelity, _step, _rows, _repeats, _sources) for finding in judge(summary)]
    return [asdict(finding) for finding in sorted(found, key=lambda one: -_badness(one.level))]


def _badness(level: Level) -> int:
    return ("ok", "look", "bad").index(level)


def _is_exact(summary: Found) -> bool:
    """Whether no influence was propagated."""
    refinement = summary["refinement"]
    return summary["fidelity"] is None or (refinement is not None and refinement["stopped"] == "pool")


def _choice(summary: Found) -> Iterator[Finding]:
    """How near the selection is to the one from exact gradients of the whole pool."""
    refinement, landmarks = summary["refinement"], summary["landmark_count"]
    if not landmarks:  # rds_plus and random have another idea of what to choose
        return
    if _is_exact(summary):
        yield Finding(
            about="choice", level="ok", figure=1.0, meaning="The selection was made among exact influences alone."
        )
    elif refinement is None:
        yield Finding(
            about="choice",
            level="look",
            figure=None,
            meaning="The selection follows propagated influence alone: no shortlist was computed exactly.",
            advice="Leave refine at its default: a shortlist in rounds finds most of what exact gradients would select.",
        )
    elif (promise := refinement["promise"]) is None:
        yield Finding(
            about="choice",
            level="look",
            figure=None,
            meaning="How near the selection is to the exact one is unknown: fewer samples than the budget were computed exactly,"
            " or all samples are alike.",
            advice="Raise refine.size or refine.max_cost; and see whether the samples of the pool differ at all.",
        )
    else:
        level: Level = "ok" if promise >= PROMISED else "look" if promise >= LITTLE_PROMISED else "bad"
        yield Finding(
            about="choice",
            level=level,
            figure=promise,
            meaning=f"The selection is expected to have {promise:.0%} of the influence, beyond the pool's mean, that the exact"
            " selection has.",
            advice=None
            if level == "ok"
            else "Raise refine.max_cost, or refine.size, to compute more of the pool exactly.",
        )


def _fidelity(summary: Found) -> Iterator[Finding]:
    """Whether propagation knows more than guessing."""
    fidelity, landmarks = summary["fidelity"], summary["landmark_count"]
    if not landmarks or _is_exact(summary):
        return
    mean = fidelity["mean_spearman"]
    if mean is None:
        yield Finding(
            about="fidelity",
            level="look",
            figure=None,
            meaning="All landmarks have the same influence: there is nothing to rank by.",
            advice="See whether the samples of the pool differ, and whether the target is anything like them.",
        )
        return
    guessing = 2 / math.sqrt(max(landmarks - 1, 1))  # two standard deviations of the rank correlation of a guess
    known = [each for each in fidelity["spearman"] if each is not None]
    guessed = sum(each < guessing for each in known)
    level: Level = "bad" if mean < guessing else "look" if mean < CLOSE or 2 * guessed > len(known) else "ok"
    meaning = (
        f"Predicted from the others, landmarks are ranked with a correlation of {mean:.2f};"
        f" a guess is within ±{guessing:.2f}, 1 is exact."
    )
    if guessed:
        meaning += f" On {guessed} of {len(known)} targets it is no better than a guess."
    yield Finding(
        about="fidelity",
        level=level,
        figure=mean,
        meaning=meaning,
        advice=None
        if level == "ok"
        else "What was computed exactly is not affected. For the rest: more landmarks, min_fidelity, or targets that resemble one"
        " another.",
    )


def _step(summary: Found) -> Iterator[Finding]:
    """Whether a step on the selection lowers the loss by more than one on random samples."""
    if (validation := summary["validation"]) is None:
        return
    held_out = validation["held_out"]
    measured = held_out or validation
    ours, random = measured["selection"]["measured"], measured["random"]["measured"]
    where = f"on {held_out['targets']} targets that had no part in the choice" if held_out else "on the targets"
    level: Level = "ok"
    if ours > random - NOISE:
        level = "bad" if ours > random + NOISE else "look"
    elif ours > 0:
        level = "look"
    yield Finding(
        about="step",
        level=level,
        figure=ours - random,
        meaning=f"One step on the selection changed the mean loss {where} by {ours:+.3g}, one on as many random samples by"
        f" {random:+.3g}.",
        advice=None
        if level == "ok"
        else "See whether the pool holds anything like the target, and whether the learning rate is the one that you train with.",
    )


def _rows(summary: Found) -> Iterator[Finding]:
    """What of pool and target took no part or was cut, and whether what was rendered is what was given."""
    said, shares = [], []
    for name in ("pool", "target"):
        counts, rendered = summary[name], (summary["rendering"] or {}).get(name, {})
        left_out = (summary["unusable"] or {}).get(name, {"count": 0})["count"] + summary["nonfinite"][name]["count"]
        parts = {
            "took no part": left_out,
            "had the reply cut at max_length": counts["truncated_responses"],
            "are rendered otherwise than they were given": sum(rendered.values()),
        }
        said += [
            f"{count:,} of the {name}'s {counts['samples']:,} samples {what}" for what, count in parts.items() if count
        ]
        shares.append((left_out + counts["truncated_responses"]) / max(counts["samples"], 1))
    if is_assumed := summary["chat_template"] == "default" and summary["conversations"] > 0:
        said.append("the model has no chat template, and conversations were rendered with the default one")
    level: Level = "bad" if max(shares) > MANY_ROWS else "look" if max(shares) > SOME_ROWS or is_assumed else "ok"
    meaning = f"{'; '.join(said)}." if said else "Every sample of pool and target took part, whole."
    yield Finding(
        about="rows",
        level=level,
        figure=max(shares),
        meaning=meaning[0].upper() + meaning[1:],
        advice=None
        if level == "ok"
        else "unusable and rendering say which and why. A higher max_length cuts less; train with the template that was used.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Repeated:
    """What is said of repeats: where there are none, of those in the pool, of selected ones, where an option left some out."""

    none: str
    of_pool: str
    selected: str
    none_selected: str
    option: str
    advice: str


_REPEATED = {
    "duplicates": _Repeated(
        none="No two of the pool's {samples:,} samples say the same.",
        of_pool="{count:,} of the pool's {samples:,} samples repeat another one of it: {exact:,} exactly, {near:,} nearly.",
        selected="{count:,} of the {selected:,} selected samples say the same as one that was selected before.",
        none_selected="No two selected samples say the same.",
        option="duplicates: one left {excluded:,} of them out.",
        advice="With duplicates: one, the budget goes to samples that differ; repeats names them.",
    ),
    "overlap": _Repeated(
        none="None of the pool's {samples:,} samples is one of the target.",
        of_pool="{count:,} of the pool's {samples:,} samples repeat one of the target: {exact:,} exactly, {near:,} nearly.",
        selected="{count:,} of the {selected:,} selected samples are samples of the target too.",
        none_selected="No selected sample is one of the target.",
        option="overlap: exclude left {excluded:,} of them out.",
        advice="A score on a target that was trained on says nothing; overlap: exclude leaves them out, and repeats names them.",
    ),
}


def _repeats(summary: Found) -> Iterator[Finding]:
    """Whether the selection repeats itself, and whether it has samples of the target."""
    selected, samples = _selected(summary), summary["pool"]["samples"]
    for about, found in (summary["repeats"] or {}).items():  # None: prepared by the version before
        said, pool, count = _REPEATED[about], found["pool"], found["count"]
        share = count / selected
        if not pool["exact"] + pool["near"]:
            sentences = [said.none.format(samples=samples)]
        else:
            sentences = [
                said.selected.format(count=count, selected=selected) if count else said.none_selected,
                said.of_pool.format(count=pool["exact"] + pool["near"], samples=samples, **pool),
            ]
        if found["excluded"]:
            sentences.append(said.option.format(excluded=found["excluded"]))
        yield Finding(
            about=about,
            level="bad" if share > MANY_REPEATS else "look" if count else "ok",
            figure=share,
            meaning=" ".join(sentences),
            advice=said.advice if count else None,
        )


def _selected(summary: Found) -> int:
    return sum(each["selected"] for each in summary["sources"].values())


def _sources(summary: Found) -> Iterator[Finding]:
    """Whether the selection is nearly all of one source that the pool has little of."""
    (name, most), *_ = sorted(summary["sources"].items(), key=lambda each: -each[1]["selected"])
    share = most["selected"] / _selected(summary)
    of_pool = most["pool"] / summary["pool"]["samples"]
    if of_pool == 1:  # the pool has no other
        return
    level: Level = "look" if share >= ONE_SOURCE and of_pool <= MOST_OF_POOL else "ok"
    yield Finding(
        about="sources",
        level=level,
        figure=share,
        meaning=f"{share:.0%} of the selection is of source {name}, which is {of_pool:.0%} of the pool.",
        advice=None
        if level == "ok"
        else "That is right where the target is of that kind. Where it should be broader, add targets of the other kinds.",
    )
