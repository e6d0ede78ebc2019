"""`winnow login` and `winnow logout`: a key is kept for its service, and for no other."""

import sys
from typing import Annotated

import typer

from winnow import logins
from winnow.address import origin
from winnow.cli.console import cli_errors, fail, options, out, show
from winnow.client import Winnow


def register(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    for command in (login, logout):
        app.command()(command)


def login(
    url: Annotated[str, typer.Argument(help="Of the service: https://winnow.example.com", envvar="WINNOW_URL")],
) -> None:
    """Store the key of a service, readable to you alone, and mean this service wherever none is named.

    The key is asked for, or read from standard input where that is no terminal. It is sent to this service once, to see whether
    it is valid.
    """
    with cli_errors():
        at = origin(options.url or url)
        key = options.api_key or (
            out.input(f"Key of {at}: ", password=True) if sys.stdin.isatty() else sys.stdin.readline()
        )
        if not (key := key.strip()):
            fail("no key was given")
        with Winnow(url, key, retries=1) as client:
            client.usage()
            known = logins.read()
            file = logins.write(logins.Logins(default=client.url, keys={**known.keys, at: key}))
        show({"url": client.url, "file": str(file)}, f"Logged in to {client.url}; the key is in {file}")


def logout(
    url: Annotated[str | None, typer.Argument(help="Of the service; default: the one of the last login")] = None,
) -> None:
    """Forget the stored key of a service."""
    with cli_errors():
        known = logins.read()
        named = url or known.default
        if named is None or origin(named) not in known.keys:
            fail(f"there is no stored key for {named}" if named else "there is no stored key")
        left = {at: key for at, key in known.keys.items() if at != origin(named)}
        is_default = known.default is not None and origin(known.default) == origin(named)
        logins.write(logins.Logins(default=None if is_default else known.default, keys=left))
    show({"url": named, "logged_out": True}, f"Logged out of {named}")
