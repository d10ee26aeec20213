"""nghttpx. It cannot match a URI name, so it does not verify the server's certificate; it relays
HTTP only."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from perf.pair import HOST, Pair, free_port, pair_of
from perf.peers.order import Kind, Order, Peer


def missing(_: Kind) -> str | None:
    return None if shutil.which("nghttpx") else "not installed (Debian: nghttp2-proxy)"


@contextmanager
def start(order: Order) -> Iterator[Pair]:
    ports = {"inbound": free_port(), "outbound": free_port()}
    protocol = "h2" if order.kind == "http2" else "http/1.1"
    common = [
        "nghttpx",
        "--conf=/dev/null",
        "--workers=1",
        "--single-process",
        "--accesslog-file=/dev/null",
    ]
    common.append("--backend-connections-per-host=512")
    serving, calling = order.material("inbound"), order.material("outbound")
    commands = {
        "inbound": [
            *common, f"--frontend={HOST},{ports['inbound']}",
            f"--backend={HOST},{order.server};;proto={protocol}", "--tls-min-proto-version=TLSv1.3",
            "--verify-client", f"--verify-client-cacert={serving / 'roots.pem'}",
            str(serving / "key.pem"), str(serving / "certificate.pem"),
        ],
        "outbound": [
            *common, f"--frontend={HOST},{ports['outbound']};no-tls",
            f"--backend={HOST},{ports['inbound']};;proto={protocol};tls", "--insecure",
            f"--client-private-key-file={calling / 'key.pem'}",
            f"--client-cert-file={calling / 'certificate.pem'}",
        ],
    }  # fmt: skip
    with pair_of("nghttpx", commands, ports, order.folder) as found:
        yield found


PEER = Peer("nghttpx", frozenset({"http1", "http2"}), missing, start)
