"""What the command line shows of a job: its phases as live progress bars, and its result in a few tables."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from service.client import Winnow

Json = dict[str, Any]


def follow(client: Winnow, job_id: str, console: Console) -> Json:
    """Shows a bar for each phase until the job has succeeded, and returns it.

    Raises:
        JobFailed: it failed or was cancelled.
    """
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("samples"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Progress(*columns, console=console) as progress:
        bars: dict[str, TaskID] = {}

        def update(job: Json) -> None:
            for stage in job["stages"]:
                name = stage["stage"]
                if name not in bars:
                    bars[name] = progress.add_task(name, total=stage["total"], start=False, note="")
                if stage["started_at"] is not None and not progress.tasks[bars[name]].started:
                    progress.start_task(bars[name])
                progress.update(bars[name], completed=stage["done"], note=_note(stage))
                if stage["seconds"] is not None:
                    progress.stop_task(bars[name])

        return client.wait(job_id, on_update=update, poll_seconds=1)


def _note(stage: Json) -> str:
    if stage["seconds"] is None:
        return f"{stage['units_done']}/{stage['units']} units" if stage["units"] > 1 else ""
    reused = f", {stage['units_reused']} of {stage['units']} reused" if stage["units_reused"] else ""
    return f"{stage['seconds']:.1f} s{reused}"


def plan(console: Console, planned: Json) -> None:
    """Prints what a job would do and cost."""
    title = f"Plan ({'about ' if planned['estimated'] else ''}{planned['tokens']['pool']:,} tokens in the pool)"
    table = Table(title=title, title_justify="left", show_footer=True)
    table.add_column("stage", footer="all", no_wrap=True)
    figures = {
        "operations": ("TFLOP", _tera),
        "seconds": ("s", _seconds),
        "artifact_bytes": ("artifacts MiB", _mebi),
        "memory_bytes": ("memory MiB", _mebi),
    }
    for key, (name, as_text) in figures.items():
        table.add_column(name, justify="right", footer=as_text(planned["totals"][key]))
    table.add_column("there", justify="right")
    for stage in planned["stages"]:
        shown = [as_text(stage[key]) for key, (_, as_text) in figures.items()]
        table.add_row(stage["stage"], *shown, f"{stage['already_there']:.0%}")
    console.print(table)
    for sentence in (*planned["warnings"], planned["note"]):
        if sentence is not None:
            console.print(sentence, markup=False)


def _tera(operations: float | None) -> str:
    return "" if operations is None else f"{operations / 1e12:,.2f}"


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:,.1f}"


def _mebi(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.0f}"


def results(console: Console, summary: Json, selected: Sequence[Json], *, top: int = 10) -> None:
    """Prints the selection's best, its sources, the time of each stage, and what the job found out in sentences."""
    console.print(_top_table(selected[:top]))
    console.print(_source_table(summary))
    console.print(_stage_table(summary))
    for sentence in summary.get("sentences", ()):  # results from before there were any have none
        console.print(sentence, markup=False)


def sample(console: Console, found: Json, *, top: int = 10) -> None:
    """Prints what a sample was given, the landmarks that spoke for it, and the targets it is best and worst for."""
    state = f"selected, rank {found['rank']}" if found["selected"] else "not selected"
    source = f" ({found['source']})" if found["source"] else ""
    console.print(f"{found['id']}{source}: {state}, weight {found['weight']:.3f}", markup=False)
    explanation = found["explanation"]
    if explanation is None:
        console.print(f"influence {found['influence']:.4f}")
        console.print(found["explanation_missing"], markup=False)
        return
    of = "" if explanation["target"] is None else f" on target {explanation['target']}"
    console.print(f"influence{of} {explanation['influence']:.4f}. {explanation['sentence']}", markup=False)
    if explanation["others"] is not None:
        console.print(_landmark_table(explanation))
    if explanation["targets"] is not None:
        console.print(_target_table(explanation["targets"], top))


def _target_table(targets: Json, top: int) -> Table:
    """The best and the worst where there are more than `top`."""
    ordered = sorted(targets["data"], key=lambda each: -each["influence"])
    shown = ordered if len(ordered) <= top else [*ordered[: top // 2], *ordered[-(top // 2) :]]
    of = f"the first {len(ordered)}" if targets["has_more"] else str(len(ordered))
    title = f"Influence on {len(shown)} of {of} targets, best first"
    table = Table(title=title, title_justify="left", min_width=len(title))
    table.add_column("target", no_wrap=True, min_width=20)
    table.add_column("influence", justify="right")
    for each in shown:
        table.add_row(escape(each["id"]), f"{each['influence']:.4f}")
    return table


def _landmark_table(explanation: Json) -> Table:
    table = Table(title="What the landmarks contributed", title_justify="left")
    table.add_column("landmark", no_wrap=True, min_width=20)
    for name in ("own influence", "kernel", "contribution", "share"):
        table.add_column(name, justify="right")
    for each in explanation["landmarks"]:
        figures = (f"{each[name]:.4f}" for name in ("influence", "kernel", "contribution"))
        table.add_row(escape(each["id"]), *figures, f"{each['share']:.1%}")
    others = explanation["others"]
    table.add_row(f"{others['count']} others", "", "", f"{others['contribution']:.4f}", f"{others['share']:.1%}")
    return table


def _top_table(selected: Sequence[Json]) -> Table:
    table = Table(title=f"The first {len(selected)} selected", title_justify="left")
    for name, justify in (
        ("rank", "right"),
        ("id", "left"),
        ("source", "left"),
        ("influence", "right"),
        ("weight", "right"),
    ):
        # In a narrow terminal the source gives way, never the id: that is what one looks up.
        table.add_column(name, justify=justify, no_wrap=True, min_width=20 if name == "id" else None)  # type: ignore[arg-type]
    table.add_column("exact")
    for row in selected:
        kind = "yes" if row["exact"] else "no"
        table.add_row(
            str(row["rank"]),
            escape(row["id"]),
            escape(row["source"] or ""),
            f"{row['influence']:.4f}",
            f"{row['weight']:.3f}",
            kind,
        )
    return table


def _source_table(summary: Json) -> Table:
    table = Table(title="The selection by source", title_justify="left")
    for name in ("source", "selected", "share", "in the pool", "share of weight"):
        table.add_column(name, justify="left" if name == "source" else "right")
    total = summary["selected_count"]
    for source, counts in sorted(summary["sources"].items(), key=lambda entry: -entry[1]["selected"]):
        table.add_row(
            escape(source),
            str(counts["selected"]),
            f"{counts['selected'] / total:.0%}",
            str(counts["pool"]),
            f"{counts['weight'] / total:.0%}",
        )
    return table


def _stage_table(summary: Json) -> Table:
    table = Table(title="Time and memory by stage", title_justify="left")
    for name in ("stage", "units", "reused", "wall s", "compute s", "peak MiB"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage in summary["stages"]:
        peak = stage["peak_memory_bytes"]
        table.add_row(
            stage["stage"],
            str(stage["units"]),
            str(stage["reused"]),
            f"{stage['wall_seconds']:.1f}",
            f"{stage['compute_seconds']:.1f}",
            "" if peak is None else f"{peak / 2**20:.0f}",
        )
    return table
