"""Answers every GET with the request, as JSON: `pod` (the host's name), `path`, `headers`
(names in lower case), `peer` (the address)."""

import json
import signal
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = json.dumps(
            {
                "pod": socket.gethostname(),
                "path": self.path,
                "headers": headers,
                "peer": self.client_address[0],
            }
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6  # and IPv4 too
    daemon_threads = True
    request_queue_size = 128


signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
Server(("::", int(sys.argv[1]) if len(sys.argv) > 1 else 8080), Handler).serve_forever()
