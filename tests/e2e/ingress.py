"""Software from Debian's packages that forwards what it gets to a configured target: nginx, HAProxy
and socat, in the lab's pods."""

from __future__ import annotations

from collections.abc import Mapping

from lab.pod import Pod
from lab.process import Process
from lab.sandbox import rootless


async def nginx(pod: Pod, locations: Mapping[int, str], *, upstreams: str = "") -> Process:
    """An nginx that listens on some ports. Each port has the contents of its `location /` (a line
    of configuration). HTTP/2 ports have `http2` as the first word. `upstreams` is put before the
    servers. `requests` counts the requests."""
    home = pod.directory / "nginx"
    home.mkdir(exist_ok=True)
    home.chmod(0o777)
    servers = []
    for port, text in locations.items():
        http2, line = (
            (" http2", text.removeprefix("http2 ")) if text.startswith("http2 ") else ("", text)
        )
        servers.append(
            f"server {{ listen {port}{http2}; listen [::]:{port}{http2}; location / {{ {line} }} }}"
        )
    # As root, nginx gives its directories to an unprivileged user. A namespace with only one user id
    # does not have that user.
    user = "user root; " if rootless() else ""
    temporary = " ".join(
        f"{kind}_temp_path {home}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (home / "nginx.conf").write_text(
        f"{user}daemon off; master_process off; worker_processes 1; pid {home}/pid; error_log"
        f" stderr;\nevents {{ worker_connections 2048; }}\nhttp {{ {temporary} log_format ports"
        f" '$server_port'; access_log {home}/access ports; proxy_http_version 1.1;\n  {upstreams}"
        f" {' '.join(servers)} }}\n"
    )
    return await pod.start(
        "nginx",
        ["nginx", "-c", str(home / "nginx.conf"), "-p", str(home), "-e", "stderr"],
        port=next(iter(locations)),
    )


def requests(pod: Pod, port: int) -> int:
    """How many requests the pod's nginx has answered on `port`. It logs them when they are over."""
    return (pod.directory / "nginx" / "access").read_text().split().count(str(port))


def has_answered(pod: Pod, port: int, count: int) -> bool:
    """Whether the pod's nginx has answered so many requests on `port`."""
    return requests(pod, port) >= count


async def haproxy(pod: Pod, targets: Mapping[int, str]) -> Process:
    """An HAProxy whose ports forward HTTP to `host:port`. With the suffix ` proto h2`, both sides
    use HTTP/2."""
    home = pod.directory / "haproxy"
    home.mkdir(exist_ok=True)
    sections = [
        "global",
        " maxconn 2000",
        "defaults",
        " mode http",
        " timeout connect 5s",
        " timeout client 30s",
        " timeout server 30s",
    ]
    for port, target in targets.items():
        _, _, http2 = target.partition(" ")
        sections += [
            f"listen port{port}",
            f" bind :{port} {http2}",
            f" bind :::{port} {http2}",
            f" server next {target}",
        ]
    (home / "haproxy.cfg").write_text("\n".join([*sections, ""]))
    return await pod.start(
        "haproxy", ["haproxy", "-db", "-f", str(home / "haproxy.cfg")], port=next(iter(targets))
    )


async def relay(pod: Pod, port: int, host: str, target: int) -> Process:
    """A socat that relays each connection from `port` to (host, target)."""
    listen = f"TCP6-LISTEN:{port},ipv6only=0,fork,reuseaddr,backlog=256"
    return await pod.start(f"socat-{port}", ["socat", listen, f"TCP:{host}:{target}"], port=port)
