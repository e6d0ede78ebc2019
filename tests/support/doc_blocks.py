"""The blocks of code in README.md and docs/*.md, as a reader finds them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m-instruct"  # that of the demo, as the documents name it
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]
_NOT_RUN = re.compile(r"<!-- not run: (.+) -->\s*")


@dataclass(frozen=True)
class Block:
    """A block of code. `not_run` is the reason that the comment before it gives for not running it."""

    page: str
    line: int
    language: str
    text: str
    not_run: str | None

    @property
    def runs(self) -> bool:
        return self.language in ("sh", "python") and self.not_run is None


def blocks(page: str) -> Iterator[Block]:
    """The blocks of a page, in order; one that is indented in place of fenced has no language."""
    before = ""
    for token in MarkdownIt().parse((ROOT / page).read_text()):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            reason = _NOT_RUN.fullmatch(before)
            yield Block(page, token.map[0] + 1, token.info, token.content, reason and reason[1])
        before = token.content if token.type == "html_block" else ""
