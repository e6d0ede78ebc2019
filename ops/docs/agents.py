"""What coding agents read, made of the documentation: skills/winnow/SKILL.md and llms.txt.

As a program: writes both, into the folder that it is given or into the repository.
"""

import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from pages import ROOT, decisions, navigation, plain, section

ABOUT = (
    "Choose which samples of a dataset to fine-tune a language model on, by their influence on examples of what it should become"
    " good at. Use it when training data is to be selected, weighed, filtered or explained with Winnow (the command `winnow`)."
)
SKILL = """---
name: winnow
description: {about}
---

# Winnow

{what}

With a service: `pip install winnow-select`, then `winnow login URL`.
Without one: `pip install 'winnow-select[local]'`, then `winnow up`.

## Five commands

{commands}

## Output and exit statuses

{output}

{statuses}

## How to read a result

Branch on `verdict` first; say what is `bad` to whoever asked before training on the selection.

{result}

## More

`winnow COMMAND --help` says what each command takes. The documentation is in docs/ of the repository, and listed in its llms.txt.
"""


def skill() -> str:
    result = section("docs/result.md", "# How to read a result").replace("\n## ", "\n### ")
    return plain(
        SKILL.format(
            about=ABOUT,
            what=introduction(),
            commands=section("docs/cli.md", "## Five commands"),
            output=section("docs/cli.md", "## Output"),
            statuses=section("docs/cli.md", "## Exit statuses"),
            result=result,
        )
    )


def llms_txt(address: Callable[[str], str] = str) -> str:
    """The pages of the documentation in the form of llmstxt.org; `address` makes a link of a file of the repository."""
    lines = ["# Winnow", "", "> " + " ".join(introduction().split())]
    for name, entries in groupby(navigation(), lambda entry: entry.section):
        lines += ["", f"## {name}", ""]
        lines += [f"- [{entry.title}]({address(entry.path)}): {entry.description}" for entry in entries]
    lines += [
        "",
        "## API",
        "",
        f"- [OpenAPI document]({address('docs/openapi.json')}): every call of the service with its parameters and answers",
    ]
    lines += ["", "## Optional", ""]
    lines += [f"- [{title}]({address(f'docs/decisions/{name}')})" for name, title in decisions()]
    return "\n".join(lines) + "\n"


def introduction() -> str:
    """The first paragraph of the README."""
    return plain(section("README.md", "# Winnow").partition("\n\n")[0])


def main(folder: Path) -> None:
    for name, text in (("skills/winnow/SKILL.md", skill()), ("llms.txt", llms_txt())):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
