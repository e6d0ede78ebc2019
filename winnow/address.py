"""Which service is meant, and which key is its.

A key belongs to the origin (scheme, host and port) that it was made for: one that is stored, is of a running stack, or stands in
the environment beside `WINNOW_URL`, is sent to no other.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from winnow import logins
from winnow.errors import NoAddress
from winnow.stack import DEFAULT_HOME, Stack, running_stack

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Address:
    """Where a service answers, without a slash at the end, and the key that is sent to it."""

    url: str
    api_key: str = field(repr=False)


def resolve(url: str | None = None, api_key: str | None = None, home: Path | None = None) -> Address:
    """What is given, else what the environment says (`WINNOW_URL`, `WINNOW_API_KEY`), else what is stored.

    Args:
        home: the folder of a stack, if it was named: its stack comes before a stored login.

    Raises:
        NoAddress: no URL or no key was found, the URL is none, or the file of logins is open to others.
    """
    if url is not None and api_key is not None:
        return Address(_checked(url), api_key)
    stack = running_stack(home or DEFAULT_HOME)
    known = logins.read()
    named = url or os.environ.get("WINNOW_URL") or (None if home else known.default) or (stack and stack.url)
    if not named:
        raise NoAddress(
            f"no stack is running from {home or DEFAULT_HOME}; start one with `winnow up`, or name a service: `winnow login"
            " URL`, --url and --api-key, or WINNOW_URL and WINNOW_API_KEY"
        )
    key = api_key or _key_of(named, stack, known)
    if not key:
        raise NoAddress(
            f"there is no key for {named}: pass it too (--api-key, or WINNOW_API_KEY beside this WINNOW_URL), or store it:"
            f" `winnow login {named}`"
        )
    return Address(_checked(named), key)


def _key_of(url: str, stack: Stack | None, known: logins.Logins) -> str | None:
    at = origin(url)
    paired = os.environ.get("WINNOW_URL")
    if (key := os.environ.get("WINNOW_API_KEY")) and (not paired or origin(paired) == at):
        return key
    if key := known.keys.get(at):
        return key
    return stack.api_key if stack is not None and origin(stack.url) == at else None


def origin(url: str) -> str:
    """Scheme, host and port, in one spelling: `https://winnow.example.com:443`.

    Raises:
        NoAddress: it is no URL of a service.
    """
    parts = urlsplit(_checked(url))
    return f"{parts.scheme}://{parts.hostname}:{parts.port or _PORTS[parts.scheme]}"


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  # raises where it is no number
    except ValueError as error:
        raise NoAddress(f"{url}: it is no URL: {error}") from error
    if parts.scheme not in _PORTS or not parts.hostname:
        raise NoAddress(f"{url}: it is no URL of a service; expected http://HOST:PORT or https://HOST")
    if parts.username is not None or parts.password is not None:
        raise NoAddress("the URL of a service has nothing before an @: the key is passed on its own, by --api-key")
    if parts.query or parts.fragment:
        raise NoAddress(f"{url}: leave out what comes after the ? or #")
    return url.rstrip("/")
