"""What does one URL give? The bytes of an image, or one word for why not; always within its deadline and byte cap.

This takes the place of img2dataset's own fetch, which opens file: and data: URLs, follows redirects into private
networks, reads bodies of any size into memory and waits for ever for a server that drips. Standard library only.
"""

from __future__ import annotations

import email.utils
import http.client
import ipaddress
import random
import ssl
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from urllib.parse import quote, urljoin, urlsplit

from data_prep.addresses import Network
from data_prep.download.connect import Failed, Names, connect
from data_prep.download.deadline import Deadlines

MAX_REDIRECTS = 5
BACKOFF = 0.5  # seconds before the first retry, doubled each time
PIECE = 2**16  # bytes read at a time
OPT_OUT = frozenset({"noai", "noimageai", "noindex", "noimageindex"})  # of X-Robots-Tag
VALUED = ("max-snippet", "max-image-preview", "max-video-preview", "unavailable_after")  # not names of robots
TEXTUAL = ("text/html", "text/xml", "application/json", "application/xml", "image/svg", "video/", "audio/")
_SAFE = "/%:=&?~+!$,;'@()*[]|-._"  # of a path and query: left as they are
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")

NAMES, DEADLINES = Names(), Deadlines()  # of this process: names and sockets are shared by its threads


@dataclass(frozen=True)
class Policy:
    """How to treat servers; JSON types only, for it travels to other processes."""

    timeout: float = 10.0  # seconds of silence
    deadline: float = 60.0  # seconds for one row in all: redirects, retries and pauses
    retries: int = 2  # of what may pass: resets, time-outs, 429, 5xx, bodies that end early
    max_bytes: int = 50 * 2**20
    user_agent: str = "Mozilla/5.0 (compatible; m3i-data-prep/1.0)"
    robot: str = "m3i-data-prep"  # the name under which X-Robots-Tag may address us
    networks: tuple[str, ...] = ()  # that are not public and may be reached all the same
    parsed: tuple[Network, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parsed", tuple(ipaddress.ip_network(text) for text in self.networks))


def may_pass(reason: str) -> bool:
    """Whether the same URL may be fine a moment later."""
    return reason in ("timeout", "connection", "incomplete", "dns_busy", "http_429") or reason.startswith(
        "http_5"
    )


def fetch(url: str, policy: Policy) -> bytes:
    """The body of `url`, 1 to policy.max_bytes bytes; raises Failed.

    Reasons: bad_url, private_address, dns, dns_busy, connection, tls, timeout, redirects, http_<status>, opted_out,
    too_large, incomplete, empty, not_an_image, bad_reply.
    """
    until = time.monotonic() + policy.deadline
    for attempt in range(policy.retries + 1):
        try:
            return _fetch_once(url, policy, until)
        except Failed as failed:
            pause = BACKOFF * 2**attempt * random.uniform(0.5, 1.5) if failed.wait is None else failed.wait
            is_last = attempt == policy.retries or time.monotonic() + pause >= until
            if is_last or not may_pass(failed.reason):
                raise
        time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _fetch_once(url: str, policy: Policy, until: float) -> bytes:
    for _ in range(MAX_REDIRECTS + 1):
        found = _exchange(url, policy, until)
        if isinstance(found, bytes):
            return found
        url = urljoin(url, found)
    raise Failed("redirects", f"more than {MAX_REDIRECTS}")


def _exchange(url: str, policy: Policy, until: float) -> bytes | str:
    """One request: the body, or where it redirects to."""
    host, port, is_secure, target = _parts(url)
    opened = connect(host, port, NAMES, policy.parsed, policy.timeout, until)
    try:
        opened.settimeout(policy.timeout)
        if is_secure:
            opened = _tls().wrap_socket(opened, server_hostname=host, do_handshake_on_connect=False)
        with DEADLINES.cut(opened, until):
            if is_secure:
                opened.do_handshake()
            kind = http.client.HTTPSConnection if is_secure else http.client.HTTPConnection
            connection = kind(host, port)
            connection.sock = opened  # to the address that was judged; the class would resolve the name again
            headers = {
                "User-Agent": policy.user_agent,
                "Accept": "image/*,*/*;q=0.5",
                "Accept-Encoding": "identity",
            }
            connection.request("GET", target, headers={**headers, "Connection": "close"})
            return _answer(connection.getresponse(), policy)
    except Failed:
        if time.monotonic() >= until:
            raise _late(policy) from None
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        if time.monotonic() >= until:
            raise _late(policy) from error
        raise _explained(error, policy) from error
    finally:
        opened.close()


def _answer(response: http.client.HTTPResponse, policy: Policy) -> bytes | str:
    with response:
        location = response.headers.get("Location")
        is_redirect = response.status in (301, 302, 303, 307, 308) and location is not None
        if not is_redirect and not 200 <= response.status < 300:
            wait = _retry_after(response.headers.get("Retry-After"))
            raise Failed(f"http_{response.status}", response.reason[:80], wait)
        if is_opted_out(
            response.headers.get_all("X-Robots-Tag", []), policy.robot
        ):  # an error page may say it too
            raise Failed("opted_out", "X-Robots-Tag")
        if is_redirect:
            return quote(location.strip().encode("latin-1", "replace"), safe=_SAFE + "#")
        return _body(response, policy.max_bytes)


def _body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    if (response.length or 0) > max_bytes:
        raise Failed("too_large", f"Content-Length {response.length}, at most {max_bytes}")
    pieces: list[bytes] = []
    size = 0
    while piece := response.read(PIECE):
        if not pieces and _is_text(response, piece):
            raise Failed("not_an_image", f"Content-Type {response.headers.get_content_type()[:80]}")
        pieces.append(piece)
        size += len(piece)
        if size > max_bytes:
            raise Failed("too_large", f"more than {max_bytes} bytes")
    if response.length:
        raise Failed("incomplete", f"{response.length} bytes are missing")
    if not size:
        raise Failed("empty", "0 bytes")
    return _decompressed(b"".join(pieces), response.headers.get("Content-Encoding", ""), max_bytes)


def _decompressed(content: bytes, encoding: str, max_bytes: int) -> bytes:
    """`content`, unpacked where a server compressed it though we asked it not to."""
    if encoding.strip().lower() not in ("gzip", "deflate"):
        return content
    try:
        content = zlib.decompressobj(47).decompress(content, max_bytes + 1)  # 47: gzip or zlib, by its header
    except zlib.error as error:
        raise Failed("bad_reply", f"Content-Encoding {encoding[:20]}: {error}") from error
    if len(content) > max_bytes:
        raise Failed("too_large", f"more than {max_bytes} bytes unpacked")
    return content


def _is_text(response: http.client.HTTPResponse, piece: bytes) -> bool:
    """Whether header and first bytes agree that it is no picture; either alone may be wrong."""
    kind = response.headers.get_content_type()
    is_packed = response.headers.get("Content-Encoding", "identity").lower() != "identity"
    return (
        kind.startswith(TEXTUAL) and not is_packed and not piece.startswith(_MAGIC) and piece[4:8] != b"ftyp"
    )


def is_opted_out(values: Iterable[str], robot: str) -> bool:
    """Whether X-Robots-Tag headers forbid this use for everybody or for `robot`."""
    for value in values:
        first, colon, rest = value.partition(":")
        name = first.strip().lower()
        is_addressed = bool(colon) and "," not in name and name not in VALUED
        if is_addressed and name != robot.lower():
            continue
        directives = (rest if is_addressed else value).split(",")
        if OPT_OUT & {directive.strip().lower() for directive in directives}:
            return True
    return False


def _parts(url: str) -> tuple[str, int, bool, str]:
    """(host, port, whether TLS, request target) of an http(s) URL."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise Failed("bad_url", str(error)) from error
    if parts.scheme not in ("http", "https") or not host:
        raise Failed("bad_url", f"{parts.scheme or 'no scheme'}:, only http and https with a host")
    is_secure = parts.scheme == "https"
    target = quote(parts.path or "/", safe=_SAFE) + (
        f"?{quote(parts.query, safe=_SAFE)}" if parts.query else ""
    )
    return host, port or (443 if is_secure else 80), is_secure, target


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _late(policy: Policy) -> Failed:
    return Failed("timeout", f"not complete after {policy.deadline:.0f} s")


def _explained(error: Exception, policy: Policy) -> Failed:
    if isinstance(error, TimeoutError):
        return Failed("timeout", f"silent for {policy.timeout:.0f} s")
    if isinstance(error, ssl.SSLError):
        return Failed("tls", str(error)[:120])
    if isinstance(error, http.client.IncompleteRead):
        return Failed("incomplete", "a chunk ends early")
    if isinstance(error, OSError):  # RemoteDisconnected among them
        return Failed("connection", str(error.strerror or error)[:120])
    return Failed("bad_reply", f"{type(error).__name__}: {error}"[:120])


def _retry_after(text: str | None) -> float | None:
    """Seconds that a Retry-After header asks for; None when it is absent or senseless."""
    if text is None:
        return None
    if text.strip().isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
