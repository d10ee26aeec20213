"""A minimal reverse proxy: forwards each GET to another host with all its header fields. `forward
PORT HOST:PORT`

It returns the response's status, header fields and body. /asked answers with the number of requests
so far.
"""

import http.client
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

OF_THE_CONNECTION = frozenset(
    {"host", "connection", "keep-alive", "transfer-encoding", "content-length"}
)


class Handler(BaseHTTPRequestHandler):
    """Forwards."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self) -> None:  # the name that the base class calls
        if self.path == "/asked":
            self._answer(200, [], str(self.server.requests).encode())
            return
        self.server.requests += 1
        next_hop = http.client.HTTPConnection(sys.argv[2], timeout=20)
        try:
            next_hop.request("GET", self.path, headers=dict(_passed(list(self.headers.items()))))
            answer = next_hop.getresponse()
            self._answer(answer.status, _passed(answer.getheaders()), answer.read())
        finally:
            next_hop.close()

    def _answer(self, status: int, fields: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in fields:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing: the responses are the result."""


def _passed(fields: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in fields if name.lower() not in OF_THE_CONNECTION]


class Server(ThreadingHTTPServer):
    """Takes IPv4 and IPv6."""

    address_family = socket.AF_INET6
    daemon_threads = True
    requests = 0


if __name__ == "__main__":
    Server(("::", int(sys.argv[1])), Handler).serve_forever()
