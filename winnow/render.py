"""How the command line shows a dataset, and a job: its plan and results in a few tables."""

from collections.abc import Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from winnow.answers import QueuePlace, SelectionJob, Worker
from winnow.marked_text import printable


class Json(Protocol):
    """Fields by their names: an answer of the service, or a dict of what was computed here."""

    def __getitem__(self, name: str, /) -> Any: ...
    def get(self, name: str, default: Any = None, /) -> Any: ...


def called(job: SelectionJob) -> list[str]:
    """Lines with what a job is called."""
    lines = [f"  {job.name}"] if job.name else []
    labels = " ".join(f"{key}={value}" for key, value in (job.labels or {}).items())
    return [*lines, f"  {labels}"] if labels else lines


_NO_ESTIMATE = {
    "importing": "a dataset of it is being imported",
    "no_worker": "no worker that is alive can do it",
    "no_rate": "how long the work before it takes is not known yet",
    "long_queue": "the queue is too long for an estimate",
}


def queue_place(place: QueuePlace) -> list[str]:
    """Lines with the place of a job in the queue."""
    if place.no_estimate == "not_queued":
        return []
    start = _NO_ESTIMATE.get(place.no_estimate or "", "when it starts is not known")
    if place.starts_at is not None:
        start = f"may start at {place.starts_at:%Y-%m-%d %H:%M:%S}"
    if place.jobs_before is None:
        return [f"  {start}"]
    return [f"  {place.jobs_before} jobs before it, {place.own_jobs_before} of them yours; {start}"]


def work_of(worker: Worker) -> str:
    """What a worker does, in a few words; empty: nothing, or something for another tenant."""
    if (unit := worker.unit) is not None:
        return f"{unit.stage}/{unit.shard} of {unit.job_id}, {unit.done}/{unit.total}"
    return "" if worker.task is None else f"{worker.task.kind} of {worker.task.subject}"


def _table(title: str, texts: Sequence[str], numbers: Sequence[str], *, key: str | None = None) -> Table:
    """A table with columns of text, then of numbers. In a narrow terminal the others shrink, never the `key`: one looks it up."""
    table = Table(title=title, title_justify="left", min_width=len(title))
    for name in texts:
        table.add_column(name, no_wrap=name == key, min_width=20 if name == key else None)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def dataset(console: Console, uploaded: Json) -> None:
    """Prints a dataset: its rows, what was taken of the upload, what was left alone, and what was left out."""
    if uploaded.get("status", "ready") != "ready":
        console.print(f"{uploaded['id']}: {uploaded['status']}", soft_wrap=True, markup=False, highlight=False)
        return
    lines = [f"{uploaded['id']}: {rows(uploaded['row_count'])}"]
    if (hub := uploaded.get("hub")) is not None:
        lines.append(f"  of {hub['id']} at {hub['commit']}")
    if (detected := uploaded.get("detected")) is not None:  # a service of an earlier version does not tell
        lines += detection(detected)
    if skipped := uploaded.get("skipped"):
        lines.append(f"  left out: {rows(skipped)} that cannot be used, see `winnow skipped {uploaded['id']}`")
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def detection(detected: Json) -> list[str]:
    """What was taken of an upload, and what was left alone, in lines."""
    lines = []
    for form in detected["forms"]:
        taken = (name if name == column else f"{name} from {column}" for name, column in form["columns"].items())
        lines.append(f"{rows(form['rows'])} of {form['form']}: {', '.join(taken)}")
    if detected["more_forms"]:
        lines.append(f"{detected['more_forms']:,} more kinds of rows")
    more = [f"{count:,} more"] if (count := detected["more_left_alone"]) else []
    if names := [*detected["left_alone"], *more]:
        lines.append(f"left alone: {', '.join(names)}")
    return [f"  {line}" for line in (*lines, *(note["message"] for note in detected["notes"]))]


def targets(console: Console, found: Sequence[Json]) -> None:
    """Prints the ready-made targets."""
    names = ["name", "what", "on the hub", "licence"]
    table = _table("Ready-made targets", names, ["samples", "taken"], key="name")
    for each in found:
        texts = (escape(text) for text in (each["name"], each["title"], _on_hub(each["hub"]), each["licence"]))
        table.add_row(*texts, f"{each['samples']:,}", str(each["count"]))
    console.print(table)
    if closed := [each["name"] for each in found if not each["allowed"]]:
        sentence = f"This server does not import {', '.join(closed)}: its operator can allow it (WINNOW_DATASETS__HUB)."
        console.print(sentence, soft_wrap=True, markup=False)


def target(console: Console, found: Json) -> None:
    """Prints a ready-made target: what it is, where its rows are and why there, and what is made of each."""
    spread = "" if found["spread"] is None else f", as many of each {found['spread']['over']}"
    lines = [
        f"{found['name']}: {found['title']}",
        f"  {_on_hub(found['hub'])} ({found['licence']}, {found['homepage']})",
        f"  {found['why']}",
        f"  {found['count']} of {found['samples']:,} samples are taken{spread}; preset:{found['name']}:N takes N.",
    ]
    if not found["allowed"]:
        lines.append(
            f"  This server does not import it: its operator can allow {found['hub']['id']} (WINNOW_DATASETS__HUB)."
        )
    for part, template in found["template"].items():
        lines += [f"  {part}:", *(f"    {line}" for line in template.splitlines())]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _on_hub(hub: Json) -> str:
    return f"{hub['id']}:{hub['config']}:{hub['split']}"


def rows(count: int) -> str:
    """So many rows, in words."""
    return "1 row" if count == 1 else f"{count:,} rows"


def plan(console: Console, planned: Json) -> None:
    """Prints what a job would do and cost."""
    figures: dict[str, tuple[str, str, float]] = {
        "operations": ("TFLOP", ",.2f", 1e12),
        "seconds": ("s", ",.1f", 1),
        "artifact_bytes": ("artifacts MiB", ",.0f", 2**20),
        "memory_bytes": ("memory MiB", ",.0f", 2**20),
    }

    def cells(values: Json) -> list[str]:
        known = ((values[key], form, unit) for key, (_, form, unit) in figures.items())
        return ["" if value is None else format(value / unit, form) for value, form, unit in known]

    title = f"Plan ({'about ' if planned['estimated'] else ''}{planned['tokens']['pool']:,} tokens in the pool)"
    table = _table(title, ["stage"], [*(name for name, _, _ in figures.values()), "there"], key="stage")
    for stage in planned["stages"]:
        table.add_row(stage["stage"], *cells(stage), f"{stage['already_there']:.0%}")
    table.add_section()
    table.add_row("all", *cells(planned["totals"]), "")
    console.print(table)
    cap = planned.get("refine_cap")
    capped = cap and f"At most {cap['samples']:,} samples are refined, {cap['times_budget']:.2g} times the budget."
    for sentence in (
        capped,
        _candidates(planned.get("candidates")),
        *planned["warnings"],
        planned["note"],
        *costs(planned.get("costs")),
    ):
        if sentence is not None:
            console.print(sentence, markup=False)


def _candidates(found: Json | None) -> str | None:
    if found is None:
        return None
    kinds = ", ".join(found["kinds"])
    if "output" in found["kinds"] or found["output_from"] is None:
        return f"Embeddings that are compared: {kinds}."
    return f"Embeddings that are compared: {kinds}; with a refine.max_cost of {found['output_from']:g} or more, output too."


_WAYS = {
    "job": "this job",
    "rds_plus": "rds_plus",
    "exact_influence": "exact_influence",
    "authors": "the authors' setting",
}


def costs(found: Json | None) -> list[str]:
    """What the choice costs beside other ways to choose, in lines; none where it is not known."""
    if found is None:
        return []
    lines = []
    counts = (
        ("operations", "rds_plus_ratio", "By products that run"),
        (
            "paper_operations",
            "rds_plus_ratio_by_paper",
            "By the paper's formula",
        ),
    )
    for key, ratio, count in counts:
        ways = ", ".join(f"{name} {_teraflop(found[way][key])}" for way, name in _WAYS.items())
        more = (
            "" if found["warmup"] is None else f"; the warm-up {_teraflop(found['warmup'][key])} more, whatever the way"
        )
        under = "" if found[ratio] is None else f". rds_plus costs {found[ratio]:,.3g} times as much as this job"
        lines.append(f"{count}, in TFLOP: {ways}{more}{under}.")
    known = [f"{name} {found[way]['seconds']:,.0f}" for way, name in _WAYS.items() if found[way]["seconds"] is not None]
    return [*lines, f"Computing seconds: {', '.join(known)}."] if known else lines


def _teraflop(operations: float) -> str:
    """Four digits, whole ones from a thousand on."""
    value = operations / 1e12
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


_LEVELS = {"ok": "green", "look": "yellow", "bad": "bold red"}


def verdict(console: Console, findings: Sequence[Json]) -> None:
    """Prints the findings on a result: level, what it is about, what it means, and what to do."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for each in findings:
        meaning = each["meaning"] if each["advice"] is None else f"{each['meaning']} {each['advice']}"
        level = f"[{_LEVELS.get(each['level'], '')}]{each['level']}[/]"
        table.add_row(level, each["about"], escape(meaning))
    console.print(table)


def results(console: Console, summary: Json, selected: Sequence[Json], *, top: int = 10) -> None:
    """Prints the verdict, the first of the selection, its sources, time and memory of each stage, what was left out, and the
    findings in sentences."""
    verdict(console, summary.get("verdict", ()))
    first = selected[:top]
    table = _table(
        f"The first {len(first)} selected", ["rank", "id", "source"], ["influence", "weight", "exact"], key="id"
    )
    for row in first:
        names = str(row["rank"]), escape(row["id"]), escape(row["source"] or "")
        table.add_row(*names, f"{row['influence']:.4f}", f"{row['weight']:.3f}", "yes" if row["exact"] else "no")
    console.print(table)
    table = _table("The selection by source", ["source"], ["selected", "share", "in the pool", "share of weight"])
    total = summary["selected_count"]
    for source, counts in sorted(summary["sources"].items(), key=lambda entry: -entry[1]["selected"]):
        shares = f"{counts['selected'] / total:.0%}", f"{counts['weight'] / total:.0%}"
        table.add_row(escape(source), str(counts["selected"]), shares[0], str(counts["pool"]), shares[1])
    console.print(table)
    table = _table("Time and memory by stage", ["stage"], ["units", "reused", "wall s", "compute s", "peak MiB"])
    for stage in summary["stages"]:
        peak = stage["peak_memory_bytes"]
        seconds = f"{stage['wall_seconds']:.1f}", f"{stage['compute_seconds']:.1f}"
        memory = "" if peak is None else f"{peak / 2**20:.0f}"
        table.add_row(stage["stage"], str(stage["units"]), str(stage["reused"]), *seconds, memory)
    console.print(table)
    unusable = summary.get("unusable")  # results of earlier versions have none, nor sentences
    for name, found in () if unusable is None else ((name, unusable[name]) for name in ("pool", "target")):
        if found["count"]:
            _unusable(console, name, found, top=top)
    for sentence in (*summary.get("sentences", ()), *costs(summary.get("costs"))):
        console.print(sentence, markup=False)


def _unusable(console: Console, name: str, found: Json, *, top: int) -> None:
    """The first samples of pool or target that took no part, and why."""
    first = found["first"][:top]
    table = _table(f"Left out of the {name}: {len(first)} of {found['count']}", ["index", "id", "reason", "detail"], [])
    for row in first:
        table.add_row(str(row["index"]), *(escape(row[column]) for column in ("id", "reason", "detail")))
    console.print(table)


def _number(influence: float | None) -> str:
    return "none" if influence is None else f"{influence:.4f}"


def _line(text: str | None, width: int = 60) -> str:
    """The beginning of a user's text, in one line."""
    line = " ".join((text or "").split())
    return escape(printable(line if len(line) <= width else line[: width - 1] + "…"))


def sample(console: Console, found: Json, *, top: int = 10) -> None:
    """Prints a sample, the parts of its influence, and the targets that it is best and worst for."""
    state = f"selected, rank {found['rank']}" if found["selected"] else "not selected"
    source = f" ({found['source']})" if found["source"] else ""
    console.print(f"{found['id']}{source}: {state}, weight {found['weight']:.3f}", markup=False)
    if (taken := found.get("taken_by")) is not None:
        console.print(f"taken by target {taken['id']}, as number {taken['pick'] + 1} of its picks", markup=False)
    explanation = found["explanation"]
    if explanation is None:
        console.print(f"influence {_number(found['influence'])}")
        console.print(found["explanation_missing"], markup=False)
        return
    of = "" if explanation["target"] is None else f" on target {explanation['target']}"
    console.print(f"influence{of} {_number(explanation['influence'])}. {explanation['sentence']}", markup=False)
    if (correction := explanation.get("correction")) is not None:
        numbers = ["own influence", "similarity", "weight", "contribution"]
        table = _table("What the influence is the sum of", ["part", "text"], numbers, key="part")
        table.add_row("average of the landmarks", "", "", "", "", f"{explanation['average']:+.4f}")
        for each in explanation["landmarks"]:
            figures = f"{each['influence']:.4f}", f"{each['kernel']:.4f}", f"{each['weight']:.1%}"
            table.add_row(escape(each["id"]), _line(each["excerpt"]), *figures, f"{each['contribution']:+.4f}")
        table.add_row("correction", "", "", "", "", f"{correction:+.4f}")
        console.print(table)
    if (targets := explanation["targets"]) is not None:
        known = (each for each in targets["data"] if each["influence"] is not None)
        ordered = sorted(known, key=lambda each: -each["influence"])
        shown = ordered if len(ordered) <= top else [*ordered[: top // 2], *ordered[-(top // 2) :]]
        of = f"the first {len(ordered)}" if targets["has_more"] else str(len(ordered))
        title = f"Influence on {len(shown)} of {of} targets, best first"
        table = _table(title, ["target", "text"], ["influence"], key="target")
        for each in shown:
            table.add_row(escape(each["id"]), _line(each["excerpt"]), f"{each['influence']:.4f}")
        console.print(table)
