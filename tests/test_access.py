"""Where callbacks may go: URLs as they are written, addresses that are connected to, and what is really sent."""

from __future__ import annotations

import asyncio
import ipaddress
import random
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fakes import FakeManager, generate_body, make_poc, round_body

from gonka_poc.access import FORBIDDEN_NETWORKS, CallbackRules, CheckedTransport, shown_url
from gonka_poc.config import Settings
from gonka_poc.errors import RequestError
from gonka_poc.routes import PREFIX, make_app

EVERYTHING = CallbackRules.parse("")
LISTED = CallbackRules.parse(
    " Receiver.Example , other.example:9000, *.Internal.Example, 10.1.0.0/16,192.168.7.7 , 127.0.0.1:9001, fd00::/64,"
    "[fd01::1],[fd02::1]:8080, b\u00fccher.example,[2001:db8::/32],web.example:80,"
)

# --- hosts as they are written ----------------------------------------------------------------------------------

ALLOWED_BY_DEFAULT = [
    "http://receiver",
    "https://receiver.example/a/b",
    "http://receiver.example.:9000",
    "http://127.0.0.1:9000",
    "http://localhost",
    "http://10.0.0.1",
    "http://192.168.1.1",
    "http://[::1]:9000",
    "http://[fd00::1]",
    "http://8.8.8.8",
    "http://[::ffff:10.0.0.1]",
    "http://169.253.255.255",
    "http://169.255.0.0",
    "http://100.100.100.201",
    "http://169.254.169.254.example",
    "http://metadata.google.internal.example",
    "http://user:password@receiver",
    "http://169.254.169.254@receiver",
    "http://b\u00fccher.example",
    "http://under_score.example",
    "http://0x.example",
    "http://1.2.3.4.example",
]
REFUSED_ALWAYS = {
    "http://169.254.169.254/latest": "link-local",
    "HTTP://169.254.0.1:80": "link-local",
    "https://169.254.169.254": "link-local",
    "http://169.254.169.254.": "link-local",
    "http://user:password@169.254.169.254": "link-local",
    "http://receiver.example@169.254.169.254": "link-local",
    "http://receiver.example\\@169.254.169.254": "link-local",
    "http://169\u3002254\u3002169\u3002254": "link-local",
    "http://[::ffff:169.254.169.254]": "link-local",
    "http://[::ffff:a9fe:a9fe]": "link-local",
    "http://[0:0:0:0:0:FFFF:A9FE:A9FE]": "link-local",
    "http://[::169.254.169.254]": "link-local",
    "http://[64:ff9b::169.254.169.254]": "link-local",
    "http://[2002:a9fe:a9fe::1]": "link-local",
    "http://[2001:0:a9fe:a9fe::1]": "link-local",
    "http://[2001:0:808:808::5601:5601]": "link-local",
    "http://[fe80::1]": "link-local",
    "http://[fe80::1%25eth0]": "link-local",
    "http://[febf::1]": "link-local",
    "http://[fd00:ec2::254]": "cloud metadata",
    "http://[FD00:0EC2:0:0:0:0:0:254]": "cloud metadata",
    "http://[fd00:42::42]": "cloud metadata",
    "http://100.100.100.200": "cloud metadata",
    "http://metadata.google.internal": "cloud metadata",
    "http://MetaData.Google.Internal.:80/computeMetadata": "cloud metadata",
    "http://\u24dcetadata.google.internal": "cannot be used",
    "http://metadata\uff0egoogle\uff0einternal": "cloud metadata",
    "http://0.0.0.0": "unspecified",
    "http://0.1.2.3": "unspecified",
    "http://[::]": "unspecified",
    "http://[::ffff:0.0.0.0]": "unspecified",
    "http://224.0.0.1": "multicast",
    "http://239.255.255.255": "multicast",
    "http://[ff02::1]": "multicast",
    "http://255.255.255.255": "broadcast",
    "http://2852039166": "is a number",
    "http://0xa9fea9fe": "is a number",
    "http://0xA9.0xFE.0xA9.0xFE": "is a number",
    "http://0251.0376.0251.0376": "cannot be used",
    "http://169.254.43518": "is a number",
    "http://169.0xfea9fe": "is a number",
    "http://025177524776": "is a number",
    "http://127.1": "is a number",
    "http://0": "is a number",
    "http://0x": "is a number",
    "http://1.2.3.4.5": "is a number",
    "http://%31%36%39.254.169.254": "cannot be used",
    "http://169.254.169.254%00.example": "cannot be used",
    "http://a..example": "cannot be used",
    "http://...": "cannot be used",
    "http://receiver.example..": "cannot be used",
    "http://a,b": "cannot be used",
    "http:///path": "cannot be used",
    "http://receiver/x?": "without query and fragment",
    "http://receiver/x#": "without query and fragment",
    "http://receiver/?token=1": "without query and fragment",
    "ftp://receiver": "http:// or https://",
    "//receiver": "http:// or https://",
    "file:///etc/passwd": "cannot be used",
    "http://[::1": "cannot be used",
}
LISTED_URLS = [
    "http://receiver.example",
    "https://RECEIVER.example.:1234/x",
    "http://other.example:9000",
    "http://a.internal.example",
    "http://a.b.INTERNAL.example",
    "http://10.1.255.255:1",
    "http://192.168.7.7",
    "http://127.0.0.1:9001",
    "http://[fd00::1]",
    "http://[fd01::1]:77",
    "http://[fd02::1]:8080",
    "http://[2001:db8::5]",
    "http://B\u00dcCHER.example",
    "http://xn--bcher-kva.example",
    "http://[::ffff:10.1.0.1]",
    "http://[64:ff9b::10.1.0.1]",
    "http://web.example",
    "http://user@receiver.example",
]
NOT_LISTED_URLS = [
    "http://example",
    "http://receiver.example.evil",
    "http://evilreceiver.example",
    "http://receiver.example@evil.example",
    "http://other.example",
    "https://other.example",
    "http://other.example:9001",
    "http://internal.example",
    "http://evilinternal.example",
    "http://a.internal.example.evil",
    "http://10.2.0.0",
    "http://192.168.7.8",
    "http://127.0.0.1",
    "http://127.0.0.1:9000",
    "http://[fd00:0:0:1::1]",
    "http://[fd02::1]",
    "http://[::1]",
    "http://localhost:9001",
    "https://web.example",
    "http://10.1.0.1.evil.example",
    # 10.1.0.1 in addresses of 6to4 and Teredo, where whoever writes the URL may put any
    "http://[2002:a01:1::1]",
    "http://[2001:0:a01:1:0:ffff:f7f7:f7f7]",
    "http://[2001:0:808:808:0:ffff:f5fe:fffe]",
    "http://[::10.1.0.1]",
]


@pytest.mark.parametrize("url", ALLOWED_BY_DEFAULT)
def test_allowed_by_default(url):
    EVERYTHING.check_url(url)


@pytest.mark.parametrize(("url", "reason"), REFUSED_ALWAYS.items(), ids=ascii)
def test_refused_always(url, reason):
    host = url.partition("//")[2].strip("[]")
    lists = ["", "*.example,*.internal,0.0.0.0/0,::/0"]
    if reason not in ("cannot be used", "is a number") and not set(host) & set("@:/%\\"):
        lists.append(host)
    for text in lists:
        with pytest.raises(RequestError, match=reason) as caught:
            CallbackRules.parse(text).check_url(url)
        assert str(caught.value).isascii()
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("url", LISTED_URLS)
def test_on_the_list(url):
    LISTED.check_url(url)


@pytest.mark.parametrize("url", NOT_LISTED_URLS)
def test_not_on_the_list(url):
    with pytest.raises(RequestError, match="POC_CALLBACK_ALLOW"):
        LISTED.check_url(url)
    EVERYTHING.check_url(url)


@pytest.mark.parametrize(
    "entry",
    [
        *("http://a.example", "a.example/path", "a@b.example", "10.0.0.1/8", "10.0.0.0/33", "*", "*.", "*.*.example"),
        *("a.example:port", "a.example:0x50", "2130706433", "10.1", "a..b", ".", "%61", "a?b", "a#b", "[::1", "a\nb"),
        "a b",
    ],
)
def test_entries_that_cannot_be_read_are_named(entry):
    with pytest.raises(ValueError, match="is no host") as caught:
        CallbackRules.parse(f"good.example,{entry}")
    assert ascii(entry.strip()) in str(caught.value)


@pytest.mark.parametrize("text", ["", " ", ",", " , "])
def test_an_empty_list_allows_every_host(text):
    assert CallbackRules.parse(text).allow_all


# --- addresses --------------------------------------------------------------------------------------------------


def is_refused(address: Any) -> bool:
    try:
        EVERYTHING.check_address(address)
    except RequestError:
        return True
    return False


def edges_and_others(network: Any) -> Iterator[int]:
    first, last = int(network[0]), int(network[-1])
    yield from (first - 1, first, random.Random(str(network)).randint(first, last), last, last + 1)


@pytest.mark.parametrize("network", [network for network, _ in FORBIDDEN_NETWORKS], ids=str)
def test_an_address_is_judged_as_the_one_that_it_stands_for(network):
    """Each forbidden network at its edges, in every spelling."""
    for bits in edges_and_others(network):
        if not 0 <= bits < 2**network.max_prefixlen:
            continue
        address = type(network[0])(bits)
        expected = any(address in forbidden for forbidden, _ in FORBIDDEN_NETWORKS)
        spellings: list[Any] = [address, str(address)]
        if network.version == 4:
            spellings += [
                f"::ffff:{address}",
                f"::ffff:0:{address}",
                f"64:ff9b::{address}",
                ipaddress.IPv6Address(0x2002 << 112 | bits << 80),
            ]
        assert {is_refused(spelling) for spelling in spellings} == {expected}, address


def resolving_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Every name has these addresses."""

    def getaddrinfo(host: Any, port: Any, *args: Any, **kwargs: Any) -> list[tuple]:
        return [(socket.AF_INET6 if ":" in a else socket.AF_INET, 1, 6, "", (a, port)) for a in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


async def test_the_addresses_of_a_name(monkeypatch):
    resolving_to(monkeypatch, "10.0.0.2", "169.254.169.254", "10.0.0.1", "10.0.0.2", "fe80::1%eth0")
    assert await EVERYTHING.allowed_addresses("name", 80) == ["10.0.0.2", "10.0.0.1"]
    resolving_to(monkeypatch, "169.254.169.254", "fe80::1%eth0")
    with pytest.raises(RequestError, match=r"'name': .*link-local"):
        await EVERYTHING.allowed_addresses("name", 80)


async def test_names_that_are_not_answered_hold_up_neither_others_nor_the_event_loop(monkeypatch):
    """More of them than the event loop has threads of its own."""
    found, hangs = socket.getaddrinfo, threading.Event()

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> list[tuple]:
        if host.startswith("dead"):
            hangs.wait(20)
        return found("127.0.0.1", *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(2))
    transport = CheckedTransport(EVERYTHING, httpx.MockTransport(lambda request: httpx.Response(200)))
    async with httpx.AsyncClient(transport=transport, timeout=30) as client:
        dead = [asyncio.create_task(client.post(f"http://dead{number}/")) for number in range(4)]
        await asyncio.sleep(0.05)
        assert (await asyncio.wait_for(client.post("http://receiver.example/"), 5)).status_code == 200
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "free"), 5) == "free"
        assert not any(task.done() for task in dead)
        hangs.set()
        await asyncio.gather(*dead)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:pass@host:1/path", "http://***@host:1/path"),
        ("https://a@b@host", "https://***@host"),
        ("http://host/path@x", "http://host/path@x"),
        ("http://host", "http://host"),
    ],
)
def test_a_url_is_shown_without_its_password(url, shown):
    assert shown_url(url) == shown


async def test_numbers_that_only_a_resolver_understands():
    """What the system makes of other spellings is judged too."""
    for host in ("2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "169.254.43518"):
        with pytest.raises(RequestError, match=r"169\.254\.169\.254"):
            await EVERYTHING.allowed_addresses(host, 80)


# --- what is connected to ---------------------------------------------------------------------------------------


class Receiver:
    """An HTTP server on the loopback address that answers 204, or what it is told to."""

    def __init__(self) -> None:
        self.heads: list[str] = []
        self.answer = "HTTP/1.1 204 No Content\r\n\r\n"

    async def __aenter__(self) -> Receiver:
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        self._server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(self.answer.encode())
        writer.close()


@pytest.fixture
async def client() -> Iterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=CheckedTransport(EVERYTHING), trust_env=False, timeout=5) as client:
        yield client


async def test_a_name_is_connected_to_by_its_address(client, monkeypatch):
    async with Receiver() as receiver:
        resolving_to(monkeypatch, "169.254.169.254", "127.0.0.1")
        response = await client.post(f"http://receiver.example:{receiver.port}/generated", json={"a": 1})
        assert response.status_code == 204
        assert response.request.url == f"http://receiver.example:{receiver.port}/generated"
        (head,) = receiver.heads
        assert head.startswith("POST /generated HTTP/1.1\r\n")
        assert f"\r\nHost: receiver.example:{receiver.port}\r\n" in head


async def test_a_name_that_moves_is_judged_again(client, monkeypatch):
    async with Receiver() as receiver:
        url = f"http://receiver.example:{receiver.port}/"
        resolving_to(monkeypatch, "127.0.0.1")
        assert (await client.post(url)).status_code == 204
        resolving_to(monkeypatch, "169.254.169.254")
        with pytest.raises(httpx.ConnectError, match="link-local"):
            await client.post(url)
        assert len(receiver.heads) == 1


async def test_the_next_address_is_tried(client, monkeypatch):
    async with Receiver() as receiver:
        resolving_to(monkeypatch, "::1", "127.0.0.1")
        response = await client.post(f"http://receiver.example:{receiver.port}/", content=b"body")
        assert response.status_code == 204
        resolving_to(monkeypatch, "::1")
        with pytest.raises(httpx.ConnectError):
            await client.post(f"http://receiver.example:{receiver.port}/")


async def test_redirects_are_not_followed(client):
    async with Receiver() as target, Receiver() as receiver:
        receiver.answer = f"HTTP/1.1 307 Go\r\nLocation: http://127.0.0.1:{target.port}/\r\n\r\n"
        assert (await client.post(f"http://127.0.0.1:{receiver.port}/")).status_code == 307
        assert target.heads == []


async def test_names_without_an_address(client, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> list:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(httpx.ConnectError, match="not known"):
        await client.post("http://receiver.example/")


async def test_a_resolver_that_hangs_ends_with_the_timeout(monkeypatch):
    async def hang(*args: Any) -> list[str]:
        await asyncio.sleep(3600)
        return []

    monkeypatch.setattr(CallbackRules, "allowed_addresses", hang)
    async with httpx.AsyncClient(transport=CheckedTransport(EVERYTHING), timeout=0.01) as client:
        with pytest.raises(httpx.ConnectTimeout, match="not resolved in time"):
            await client.post("http://receiver.example/")


async def test_tls_is_checked_against_the_name(monkeypatch):
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200)

    resolving_to(monkeypatch, "127.0.0.1")
    transport = CheckedTransport(EVERYTHING, httpx.MockTransport(answer))
    async with httpx.AsyncClient(transport=transport) as client:
        await client.post("https://receiver.example/generated")
    (request,) = seen
    assert (request.url, request.extensions["sni_hostname"]) == ("https://127.0.0.1/generated", "receiver.example")
    assert request.headers["host"] == "receiver.example"


# --- requests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allow", "url", "status"),
    [
        ("", "http://receiver", 200),
        ("", "http://169.254.169.254", 400),
        ("", "http://2852039166", 400),
        ("*.example", "http://a.example", 200),
        ("*.example", "http://receiver", 400),
    ],
)
async def test_a_request_with_a_refused_url_is_400(allow, url, status):
    service = make_poc(FakeManager(), Settings(callback_allow=allow)).service
    transport = httpx.ASGITransport(app=make_app(service))
    async with httpx.AsyncClient(transport=transport, base_url=f"http://test{PREFIX}") as client:
        bodies = {"/init/generate": round_body(url=url), "/generate": generate_body([], url=url)}
        for path, body in bodies.items():
            response = await client.post(path, json=body)
            assert response.status_code == status
            assert (status == 200) or "refused" in response.text or "is a number" in response.text
        assert service.slot.generating is (status == 200)
    await service.close()
