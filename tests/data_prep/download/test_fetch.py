"""Is a fetch held to its deadline, its address and its manners, where the table of verdicts cannot show it?"""

from __future__ import annotations

import socket
import ssl
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

import data_prep.download.fetch as fetching
from data_prep.download import Download
from data_prep.download.connect import Failed, Names, connect
from data_prep.download.deadline import Deadlines
from data_prep.download.fetch import Policy, fetch, is_opted_out, may_pass
from data_prep.download.options import require_engine
from data_prep.download.raw import is_outage
from tests.data_prep.addresses import NOT_PUBLIC, PUBLIC
from tests.data_prep.download.lists import LOOPBACK
from tests.data_prep.download.misbehaving import GOOD, serving

QUICK = Policy(timeout=2.0, deadline=3.0, retries=1, networks=LOOPBACK)


@pytest.mark.parametrize("address", [*PUBLIC, *NOT_PUBLIC, "fe80::1%eth0"])
def test_only_public_addresses_are_connected_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    connected: list[str] = []

    class Socket(socket.socket):
        def __init__(self, *_: object) -> None:
            super().__init__()

        def connect(self, address: tuple) -> None:
            connected.append(address[0])

    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: [(family, socket.SOCK_STREAM, 6, "", (address, 80))]
    )
    monkeypatch.setattr(socket, "socket", Socket)
    try:
        connect("any.example", 80, Names(), (), 1.0, time.monotonic() + 1.0).close()
    except Failed as failed:
        assert failed.reason == "private_address"
    assert connected == ([address] if address in PUBLIC else [])


def _resolver(monkeypatch: pytest.MonkeyPatch, answers: dict[str, list[str]]) -> list[str]:
    """Names get these addresses; returns the list of names that were asked for."""
    asked: list[str] = []

    def getaddrinfo(host: str, port: int, **_: Any) -> list[tuple]:
        asked.append(host)
        if host not in answers:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers[host]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(fetching, "NAMES", Names())
    return asked


def test_a_name_that_resolves_to_a_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _resolver(monkeypatch, {"rebound.example": ["192.168.0.1", "127.0.0.2"]})
    with pytest.raises(Failed) as caught:
        fetch("http://rebound.example/picture.jpg", QUICK)
    assert caught.value.reason == "private_address"


def test_the_connection_goes_to_the_address_that_was_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        asked = _resolver(monkeypatch, {"mixed.example": ["127.0.0.2", "127.0.0.1"]})
        url = f"http://mixed.example:{server.server_port}/good"
        assert fetch(url, QUICK) == fetch(url, QUICK) == GOOD
    assert asked == ["mixed.example"]  # once: neither again for the connection, nor for the second row


def test_an_unknown_name_is_remembered_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _resolver(monkeypatch, {})
    for _ in range(3):
        with pytest.raises(Failed, match="dns"):
            fetch("http://gone.example/", QUICK)
    assert len(asked) == 1 and not may_pass("dns")


def test_a_resolver_that_is_too_busy_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def getaddrinfo(host: str, port: int, **_: Any) -> list[tuple]:
        asked.append(host)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(fetching, "NAMES", Names())
    monkeypatch.setattr(fetching, "BACKOFF", 0.0)
    with pytest.raises(Failed, match="dns_busy"):
        fetch("http://busy.example/", replace(QUICK, retries=2))
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("headers", "verdict"),
    [
        ([], False),
        (["all"], False),
        (["noai"], True),
        (["NoIndex, nofollow"], True),
        (["max-snippet:20, noimageai"], True),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST"], False),
        (["googlebot: noindex"], False),
        (["googlebot: nofollow", "m3i-data-prep: noimageindex"], True),
        (["M3I-Data-Prep:noai"], True),
        (["archive"], False),
    ],
)
def test_opt_outs_hold_for_everybody_and_for_us(headers: list[str], verdict: bool) -> None:
    assert is_opted_out(headers, Policy.robot) is verdict


def test_a_pause_that_a_server_asks_for_is_kept_or_the_row_given_up() -> None:
    assert fetching._retry_after("7") == 7.0
    assert 50 < fetching._retry_after(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert fetching._retry_after("soon") is None and fetching._retry_after(None) is None
    with serving() as server:
        with pytest.raises(Failed, match="http_503"):
            fetch(f"{server.url}/busy-for-long", QUICK)
        assert server.visits["/busy-for-long"] == 1


def test_what_cannot_pass_is_asked_for_once() -> None:
    with serving() as server:
        for path in ("missing", "noai", "html", "empty"):
            with pytest.raises(Failed):
                fetch(f"{server.url}/{path}", QUICK)
        assert set(server.visits.values()) == {1}


def test_a_fragment_and_odd_letters_of_an_address_do_no_harm() -> None:
    with serving() as server:
        for path in ("good/a b?size=ü|x#part", "to-accents", "good/%41%20b"):
            assert fetch(f"{server.url}/{path}", QUICK) == GOOD


def test_many_dripping_servers_end_together_on_time() -> None:
    policy = Policy(timeout=0.5, deadline=0.6, retries=0, networks=LOOPBACK)

    def reason(url: str) -> str:
        with pytest.raises(Failed) as caught:
            fetch(url, policy)
        return caught.value.reason

    with serving() as server, ThreadPoolExecutor(40) as pool:
        began = time.monotonic()
        reasons = set(pool.map(reason, [f"{server.url}/drip", f"{server.url}/drip-header"] * 20))
        assert reasons == {"timeout"}
        assert time.monotonic() - began < 10


def test_a_deadline_cuts_a_blocked_read_and_spares_an_ended_one() -> None:
    deadlines = Deadlines()
    ours, theirs = socket.socketpair()
    with ours, theirs, deadlines.cut(ours, time.monotonic() + 0.05):
        assert ours.recv(1) == b""  # would wait for ever
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with deadlines.cut(ours, time.monotonic() + 0.05):
            pass
        later = socket.socketpair()
        with later[0], later[1], deadlines.cut(later[0], time.monotonic() + 0.1):
            assert later[0].recv(1) == b""  # now the first moment is over too
        theirs.send(b"x")
        assert ours.recv(1) == b"x"


def test_an_address_that_answers_nothing_ends_by_its_timeout() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(3)]  # they fill the queue: the next one is not answered
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        with pytest.raises(Failed, match="timeout"):
            connect(
                "127.0.0.1", full.getsockname()[1], Names(), QUICK.parsed, 0.2, time.monotonic() + 5
            ).close()
        for one in waiting:
            one.close()


def _certified(folder: Path) -> Path:
    """A certificate of 127.0.0.1 that vouches for itself, with its key, in one file."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "loopback")])
    day, now = timedelta(days=1), datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(
            name, name, key.public_key(), x509.random_serial_number(), now - day, now + day
        )
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, raw = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path = folder / "certificate.pem"
    path.write_bytes(
        key.private_bytes(pem, raw, serialization.NoEncryption()) + certificate.public_bytes(pem)
    )
    return path


def test_tls_holds_the_name_and_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = _certified(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    policy = replace(QUICK, timeout=1.0, deadline=1.2, retries=0)
    with serving() as server:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        url = f"https://127.0.0.1:{server.server_port}"
        with pytest.raises(Failed, match=r"tls: .*self-signed"):
            fetch(f"{url}/good", policy)
        monkeypatch.setattr(fetching, "_tls", lambda: ssl.create_default_context(cafile=str(certificate)))
        assert fetch(f"{url}/good", policy) == GOOD
        with pytest.raises(Failed, match=r"tls: .*localhost"):
            fetch(f"{url}/good".replace("127.0.0.1", "localhost"), policy)
        with pytest.raises(Failed, match="timeout"):
            fetch(f"{url}/drip", policy)


def test_a_handshake_that_never_answers_ends_by_its_timeout() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(Failed, match="timeout"):
            fetch(f"https://127.0.0.1:{silent.getsockname()[1]}/", replace(QUICK, timeout=0.2, retries=0))


def test_an_outage_is_many_failures_that_pass_and_not_many_dead_links() -> None:
    assert is_outage(Counter(dns_busy=95, good=5), 0.9)
    assert is_outage(Counter(dns=60, timeout=40), 0.9)
    assert not is_outage(Counter(http_404=99, timeout=1), 0.9)
    assert not is_outage(Counter(timeout=10), 0.9)  # too few to tell


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads=0 must be at least 1"),
        ({"retries": -1}, "retries=-1 must not be negative"),
        ({"deadline": 5.0}, "must rise in this order"),
        ({"stall": 60.0}, "must rise in this order"),
        ({"outage": 0.0}, "outage=0.0"),
        ({"processes": 2}, "with ahead only"),
        ({"distributor": "ray"}, "with ahead only"),
        ({"allow_private": ("10.0.0.1/8",)}, "allow_private"),
        ({"allow_private": ("localhost",)}, "allow_private"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Download(**options)


def test_a_missing_engine_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.download.options.version", lambda name: "1.45.0")
    with pytest.raises(ModuleNotFoundError, match=r"pip install img2dataset==1\.47\.0"):
        require_engine(Download())
    monkeypatch.undo()
    monkeypatch.setattr("data_prep.download.options.find_spec", lambda name: None if name == "ray" else name)
    with pytest.raises(ModuleNotFoundError, match="pip install ray"):
        require_engine(Download(ahead=True, distributor="ray"))
