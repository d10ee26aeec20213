"""An HTTP/1.1 server: the standard library's, as thousands of small services are written.  `web
HOST PORT [NAME]`

/                 a short text, with the NAME (shop)
/head             the request as it came: method, target, and all header fields, in their order
/stream/BYTES     that many bytes, chunked, never held whole
POST /sink        reads a body of any size, answers how many bytes and their SHA-256
"""

import hashlib
import json
import socket
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NAME = sys.argv[3] if len(sys.argv) > 3 else "shop"
BLOCK = bytes(range(256)) * 256  # 64 KiB that do not compress into something trivial


class Handler(BaseHTTPRequestHandler):
    """The resources."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 64 * 1024  # head and body in one segment

    def do_GET(self) -> None:  # the name that the base class calls
        if self.path.startswith("/stream/"):
            self._stream(int(self.path.rpartition("/")[2]))
            return
        if self.path.startswith("/head"):
            self._answer(
                {
                    "name": NAME,
                    "method": self.command,
                    "target": self.path,
                    "headers": self.headers.items(),
                }
            )
            return
        self._answer(
            {
                "message": f"hello from the {NAME}",
                "name": NAME,
                "secret": self.headers.get("X-Secret", ""),
            }
        )

    def do_POST(self) -> None:
        digest, total = hashlib.sha256(), 0
        for block in self._body():
            digest.update(block)
            total += len(block)
        self._answer({"bytes": total, "sha256": digest.hexdigest()})

    def _body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline(100).split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline(100)
            self.rfile.readline(100)
            return
        left = int(self.headers.get("Content-Length", "0"))
        while left and (block := self.rfile.read(min(left, len(BLOCK)))):
            left -= len(block)
            yield block

    def _stream(self, total: int) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while total > 0:
            block = BLOCK[:total]
            self.wfile.write(f"{len(block):x}\r\n".encode() + block + b"\r\n")
            total -= len(block)
        self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()

    def _answer(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class's name
        """Log nothing: thousands of requests are measured."""


class Server(ThreadingHTTPServer):
    """Many connections at once."""

    daemon_threads = True
    request_queue_size = 256


if __name__ == "__main__":
    host, port = sys.argv[1], int(sys.argv[2])
    if ":" in host:
        Server.address_family = socket.AF_INET6
    Server((host, port), Handler).serve_forever()
