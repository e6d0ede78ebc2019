"""The client as a person installs it: its wheel alone, in a fresh environment, against a stack that runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from support.doc_blocks import MODEL, ROOT

NOT_ITS_OWN = {"torch", "transformers", "datasets", "sqlalchemy", "fastapi", "celery", "redis", "pandas", "polars"}
PROGRAM = """
import asyncio, sys
from pathlib import Path
import winnow.answers
from winnow import AsyncWinnow, Winnow

job_id, model = sys.argv[1:]
with Winnow() as client:
    results = client.job(job_id).wait().results()
    assert results.verdict
    assert results.export("train.jsonl").stat().st_size
    rows = [{"prompt": f"Add {n} and 1.", "completion": f"{n + 1}"} for n in range(40)]
    again = client.create_job(
        model=model, pool=client.upload_dataset(rows, "rows"), target=client.job(job_id).target, budget=4
    )
    assert len(again.wait(progress=False).results().to_arrow()) == 4

async def main():
    async with AsyncWinnow() as client:
        return await client.job(job_id)

print(asyncio.run(main()).status)
"""


@pytest.mark.slow
def test_the_wheel_alone_selects_and_exports(folder: Path, tmp_path: Path) -> None:
    """Built from the sources under version control."""
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT, check=True)
    for name in listed.stdout.rstrip("\0").split("\0"):
        if name.startswith(("winnow/", "service/", "worker/", "migrations/")) or "/" not in name:
            (tmp_path / "sources" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "sources" / name)
    stack = json.loads((folder / ".winnow" / "stack.json").read_text())
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "WINNOW"))}
    environment = {**kept, "WINNOW_URL": stack["url"], "WINNOW_API_KEY": stack["api_key"]}

    def run(*words: str | Path) -> str:
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    quiet = ("-q", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", *quiet, "--no-deps", "-w", tmp_path / "wheels", tmp_path / "sources")
    run(sys.executable, "-m", "venv", tmp_path / "fresh")
    (wheel,) = (tmp_path / "wheels").iterdir()
    python, winnow = (tmp_path / "fresh" / "bin" / name for name in ("python", "winnow"))
    run(python, "-m", "pip", "install", *quiet, "-c", ROOT / "constraints.txt", wheel)
    listed_json = run(python, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check")
    installed = {canonicalize_name(each["name"]) for each in json.loads(listed_json)}
    assert {"winnow-select", "httpx", "pydantic"} <= installed
    assert not installed & NOT_ITS_OWN
    where = run(
        python, "-c", "import winnow, pathlib; print(pathlib.Path(winnow.__file__).with_name('py.typed').is_file())"
    )
    assert where == "True\n"
    assert all(name in run(winnow, "--help") for name in ("submit", "jobs", "datasets", "login"))

    examples = folder / "examples"
    files = [examples / "pool.jsonl", examples / "target.jsonl"]
    job = json.loads(run(winnow, "submit", *files, "--model", MODEL, "--budget", "20", "--wait", "--json"))
    assert run(python, "-c", PROGRAM, job["id"], MODEL) == "succeeded\n"
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 20
    run(winnow, "export", job["id"], "chosen.jsonl", "--rows-of", files[0])
    uploaded = files[0].read_text().splitlines()
    assert set((tmp_path / "chosen.jsonl").read_text().splitlines()) < set(uploaded)
    run(winnow, "verify", "train.jsonl", "--job", job["id"])
