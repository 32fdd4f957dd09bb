"""Which machine may a download talk to? Only public addresses, checked where the connection is made.

A check of the URL alone is not enough: a name may resolve to 127.0.0.1 or 169.254.169.254, or do so only the second
time. Here the name is resolved, every address is judged, and the socket goes to the very address that was judged.
Standard library only: img2dataset's workers import it.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence

from data_prep.addresses import Address, Network, may_reach

REMEMBERED = 20_000  # names
REMEMBER_SECONDS = 60.0
ADDRESSES_TRIED = 3  # of one name


class Failed(Exception):
    """A URL that gave no image; `reason` is one word for the count, `wait` what Retry-After asked for (seconds)."""

    def __init__(self, reason: str, detail: str, wait: float | None = None) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.wait = wait

    def __reduce__(self) -> tuple[type[Failed], tuple[str, str, float | None]]:
        """A process may send it to others."""
        return type(self), (self.reason, self.detail, self.wait)


class Names:
    """Addresses of host names, remembered for a minute: rows share hosts, and resolvers fall first."""

    def __init__(self) -> None:
        self._found: OrderedDict[tuple[str, int], tuple[float, list | Failed]] = OrderedDict()
        self._lock = threading.Lock()

    def resolve(self, host: str, port: int) -> list[tuple[int, tuple]]:
        """(family, socket address) of every address of the host; raises Failed (`dns`, `bad_url`)."""
        with self._lock:
            known = self._found.get((host, port))
        if known is None or known[0] < time.monotonic():
            known = (time.monotonic() + REMEMBER_SECONDS, self._asked(host, port))
            self._remember((host, port), known)
        if isinstance(known[1], Failed):
            raise Failed(known[1].reason, known[1].detail)
        return known[1]

    def _remember(self, name: tuple[str, int], known: tuple[float, list | Failed]) -> None:
        if isinstance(known[1], Failed) and known[1].reason == "dns_busy":
            return  # the next try may have more luck
        with self._lock:
            self._found[name] = known
            while len(self._found) > REMEMBERED:
                self._found.popitem(last=False)

    @staticmethod
    def _asked(host: str, port: int) -> list[tuple[int, tuple]] | Failed:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            again = error.errno == socket.EAI_AGAIN
            return Failed("dns_busy" if again else "dns", f"{host}: {error.strerror}")
        except (UnicodeError, OSError, OverflowError) as error:
            return Failed("bad_url", f"host {host[:80]!r}: {error}")
        return [(family, address) for family, _, _, _, address in found]


def connect(
    host: str, port: int, names: Names, networks: Sequence[Network], timeout: float, until: float
) -> socket.socket:
    """A connected TCP socket to the first address of `host` that answers within `timeout` seconds and by `until`.

    Raises Failed with the reasons `private_address`, `dns`, `dns_busy`, `bad_url`, `timeout`, `connection`.
    """
    found = names.resolve(host, port)
    allowed = [(family, address) for family, address in found if may_reach(_parsed(address[0]), networks)]
    if not allowed:
        raise Failed(
            "private_address", f"{host} is {', '.join(sorted({address[0] for _, address in found}))}"
        )
    failure = Failed("connection", "no address")
    for family, address in allowed[:ADDRESSES_TRIED]:
        opened = socket.socket(family, socket.SOCK_STREAM)
        try:
            opened.settimeout(max(0.001, min(timeout, until - time.monotonic())))
            opened.connect(address)
            return opened
        except TimeoutError:
            failure = Failed("timeout", f"no connection to {address[0]} in {timeout:.0f} s")
        except OSError as error:
            failure = Failed("connection", f"{address[0]}: {error.strerror or error}")
        opened.close()
    raise failure


def _parsed(text: str) -> Address:
    return ipaddress.ip_address(text.partition("%")[0])  # %: the interface of a link-local one
