"""May this address be downloaded, and how is it spelt? Public http(s) only, one spelling for every address.

`clean_url` decides; `IS_PLAIN_URL` is a condition in SQL that holds only for addresses which `clean_url` takes as
they are, so that nearly all of a long list never reach Python. Names are not looked up here: a public name that
resolves to a private address is for the downloader to refuse.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from functools import lru_cache

from data_prep.addresses import may_reach

MAX_LENGTH = 8192  # characters
HOSTS = 65_536  # names remembered: a list has far fewer of them than rows
PORTS = {"http": 80, "https": 443}
PRIVATE_SUFFIXES = (
    "localhost",
    "local",
    "internal",
    "lan",
    "home",
    "intranet",
    "corp",
    "localdomain",
    "arpa",
)
POINTS_ANYWHERE = ("nip.io", "sslip.io", "xip.io", "localtest.me", "lvh.me", "vcap.me")  # x.127.0.0.1.nip.io
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")
_AFTER_SCHEME = re.compile(r"(?P<netloc>[^/?#]*)(?P<path>/[^?#]*)?(?P<query>\?[^#]+)?\??(?:#.*)?", re.DOTALL)
_NETLOC = re.compile(r"(?P<name>\[[0-9A-Fa-f:.%]+\]|[^\[\]:]+)(?::(?P<port>[0-9]*))?")
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"0x[0-9a-f]*|[0-9]+")
_TO_ENCODE = re.compile(r"%(?![0-9A-Fa-f]{2})|[^!#-;=?-\[\]_a-z~%]")
_IS_PRIVATE_SQL = "|".join([*PRIVATE_SUFFIXES, *(name.replace(".", r"\.") for name in POINTS_ANYWHERE)])

# Lower-case names of at most 54 characters that end in letters, and paths that need no encoding.
IS_PLAIN_URL = (
    r"regexp_full_match({url}, '(http|https)://([a-z0-9]|[a-z0-9][a-z0-9-]*[a-z0-9])"
    r"(\.([a-z0-9]|[a-z0-9][a-z0-9-]*[a-z0-9]))*\.[a-z]+/"
    r"([!$&-;=?-Z_a-z~]|%[0-9A-Fa-f][0-9A-Fa-f])*')"
    r" AND strpos(substr({url}, 9, 54), '/') > 0 AND length({url}) <= " + str(MAX_LENGTH)
    + r" AND NOT regexp_matches({url}, '^https?://([^/]*\.)?(" + _IS_PRIVATE_SQL + r")/')"
)  # fmt: skip


class RefusedUrl(Exception):
    """An address that is not downloaded; `reason` is one word for the count."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def clean_url(text: str | None, *, allow_private: bool = False) -> str:
    """The one spelling of an address: lower-case ASCII host, no default port or fragment, all else percent-encoded.

    Raises RefusedUrl: no_url, url_scheme, url_malformed, url_userinfo, url_private, url_too_long.
    """
    text = (text or "").strip(" \t\r\n\f\v\ufeff")
    if not text:
        raise RefusedUrl("no_url")
    if len(text) > MAX_LENGTH:
        raise RefusedUrl("url_too_long")
    if _CONTROL.search(text):
        raise RefusedUrl("url_malformed")
    scheme, _, rest = text.partition("://")
    scheme = scheme.lower()
    if scheme not in PORTS:
        raise RefusedUrl("url_scheme")
    found = _AFTER_SCHEME.fullmatch(rest)
    if "@" in found["netloc"]:
        raise RefusedUrl("url_userinfo")
    name, port = _name_and_port(found["netloc"])
    host = _ipv6(name, allow_private) if name.startswith("[") else _host(name, allow_private)
    where = host if port in (None, PORTS[scheme]) else f"{host}:{port}"
    return f"{scheme}://{where}{_encoded(found['path'] or '/')}{_encoded(found['query'] or '')}"


def _name_and_port(netloc: str) -> tuple[str, int | None]:
    found = _NETLOC.fullmatch(netloc)
    if found is None:
        raise RefusedUrl("url_malformed")
    port = int(found["port"]) if found["port"] else None
    if port is not None and not 0 < port < 65536:
        raise RefusedUrl("url_malformed")
    return found["name"], port


@lru_cache(HOSTS)
def _host(name: str, allow_private: bool) -> str:
    """A host spelt one way; private ones are refused unless allowed."""
    name = unicodedata.normalize("NFKC", name).lower()
    for dot in "。．｡":
        name = name.replace(dot, ".")
    name = name.removesuffix(".")
    labels = [_ascii_label(label) for label in name.split(".")]
    name = ".".join(labels)
    if len(name) > 253:
        raise RefusedUrl("url_malformed")
    if _NUMBER.fullmatch(labels[-1]):  # then all of it is an address, by the rule of the WHATWG
        address = _ipv4(labels)
        if not (allow_private or may_reach(address)):
            raise RefusedUrl("url_private")
        return str(address)
    is_private = (
        len(labels) == 1 or labels[-1] in PRIVATE_SUFFIXES or ".".join(labels[-2:]) in POINTS_ANYWHERE
    )
    if is_private and not allow_private:
        raise RefusedUrl("url_private")
    return name


def _ascii_label(label: str) -> str:
    try:
        label = label if label.isascii() else label.encode("idna").decode("ascii")
    except UnicodeError as error:
        raise RefusedUrl("url_malformed") from error
    if not _LABEL.fullmatch(label):
        raise RefusedUrl("url_malformed")
    return label


def _ipv4(labels: list[str]) -> ipaddress.IPv4Address:
    """127.1, 0x7f000001, 017700000001, 2130706433 and the like, as inet_aton reads them."""
    if len(labels) > 4 or not all(_NUMBER.fullmatch(label) for label in labels):
        raise RefusedUrl("url_malformed")
    try:
        numbers = [_number(label) for label in labels]
    except ValueError as error:
        raise RefusedUrl("url_malformed") from error
    *leading, last = numbers
    if any(number > 255 for number in leading) or last >= 256 ** (5 - len(numbers)):
        raise RefusedUrl("url_malformed")
    value = last + sum(number << (8 * (3 - place)) for place, number in enumerate(leading))
    return ipaddress.IPv4Address(value)


def _number(label: str) -> int:
    if label.startswith("0x"):
        return int(label[2:] or "0", 16)
    return int(label, 8) if len(label) > 1 and label.startswith("0") else int(label)


def _ipv6(name: str, allow_private: bool) -> str:
    try:
        address = ipaddress.IPv6Address(name[1:-1])
    except ValueError as error:
        raise RefusedUrl("url_malformed") from error
    if address.scope_id:
        raise RefusedUrl("url_malformed")
    if not (allow_private or may_reach(address)):
        raise RefusedUrl("url_private")
    return f"[{address.compressed}]"


def _encoded(text: str) -> str:
    """Everything that a request line may not hold, percent-encoded as UTF-8; what is encoded already stays."""
    return _TO_ENCODE.sub(
        lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode("utf-8", "replace")), text
    )
