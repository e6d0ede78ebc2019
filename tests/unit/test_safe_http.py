"""Where webhooks may lead: what is refused, and that only what was checked is connected to."""

import socket
import time
from collections.abc import Iterator, Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from support.webhook_receiver import NAME, Receiver, drip, receiving, status

from service.settings import WebhookSettings
from service.webhooks.safe_http import Outbound, Refused, Undelivered, is_public, parse

PUBLIC, PATIENCE = "93.184.215.14", 30.0
NO_ANSWER = "the connection ended without an HTTP response"


@pytest.fixture(scope="module")
def _receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    with receiving(tmp_path_factory.mktemp("receiver")) as receiver:
        yield receiver


@pytest.fixture
def receiver(_receiver: Receiver) -> Receiver:
    _receiver.forget()
    return _receiver


class Names:
    """A name server that gives its answers one after the other, and repeats the last."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers, self.asked = list(answers), 0

    def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked += 1
        return self.answers[min(self.asked, len(self.answers)) - 1]


def outbound(
    receiver: Receiver | None = None,
    names: Any = None,
    *,
    allowed: Sequence[str] = ("127.0.0.0/8",),
    seconds: float = 10,
) -> Outbound:
    settings = WebhookSettings(
        allowed_networks=tuple(ip_network(network) for network in allowed),
        ca_file=receiver and receiver.ca_file,
        timeout_seconds=seconds,
    )
    return Outbound(settings, names)


MALFORMED = [
    *("http://example.com/", "HTTPS://example.com/", "ftp://example.com/", "//example.com/", "example.com", ""),
    *("https://", "https:///path", "https:/example.com", "https://example.com/#fragment", "https://example.com/a b"),
    *("https://user@example.com/", "https://user:password@example.com/"),
    *("https://example.com@10.0.0.1/", "https://example.com\\@10.0.0.1/"),
    *("https://example.com/\r\nX: y", "https://example.com\n", "https://example.com\t.evil/"),
    *("https://exämple.com/", "https://example。com/", "https://①②⑦.⓪.⓪.①/"),
    *("https://example.com./", "https://127.0.0.1./", "https://.example.com/", "https://example..com/"),
    *("https://-example.com/", "https://exa_mple.com/", "https://example%2ecom/"),
    *("https://[::1/", "https://::1/", "https://[fe80::1%25eth0]/", "https://[example.com]/", "https://[127.0.0.1]x/"),
    *(f"https://example.com:{port}/" for port in ("0", "22", "80", "1023", "65536", "443x", "")),
    *("https://" + "a" * 64 + ".example/", "https://" + ".".join(["a" * 60] * 5) + "/"),
    "https://example.com/" + "a" * 2048,
    # addresses that are not in canonical form, all of them 127.0.0.1 to some software
    *(f"https://{host}/" for host in ("2130706433", "0x7f000001", "017700000001", "0177.0.0.1", "127.1", "127.0.1")),
    *(
        f"https://{host}/"
        for host in ("0x7f.0.0.1", "127.0.0.0x1", "127.0.0.01", "1.2.3.4.5", "300.1.1.1", "example.0x")
    ),
]


@pytest.mark.parametrize("url", MALFORMED)
def test_a_url_of_another_form_is_refused_before_anything_is_looked_up(url: str) -> None:
    names = Names([PUBLIC])
    with pytest.raises(Refused):
        outbound(names=names).check(url)
    assert names.asked == 0


NOT_PUBLIC = """
    0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 100.100.100.200 127.0.0.1 127.255.255.254 168.63.129.16 169.254.169.254
    172.16.0.1 172.31.255.255 192.0.0.192 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.51.100.1 203.0.113.1
    224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255
    :: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:a00:1 ::ffff:8.8.8.8 64:ff9b::10.0.0.1 64:ff9b::a9fe:a9fe 64:ff9b:1::1
    100::1 2001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:db8::1 2002:7f00:1:: 2002:a00:1::1 3fff::1 5f00::1
    fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 fec0::1 ff02::1
"""


@pytest.mark.parametrize("address", NOT_PUBLIC.split())
def test_an_address_that_is_not_public_is_refused_as_itself_behind_a_name_and_beside_a_public_one(address: str) -> None:
    assert not is_public(ip_address(address))
    nobody = outbound(allowed=())
    if "%" not in address:
        with pytest.raises(Refused, match="resolves to an address that is not public"):
            nobody.check(f"https://[{address}]/" if ":" in address else f"https://{address}/")
    for answer in ([address], [PUBLIC, address]):
        with pytest.raises(Refused) as refused:
            outbound(names=Names(answer), allowed=()).check("https://example.com/")
        assert str(refused.value) == "resolves to an address that is not public", "and no word of which"


@pytest.mark.parametrize(
    "address", [PUBLIC, "8.8.8.8", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00:1450::1", "64:ff9b::808:808"]
)
def test_a_public_address_is_not(address: str) -> None:
    outbound(names=Names([address]), allowed=()).check("https://example.com:8443/path?query")


def test_allowed_networks_open_themselves_and_nothing_else() -> None:
    allowed = ("10.1.0.0/16", "fd12::/64")
    for address in ("10.1.2.3", "fd12::5"):
        outbound(names=Names([address]), allowed=allowed).check("https://example.com/")
    for address in ("10.2.0.1", "fd13::1", "127.0.0.1", "::ffff:10.1.2.3", "64:ff9b::a01:203", "2002:a01:203::"):
        with pytest.raises(Refused):
            outbound(names=Names([address]), allowed=allowed).check("https://example.com/")


def test_plain_http_is_named_as_what_is_wrong() -> None:
    with pytest.raises(Refused, match="nothing is delivered over plain HTTP"):
        outbound().check("http://example.com/")


def test_a_url_is_taken_apart_once_and_whole() -> None:
    found = parse("https://Example.COM?a=/b")
    assert (found.host, found.port, found.target, found.authority) == ("example.com", 443, "/?a=/b", "example.com")
    found = parse("https://[2606:4700:0::1]:8443/x")
    assert (found.host, found.authority) == ("2606:4700::1", "[2606:4700::1]:8443")


def test_a_name_that_does_not_resolve_is_reported() -> None:
    with pytest.raises(Refused, match="does not resolve"):
        outbound(names=Names([])).check("https://example.com/")
    with pytest.raises(Refused, match="does not resolve"):
        outbound().check("https://nothing.invalid/")


def test_a_look_up_that_hangs_is_not_waited_for(receiver: Receiver) -> None:
    def hang(host: str, port: int) -> Sequence[str]:
        receiver.ended.wait(PATIENCE)
        return [PUBLIC]

    started = time.monotonic()
    with pytest.raises(Refused, match="not resolved in time"):
        outbound(names=hang, seconds=0.2).check("https://example.com/")
    with pytest.raises(Undelivered, match=r"within 0\.2 s"):
        outbound(names=hang, seconds=0.2).post("https://example.com/", {}, b"")
    assert time.monotonic() - started < PATIENCE


def test_it_posts_to_the_address_under_the_name(receiver: Receiver) -> None:
    way = outbound(receiver, Names(["127.0.0.1"]))
    answer = way.post(f"https://{NAME}:{receiver.port}/a?b=c", {"X-Y": "z"}, b"body")
    assert answer.status == 204
    (got,) = receiver.requests
    assert (got.path, got.body, got.headers["x-y"]) == ("/a?b=c", b"body", "z")
    assert got.headers["host"] == f"{NAME}:{receiver.port}"


def test_a_name_that_leads_elsewhere_by_the_time_of_the_request_leads_nowhere(receiver: Receiver) -> None:
    names = Names([PUBLIC], ["127.0.0.1"])
    way = outbound(receiver, names, allowed=())
    url = f"https://{NAME}:{receiver.port}/"
    way.check(url)
    with pytest.raises(Refused):
        way.post(url, {}, b"")
    assert (names.asked, receiver.connections) == (2, 0)


def test_what_was_checked_is_connected_to_and_the_name_is_not_resolved_twice(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, looked_up = Names(["127.0.0.1"], ["10.0.0.1"]), []
    getaddrinfo = socket.getaddrinfo

    def watched(host: Any, *rest: Any, **more: Any) -> Any:
        looked_up.append(host)
        return getaddrinfo(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", watched)
    assert outbound(receiver, names).post(f"https://{NAME}:{receiver.port}/", {}, b"").status == 204
    assert (names.asked, set(looked_up)) == (1, {"127.0.0.1"})


def test_where_one_address_does_not_answer_the_next_is_tried(receiver: Receiver) -> None:
    way = outbound(receiver, Names(["127.0.0.0", "127.0.0.1"]))
    assert way.post(f"https://{NAME}:{receiver.port}/", {}, b"").status == 204


def test_a_redirect_is_an_answer_and_is_not_followed(receiver: Receiver, tmp_path: Path) -> None:
    with receiving(tmp_path) as other:
        receiver.answer = status(307, Location=other.url)
        assert outbound(receiver).post(receiver.url, {}, b"").status == 307
        assert other.connections == 0
    assert len(receiver.requests) == 1


def test_a_proxy_of_the_environment_is_not_used(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert outbound(receiver).post(receiver.url, {}, b"").status == 204


def refusal(way: Outbound, url: str) -> str:
    with pytest.raises(Undelivered) as refused:
        way.post(url, {}, b"")
    return str(refused.value)


def test_a_certificate_of_another_name_or_of_nobody_we_trust_is_not_accepted(receiver: Receiver) -> None:
    other = outbound(receiver, Names(["127.0.0.1"]))
    assert "certificate was rejected: Hostname mismatch" in refusal(other, f"https://other.example:{receiver.port}/")
    assert "certificate was rejected" in refusal(outbound(), receiver.url)
    assert receiver.requests == []


def test_an_answer_that_never_ends_is_ended_by_the_timeout(receiver: Receiver) -> None:
    receiver.answer = drip
    started = time.monotonic()
    assert refusal(outbound(receiver, seconds=0.5), receiver.url) == "no response within 0.5 s"
    assert time.monotonic() - started < PATIENCE


def test_of_an_answer_only_the_head_is_read(receiver: Receiver) -> None:
    sent, broken_off = [0], Event()

    def huge(handler: Any) -> None:
        handler.send_response(200)
        handler.end_headers()
        try:
            for _ in range(2**14):
                sent[0] += handler.wfile.write(b"x" * 2**16)
        except OSError:
            broken_off.set()

    receiver.answer = huge
    assert outbound(receiver).post(receiver.url, {}, b"").status == 200
    assert broken_off.wait(PATIENCE)
    assert sent[0] < 2**26, "what fits into the buffers between, and not the gigabyte"


def test_a_head_without_end_is_not_read(receiver: Receiver) -> None:
    receiver.answer = lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2**20)
    assert refusal(outbound(receiver), receiver.url) == NO_ANSWER


def test_failures_are_reported_without_addresses(receiver: Receiver) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        assert refusal(outbound(receiver), f"https://127.0.0.1:{port}/") == "no connection could be established"
    receiver.answer = lambda handler: handler.wfile.write(b"220 mail.example ESMTP\r\n")
    assert refusal(outbound(receiver), receiver.url) == NO_ANSWER
    receiver.answer = lambda _: None
    assert refusal(outbound(receiver), receiver.url) == NO_ANSWER
