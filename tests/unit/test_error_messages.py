"""Every sentence that a client may read in an error, in one kept file: other tests assert codes and parameters, not wording.

After a change that is meant: `PYTHONPATH=. python tests/unit/test_error_messages.py > tests/unit/error_messages.txt`; read
the difference.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from service.auth.quotas import QuotaExceeded
from service.datasets.values import InvalidRow
from service.http.errors import ApiError
from service.webhooks.safe_http import Refused, Undelivered

ROOT = Path(__file__).parents[2]
KEPT = Path(__file__).with_name("error_messages.txt")
ERRORS = {
    kind.__name__ for kind in (ApiError, *ApiError.__subclasses__(), QuotaExceeded, InvalidRow, Refused, Undelivered)
} | {"invalid_file"}  # which makes one of them


def wording(node: ast.expr) -> str | None:
    """The text of a literal, with `{}` for what is put in; None where the argument is none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = wording(node.left), wording(node.right)
        return None if left is None or right is None else left + right
    if isinstance(node, ast.IfExp):
        return f"{wording(node.body)} | {wording(node.orelse)}"
    return None


def sentences() -> Iterator[str]:
    for path in sorted((ROOT / "service").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute) and node.args:
                name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                if name in ERRORS and (text := wording(node.args[0])) is not None:
                    yield f"{name}: {text}"


def test_the_sentences_are_those_that_are_kept() -> None:
    found = sorted(set(sentences()))
    assert len(found) > 80
    assert "\n".join(found) + "\n" == KEPT.read_text(), (
        "a message has changed: if it was meant, write the file again (see above)"
    )


if __name__ == "__main__":
    print("\n".join(sorted(set(sentences()))))
