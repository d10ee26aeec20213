"""How much memory does an open, idle connection take in each proxy? Opaque TCP over mutual TLS, so each has one of its own upstream.

Baseline: the proxies before the connections. It needs a server that holds connections open: this process.
"""

from __future__ import annotations

import resource
import socket
import sys
import time

from perf.pair import HOST, pair

CONNECTIONS = 1000


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else CONNECTIONS
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with pair() as running:
        before = {proxy.name: proxy.resident() for proxy in running.proxies}
        clients = []
        for _ in range(count):
            client = socket.create_connection((HOST, running.outbound.port))
            # An HTTP request that is answered and kept alive: client, TLS between the proxies and server stay connected.
            client.sendall(b"GET / HTTP/1.1\r\nHost: perf.test\r\n\r\n")
            clients.append(client)
        for client in clients:
            client.settimeout(30)
            assert client.recv(65536).startswith(b"HTTP/1.1 200"), "every connection is answered"
        time.sleep(1)
        print(f"{count} idle connections")
        for proxy in running.proxies:
            grown = proxy.resident() - before[proxy.name]
            was = before[proxy.name] / 2**20
            print(f"  {proxy.name:10} baseline {was:6.1f} MiB, grown by {grown / 2**20:6.1f} MiB: {grown / count / 1024:.1f} KiB each")
        for client in clients:
            client.close()


if __name__ == "__main__":
    main()
