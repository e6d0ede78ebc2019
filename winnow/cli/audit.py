"""Commands to check a result: reproduce, compare and verify it, and read the records."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from winnow.cli.console import DIFFERENT, cli_errors, connected, err, fail, options, out, print_json, show
from winnow.cli.jobs import follow
from winnow.client import Winnow, WinnowError

if TYPE_CHECKING:  # pyarrow is imported only by the commands that need it
    from winnow.verify import Record

Tolerance = Annotated[
    float, typer.Option(min=0, help="Largest difference of an influence or weight, relative to the largest value")
]


def register(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    for command in (reproduce, compare, verify, provenance, audit):
        app.command()(command)


def reproduce(
    job_id: str,
    wait: Annotated[bool, typer.Option(help="Follow it to its end and compare")] = True,
    tolerance: Tolerance = 1e-4,
) -> None:
    """Recompute a job from its provenance, and compare. Exit status 3 if it differs by more than the tolerance."""
    with connected() as client:
        job = client.reproduce(job_id)
        if not options.as_json:
            out.print(f"Posted {job['id']}")
        if wait:
            follow(client, job["id"])
            _report(client, job_id, job["id"], tolerance, is_reproduction=True)
        elif options.as_json:
            print_json(job)


def compare(
    first: Annotated[str, typer.Argument(help="A succeeded job")],
    second: Annotated[str, typer.Argument(help="Another succeeded job, over a pool of the same size")],
    tolerance: Tolerance = 1e-4,
) -> None:
    """Compare the results of two jobs. Exit status 3 if they differ by more than the tolerance."""
    with connected() as client:
        _report(client, first, second, tolerance)


def _report(client: Winnow, first: str, second: str, tolerance: float, *, is_reproduction: bool = False) -> None:
    from winnow.comparison import compare, is_within

    found = compare(client, first, second)
    # A reused artifact proves nothing: it is from a worker of a version without reproduction.
    is_proof = not (is_reproduction and found["shared_artifacts"])
    is_same = is_proof and is_within(found, tolerance)
    show({**found, "tolerance": tolerance, "is_same": is_same}, *_sentences(found, tolerance, is_same))
    if not is_proof and not options.as_json:
        err.print(f"{found['shared_artifacts']} results were reused and not recomputed: upgrade all workers.")
    if not is_same:
        raise typer.Exit(DIFFERENT)


def _sentences(found: dict[str, Any], tolerance: float, is_same: bool) -> Iterator[str]:
    if found["equal"]:
        yield "Identical bit for bit: the Merkle roots of the weights are equal."
    else:
        yield "The Merkle roots of the weights differ."
    if "missing" in found:
        yield f"The size of the difference is unknown: {found['missing']}"
    elif not found["equal"]:
        for name in ("influence", "weight"):
            each = found[name]
            yield (
                f"{name}: differs by {each['largest_difference']:.3g} at most, {each['mean_difference']:.3g} on average; the"
                f" largest is {each['largest_value']:.3g}"
            )
        if found["in_one_only"]:
            yield f"samples with an influence in one job alone: {found['in_one_only']:,}"
        selection, correlation = found["selection"], found["rank_correlation"]
        order = "in the same order" if selection["same_order"] else "not in the same order"
        yield f"rank correlation of the influences: {'none' if correlation is None else f'{correlation:.6f}'}"
        yield f"selected by both: {selection['in_both']:,} of {selection['of']:,}, {order}"
        yield f"{'within' if is_same else 'beyond'} the tolerance of {tolerance:g}"
    for name, (one, other) in found["differs"].items():
        yield f"{name}: {one} / {other}"


def verify(
    export: Annotated[Path, typer.Argument(help="A downloaded .jsonl, .csv (gzipped or not) or .parquet", exists=True)],
    job: Annotated[str | None, typer.Option(help="The job of the export; a Parquet file contains it")] = None,
    root: Annotated[str | None, typer.Option(help="The Merkle root, instead of asking the service")] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            "--provenance", help="A file with the job's provenance, instead of asking the service", exists=True
        ),
    ] = None,
) -> None:
    """Check a downloaded export against the audit record of its job. Exit status 3 if they differ."""
    from winnow.verify import CannotVerify, NotVerified, Record, job_of
    from winnow.verify import verify as verified

    if sum(each is not None for each in (job, root, record)) > 1:
        fail("pass only one of --job, --root and --provenance")
    try:
        if root is not None:
            found = verified(export, Record(root.lower()))
        elif record is not None:
            with cli_errors():
                known = Record.of_provenance(json.loads(record.read_text()))
            found = verified(export, known)
        else:
            job_id = job or job_of(export)
            if job_id is None:
                fail(f"{export.name} does not contain the id of its job; pass --job, --root or --provenance")
            with connected() as client:
                found = verified(export, _record(client, job_id))
    except NotVerified as error:
        if options.as_json:
            print_json({"verified": False, "detail": str(error)})
        fail(f"{export.name} differs from the results of the job. {error}", DIFFERENT)
    except CannotVerify as error:
        fail(str(error))
    scope = f"all {found.samples:,} samples" if found.is_whole else f"the {found.selected:,} selected samples"
    show(
        {"verified": True, "samples": found.samples, "selected": found.selected, "unchecked": found.unchecked},
        f"{export.name} is verified: {scope}.",
        f"Not covered: {', '.join(found.unchecked)}.",
    )


def _record(client: Winnow, job_id: str) -> "Record":
    from winnow.verify import Record

    def chunks() -> list[str] | None:
        try:
            hashes: list[str] | None = client.provenance(job_id, chunks=True).chunk_sha256
        except WinnowError:  # the file is known to differ by then, but not where
            return None
        return hashes

    return Record.of_provenance(client.provenance(job_id), chunks)


def provenance(job_id: str) -> None:
    """Print the audit record of a job, as JSON."""
    with connected() as client:
        print_json(client.provenance(job_id))


def audit(
    limit: Annotated[int, typer.Option(min=1)] = 50,
    action: Annotated[str | None, typer.Option(help="Only this action, for example selection_job.deleted")] = None,
    object_id: Annotated[str | None, typer.Option("--object", help="Only actions on this object")] = None,
) -> None:
    """List who did what in your tenant, newest first (needs a key with the scope admin)."""
    with connected() as client:
        found = list(islice(client.audit_log(action=action, object_id=object_id), limit))
    lines = []
    for entry in found:
        who = f"{entry.key.name} ({entry.key.prefix})" if entry.key else entry.actor
        lines.append(f"{entry.created_at:%Y-%m-%dT%H:%M:%S}  {who:<30} {entry.action:<24} {entry.object_id}")
    show(found, *lines)
