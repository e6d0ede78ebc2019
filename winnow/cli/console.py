"""Shared by the commands: the options of the program, the connection to the service, and error reporting."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from winnow.address import resolve
from winnow.answers import Answer
from winnow.client import Winnow, WinnowError
from winnow.job_calls import JobFailed
from winnow.stack import DEFAULT_HOME

Home = Annotated[
    Path | None,
    typer.Option(help=f"Folder of the embedded stack's state; default: {DEFAULT_HOME}", envvar="WINNOW_HOME"),
]
Url = Annotated[
    str | None,
    typer.Option(
        help="URL of the service; default: WINNOW_URL, that of `winnow login`, or the stack running from --home"
    ),
]
Key = Annotated[
    str | None, typer.Option("--api-key", help="wnw_...; default: WINNOW_API_KEY, or the one of `winnow login`")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON")]


REFUSED, USAGE, DIFFERENT, JOB_FAILED, NOT_YET = 1, 2, 3, 4, 5
"""Exit statuses, as docs/cli.md has them."""


@dataclass(slots=True)
class Options:
    """The options of the program, given before or after the name of the command."""

    home: Path | None = None
    url: str | None = None
    api_key: str | None = None
    as_json: bool = False


options = Options()
out = Console()
err = Console(stderr=True)


def fail(message: str, status: int = REFUSED) -> NoReturn:
    """Ends the program with a message."""
    err.print(f"[red]winnow:[/] {escape(message)}", soft_wrap=True, highlight=False)
    raise typer.Exit(status)


def require(*modules: str) -> None:
    """Raises ModuleNotFoundError if one of the modules is not installed, without importing them."""
    for name in modules:
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@contextmanager
def cli_errors(*more: type[Exception]) -> Iterator[None]:
    """Reports expected errors, and those of the types `more`, in a few lines; any other is a bug and keeps its traceback."""
    try:
        yield
    except WinnowError as error:
        lines = [f"\n  {each['param']}: {each['message']}" for each in error.errors]
        fail(f"{error}{''.join(lines)}", JOB_FAILED if isinstance(error, JobFailed) else REFUSED)
    except TimeoutError as error:
        fail(str(error), NOT_YET)
    except Exception as error:
        if not isinstance(error, (ValueError, OSError, *more)):
            raise
        fail(str(error))


@contextmanager
def connected() -> Iterator[Winnow]:
    """A client of the service that is meant: see `winnow.address`."""
    with cli_errors():
        at = resolve(options.url, options.api_key, options.home)
        with Winnow(at.url, at.api_key) as client:
            yield client


def print_json(value: Any) -> None:
    print(as_json(value, indent=2))


def as_json(value: Any, indent: int | None = None) -> str:
    """A value in which answers of the service may be."""
    return json.dumps(value, indent=indent, ensure_ascii=False, default=Answer.to_dict)


def show(value: Any, *lines: str) -> None:
    """Prints the value with --json, else the lines, without markup."""
    if options.as_json:
        print_json(value)
        return
    for line in lines:
        out.print(line, soft_wrap=True, markup=False)
