"""The commands of `winnow` for who has to trust a result: post again, reproduce, compare, verify, and read the records."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service import show
from service.client import Winnow, WinnowError
from service.console import (
    DEFAULT_HOME,
    AsJson,
    Home,
    Key,
    Url,
    connected,
    err,
    fail,
    out,
    print_json,
    told,
)

if TYPE_CHECKING:  # what computes is imported by the commands that need it: it takes a second
    from service.verify import Record

DIFFERENT = 3
"""The exit status that says that something is not what it should be; 1 says that it could not be found out."""

Tolerance = Annotated[
    float, typer.Option(min=0, help="Largest difference of an influence or a weight, as a part of the largest one")
]
Json = dict[str, Any]


def register(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    for command in (retry, reproduce, compare, verify, provenance, audit):
        app.command()(command)


def retry(
    job_id: str,
    wait: Annotated[bool, typer.Option(help="Show progress until it has ended")] = False,
    home: Home = DEFAULT_HOME,
    url: Url = None,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Post a failed or cancelled job again, as a new one."""
    with connected(home, url, api_key) as client:
        job = client.retry(job_id)
        if not as_json:
            out.print(f"Posted {job['id']}")
        if wait:
            job = show.follow(client, job["id"], err if as_json else out)
    if as_json:
        print_json(job)


def reproduce(
    job_id: str,
    wait: Annotated[bool, typer.Option(help="Follow it to its end, and compare")] = True,
    tolerance: Tolerance = 1e-4,
    home: Home = DEFAULT_HOME,
    url: Url = None,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Compute a job again from its provenance, and compare. Exit status 3 if it differs by more than the tolerance."""
    from service import comparison

    with connected(home, url, api_key) as client:
        job = client.reproduce(job_id)
        if not as_json:
            out.print(f"Posted {job['id']}")
        if wait:
            show.follow(client, job["id"], err if as_json else out)
            _tell(comparison.compare(client, job_id, job["id"]), tolerance, as_json, anew=True)
        elif as_json:
            print_json(job)


def compare(
    first: Annotated[str, typer.Argument(help="A job that has succeeded")],
    second: Annotated[str, typer.Argument(help="Another one, over a pool of the same size")],
    tolerance: Tolerance = 1e-4,
    home: Home = DEFAULT_HOME,
    url: Url = None,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Compare what two jobs found. Exit status 3 if they differ by more than the tolerance."""
    from service import comparison

    with connected(home, url, api_key) as client:
        _tell(comparison.compare(client, first, second), tolerance, as_json)


def _tell(found: Json, tolerance: float, as_json: bool, *, anew: bool = False) -> None:
    from service.comparison import is_within

    # What was found again says nothing: a worker of a version that knows no reproduction has had a part in it.
    is_proof = not (anew and found["shared_artifacts"])
    is_same = is_proof and is_within(found, tolerance)
    if as_json:
        print_json({**found, "tolerance": tolerance, "is_same": is_same})
    else:
        for line in _sentences(found, tolerance, is_same):
            out.print(line, soft_wrap=True, markup=False)
        if not is_proof:
            err.print(f"{found['shared_artifacts']} results were found and not computed anew: upgrade all workers.")
    if not is_same:
        raise typer.Exit(DIFFERENT)


def _sentences(found: Json, tolerance: float, is_same: bool) -> Iterator[str]:
    if found["equal"]:
        yield "Equal bit for bit: the Merkle roots of the weights are the same."
    else:
        yield "The Merkle roots of the weights differ."
    if "missing" in found:
        yield f"How far they are apart cannot be said: {found['missing']}"
    elif not found["equal"]:
        for name in ("influence", "weight"):
            each = found[name]
            yield (
                f"{name}: differs by {each['largest_difference']:.3g} at most, {each['mean_difference']:.3g} on average; the"
                f" largest is {each['largest_value']:.3g}"
            )
        chosen = found["selection"]
        order = "in the same order" if chosen["same_order"] else "not in the same order"
        correlation = found["rank_correlation"]
        yield f"rank correlation of the influences: {'none' if correlation is None else f'{correlation:.6f}'}"
        yield f"selected by both: {chosen['in_both']:,} of {chosen['of']:,}, {order}"
        yield f"{'within' if is_same else 'beyond'} the tolerance of {tolerance:g}"
    for name, (one, other) in found["differs"].items():
        yield f"{name}: {one} / {other}"


def verify(
    export: Annotated[Path, typer.Argument(help="A downloaded .jsonl, .csv (gzipped or not) or .parquet", exists=True)],
    job: Annotated[str | None, typer.Option(help="The job that it is of; a Parquet file says so itself")] = None,
    root: Annotated[str | None, typer.Option(help="The Merkle root, instead of asking the service")] = None,
    record: Annotated[
        Path | None,
        typer.Option("--provenance", help="A file with the job's provenance, instead of asking", exists=True),
    ] = None,
    home: Home = DEFAULT_HOME,
    url: Url = None,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Check that a downloaded export is what the job has found. Exit status 3 if it is not."""
    from service import verify as verification
    from service.verify import CannotVerify, NotVerified, Record

    if sum(each is not None for each in (job, root, record)) > 1:
        fail("pass one of --job, --root and --provenance")
    try:
        if root is not None:
            found = verification.verify(export, Record(root.lower()))
        elif record is not None:
            with told():
                known = Record.of_provenance(json.loads(record.read_text()))
            found = verification.verify(export, known)
        else:
            job_id = job or verification.job_of(export)
            if job_id is None:
                fail(f"{export.name} does not say which job it is of; pass --job, --root or --provenance")
            with connected(home, url, api_key) as client:
                found = verification.verify(export, _record(client, job_id))
    except NotVerified as error:
        if as_json:
            print_json({"verified": False, "detail": str(error)})
        fail(f"{export.name} is not what the job has found. {error}", DIFFERENT)
    except CannotVerify as error:
        fail(str(error))
    if as_json:
        print_json(
            {"verified": True, "samples": found.samples, "selected": found.selected, "unchecked": found.unchecked}
        )
        return
    what = f"all {found.samples:,} samples" if found.is_whole else f"the {found.selected:,} selected samples"
    out.print(f"{export.name} is what the job has found: {what}.", soft_wrap=True, markup=False)
    out.print(f"Not covered: {', '.join(found.unchecked)}.", soft_wrap=True, markup=False)


def _record(client: Winnow, job_id: str) -> "Record":
    from service.verify import Record

    def chunks() -> list[str] | None:
        try:
            hashes: list[str] | None = client.provenance(job_id, chunks=True)["chunk_sha256"]
        except WinnowError:  # that the file differs is known by then; where it does, is not
            return None
        return hashes

    return Record.of_provenance(client.provenance(job_id), chunks)


def provenance(job_id: str, home: Home = DEFAULT_HOME, url: Url = None, api_key: Key = None) -> None:
    """Print the audit record of a job, as JSON."""
    with connected(home, url, api_key) as client:
        print_json(client.provenance(job_id))


def audit(
    limit: Annotated[int, typer.Option(min=1)] = 50,
    action: Annotated[str | None, typer.Option(help="Only this, as selection_job.deleted")] = None,
    object_id: Annotated[str | None, typer.Option("--object", help="Only what was done to this")] = None,
    home: Home = DEFAULT_HOME,
    url: Url = None,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """List who did what in your tenant, newest first (needs a key with the scope admin)."""
    with connected(home, url, api_key) as client:
        entries = client.audit_log(action=action, object_id=object_id)
        found = [entry for entry, _ in zip(entries, range(limit), strict=False)]
    if as_json:
        print_json(found)
        return
    for entry in found:
        who = f"{entry['key']['name']} ({entry['key']['prefix']})" if entry["key"] else entry["actor"]
        line = f"{entry['created_at'][:19]}  {who:<30} {entry['action']:<24} {entry['object_id']}"
        out.print(line, soft_wrap=True, markup=False)
