"""The version of code: a hash of what it computes with, so that an edit of a docstring, a comment or the layout changes none
(docs/decisions/0013-code-versions.md). Reads sources, imports none of them, and needs no torch."""

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from service.plan.stages import Stage

_LOADED = ("influence", "loading")  # what a loaded model computes
_EXACT = ("influence", "stages/exact_rows.py")
# Files and folders of the package `worker`. What reads tokens is in the names of the tokens already, by PREPARE.
SOURCES: dict[Stage, tuple[str, ...]] = {
    Stage.PREPARE: (
        *("text", "duplicates", "influence/landmarks.py"),
        *("stages/duplicates.py", "stages/prepare.py", "stages/tokenise.py"),
    ),
    Stage.WARMUP: (*_LOADED, "training.py", "stages/optimizer.py", "stages/warmup.py"),
    Stage.LANDMARK_GRADIENTS: (*_LOADED, "stages/exact_rows.py", "stages/optimizer.py", "stages/gradients.py"),
    Stage.CHOOSE_EMBEDDING: (*_EXACT, "stages/propagate.py", "stages/rounds.py", "stages/select_embedding.py"),
    Stage.CURVATURE: (*_LOADED, "stages/exact_rows.py", "stages/optimizer.py", "stages/curvature.py"),
    Stage.EMBED: (*_LOADED, "stages/exact_rows.py", "stages/embed.py"),
    Stage.PROPAGATE: (*_EXACT, "stages/propagate.py", "stages/rounds.py"),
    Stage.SELECT: (*_EXACT, "stages/rounds.py", "stages/select.py"),
    Stage.VALIDATE: (*_LOADED, "stages/optimizer.py", "stages/validate.py"),
}
_SAME_CODE = {
    Stage.TARGET_GRADIENTS: Stage.LANDMARK_GRADIENTS,
    Stage.REFINE: Stage.LANDMARK_GRADIENTS,
    Stage.CANDIDATES: Stage.EMBED,
    Stage.EMBED_TARGET: Stage.EMBED,
}


@cache
def code_version(stage: Stage) -> str:
    """The sha256 over the code that a stage's artifact depends on."""
    package = find_spec("worker")
    if package is None or package.origin is None:
        raise RuntimeError("the package `worker` is not installed, so the code of its stages has no version")
    return source_version(Path(package.origin).parent, SOURCES[_SAME_CODE.get(stage, stage)])


@cache
def worker_version() -> str:
    """12 digits of a sha256 over all code whose results are kept: workers that differ in it make different artifacts."""
    return hashlib.sha256("".join(code_version(stage) for stage in Stage).encode()).hexdigest()[:12]


def source_version(folder: Path, sources: Iterable[str]) -> str:
    """The sha256 over Python files of the folder, and those of its subfolders that are named."""
    digest = hashlib.sha256()
    for source in sources:
        for file in sorted((folder / source).rglob("*.py")) or [folder / source]:
            digest.update(f"{file.relative_to(folder).as_posix()}\0{_computation(file)}\0".encode())
    return digest.hexdigest()


@cache
def _computation(file: Path) -> str:
    return "".join(_tokens(ast.parse(file.read_bytes())))


def _tokens(value: object) -> Iterator[str]:
    """The syntax tree as text, without positions, docstrings and empty fields. (`ast.dump` is another one in each Python.)"""
    if isinstance(value, ast.AST):
        yield f"{type(value).__name__}("
        for name, field in ast.iter_fields(value):
            if field is not None and field != []:
                yield f"{name}="
                yield from _tokens(field)
        yield ")"
    elif isinstance(value, list):
        yield "["
        for item in value:
            # A string that stands alone is a docstring, of whatever it follows: it computes nothing.
            if not (isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant)):
                yield from _tokens(item)
        yield "]"
    else:
        yield f"{value!r},"
