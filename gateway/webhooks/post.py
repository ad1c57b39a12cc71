"""One POST to an address that a tenant has named, so one that may be hostile:

1. https only, to public addresses: every address that the name has must be one, else nothing is sent. The connection
   goes to an address that was checked, not to a second look at the name (DNS rebinding).
2. The certificate must be valid for the name. No redirect is followed.
3. The time for all of it and the bytes of the answer are bounded; the answer's body is not read.

``private_allowed`` (a setting) lifts the first rule, for receivers inside the operator's own network: any address, and
plain http.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Mapping
from urllib.parse import SplitResult, urlsplit

POST_TIMEOUT_S = 10.0
HEAD_BYTES_MAX = 16_384


class PostError(Exception):
    """Nothing was sent, or no answer came; the message may be shown to whoever made the endpoint."""


def check_url(url: str, *, private_allowed: bool) -> SplitResult:
    """Raises PostError for what will never be sent to."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise PostError(f"{url!r} is no URL: {error}") from error
    if any(not "!" <= c <= "~" for c in url):
        raise PostError("a URL has no spaces and only ASCII characters")
    if parts.scheme != "https" and not (parts.scheme == "http" and private_allowed):
        raise PostError("the URL must begin with https://")
    if not parts.hostname or parts.username is not None or parts.fragment or port == 0:
        raise PostError("the URL must be https://host[:port]/path, without user name and fragment")
    with_address = _literal(parts.hostname)
    if with_address is not None and not private_allowed and not _is_public(with_address):
        raise PostError(f"{parts.hostname} is not a public address")
    return parts


async def post(
    url: str,
    body: bytes,
    headers: Mapping[str, str],
    *,
    private_allowed: bool,
    tls: ssl.SSLContext,
    timeout_s: float = POST_TIMEOUT_S,
) -> int:
    """The answer's status. Raises PostError."""
    parts = check_url(url, private_allowed=private_allowed)
    try:
        async with asyncio.timeout(timeout_s):
            return await _post(parts, body, headers, private_allowed, tls)
    except TimeoutError as error:
        raise PostError(f"no answer within {timeout_s:g} s") from error
    except ssl.SSLError as error:
        raise PostError(f"TLS: {error.reason or error}") from error
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        raise PostError(f"the connection failed ({type(error).__name__})") from error


async def _post(
    parts: SplitResult, body: bytes, headers: Mapping[str, str], private_allowed: bool, tls: ssl.SSLContext
) -> int:
    assert parts.hostname is not None
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    address = (await _addresses(parts.hostname, port, private_allowed))[0]
    reader, writer = await asyncio.open_connection(
        address,
        port,
        ssl=tls if secure else None,
        server_hostname=parts.hostname if secure else None,
        limit=HEAD_BYTES_MAX,
    )
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        host = parts.netloc
        lines = [f"POST {path} HTTP/1.1", f"host: {host}", f"content-length: {len(body)}", "connection: close"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode("ascii") + body)
        await writer.drain()
        head = await reader.readuntil(b"\r\n")
        fields = head.split(b" ", 2)
        if len(fields) < 2 or not fields[0].startswith(b"HTTP/1.") or not fields[1].isdigit() or len(fields[1]) != 3:
            raise PostError("the answer is not HTTP/1.1")
        return int(fields[1])
    finally:
        writer.transport.abort()


async def _addresses(host: str, port: int, private_allowed: bool) -> list[str]:
    """What the name stands for now, all checked. Raises PostError."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise PostError(f"{host} has no address") from error
    addresses = [str(entry[4][0]) for entry in found]
    if not private_allowed:
        for address in addresses:
            if not _is_public(ipaddress.ip_address(address.partition("%")[0])):
                raise PostError(f"{host} has an address that is not public")
    return addresses


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Global unicast, also of what an IPv6 address carries inside (mapped, 6to4, Teredo, NAT64)."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is None and address in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None and not _is_public(inner):
            return False
    return address.is_global and not address.is_multicast
