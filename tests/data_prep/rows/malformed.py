"""What becomes of a malformed line of metadata? A table: the bytes of a line, and its verdict.

A verdict is a reason of the rejects, or (address, caption) of a row that stays.
"""

from __future__ import annotations

GOOD = "http://a.example.com/1.jpg"

LINES: list[tuple[bytes, str | tuple[str, str]]] = [
    # cells
    (b"", "empty_line"),
    (b"\t", "no_url"),
    (b"   \tspaces for an address", "no_url"),
    (b"http://a.example.com/no-caption.jpg", "columns"),
    (b"http://a.example.com/more.jpg\tone\ttwo", "columns"),
    (b"http://a.example.com/tab-at-end.jpg\tone\t", "columns"),
    (b"http://a.example.com/" + b"x" * 2**20 + b"\tlonger than a line may be", "line_too_long"),
    (b"http://a.example.com/" + b"x" * 9000 + b"\tlong address", "url_too_long"),
    # quotes mean nothing
    (
        b'http://a.example.com/q1.jpg\t"begins with a quote',
        ("http://a.example.com/q1.jpg", '"begins with a quote'),
    ),
    (b'http://a.example.com/q2.jpg\tone " inside', ("http://a.example.com/q2.jpg", 'one " inside')),
    (b'"http://a.example.com/q3.jpg"\tquoted address', "url_scheme"),
    (b"http://a.example.com/q4.jpg\tback\\slash", ("http://a.example.com/q4.jpg", "back\\slash")),
    # encodings
    (b"http://a.example.com/e1.jpg\tcaf\xe9 \x80 5", ("http://a.example.com/e1.jpg", "café € 5")),
    ("http://a.example.com/e2.jpg\tcafe\u0301".encode(), ("http://a.example.com/e2.jpg", "café")),
    (b"http://a.example.com/e3.jpg\tbroken \xc3", ("http://a.example.com/e3.jpg", "broken Ã")),
    (
        b"http://a.example.com/e4.jpg\t\x81\x8d undefined",
        ("http://a.example.com/e4.jpg", "\ufffd\ufffd undefined"),
    ),
    ("http://a.example.com/é5.jpg\tcafé".encode("latin-1"), ("http://a.example.com/%C3%A95.jpg", "café")),
    # control characters and spaces
    (b"http://a.example.com/c1.jpg\tnul\x00inside", ("http://a.example.com/c1.jpg", "nulinside")),
    (b"http://a.example.com/c2.jpg\t\x1b[31mred\x07", ("http://a.example.com/c2.jpg", "[31mred")),
    (b"http://a.example.com/c3.jpg\tends in return\r", ("http://a.example.com/c3.jpg", "ends in return")),
    (b"http://a.example.com/c4.jpg\tone\rtwo  \x0b three ", ("http://a.example.com/c4.jpg", "one two three")),
    (
        "http://a.example.com/c5.jpg\tno\u00a0break\u200bed\ufeff".encode(),
        ("http://a.example.com/c5.jpg", "no breaked"),
    ),
    (
        "http://a.example.com/c6.jpg\tline\u2028separator".encode(),
        ("http://a.example.com/c6.jpg", "line separator"),
    ),
    (b"http://a.example.com/c7\x00.jpg\tnul in the address", "url_malformed"),
    (b"http://a.example.com/c8\x0d.jpg\treturn in the address", "url_malformed"),
    (b"http://a.example.com/c9.jpg\t", "no_caption"),
    (b"http://a.example.com/c10.jpg\t \x00\x01 ", "no_caption"),
    # addresses
    (b" http://a.example.com/a1 b.jpg \tspaces", ("http://a.example.com/a1%20b.jpg", "spaces")),
    (
        "https://bücher.example.com/ü.jpg\tidn".encode(),
        ("https://xn--bcher-kva.example.com/%C3%BC.jpg", "idn"),
    ),
    (b"HTTP://A.EXAMPLE.COM:80/A2.jpg#part\tone spelling", ("http://a.example.com/A2.jpg", "one spelling")),
    (b"https://a.example.com./a3.jpg\ttrailing dot", ("https://a.example.com/a3.jpg", "trailing dot")),
    (b"http://a.example.com/100%.jpg\tpercent", ("http://a.example.com/100%25.jpg", "percent")),
    (b"http://a.example.com/a%20b%2fc.jpg\tencoded", ("http://a.example.com/a%20b%2fc.jpg", "encoded")),
    (b"http://134744072/a4.jpg\tpublic in one number", ("http://8.8.8.8/a4.jpg", "public in one number")),
    (b"a.example.com/a5.jpg\tno scheme", "url_scheme"),
    (b"//a.example.com/a6.jpg\tno scheme", "url_scheme"),
    (b"ftp://a.example.com/a7.jpg\tftp", "url_scheme"),
    (b"file:///etc/hostname\tfile", "url_scheme"),
    (b"data:image/png;base64,AAAA\tdata", "url_scheme"),
    (b"javascript:alert(1)\tscript", "url_scheme"),
    (b"http:///a8.jpg\tno host", "url_malformed"),
    (b"http://a..example.com/\ttwo dots", "url_malformed"),
    (b"http://a.example.com:99999/\tport", "url_malformed"),
    (b"http://a.example.com:port/\tport", "url_malformed"),
    (b"http://[::1/\tbracket", "url_malformed"),
    (b"http://a.example.com\\@10.0.0.1/\tbackslash", "url_malformed"),
    (b"http://%31%32%37.0.0.1/\tencoded host", "url_malformed"),
    (b"http://user:secret@a.example.com/\tuser", "url_userinfo"),
    (b"http://a.example.com@10.0.0.1/\tuser", "url_userinfo"),
    # addresses that are not public
    (b"http://127.0.0.1/\tloopback", "url_private"),
    (b"http://127.1/\tshort", "url_private"),
    (b"http://2130706433/\tdecimal", "url_private"),
    (b"http://0x7f.0.0.0x1/\thex", "url_private"),
    (b"http://017700000001/\toctal", "url_private"),
    ("http://①②⑦.0.0.1/\tcircled digits".encode(), "url_private"),
    ("http://127。0。0。1/\tideographic dots".encode(), "url_private"),
    (b"http://localhost./\ttrailing dot", "url_private"),
    (b"http://10.1.2.3:8080/\tprivate", "url_private"),
    (b"http://172.16.0.1/\tprivate", "url_private"),
    (b"http://192.168.1.1/\tprivate", "url_private"),
    (b"http://169.254.169.254/latest/meta-data/\tlink-local", "url_private"),
    (b"http://100.64.0.1/\tcarrier", "url_private"),
    (b"http://0.0.0.0/\tunspecified", "url_private"),
    (b"http://224.0.0.1/\tmulticast", "url_private"),
    (b"http://[::1]/\tloopback", "url_private"),
    (b"http://[fe80::1]/\tlink-local", "url_private"),
    (b"http://[fd00::1]/\tprivate", "url_private"),
    (b"http://[::ffff:127.0.0.1]/\tmapped", "url_private"),
    (b"http://[::ffff:a00:1]/\tmapped", "url_private"),
    (b"http://[64:ff9b::7f00:1]/\ttranslated", "url_private"),
    (b"http://[2002:7f00:1::]/\t6to4", "url_private"),
    (b"http://[::127.0.0.1]/\tcompatible", "url_private"),
    (b"http://intranet/\tone label", "url_private"),
    (b"http://printer.local/\tlocal", "url_private"),
    (b"http://metadata.google.internal/\tinternal", "url_private"),
    (b"http://x.127.0.0.1.nip.io/\tpoints anywhere", "url_private"),
    # the same again
    (b"http://a.example.com/1.jpg\tfirst", (GOOD, "first")),
    (b"http://A.example.com:80/1.jpg#x\tsecond", "duplicate_url"),
]
