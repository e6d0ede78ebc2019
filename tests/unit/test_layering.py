"""Who may import whom: `worker` may import `service`; `service` never `worker` nor torch; `worker/influence` neither."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "accelerate", "safetensors", "peft", "bitsandbytes", "gguf", "datasets"}


def sources(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


def imports(path: Path) -> Iterator[str]:
    """Every module that the file imports, within functions too, by its absolute name."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            yield node.args[0].value if isinstance(node.args[0], ast.Constant) else ast.unparse(node.args[0])


def breaches(folder: str, forbidden: set[str], allowed: str = "-") -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(folder)
        for name in imports(path)
        if name.split(".")[0] in forbidden and not f"{name}.".startswith(f"{allowed}.")
    ]


def test_the_service_imports_neither_the_worker_nor_torch() -> None:
    assert breaches("service", {"worker", *HEAVY}) == []


def test_the_migrations_import_neither_the_worker_nor_torch() -> None:
    assert breaches("migrations", {"worker", *HEAVY}) == []


def test_the_numerical_core_knows_no_job_no_file_and_no_database() -> None:
    outside = {"service", "worker", "migrations", "sqlalchemy", "psycopg", "fsspec", "celery", "fastapi", "redis"}
    assert breaches("worker/influence", outside, allowed="worker.influence") == []


def test_no_stage_knows_the_database() -> None:
    """They are given a store and a job; what the ledger holds of it is the supervisor's."""
    assert breaches("worker/stages", {"sqlalchemy", "psycopg", "celery", "redis"}) == []
    ours = {name for path in sources("worker/stages") for name in imports(path) if name.startswith("service.")}
    allowed = ("artifacts", "datasets.storage", "jobs.state", "models", "settings")
    assert {name for name in ours if not name.startswith(tuple(f"service.{module}" for module in allowed))} == {
        "service.jobs.ledger.UnitSpec"
    }


def test_the_reader_of_imports_sees_every_way_to_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "worker" / "influence" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import a.b, c as d\nfrom e.f import g\nfrom . import h\nfrom .i import j\nfrom ..k import l\n"
        "def late():\n    import m\n    importlib.import_module('n.o')\n"
    )
    names = {"a.b", "c", "e.f.g", "worker.influence.h", "worker.influence.i.j", "worker.k.l", "m", "n.o"}
    assert set(imports(path)) == names


def loaded_by(program: str, tmp_path: Path) -> set[str]:
    """The top packages that a fresh process has loaded after the program."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "WINNOW_DATABASE__URL": "postgresql://nobody@127.0.0.1:1/none",
        "WINNOW_BROKER__URL": "redis://127.0.0.1:1/0",
        "WINNOW_ARTIFACTS__URL": str(tmp_path),
        "WINNOW_MODELS__FOLDER": str(tmp_path),
        "WINNOW_SECRET_KEY": "layering-tests-only-0123456789abcdef",
    }
    show = "\nimport sys\nprint('loaded:', *{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", program + show],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("loaded:")[2].split())


def test_the_running_api_has_loaded_neither_torch_nor_the_worker(tmp_path: Path) -> None:
    loaded = loaded_by("import service.app, service.cli\nservice.app.create_app().openapi()", tmp_path)
    assert "fastapi" in loaded
    assert not loaded & {"torch", "transformers", "accelerate", "peft", "worker"}


def test_the_supervisor_has_not_loaded_torch_which_only_its_child_may(tmp_path: Path) -> None:
    loaded = loaded_by("import worker.celery_app, worker.supervisor, worker.publish", tmp_path)
    assert {"celery", "worker"} <= loaded
    assert not loaded & {"torch", "transformers", "accelerate", "peft"}
