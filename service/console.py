"""What the commands of `winnow` share: their options, the connection to the service, and how errors are told."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from service.client import Winnow, WinnowError
from service.local import StackError, running_stack

Home = Annotated[Path, typer.Option(help="Folder of the embedded stack's state", envvar="WINNOW_HOME")]
Url = Annotated[
    str | None, typer.Option(help="The service; default: the stack that runs from --home", envvar="WINNOW_URL")
]
Key = Annotated[str | None, typer.Option("--api-key", help="wnw_...", envvar="WINNOW_API_KEY")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON")]
DEFAULT_HOME = Path(".winnow")

out = Console()
err = Console(stderr=True)


def fail(message: str, status: int = 1) -> NoReturn:
    err.print(f"[red]winnow:[/] {escape(message)}", soft_wrap=True, highlight=False)
    raise typer.Exit(status)


@contextmanager
def told() -> Iterator[None]:
    """Errors of the service and the stack as a line or a few; anything else is a fault of ours and keeps its traceback."""
    try:
        yield
    except WinnowError as error:
        more = [f"\n  {e['param']}: {e['message']}" for e in error.errors or []]
        fail(f"{error}{''.join(more)}")
    except (StackError, ValueError, TimeoutError, OSError) as error:
        fail(str(error))


@contextmanager
def connected(home: Path, url: str | None, api_key: str | None) -> Iterator[Winnow]:
    """A client of the service that is named, or of the stack that runs from `home`."""
    with told():
        if url is None or api_key is None:
            stack = running_stack(home)
            if stack is None:
                raise StackError(
                    f"no stack runs from {home}; start one with `winnow up`, or pass --url and --api-key"
                    " (WINNOW_URL, WINNOW_API_KEY)"
                )
            url, api_key = url or stack.url, api_key or stack.api_key
        with Winnow(url, api_key) as client:
            yield client


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))
