"""Shared by the commands: the options of the program, the connection to the service, and error reporting."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.markup import escape

from winnow.answers import Answer
from winnow.client import Winnow, WinnowError
from winnow.stack import DEFAULT_HOME, running_stack

Home = Annotated[
    Path | None,
    typer.Option(help=f"Folder of the embedded stack's state; default: {DEFAULT_HOME}", envvar="WINNOW_HOME"),
]
Url = Annotated[
    str | None, typer.Option(help="URL of the service; default: the stack running from --home", envvar="WINNOW_URL")
]
Key = Annotated[str | None, typer.Option("--api-key", help="wnw_...", envvar="WINNOW_API_KEY")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON")]


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


def fail(message: str, status: int = 1) -> NoReturn:
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
        fail(f"{error}{''.join(lines)}")
    except Exception as error:
        if not isinstance(error, (ValueError, TimeoutError, OSError, *more)):
            raise
        fail(str(error))


@contextmanager
def connected() -> Iterator[Winnow]:
    """A client of the service at --url, or of the stack that runs from --home."""
    with cli_errors(), Winnow(*_address()) as client:
        yield client


def _address() -> tuple[str, str]:
    """The URL and the key. The key of the running stack goes to that stack alone, never to another address that is named."""
    url, api_key = options.url, options.api_key
    if url is not None and api_key is not None:
        return url, api_key
    home = options.home or DEFAULT_HOME
    stack = running_stack(home)
    if url is not None and (stack is None or _origin(url) != _origin(stack.url)):
        fail(f"pass the key of {url} too: --api-key, or WINNOW_API_KEY")
    if stack is None:
        fail(
            f"no stack is running from {home}; start one with `winnow up`, or pass --url and --api-key (WINNOW_URL,"
            " WINNOW_API_KEY)"
        )
    return url or stack.url, api_key or stack.api_key


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


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
