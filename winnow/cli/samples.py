"""The commands for the samples of a result: to list some, and to explain one."""

from enum import StrEnum
from itertools import islice
from typing import Annotated, Any

import typer

from winnow import render
from winnow.cli.console import connected, options, out, print_json
from winnow.cli.records import TableColumns, print_records

_TEXT = 120  # characters of a line


class SortOption(StrEnum):
    RANK = "rank"
    INDEX = "index"
    INFLUENCE = "influence"
    WEIGHT = "weight"


class OrderOption(StrEnum):
    ASC = "asc"
    DESC = "desc"


def samples(
    job_id: str,
    all_samples: Annotated[
        bool, typer.Option("--all", help="Of the pool, selected or not; else of the selection")
    ] = False,
    sort: Annotated[SortOption | None, typer.Option(show_default="rank, of the pool index")] = None,
    order: Annotated[
        OrderOption | None, typer.Option(show_default="desc for influence and weight, asc for the others")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Only samples of this source")] = None,
    exact: Annotated[
        bool | None, typer.Option("--exact/--propagated", help="Only samples whose influence was computed, or was not")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Only samples that say this, in letters of either case")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many are listed")] = 20,
) -> None:
    """List samples of a result, with how they begin."""
    wanted: dict[str, Any] = {"order": order, "source": source, "exact": exact, "text": text, "include": "text"}
    if sort is not None:
        wanted["sort"] = sort.value
    columns: TableColumns = {
        "index": lambda row: row.index,
        "influence": lambda row: "" if row.influence is None else f"{row.influence:.4g}",
        "weight": lambda row: f"{row.weight:.4g}",
        "exact": lambda row: row.exact,
        "source": lambda row: row.source,
        "text": lambda row: None if row.text is None else row.text[:_TEXT],
    }
    with connected() as client:
        found = client.samples(job_id, **wanted) if all_samples else client.selected(job_id, **wanted)
        print_records(list(islice(found, limit)), columns)


def explain(
    job_id: str,
    sample: Annotated[str, typer.Argument(help="The sample's position in the pool, from 0; or with --id its id")],
    by_id: Annotated[bool, typer.Option("--id", help="SAMPLE is an id")] = False,
    landmarks: Annotated[
        int, typer.Option(min=0, max=100, help="How many of the nearest exact samples are listed")
    ] = 5,
    target: Annotated[int | None, typer.Option(min=0, help="Explain the influence on this target sample only")] = None,
) -> None:
    """Explain the influence of a sample."""
    if not by_id and not sample.isdecimal():
        raise typer.BadParameter(f"{sample} is no position; with --id it is an id")
    with connected() as client:
        found = client.sample(job_id, sample if by_id else int(sample), landmarks=landmarks, target=target)
    print_json(found) if options.as_json else render.sample(out, found)
