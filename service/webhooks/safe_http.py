"""Outbound POST requests to URLs that tenants give: over TLS, and to public addresses only (OWASP's SSRF rules).

A name may resolve differently when it is checked and when it is used (DNS rebinding). So each name is resolved once: the socket
is connected to the addresses that were checked, and the certificate must match the name. Redirects are not followed, proxies
of the environment are not used, and only the head of a response is read. Error messages reveal nothing about our network.
"""

import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any

import httpcore

from service.settings import WebhookSettings

Resolve = Callable[[str, int], Sequence[str]]

_MAX_URL = 2048
_LOOKUP_SECONDS = 5.0  # while the caller of the API waits
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_URL = re.compile(
    rf"https://(?P<host>\[[0-9A-Fa-f:.]+\]|{_LABEL}(?:\.{_LABEL})*)(?::(?P<port>[0-9]{{1,5}}))?(?P<target>[/?][!-~]*)?"
)
# A host that ends in a number is an IPv4 address to most software: 2130706433, 0x7f.1 and 0177.0.0.1 are all 127.0.0.1.
_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0[xX][0-9A-Fa-f]*)")

_UNICAST6 = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")
# In addition to `is_global`, which differs between releases of Python: IPv6 addresses that embed an IPv4 address (Teredo among
# 2001::/23, 6to4 and its relays) and addresses of clouds that look public (Azure's host).
_NOT_PUBLIC = tuple(
    map(
        ip_network,
        ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
    )
)


class Refused(ValueError):
    """The URL is not one that we send to; the message is for its owner."""


class Undelivered(Exception):
    """There was no response; the message is for the owner of the endpoint."""


@dataclass(frozen=True, slots=True)
class Answer:
    """`retry_after`: the header as sent."""

    status: int
    retry_after: str | None


@dataclass(frozen=True, slots=True)
class Destination:
    """A parsed URL. It is parsed once: what is checked is what is connected to."""

    host: str
    port: int
    target: str

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == 443 else f"{host}:{self.port}"


def parse(url: str) -> Destination:
    """The parts of the URL. Other ports below 1024 than 443 belong to other services of a system (SSH, mail).

    Raises:
        Refused: the URL is malformed.
    """
    if not url.startswith("https://"):
        raise Refused("must start with https://; nothing is delivered over plain HTTP")
    found = _URL.fullmatch(url)
    if found is None or len(url) > _MAX_URL or {"#", "\\"} & set(url):
        raise Refused(
            "must be https://host[:port][/path][?query] in ASCII, of at most 2048 characters, with no user, password or fragment;"
            " a non-ASCII name must be written as xn--..., and no name may end with a dot"
        )
    port = int(found["port"] or 443)
    if port != 443 and not 1024 <= port <= 65535:
        raise Refused("the port must be 443 or from 1024 to 65535")
    target = found["target"] or "/"
    return Destination(_host(found["host"]), port, target if target.startswith("/") else f"/{target}")


def _host(host: str) -> str:
    if not host.startswith("[") and not _NUMBER.fullmatch(host):
        if len(host) > 253:
            raise Refused("the name has more than 253 characters")
        return host.lower()
    try:
        return str(ip_address(host.strip("[]")))
    except ValueError:
        raise Refused("an address must be in canonical form: 203.0.113.7 or [2001:db8::7]") from None


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether it is an address of the public internet."""
    if isinstance(address, IPv6Address):
        if address in _NAT64:
            return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
        if address not in _UNICAST6:
            return False
    return address.is_global and not address.is_multicast and not any(address in network for network in _NOT_PUBLIC)


class Outbound:
    """Posts to endpoints. Threads may share it."""

    def __init__(self, settings: WebhookSettings, resolve: Resolve | None = None) -> None:
        """`resolve` returns the addresses of a name and a port; default: the system's resolver.

        Raises:
            OSError: the file of trusted certificates cannot be used.
        """
        self._seconds = settings.timeout_seconds
        self._allowed = settings.allowed_networks
        self._resolve = resolve or _lookup
        self._trust = _trust(settings.ca_file)

    def check(self, url: str) -> None:
        """Resolves the URL.

        Raises:
            Refused: we do not send there.
        """
        destination = parse(url)
        try:
            self._addresses(destination, min(_LOOKUP_SECONDS, self._seconds))
        except httpcore.TimeoutException:
            raise Refused("the name was not resolved in time; correct it, or retry") from None

    def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Sends the body; the timeout of the settings covers everything from the lookup to the head of the response.

        Raises:
            Refused: the URL now resolves to an address that we do not send to.
            Undelivered: there was no response.
        """
        destination, clock = parse(url), _Clock(self._seconds)
        request = httpcore.Request(
            "POST",
            httpcore.URL(scheme="https", host=destination.host, port=destination.port, target=destination.target),
            headers=[("Host", destination.authority), ("Content-Length", str(len(body))), *headers.items()],
            content=body,
        )
        backend = _Pinned(lambda: self._addresses(destination, clock.left()), clock)
        try:
            with httpcore.ConnectionPool(ssl_context=self._trust, network_backend=backend) as pool:
                answer = pool.handle_request(request)
                retry_after = next((value for name, value in answer.headers if name.lower() == b"retry-after"), None)
                answer.close()
        except httpcore.TimeoutException:
            raise Undelivered(f"no response within {self._seconds:g} s") from None
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise Undelivered(_description(error)) from None
        return Answer(answer.status, None if retry_after is None else retry_after.decode("latin-1"))

    def _addresses(self, destination: Destination, seconds: float) -> list[str]:
        """Every address of the destination, checked.

        Raises:
            Refused: it has none, or one of them is neither public nor in a network that the settings allow.
            httpcore.TimeoutException: the lookup took too long.
        """
        try:
            found = [ip_address(destination.host)]
        except ValueError:
            found = [ip_address(text) for text in _within(seconds, self._resolve, destination)]
        if not found:
            raise Refused("the name does not resolve to an address; correct it, or retry")
        for address in found:
            if not is_public(address) and not any(address in network for network in self._allowed):
                raise Refused("resolves to an address that is not public")
        return [str(address) for address in dict.fromkeys(found)]


class _Clock:
    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until the timeout; raises it once they are over."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise httpcore.TimeoutException
        return left


class _Pinned(httpcore.NetworkBackend):
    """Connects to the checked addresses, whatever the name resolves to by now."""

    def __init__(self, addresses: Callable[[], Sequence[str]], clock: _Clock) -> None:
        self._addresses, self._clock = addresses, clock

    def connect_tcp(
        self,
        host: str,  # noqa: ARG002
        port: int,
        timeout: float | None = None,  # noqa: ARG002
        local_address: str | None = None,  # noqa: ARG002
        socket_options: Iterable[Any] | None = None,  # noqa: ARG002
    ) -> httpcore.NetworkStream:
        addresses = self._addresses()
        for left in range(len(addresses), 1, -1):
            try:
                return self._connect(addresses[-left], port, self._clock.left() / left)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return self._connect(addresses[-1], port, self._clock.left())

    def _connect(self, address: str, port: int, seconds: float) -> httpcore.NetworkStream:
        return _Timed(httpcore.SyncBackend().connect_tcp(address, port, seconds), self._clock)


class _Timed(httpcore.NetworkStream):
    """A stream with one timeout in all: a peer that sends a byte now and then would outlive any timeout per read."""

    def __init__(self, stream: httpcore.NetworkStream, clock: _Clock) -> None:
        self._stream, self._clock = stream, clock

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        return self._stream.read(max_bytes, self._clock.left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002
        self._stream.write(buffer, self._clock.left())

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002
    ) -> httpcore.NetworkStream:
        return _Timed(self._stream.start_tls(ssl_context, server_hostname, self._clock.left()), self._clock)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


@cache
def _trust(ca_file: Path | None) -> ssl.SSLContext:
    return httpcore.default_ssl_context() if ca_file is None else ssl.create_default_context(cafile=ca_file)


def _lookup(host: str, port: int) -> list[str]:
    try:
        return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except OSError:
        return []


def _within(seconds: float, resolve: Resolve, destination: Destination) -> Sequence[str]:
    """The result of `resolve`, in a separate thread: the system's resolver takes no timeout."""
    found: Future[Sequence[str]] = Future()

    def look_up() -> None:
        try:
            found.set_result(resolve(destination.host, destination.port))
        except Exception as error:
            found.set_exception(error)

    threading.Thread(target=look_up, name="webhook-lookup", daemon=True).start()
    try:
        return found.result(seconds)
    except TimeoutError:
        raise httpcore.TimeoutException from None


def _description(error: Exception) -> str:
    cause = error.__cause__ or error.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"the certificate was rejected: {cause.verify_message}"
    if isinstance(cause, ssl.SSLError):
        return "no TLS connection could be established"
    if isinstance(error, httpcore.ConnectError):
        return "no connection could be established"
    return "the connection ended without an HTTP response"
