"""What a process has loaded at run time; who may import whom is for import-linter (pyproject.toml)."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


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
    loaded = loaded_by("import service.app, winnow.cli.main\nservice.app.create_app().openapi()", tmp_path)
    assert "fastapi" in loaded
    assert not loaded & {"torch", "transformers", "accelerate", "peft", "worker"}


def test_the_supervisor_has_not_loaded_torch_which_only_its_child_may(tmp_path: Path) -> None:
    loaded = loaded_by("import worker.celery_app, worker.supervisor, worker.publish", tmp_path)
    assert {"celery", "worker"} <= loaded
    assert not loaded & {"torch", "transformers", "accelerate", "peft"}
