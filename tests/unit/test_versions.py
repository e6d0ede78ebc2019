"""The versions of code: what changes them, what does not, and that they cover all code that a stage computes with."""

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.http import etags
from service.plan.stages import Stage
from service.plan.versions import SOURCES, code_version, source_version, worker_version

WORKER = Path(__file__).parents[2] / "worker"
CODE = '''
"""A module."""
X = 2
"""Of two."""


class A:
    """A class."""

    def f(self, a: int) -> int:
        """A function."""
        return a * X  # a comment
'''


def version(folder: Path, source: str) -> str:
    file = folder / f"{len(list(folder.iterdir()))}" / "a.py"
    file.parent.mkdir()
    file.write_text(source)
    return source_version(file.parent, ["a.py"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""A module."""', '"""Another one."""'),
        ('"""A module."""', ""),
        ('    """A class."""\n', ""),
        ('        """A function."""\n', ""),
        ('"""Of two."""', '"""Of\ntwo."""'),
        ("# a comment", ""),
        ("a * X", "(a\n            * X)"),
        ("X = 2", "\n\nX  =  2"),
    ],
)
def test_words_and_layout_leave_the_version_as_it_is(tmp_path: Path, old: str, new: str) -> None:
    assert CODE.replace(old, new) != CODE
    assert version(tmp_path, CODE.replace(old, new)) == version(tmp_path, CODE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a * X", "a + X"),
        ("X = 2", "X = 2.0"),
        ("X = 2", "X = True"),
        ("a * X", "X * a"),
        ("a * X", "'a' * X"),
        ("return ", ""),
    ],
)
def test_what_computes_changes_the_version(tmp_path: Path, old: str, new: str) -> None:
    assert version(tmp_path, CODE.replace(old, new)) != version(tmp_path, CODE)


def test_a_version_covers_names_folders_and_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("a.py", "b/c.py", "b/d.py"):
        (tmp_path / name).write_text("x = 1\n")
    found = {source_version(tmp_path, sources) for sources in (["a.py"], ["b"], ["b/c.py"], ["a.py", "b"])}
    assert len(found) == 4
    (tmp_path / "e.py").write_text("x = 1\n")
    assert source_version(tmp_path, ["a.py"]) != source_version(tmp_path, ["e.py"])
    with pytest.raises(FileNotFoundError):
        source_version(tmp_path, ["gone.py"])


def test_every_computed_stage_has_a_version() -> None:
    assert {len(code_version(stage)) for stage in Stage} == {64}
    assert len(worker_version()) == 12


# What a stage takes of other modules without computing an artifact with it, and why.
EXEMPT = {
    "stages/context.py": "hands over the store, the job and the model",
    "stages/package_versions.py": "is in the provenance",
    "duplicates": "what is left out carries the version of `prepare` in its name",
    "text": "tokens carry the version of `prepare` in their names",
}
EXEMPT_OF_PREPARE = {
    "influence": "but for the landmarks' order, what it decides is in the specs of later units",
    "loading": "its names have the fingerprints of the tokenizer and its template",
}


@pytest.mark.parametrize("stage", SOURCES, ids=str)
def test_the_sources_of_a_stage_cover_what_they_import(stage: Stage) -> None:
    sources = SOURCES[stage]
    exempt = EXEMPT | EXEMPT_OF_PREPARE if stage == Stage.PREPARE else EXEMPT
    files = {
        file for source in sources for file in (*(WORKER / source).rglob("*.py"), WORKER / source) if file.is_file()
    }
    for file in files:
        missing = {name for name in imported(file) if not is_under(name, sources) and not is_under(name, exempt)}
        assert not missing, f"{stage}: {file.name} imports {missing}"


def is_under(name: str, parts: tuple[str, ...] | dict[str, str]) -> bool:
    return any(name == part or name.startswith(f"{part}/") for part in parts)


def imported(file: Path) -> Iterator[str]:
    """The files of the worker that a file imports from `stages`, `text`, `loading`, `influence` and the modules beside them."""
    package = ("worker", *file.relative_to(WORKER).parent.parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, node.module) if node.module else base)
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            path = WORKER.parent / f"{name.replace('.', '/')}.py"
            if name.startswith("worker.") and name != "worker.errors" and path.is_file():
                yield path.relative_to(WORKER).as_posix()
            elif name == "worker.influence":  # which hands on its modules' names
                yield "influence"


def test_the_reader_of_imports_finds_them() -> None:
    assert {"stages/exact_rows.py", "text/token_files.py", "influence"} <= set(imported(WORKER / "stages/embed.py"))
    assert "influence/samples.py" in set(imported(WORKER / "influence/batching.py"))
    assert "training.py" in set(imported(WORKER / "stages/warmup.py"))


@pytest.mark.parametrize(
    "writer",
    ["results/export.py", "results/formats.py", "results/schemas.py", "datasets/storage.py", "http/pagination.py"],
)
def test_the_tags_of_results_change_with_the_code_that_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    found = set()
    for version, more in (("before", ""), ("after", "X = 1\n")):
        copied = Path(shutil.copytree(WORKER.parent / "service", tmp_path / version))
        with (copied / writer).open("a") as file:
            file.write(more)
        monkeypatch.setattr(etags, "__file__", str(copied / "http" / "etags.py"))
        found.add(etags._writers())
    assert len(found) == 2
