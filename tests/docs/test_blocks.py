"""What README.md and docs/*.md print is run as it is printed: every block of shell and of Python, against one embedded stack.

Only what stands for something else is replaced: ids (`ds_...`, `job_...`), a secret, the name MODEL. In place of the demo's model
there is a tiny one, and the pool is shorter. A block that cannot be run says why in a comment before it (support/doc_blocks.py).
"""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from support.doc_blocks import MODEL, PAGES, Block, blocks
from support.tiny import write_jsonl

from winnow import Job, Winnow

LANGUAGES = {"sh", "python", "json", "text"}
SECRET = "whsec_" + "c2VjcmV0" * 4


def test_every_block_has_a_language_and_most_are_run() -> None:
    found = [block for page in PAGES for block in blocks(page)]
    assert [f"{block.page}:{block.line}" for block in found if block.language not in LANGUAGES] == []
    commands = [block for block in found if block.language in ("sh", "python")]
    assert sum(block.runs for block in commands) > 0.7 * len(commands)


@pytest.fixture(scope="module")
def job(folder: Path) -> Iterator[Job]:
    """A job that has succeeded; what was selected is in train.parquet, its upload and target in files that pages name."""
    examples = folder / "examples"
    for name in ("pool", "target"):
        shutil.copy(examples / f"{name}.jsonl", folder)
    rows = [json.loads(line) for line in (examples / "pool.jsonl").read_text().splitlines()]
    with gzip.open(folder / "data.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"topic": row["source"], "messages": row["messages"]}) + "\n" for row in rows)
    (folder / "pool.csv").write_text("frage,antwort\nTwo and two?,Four.\n")
    (folder / "models" / "mine").mkdir(parents=True)
    stack = json.loads((folder / ".winnow" / "stack.json").read_text())
    with Winnow(stack["url"], stack["api_key"]) as client:
        pool, target = (client.upload_dataset(folder / f"{name}.jsonl") for name in ("pool", "target"))
        job = client.create_job(model=MODEL, pool=pool, target=target, budget=60).wait()
        job.results().export(folder / "train.parquet")
        write_jsonl(folder / "job.json", [{"model": MODEL, "pool": pool.id, "target": target.id, "budget": 60}])
        yield job


class Reader:
    """Runs the blocks of a page one after the other, as somebody who types them would: variables and names stay."""

    def __init__(self, folder: Path, job: Job) -> None:
        self._folder = folder
        self._state = folder / "variables"
        self._state.write_text("")
        self.names: dict[str, Any] = {}
        stack = json.loads((folder / ".winnow" / "stack.json").read_text())
        kept = {name: value for name, value in os.environ.items() if not name.startswith("WINNOW_")}
        self._environment = {
            **kept,
            "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}",
            "CURL_HOME": str(folder),
            "WINNOW_LOGINS": str(folder / "logins.json"),
            "WINNOW_URL": stack["url"],
            "WINNOW_API_KEY": stack["api_key"],
        }
        self._replaced = {
            "ds_... ds_...": f"{job.pool} {job.target}",
            "ds_...": job.pool,
            "job_...": job.id,
            "whsec_...": SECRET,
            "MODEL": MODEL,
            "http://127.0.0.1:8000": stack["url"],
        }
        (folder / ".curlrc").write_text("fail\n")  # a refusal is an exit status

    def run(self, block: Block) -> None:
        text = block.text
        for printed, used in self._replaced.items():
            text = re.sub(rf"(?<![\w.]){re.escape(printed)}(?!\w)", used, text)
        if block.language == "python":
            exec(compile(text, f"{block.page}:{block.line}", "exec"), self.names)
            return
        script = f"set -eua -o pipefail\n. {self._state}\n{text}\nexport -p > {self._state}\n"
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self._folder,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, f"{block.page}:{block.line}\n{text}\n{done.stdout}\n{done.stderr}"


def trained(job: Job) -> dict[str, Any]:
    """A model and the optimiser that has trained it for a step."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def written(names: dict[str, Any]) -> None:
    """`train.parquet` has the selection with its content."""
    messages = pq.read_table("train.parquet")["messages"]
    assert (len(messages), messages.null_count) == (60, 0)


def of_readme(names: dict[str, Any]) -> None:
    written(names)
    assert names["results"]["fidelity"] is not None, "most of the pool is propagated"
    assert Path("selection.parquet").is_file()


def of_client(names: dict[str, Any]) -> None:
    written(names)
    assert len(names["frame"]) == 60


GIVEN: dict[str, Callable[[Job], dict[str, Any]]] = {
    "docs/api.md": lambda job: {"job": job},
    "docs/own-model.md": trained,
}
"""Names that the Python of a page has from its reader."""
LEFT: dict[str, Callable[[dict[str, Any]], None]] = {"README.md": of_readme, "docs/client.md": of_client}
"""What is there once a page has run."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", [page for page in PAGES if any(block.runs for block in blocks(page))])
def test_a_page_runs_as_it_is_printed(
    folder: Path, job: Job, page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    for name in ("WINNOW_URL", "WINNOW_API_KEY", "WINNOW_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WINNOW_LOGINS", str(folder / "logins.json"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    reader = Reader(folder, job)
    if page in GIVEN:
        reader.names.update(GIVEN[page](job))
    for block in blocks(page):
        if block.runs:
            reader.run(block)
    if page in LEFT:
        LEFT[page](reader.names)
        assert capsys.readouterr().err == "", "progress is for terminals"
