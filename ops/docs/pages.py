"""Which pages there are: where each file of the repository is on the site, and what the navigation names."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = "benchmarks/results/"
PUBLISHED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "docs/decisions": "decisions/index.md",
    "service/settings.py": "reference/settings.md",
}
"""Files and folders of the repository outside docs/ (or without a page of their own there), and the page of each."""
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")


@dataclass(frozen=True)
class Entry:
    """A page that the navigation names: its section, its title, and the file of the repository that it is."""

    section: str
    title: str
    path: str

    @property
    def description(self) -> str:
        """The first sentence of the page, below its title."""
        paragraphs = (ROOT / self.path).read_text().split("\n\n")
        return re.split(r"(?<=[.?]) ", plain(" ".join(paragraphs[1].split())))[0]


def site_path(path: str) -> str | None:
    """Where a file of the repository is on the site, or None."""
    if path in PUBLISHED:
        return PUBLISHED[path]
    for folder, target in (("docs/", ""), (RESULTS, "results/")):
        if path.startswith(folder):
            name = target + path.removeprefix(folder)
            return name.removesuffix("README.md") + "index.md" if name.endswith("README.md") else name
    return None


def navigation() -> Iterator[Entry]:
    """The pages that mkdocs.yml names, but for those that are made for the site alone."""
    known = {site_path(path.relative_to(ROOT).as_posix()): path for path in (ROOT / "docs").glob("*.md")}
    known |= {site_path(name): ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")}
    known |= {"results/index.md": ROOT / RESULTS / "README.md"}
    nav: list[dict[str, Any]] = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    for section, inside in (pair for each in nav for pair in each.items()):
        pages = [{section: inside}] if isinstance(inside, str) else inside
        for title, target in (pair for page in pages for pair in page.items()):
            if target in known:
                yield Entry(section, title, known[target].relative_to(ROOT).as_posix())


def decisions() -> list[tuple[str, str]]:
    """The file of each decision, and its number and title."""
    found = []
    for path in sorted((ROOT / "docs/decisions").glob("*.md")):
        title = re.sub(r"^#\s*\d+[.:]?\s*", "", path.read_text().partition("\n")[0])
        found.append((path.name, f"{int(path.name[:4])}. {title}"))
    return found


def section(path: str, heading: str) -> str:
    """What stands under a heading of a page, without the heading.

    Raises:
        ValueError: the page has no such heading.
    """
    found = re.search(
        rf"^{re.escape(heading)}\n(.*?)(?=^#{{1,{heading.index(' ')}}} |\Z)", (ROOT / path).read_text(), re.M | re.S
    )
    if found is None:
        raise ValueError(f"{path} has no heading {heading!r}")
    return found[1].strip()


def plain(text: str) -> str:
    """Text with what links say in the place of the links."""
    return _LINK.sub(r"\1", text)
