"""HAProxy. It verifies the chain of the server's certificate but no name: it supports host names
only.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from perf.pair import HOST, Pair, free_port, pair_of
from perf.peers.order import Kind, Order, Peer


def missing(_: Kind) -> str | None:
    return None if shutil.which("haproxy") else "not installed (Debian: haproxy)"


@contextmanager
def start(order: Order) -> Iterator[Pair]:
    ports = {"inbound": free_port(), "outbound": free_port()}
    protocol = {"http1": "", "http2": "proto h2", "tcp": ""}[order.kind]
    alpn = {"http1": "alpn http/1.1", "http2": "alpn h2", "tcp": ""}[order.kind]
    tls = {}
    for side in ports:
        material, both = order.material(side), order.folder / f"haproxy-{side}.pem"
        both.write_bytes(
            (material / "certificate.pem").read_bytes() + (material / "key.pem").read_bytes()
        )
        tls[side] = (
            f"ssl crt {both} ca-file {material / 'roots.pem'} verify required ssl-min-ver TLSv1.3"
            f" {alpn}"
        )
    reuse = "" if order.resume else "no-ssl-reuse"
    lines = {
        "outbound": (
            f"{HOST}:{ports['outbound']} {protocol}",
            f"{HOST}:{ports['inbound']} {tls['outbound']} {protocol} {reuse}",
        ),
        "inbound": (
            f"{HOST}:{ports['inbound']} {tls['inbound']}",
            f"{HOST}:{order.server} {protocol}",
        ),
    }
    commands = {}
    for side, (bind, server) in lines.items():
        file = order.folder / f"haproxy-{side}.cfg"
        mode = "tcp" if order.kind == "tcp" else "http\n  http-reuse always"
        file.write_text(
            f"global\n  nbthread 1\n  maxconn 8192\ndefaults\n  mode {mode}\n  timeout connect 5s\n"
            f"  timeout client 60s\n  timeout server 60s\nfrontend hop\n  bind {bind}\n "
            f" default_backend next\nbackend next\n  server next {server}\n"
        )
        commands[side] = ["haproxy", "-db", "-f", str(file)]
    with pair_of("haproxy", commands, ports, order.folder) as found:
        yield found


PEER = Peer("haproxy", frozenset({"http1", "http2", "tcp"}), missing, start)
