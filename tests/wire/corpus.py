"""Heads as real programs write them (versions and hosts changed), and ways to damage them."""

from __future__ import annotations

import random


def head(*lines: str) -> bytes:
    return "".join(line + "\r\n" for line in (*lines, "")).encode("latin-1")


REQUESTS = (
    head("GET / HTTP/1.1", "Host: web.shop:8080", "User-Agent: curl/8.14.1", "Accept: */*"),
    head("POST /api/v1/items?x=1&y=%20 HTTP/1.1", "Host: 10.96.0.12", "User-Agent: curl/8.14.1", "Accept: */*", "Content-Length: 13",
         "Content-Type: application/x-www-form-urlencoded"),
    head("GET /a/b.html HTTP/1.1", "Host: example.org",
    "User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
         "Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "Accept-Language: de,en-US;q=0.7,en;q=0.3",
         "Accept-Encoding: gzip, deflate, br, zstd", "Connection: keep-alive", "Cookie: a=b; session=\"x y\"; c=",
         "Upgrade-Insecure-Requests: 1",
         "Sec-Fetch-Dest: document", "Priority: u=0, i"),
    head("GET /app HTTP/1.1", "Host: localhost:3000", "Connection: keep-alive",
         'sec-ch-ua: "Chromium";v="140", "Not=A?Brand";v="24", "Google Chrome";v="140"', "sec-ch-ua-mobile: ?0", "Accept: */*",
         "Referer: http://localhost:3000/?q=a#b", "Accept-Encoding: gzip, deflate, br, zstd", "If-None-Match: W/\"5f-19\""),
    head("GET /items/7 HTTP/1.1", "Host: web.shop", "User-Agent: python-requests/2.32.5", "Accept-Encoding: gzip, deflate", "Accept: */*",
         "Connection: keep-alive"),
    head("PUT /items/7 HTTP/1.1", "Host: web.shop", "Accept: */*", "Accept-Encoding: gzip, deflate", "Connection: keep-alive",
         "User-Agent: python-httpx/0.28.1", "Content-Length: 17", "Content-Type: application/json"),
    head("GET /1k HTTP/1.1", "Host: 127.0.0.1:4140"),
    head("GET /1k HTTP/1.1", "Host: 127.0.0.1:4140", "user-agent: h2load nghttp2/1.64.0", "accept: */*"),
    head("POST /v1/orders HTTP/1.1", "Host: orders.shop.svc.cluster.local", "User-Agent: Go-http-client/1.1", "Content-Length: 2",
         "Content-Type: application/json", "Traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "Accept-Encoding: gzip"),
    head("DELETE /v1/orders/9 HTTP/1.1", "Host: [fd00::1]:8080", "User-Agent: okhttp/4.12.0", "X-Empty-No: 1"),
    head("POST /upload HTTP/1.1", "Host: a", "User-Agent: Go-http-client/1.1", "Transfer-Encoding: chunked", "Accept-Encoding: gzip"),
    head("POST /upload HTTP/1.1", "Host: a", "User-Agent: curl/8.14.1", "Content-Length: 1048577", "Expect: 100-continue"),
    head("GET /ws HTTP/1.1", "Host: a", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: dGhlIHNhbXBsZQ==",
         "Sec-WebSocket-Version: 13"),
    head("GET http://example.org:8080/x?y HTTP/1.1", "Host: example.org:8080", "Proxy-Connection: Keep-Alive"),
    head("CONNECT db.shop:5432 HTTP/1.1", "Host: db.shop:5432"),
    head("OPTIONS * HTTP/1.1", "Host: a"),
    head("GET / HTTP/1.0", "User-Agent: ApacheBench/2.3", "Accept: */*"),
    head("GET / HTTP/1.0", "Connection: Keep-Alive", "Host: a", "User-Agent: ApacheBench/2.3"),
    head("HEAD /health HTTP/1.1", "Host: a", "User-Agent: kube-probe/1.33", "Connection: close"),
    head("PROPFIND /dav HTTP/1.1", "Host: a", "Depth: 1", "Content-Length: 0"),
)  # fmt: skip

RESPONSES = (
    head("HTTP/1.1 200 OK", "Server: nginx/1.26.3", "Date: Mon, 01 Dec 2025 10:00:00 GMT", "Content-Type: text/html", "Content-Length: 615",
         "Last-Modified: Wed, 05 Feb 2025 11:06:32 GMT", "Connection: keep-alive", 'ETag: "67a34638-267"', "Accept-Ranges: bytes"),
    head("HTTP/1.1 304 Not Modified", "Date: Mon, 01 Dec 2025 10:00:00 GMT", "Server: Apache/2.4.62 (Debian)", 'ETag: "29cd-5d"'),
    head("HTTP/1.1 200 OK", "Date: Mon, 01 Dec 2025 10:00:00 GMT", "Server: Apache/2.4.62 (Debian)", "Content-Length: 10701",
         "Vary: Accept-Encoding", "Content-Type: text/html"),
    head("HTTP/1.1 200 OK", "Server: gunicorn", "Date: Mon, 01 Dec 2025 10:00:00 GMT", "Connection: close",
    "Content-Type: application/json",
         "Content-Length: 27"),
    head("HTTP/1.1 200 OK", "X-Powered-By: Express", "Content-Type: application/json; charset=utf-8", "Content-Length: 12",
         'ETag: W/"c-Lve95gjOVATpfV8EL5X4nxwjKHE"', "Date: Mon, 01 Dec 2025 10:00:00 GMT", "Connection: keep-alive",
         "Keep-Alive: timeout=5"),
    head("HTTP/1.1 404 Not Found", "date: Mon, 01 Dec 2025 10:00:00 GMT", "server: uvicorn", "content-length: 22",
         "content-type: application/json"),
    head("HTTP/1.1 200 OK", "Content-Type: text/plain; charset=utf-8", "Date: Mon, 01 Dec 2025 10:00:00 GMT", "Content-Length: 2"),
    head("HTTP/1.1 204 No Content", "Date: Mon, 01 Dec 2025 10:00:00 GMT", "Set-Cookie: a=b; Path=/", "Set-Cookie: c=d; HttpOnly"),
    head("HTTP/1.1 200 OK", "Server: nginx/1.26.3", "Transfer-Encoding: chunked", "Connection: keep-alive", "Content-Encoding: gzip"),
    head("HTTP/1.1 200 OK", "Content-Type: text/event-stream", "Cache-Control: no-cache"),
    head("HTTP/1.0 200 OK", "Server: SimpleHTTP/0.6 Python/3.11.2", "Content-type: text/html", "Content-Length: 8"),
    head("HTTP/1.1 100 Continue"),
    head("HTTP/1.1 103 Early Hints", "Link: </style.css>; rel=preload; as=style"),
    head("HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade",
    "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
    head("HTTP/1.1 500 ", "Content-Length: 0"),
    head("HTTP/1.1 200", "Content-Length: 0"),
    head("HTTP/1.1 302 Found", "Location: https://example.org/login?next=%2F", "Content-Length: 0", "Cache-Control: private"),
    head("HTTP/1.1 502 Bad Gateway", "Server: openresty", "Content-Length: 150", "Proxy-Status: isthmus; error=connection_refused"),
)  # fmt: skip

# Inserted into a head to damage it: framing given twice, or in an unusual way, and lines that other
# parsers are known to handle wrongly.
LINES = (
    b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"content-length: 5\r\n", b"Content-Length: 05\r\n", b"Content-Length: +5\r\n",
    b"Content-Length: -1\r\n", b"Content-Length: 0x10\r\n", b"Content-Length: 5, 5\r\n", b"Content-Length: 5,6\r\n", b"Content-Length:\r\n",
    b"Content-Length: 99999999999999999\r\n", b"Content-Length: 99999999999999999999999\r\n", b"Content-Length: 5 \r\n",
    b"Content-Length : 5\r\n",
    b"Content-Length: \t5\r\n", b"Content-Length: 1_0\r\n", b"Content-Length: 5;\r\n", b"Content\x00-Length: 5\r\n",
    b"Content-Length: 5\r\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: Chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n",
    b"Transfer-Encoding:\r\n",
    b"Transfer-Encoding: \x0bchunked\r\n", b"Transfer-Encoding : chunked\r\n", b" Transfer-Encoding: chunked\r\n",
    b"transfer-encoding: identity\r\n",
    b"Host: b\r\n", b"host: b\r\n", b"Host:\r\n", b"Host: a b\r\n", b"Host: a@b\r\n", b"Host: a/b\r\n", b"Host : a\r\n", b"Host: a, b\r\n",
    b"Connection: close\r\n", b"connection: keep-alive\r\n", b"Connection: Keep-Alive \r\n", b"Connection: Host\r\n",
    b"Expect: 100-continue\r\n",
    b"TE: trailers\r\n", b"Trailer: x\r\n", b"Upgrade: h2c\r\n", b"X: y\r\n", b"x:y\r\n", b"x:\r\n", b"x: \r\n", b"X:  y\r\n",
    b"X: y \r\n", b"X: a\tb\r\n",
    b": x\r\n", b"x\r\n", b"\r\n", b"\n", b"X: y\n", b"X: \xe9\r\n", b"X: a\x01b\r\n", b"X: a\x7fb\r\n", b"\tfolded\r\n", b"X-\xe9: y\r\n",
    b"(x): y\r\n", b"X: " + b"z" * 300 + b"\r\n", b"X-Long-" + b"n" * 300 + b": z\r\n",
)  # fmt: skip
ODD = (
    b"\r",
    b"\n",
    b"\r\n",
    b"\x00",
    b" ",
    b"\t",
    b"\x0b",
    b"\x0c",
    b"\x01",
    b"\x1c",
    b"\x7f",
    b"#",
    b"\x85",
    b"\xa0",
    b"\xff",
    b":",
    b",",
    b"0",
    b"+",
    b"-",
    b";",
    b'"',
    b"_",
)


def spoil(source: random.Random, head: bytes) -> bytes:
    """`head` with one to three things changed. Half of the changes are harmless, so that many of
    the results are still good."""
    for _ in range(source.choice((1, 1, 2, 3))):
        head = _CHANGES[source.randrange(len(_CHANGES))](source, head)
    return head


def _flip(source: random.Random, head: bytes) -> bytes:
    at = source.randrange(len(head))
    return head[:at] + bytes([head[at] ^ (1 << source.randrange(8))]) + head[at + 1 :]


def _odd(source: random.Random, head: bytes) -> bytes:
    at = source.randrange(len(head))
    return head[:at] + source.choice(ODD) + head[at + source.randrange(2) :]


def _line(source: random.Random, head: bytes) -> bytes:
    lines = head.splitlines(keepends=True)
    lines.insert(source.randrange(1, len(lines)) if len(lines) > 1 else 0, source.choice(LINES))
    return b"".join(lines)


def _lines(source: random.Random, head: bytes) -> bytes:
    """Swap, drop, or double lines."""
    lines = head.splitlines(keepends=True)
    a, b = source.randrange(len(lines)), source.randrange(len(lines))
    match source.randrange(3):
        case 0:
            lines[a], lines[b] = lines[b], lines[a]
        case 1:
            del lines[a]
        case _:
            lines.insert(b, lines[a])
    return b"".join(lines) or b"\r\n"


def _case(source: random.Random, head: bytes) -> bytes:
    lines = head.splitlines(keepends=True)
    at = source.randrange(len(lines))
    lines[at] = source.choice((bytes.lower, bytes.upper, bytes.swapcase, bytes.title))(lines[at])
    return b"".join(lines)


def _letter(source: random.Random, head: bytes) -> bytes:
    """One visible byte for another: mostly harmless."""
    at = source.randrange(len(head))
    return (
        head[:at] + bytes([source.randrange(0x21, 0x7F)]) + head[at + 1 :]
        if head[at] > 0x20
        else head
    )


def _version(source: random.Random, head: bytes) -> bytes:
    other = source.choice(
        (b"HTTP/1.0", b"HTTP/2.0", b"HTTP/1.2", b"HTTP/11", b"http/1.1", b"HTTP/1.1 ", b" HTTP/1.1")
    )
    return head.replace(b"HTTP/1.1", other, 1)


_CHANGES = (_flip, _odd, _line, _line, _lines, _lines, _case, _case, _letter, _letter, _version)
