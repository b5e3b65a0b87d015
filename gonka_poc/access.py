"""The addresses that callbacks may go to.

A callback URL makes this server send requests, so it must not reach what only this server can reach by accident:
link-local and cloud metadata addresses are always refused. The host is judged twice: as it was written, when the
request arrives, and as the address that is connected to, when a callback is sent, because what a name resolves to
can change in between.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import httpx

from gonka_poc.bounded_http import BoundedTransport
from gonka_poc.certificates import ssl_context
from gonka_poc.errors import RequestError, printable
from gonka_poc.request_fields import has_query

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

METADATA_NAMES = frozenset({"metadata.google.internal", "metadata.goog"})
# each with the reason that a refusal gives
FORBIDDEN_NETWORKS: tuple[tuple[Network, str], ...] = (
    (ipaddress.ip_network("169.254.0.0/16"), "link-local (cloud metadata)"),
    (ipaddress.ip_network("fe80::/10"), "link-local"),
    (ipaddress.ip_network("100.100.100.200/32"), "cloud metadata"),
    (ipaddress.ip_network("168.63.129.16/32"), "cloud metadata"),
    (ipaddress.ip_network("192.0.0.192/32"), "cloud metadata"),
    (ipaddress.ip_network("fd00:ec2::/32"), "cloud metadata"),
    (ipaddress.ip_network("fd20:ce::254/128"), "cloud metadata"),
    (ipaddress.ip_network("fd00:42::42/128"), "cloud metadata"),
    # where in such an address the IPv4 one lies, only its network knows
    (ipaddress.ip_network("64:ff9b:1::/48"), "local-use NAT64"),
    (ipaddress.ip_network("0.0.0.0/8"), "unspecified"),
    (ipaddress.ip_network("::/128"), "unspecified"),
    (ipaddress.ip_network("224.0.0.0/4"), "multicast"),
    (ipaddress.ip_network("ff00::/8"), "multicast"),
    (ipaddress.ip_network("255.255.255.255/32"), "broadcast"),
)
# IPv6 networks whose last 32 bits are the IPv4 address that a gateway goes on to: NAT64, SIIT, the "compatible" form
NAT64 = ipaddress.ip_network("64:ff9b::/96")
NETWORKS_AROUND_IPV4 = (NAT64, ipaddress.ip_network("::ffff:0:0:0/96"), ipaddress.ip_network("::/96"))
# names that are looked up at once; a thread for each, which a dead resolver holds long after its callback gave up
MAX_LOOKUPS = 16


@dataclass(frozen=True)
class CallbackRules:
    """The addresses that callbacks may go to: POC_CALLBACK_ALLOW, less what is always forbidden.

    An entry is a host, host:port, *.suffix, address or CIDR range; no entries allow every host. A range is compared
    with addresses that are written as such; a host that is given by name needs an entry by name.
    """

    names: tuple[tuple[str, int | None], ...] = ()
    suffixes: tuple[str, ...] = ()
    networks: tuple[Network, ...] = ()

    @classmethod
    def parse(cls, text: str) -> CallbackRules:
        """Parse comma-separated entries. Raises ValueError naming a wrong entry."""
        names: list[tuple[str, int | None]] = []
        suffixes, networks = [], []
        for entry in filter(None, (part.strip() for part in text.split(","))):
            try:
                if entry.startswith("*."):
                    suffixes.append("." + _plain_name(entry[2:]))
                elif "/" in entry or _as_address(_unbracketed(entry)) is not None:
                    networks.append(ipaddress.ip_network(_unbracketed(entry)))
                else:
                    url = httpx.URL(f"http://{entry}")
                    if url.path != "/" or url.userinfo or has_query(entry) or _is_number(url):
                        raise ValueError("neither a host nor a range")
                    # httpx leaves out the port that is http's own
                    names.append((host_name(url), 80 if entry.endswith(":80") else url.port))
            except (httpx.InvalidURL, ValueError) as error:
                text = f"{entry!a} is no host, host:port, *.suffix, address or CIDR range ({error})"
                raise ValueError(text) from error
        return cls(tuple(names), tuple(suffixes), tuple(networks))

    @property
    def allow_all(self) -> bool:
        """True if there is no allow-list."""
        return not (self.names or self.suffixes or self.networks)

    def check_url(self, url: str) -> None:
        """Refuse a callback URL by its host as it is written. Raises RequestError with the reason."""
        try:
            parsed = httpx.URL(url)
            name = host_name(parsed)
        except (httpx.InvalidURL, ValueError) as error:
            shown = shown_url(url)
            raise RequestError(f"the callback URL {shown!a} cannot be used: {printable(str(error))}") from error
        if parsed.scheme not in ("http", "https"):
            raise RequestError(f"the callback URL {shown_url(url)!a} must begin with http:// or https://")
        if has_query(url):
            raise RequestError(f"the callback URL {shown_url(url)!a} must be without query and fragment")
        address = _as_address(name)
        if address is not None:
            self.check_address(address)
        elif _is_number(parsed):
            # resolvers read 2852039166, 0xa9fea9fe and 0251.254.169.254 as addresses; nobody who means well writes so
            raise RequestError(f"the callback host {name!a} is a number; write an address as four decimal numbers")
        elif name in METADATA_NAMES:
            raise RequestError(f"callbacks to {name!a} are refused: cloud metadata")
        if not self._allows(name, address, _port_of(parsed)):
            raise RequestError(f"callbacks to {name!a} are refused: not in POC_CALLBACK_ALLOW")

    def check_address(self, address: Address | str) -> None:
        """Refuse an address that no callback may connect to, whatever the allow-list. Raises RequestError."""
        if isinstance(address, str):
            address = ipaddress.ip_address(address)
        for form in _all_forms(address):
            for network, reason in FORBIDDEN_NETWORKS:
                if form in network:
                    raise RequestError(f"callbacks to the address {str(address)!a} are refused: {reason}")

    async def allowed_addresses(self, host: str, port: int, threads: Executor | None = None) -> list[str]:
        """The addresses of `host` that a callback may connect to, in the resolver's order; looked up in `threads`.
        Raises OSError if the host has none, RequestError if it has none that is allowed."""
        lookup = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(threads, lookup)
        allowed, refusal = [], None
        for address in dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found):
            try:
                self.check_address(address)
                allowed.append(address)
            except RequestError as error:
                refusal = error
        if not allowed and refusal is not None:
            raise RequestError(f"{host!a}: {refusal}")
        return allowed

    def _allows(self, name: str, address: Address | None, port: int) -> bool:
        if self.allow_all or (name, None) in self.names or (name, port) in self.names:
            return True
        if address is not None:
            return any(_final_address(address) in network for network in self.networks)
        return name.endswith(self.suffixes) if self.suffixes else False


class CheckedTransport(httpx.AsyncBaseTransport):
    """Connects only to addresses that the rules allow: the one that was checked is the one that is used.

    The URL's host is replaced by the address; the Host header, TLS server name and certificate check stay with the
    host's name. No connection is kept: each is made for a name, and would be found again by address.
    """

    def __init__(self, rules: CallbackRules, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._rules = rules
        self._transport = transport or BoundedTransport(ssl_context())
        # not the event loop's threads, which vLLM uses too
        self._threads = ThreadPoolExecutor(MAX_LOOKUPS, "poc-dns")

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send `request` to the first allowed address that can be connected to. Raises httpx.ConnectError if none."""
        url = request.url
        host = url.raw_host.decode("ascii")
        timeout = request.extensions.get("timeout", {}).get("connect")
        try:
            resolving = self._rules.allowed_addresses(host, _port_of(url), self._threads)
            addresses = await asyncio.wait_for(resolving, timeout)
        except asyncio.TimeoutError as error:  # another class than TimeoutError until Python 3.11
            raise httpx.ConnectTimeout(f"{host!a} was not resolved in time", request=request) from error
        except (OSError, UnicodeError, RequestError) as error:
            raise httpx.ConnectError(str(error), request=request) from error
        failure: httpx.TransportError = httpx.ConnectError(f"{host!a} has no address", request=request)
        for address in addresses:
            pinned = httpx.Request(
                request.method,
                url.copy_with(host=address),
                headers=request.headers,
                stream=request.stream,
                extensions={**request.extensions, "sni_hostname": host},
            )
            try:
                return await self._transport.handle_async_request(pinned)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:  # nothing was sent yet
                failure = error
        raise failure

    async def aclose(self) -> None:
        """Close the connections."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._transport.aclose()


def is_loopback(host: str) -> bool:
    """True if `host` is a loopback address, also as IPv6 writes an IPv4 one; False for what is no address."""
    address = _as_address(host)
    return address is not None and _final_address(address).is_loopback


def shown_url(url: str) -> str:
    """`url` for people and logs, with *** for a name and password in it."""
    return re.sub(r"^([^/?#]*//)[^/?#]*@", r"\1***@", url)


def _port_of(url: httpx.URL) -> int:
    return url.port or (443 if url.scheme == "https" else 80)


def host_name(url: httpx.URL) -> str:
    """The host of `url` as names are compared: in lower case, IDNA-encoded, without the dot of the DNS root."""
    return _plain_name(url.raw_host.decode("ascii"))


def _plain_name(name: str) -> str:
    name = name.lower().removesuffix(".")
    if _as_address(name) is None and not re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", name):
        raise ValueError(f"{name!a} is no host name")
    return name


def _unbracketed(text: str) -> str:
    return text[1:-1] if text.startswith("[") and text.endswith("]") else text


def _as_address(name: str) -> Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _is_number(url: httpx.URL) -> bool:
    """True if the host would be read as a number: its last label is digits, or 0x and hexadecimal digits."""
    last_label = host_name(url).rpartition(".")[2]
    return _as_address(host_name(url)) is None and re.fullmatch(r"\d+|0x[0-9a-f]*", last_label) is not None


def _final_address(address: Address) -> Address:
    """The address that a connection to `address` ends at; 6to4 and Teredo addresses are left as they are."""
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped or (_last_32_bits(address) if address in NAT64 else address)
    return address


def _all_forms(address: Address) -> list[Address]:
    """`address`, and before it the IPv4 addresses that an IPv6 address may stand for."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if any(address in network for network in NETWORKS_AROUND_IPV4) and int(address) > 0xFFFF:
        inner.append(_last_32_bits(address))
    return [*(form for form in inner if form is not None), address]


def _last_32_bits(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address:
    return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
