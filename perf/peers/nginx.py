"""nginx. It has no HTTP/2 to servers and cannot match a URI name, so it does not verify the
server's certificate.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perf.pair import HOST, Pair, free_port, nginx_paths, pair_of
from perf.peers.order import Kind, Order, Peer

_STREAM = Path("/usr/lib/nginx/modules/ngx_stream_module.so")


def missing(kind: Kind) -> str | None:
    if shutil.which("nginx") is None:
        return "not installed (Debian: nginx-light)"
    return (
        "without its stream module (Debian: libnginx-mod-stream)"
        if kind == "tcp" and not _STREAM.exists()
        else None
    )


@contextmanager
def start(order: Order) -> Iterator[Pair]:
    ports = {"inbound": free_port(), "outbound": free_port()}
    next_ports = {"outbound": ports["inbound"], "inbound": order.server}
    commands = {}
    for side, port in ports.items():
        material, file = order.material(side), order.folder / f"nginx-{side}.conf"
        pem = (
            f"{material / 'certificate.pem'}",
            f"{material / 'key.pem'}",
            f"{material / 'roots.pem'}",
        )
        accept = (
            f"listen {HOST}:{port} ssl; ssl_certificate {pem[0]}; ssl_certificate_key {pem[1]};"
            f" ssl_client_certificate {pem[2]};ssl_verify_client on; ssl_protocols TLSv1.3;"
            if side == "inbound"
            else f"listen {HOST}:{port};"
        )
        dial = (
            f"proxy_ssl_certificate {pem[0]}; proxy_ssl_certificate_key {pem[1]};"
            " proxy_ssl_protocols TLSv1.3;proxy_ssl_session_reuse"
            f" {'on' if order.resume else 'off'};"
            if side == "outbound"
            else ""
        )
        body = _stream if order.kind == "tcp" else _http
        folder = order.folder / f"nginx-{side}"
        folder.mkdir()
        file.write_text(
            (f"load_module {_STREAM};" if order.kind == "tcp" else "")
            + f"daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/log crit;"
            " events { worker_connections 8192; }"
            + body(folder, accept, dial, (next_ports[side], side == "outbound"))
        )
        commands[side] = ["nginx", "-g", "master_process off;", "-c", str(file)]
    with pair_of("nginx", commands, ports, order.folder) as found:
        yield found


def _http(folder: Path, accept: str, dial: str, to: tuple[int, bool]) -> str:
    port, tls = to
    return (
        f"http {{ access_log off; keepalive_requests 100000000; {nginx_paths(folder)}"
        f"upstream next {{ server {HOST}:{port}; keepalive 512; }}"
        f"server {{ {accept} location / {{ proxy_pass http{'s' if tls else ''}://next;"
        " proxy_http_version 1.1;"
        f'proxy_set_header Connection ""; proxy_max_temp_file_size 0; {dial} }} }} }}'
    )


def _stream(_: Path, accept: str, dial: str, to: tuple[int, bool]) -> str:
    port, tls = to
    return (
        f"stream {{ server {{ {accept} proxy_pass {HOST}:{port}; {'proxy_ssl on;' if tls else ''}"
        f" {dial} }} }}"
    )


PEER = Peer("nginx", frozenset({"http1", "tcp"}), missing, start)
