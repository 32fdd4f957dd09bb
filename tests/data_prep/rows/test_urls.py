"""Is an address spelt one way, and refused when it may lead inside?"""

from __future__ import annotations

import ipaddress

import duckdb
import pytest

from data_prep.rows.urls import IS_PLAIN_URL, RefusedUrl, clean_url
from tests.data_prep.addresses import NOT_PUBLIC, PUBLIC
from tests.data_prep.rows.malformed import LINES

MORE = [
    "http://a.example.com/",
    "https://a.example.com/a/b.jpg?x=1&y=%20#part",
    "http://a.example.com",
    "http://a-.example.com/",
    "http://-a.example.com/",
    "http://a_b.example.com/",
    "http://a.example.com:8080/x",
    "http://a.example.com:80/x",
    "http://a.example.com/%zz",
    "http://a.example.com/a|b",
    'http://a.example.com/"',
    "http://a.example.com/~u/(x)[y]{z}",
    "http://a.b.local/",
    "http://lvh.me/",
    "http://xlvh.me/",
    "http://a.home.arpa/x",
    "http://127.0.0.1/x",
    "http://1.2.3.4/x",
    "http://a.1/x",
    "http://a.b1/x",
    f"http://{'a' * 64}.com/x",
    f"http://{'a.' * 130}com/x",
    "http://A.example.com/x",
    "https://com/x",
    "https://localhost/x",
    "http://a.example.com/x y",
    "http://a.example.com/ä",
    "http://a.example.com/x\n",
    "http://a.example.com//x?a=b?c",
    "http://xn--bcher-kva.example/x",
    "http://8.8.8.8./x",
    "http://[2606:4700::1111]/x",
]


def _cleaned(url: str, allow_private: bool = False) -> str:
    try:
        return clean_url(url, allow_private=allow_private)
    except RefusedUrl as refused:
        return refused.reason


def test_what_sql_takes_as_plain_is_what_python_leaves_as_it_is():
    urls = MORE + [line.partition(b"\t")[0].decode("utf-8", "replace") for line, _ in LINES]
    connection = duckdb.connect()
    plain = [
        url
        for url in urls
        if connection.execute(
            f"SELECT {IS_PLAIN_URL.format(url='u')} FROM (SELECT ? AS u)", [url]
        ).fetchone()[0]
    ]
    connection.close()
    assert [(url, _cleaned(url)) for url in plain] == [(url, url) for url in plain]
    assert {"http://a.example.com/", "http://a.example.com/a%20b%2fc.jpg", "http://xlvh.me/"} <= set(plain)


@pytest.mark.parametrize("url", MORE)
def test_a_clean_address_is_clean_already(url):
    once = _cleaned(url)
    if "://" in once:
        assert _cleaned(once) == once


def test_private_addresses_pass_in_one_spelling_when_they_are_allowed():
    urls = ["http://127.1:8000/x", "http://localhost./x", "http://[::ffff:7f00:1]/x"]
    assert [_cleaned(url, True) for url in urls] == [
        "http://127.0.0.1:8000/x",
        "http://localhost/x",
        "http://[::ffff:7f00:1]/x",
    ]
    assert _cleaned("file:///etc/hostname", True) == "url_scheme"


@pytest.mark.parametrize("address", [*PUBLIC, *NOT_PUBLIC])
def test_only_public_addresses_are_taken_from_a_list(address):
    host = f"[{ipaddress.IPv6Address(address)}]" if ":" in address else address
    url = f"http://{host}/x"
    assert _cleaned(url) == (url if address in PUBLIC else "url_private")
    assert _cleaned(url, True) == url
