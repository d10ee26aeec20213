"""Several workers as one proxy, with real processes on loopback.

Rules: the ports, the admin view and the exit code are those of one proxy. A worker that dies loses
its own connections and nothing else. Its counters stay. The kernel distributes connections by a
hash of their ports, so tests open connections until both workers have some."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy.identity.issue import issue, make_root
from proxy.identity.spiffe import SpiffeId
from tests.kit.ports import free_port
from tests.workers.exposition import samples
from tests.workers.processes import children

HOST = "127.0.0.1"
PATIENCE = 60.0
REQUESTS = 'isthmus_requests_total{direction="outbound",method="GET"}'


def eventually(look: Callable[[], Any], what: str) -> Any:
    """The result of `look`, as soon as it is true."""
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        if found := look():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {PATIENCE:g} s: {what}")


class Application(BaseHTTPRequestHandler):
    """Responds at once; to a request for /slow when `go` is set; to one for /loop by sending the
    same request to the proxy again."""

    protocol_version = "HTTP/1.1"
    go: threading.Event
    asked: threading.Semaphore
    proxy: int
    rounds: list[str]

    def do_GET(self) -> None:
        status, body = 200, b"hello"
        if self.path == "/slow":
            self.asked.release()
            self.go.wait(PATIENCE)
        if self.path == "/loop":
            self.rounds.append(self.path)
            again = http.client.HTTPConnection(HOST, self.proxy, timeout=PATIENCE)
            again.request("GET", self.path, headers=dict(self.headers.items()))
            answer = again.getresponse()
            status, body = answer.status, answer.read()
            again.close()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def application(proxy: int) -> Iterator[tuple[int, Any]]:
    class Mine(Application):
        go, asked, rounds = threading.Event(), threading.Semaphore(0), []

    Mine.proxy = proxy
    with ThreadingHTTPServer((HOST, 0), Mine) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1], Mine
        finally:
            Mine.go.set()
            server.shutdown()
            thread.join()


class Proxy:
    """A proxy with two workers in front of an application. `rules`: more of the sections that are
    there in any case."""

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        back: int,
        port: int,
        side: str = "outbound",
        *,
        rules: dict[str, Any] | None = None,
    ) -> None:
        self.port, self.admin_port = port, free_port()
        self.config, self.log = folder / "isthmus.yaml", folder / "log"
        other = "inbound" if side == "outbound" else "outbound"
        document: dict[str, Any] = {
            "workers": 2,
            side: {"listen": [f"{HOST}:{port}"], "fixed_destination": f"{HOST}:{back}"},
            other: {"listen": []},
            "admin": {
                "listen": [f"{HOST}:{self.admin_port}"],
                "stall_timeout": "4s",
                "metrics_max_age": 0,
            },
            "log": {"format": "json"},
            "shutdown": {"grace": "60s"},
            **settings,
        }
        for section, more in (rules or {}).items():
            document[section] = {**document[section], **more}
        self.config.write_text(yaml.safe_dump(document))
        self.process = self.start("ab")

    def start(self, mode: str = "ab") -> subprocess.Popen[bytes]:
        with self.log.open(mode) as sink:
            command = [sys.executable, "-m", "proxy.cli", "run", "--config", str(self.config)]
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)

    def logged(self) -> str:
        return self.log.read_text("utf-8")

    def admin(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(HOST, self.admin_port, timeout=PATIENCE)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except OSError:
            return 0, b""
        finally:
            connection.close()

    def ready(self) -> bool:
        assert self.process.poll() is None, self.logged()
        return self.admin("/ready")[0] == 200

    def metrics(self) -> dict[str, float]:
        return samples(self.admin("/metrics")[1])

    def workers(self) -> list[int]:
        return children(self.process.pid)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(PATIENCE)


@pytest.fixture
def stage(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Proxy, Any]]:
    port = free_port()
    with application(port) as (back, app):
        proxy = Proxy(tmp_path, getattr(request, "param", {}), back, port)
        try:
            eventually(proxy.ready, "ready")
            yield proxy, app
        finally:
            app.go.set()
            proxy.end()


def get(port: int, path: str = "/") -> int:
    connection = http.client.HTTPConnection(HOST, port, timeout=PATIENCE)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


class Kept:
    """A connection that is kept open, and the worker that has it."""

    def __init__(self, proxy: Proxy) -> None:
        self.connection = http.client.HTTPConnection(HOST, proxy.port, timeout=PATIENCE)
        self.connection.connect()
        self.ask()
        self.worker = owner(proxy, self.connection.sock.getsockname()[1])

    def ask(self) -> None:
        self.connection.auto_open = 0  # a new connection would be another one
        self.connection.request("GET", "/")
        answer = self.connection.getresponse()
        answer.read()
        assert answer.status == 200


def owner(proxy: Proxy, port: int) -> int:
    """The worker that has the other end of the connection from our `port`."""
    ends = f"{proxy.port:04X}", f"{port:04X}"
    for line in Path("/proc/net/tcp").read_text("ascii").splitlines()[1:]:
        fields = line.split()
        if (fields[1].rpartition(":")[2], fields[2].rpartition(":")[2]) == ends:
            link = f"socket:[{fields[9]}]"
            for pid in proxy.workers():
                if link in {
                    str(entry.readlink())
                    for entry in Path(f"/proc/{pid}/fd").iterdir()
                    if entry.is_symlink()
                }:
                    return pid
    raise AssertionError("no worker has it")


def counted(proxy: Proxy, requests: int) -> dict[str, float]:
    """The metrics, once exactly so many requests have been counted. A worker counts a request after
    it has sent the response, so the test has to wait for that."""

    def enough() -> dict[str, float] | None:
        found = proxy.metrics()
        return found if found.get(REQUESTS, 0) >= requests else None

    metrics: dict[str, float] = eventually(enough, f"{requests} requests are counted")
    assert metrics[REQUESTS] == requests
    return metrics


def workers_counted(proxy: Proxy) -> tuple[float, float]:
    """(alive, ready)"""
    found = proxy.metrics()
    return found['isthmus_workers{state="alive"}'], found['isthmus_workers{state="ready"}']


def kept_by_both(proxy: Proxy, stack: ExitStack) -> list[Kept]:
    """Connections of which each worker has some."""
    found: list[Kept] = []
    while len({kept.worker for kept in found}) < 2 or len(found) < 6:
        assert len(found) < 64
        found.append(Kept(proxy))
        stack.callback(found[-1].connection.close)
    return found


def test_both_workers_serve_and_read_as_one_proxy(stage: tuple[Proxy, Any]) -> None:
    proxy, _ = stage
    assert len(proxy.workers()) == 2
    with ExitStack() as stack:
        kept = kept_by_both(proxy, stack)
        found = counted(proxy, len(kept))
        assert found['isthmus_connections_open{direction="outbound",peer="src",tls="none"}'] == len(
            kept
        )
        eventually(lambda: workers_counted(proxy) == (2, 2), "both workers are alive and ready")
        assert not any(name.startswith("isthmus_worker_exits_total") for name in found)
    assert proxy.admin("/live") == (200, b"live\n")
    lines = eventually(
        lambda: re.findall(r'"message": "connection", "worker": (\d)', proxy.logged()),
        "lines of connections",
    )
    eventually(
        lambda: (
            set(re.findall(r'"message": "connection", "worker": (\d)', proxy.logged()))
            == {"1", "2"}
        ),
        f"both in {lines}",
    )


def test_a_killed_worker_loses_only_its_own_connections(
    stage: tuple[Proxy, Any],
) -> None:
    proxy, _ = stage
    before = proxy.workers()
    with ExitStack() as stack:
        kept = kept_by_both(proxy, stack)
        before_it = len(kept)
        counted(proxy, before_it)
        victim = kept[0].worker
        os.kill(victim, signal.SIGKILL)
        for one in kept:
            if one.worker == victim:
                with pytest.raises((http.client.HTTPException, OSError)):
                    one.ask()
            else:
                one.ask()
        survivors = sum(one.worker != victim for one in kept)
        # Its sockets are closed one by one, and its listener may not be the first.
        eventually(lambda: not Path(f"/proc/{victim}").exists(), "the one that was killed is gone")
        for _ in range(20):
            assert get(proxy.port) == 200, "a new client does not reach the dead worker"
        counted(proxy, before_it + survivors + 20)
        eventually(lambda: len(proxy.workers()) == 2 and proxy.ready(), "two again")
        assert len(set(proxy.workers()) & set(before)) == 1
        again = counted(proxy, before_it + survivors + 20)
        assert again['isthmus_worker_exits_total{how="signal"}'] == 1
    assert "was killed by SIGKILL" in proxy.logged()
    with ExitStack() as stack:
        kept_by_both(proxy, stack)  # the new one has its share


def test_sigterm_lets_the_requests_of_all_workers_finish(stage: tuple[Proxy, Any]) -> None:
    proxy, app = stage
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(get(proxy.port, "/slow"))) for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert app.asked.acquire(timeout=PATIENCE)
    proxy.process.send_signal(signal.SIGTERM)
    eventually(lambda: proxy.admin("/ready") == (503, b"not ready: shutting down\n"), "not ready")
    assert proxy.admin("/live")[0] == 200
    app.go.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert answers == [200] * 12
    assert proxy.process.wait(PATIENCE) == 0
    assert proxy.logged().count("stopping: open connections have 60 s") == 2


def test_a_second_signal_ends_all_of_them_at_once(stage: tuple[Proxy, Any]) -> None:
    proxy, app = stage
    workers = proxy.workers()
    thread = threading.Thread(target=_cut, args=(proxy.port,))
    thread.start()
    assert app.asked.acquire(timeout=PATIENCE)
    proxy.process.send_signal(signal.SIGINT)
    eventually(lambda: proxy.logged().count("stopping: open") == 2, "both have heard of it")
    assert proxy.process.poll() is None
    proxy.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert proxy.process.wait(PATIENCE) == 0
    assert time.monotonic() - began < 30, "half of the grace period"
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    app.go.set()
    thread.join(PATIENCE)


def _cut(port: int) -> None:
    with pytest.raises((http.client.HTTPException, OSError)):
        get(port, "/slow")


def test_a_worker_that_hangs_is_reported_until_it_runs_again(
    stage: tuple[Proxy, Any],
) -> None:
    proxy, _ = stage
    victim = proxy.workers()[1]
    took: list[float] = []

    def probe(path: str) -> tuple[int, bytes]:
        began = time.perf_counter()
        found = proxy.admin(path)
        took.append(time.perf_counter() - began)
        return found

    os.kill(victim, signal.SIGSTOP)
    try:
        assert probe("/live") == (200, b"live\n"), "it may only be busy"
        assert probe("/ready") == (200, b"ready\n")
        status, body = eventually(lambda: (found := probe("/live"))[0] == 503 and found, "not live")
        assert status == 503
        assert re.fullmatch(rb"not live: worker 2 has not answered for [4-6] s\n", body)
        assert re.fullmatch(
            rb"not ready: worker 2: has not answered for [4-6] s\n", probe("/ready")[1]
        )
        assert REQUESTS in proxy.metrics(), "its last report still counts"
    finally:
        os.kill(victim, signal.SIGCONT)
    eventually(lambda: probe("/ready")[0] == 200, "ready again")
    assert probe("/live")[0] == 200
    assert sorted(took)[len(took) * 9 // 10] < 0.1, "no response waits for a worker"
    assert max(took) < 1.0


def test_workers_end_when_their_supervisor_is_gone(stage: tuple[Proxy, Any]) -> None:
    proxy, _ = stage
    workers = proxy.workers()
    proxy.process.kill()
    proxy.process.wait(PATIENCE)
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), "all gone")
    proxy.process = proxy.start()
    eventually(proxy.ready, "its ports are free again")


def test_a_second_proxy_on_the_same_ports_is_refused_and_takes_nothing(
    stage: tuple[Proxy, Any],
) -> None:
    proxy, _ = stage
    for environ, words in (
        ({}, f"port {proxy.port} is in use by another proxy"),
        ({"ISTHMUS_WORKERS": "1"}, "another process listens"),
    ):
        command = [sys.executable, "-m", "proxy.cli", "run", "--config", str(proxy.config)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
            env={**os.environ, **environ},
        )
        assert done.returncode == 69
        assert words in done.stderr
        assert len([line for line in done.stderr.splitlines() if line.startswith("isthmus: ")]) == 1
    for _ in range(20):
        assert get(proxy.port) == 200
    counted(proxy, 20)


def test_tokens_of_one_worker_stop_a_loop_that_goes_through_the_other(
    stage: tuple[Proxy, Any],
) -> None:
    """As soon as one proxy would: the request is recognised on any worker that it comes back to."""
    proxy, app = stage
    assert get(proxy.port, "/loop") == 508
    assert len(app.rounds) == 5, "the first time, and loops.max_returns"


def test_questions_of_many_programs_are_answered_by_both_workers(tmp_path: Path) -> None:
    """Datagrams are distributed like connections, and each answer comes from the address that was
    asked."""
    port, names = free_port(), free_port()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as upstream:
        upstream.bind((HOST, 0))

        def resolve() -> None:
            with suppress(OSError):
                while True:
                    data, sender = upstream.recvfrom(512)
                    if not data:
                        return
                    upstream.sendto(data[:2] + b"\x81\x83" + data[4:], sender)  # NXDOMAIN

        thread = threading.Thread(target=resolve)
        thread.start()
        dns = {"listen": [f"{HOST}:{names}"], "upstreams": [f"{HOST}:{upstream.getsockname()[1]}"]}
        proxy = Proxy(tmp_path, {"dns": dns}, 1, port)
        try:
            eventually(proxy.ready, "ready")
            for number in range(24):
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                    client.settimeout(PATIENCE)
                    client.connect((HOST, names))
                    question = (
                        bytes([7, number])
                        + b"\1\0\0\1\0\0\0\0\0\0"
                        + b"\4shop\7invalid\0"
                        + b"\0\1\0\1"
                    )
                    client.send(question)
                    assert client.recv(512)[:4] == question[:2] + b"\x81\x83"
            name = 'isthmus_dns_queries_total{result="forwarded",transport="udp"}'
            eventually(lambda: proxy.metrics().get(name) == 24, "24 questions are counted")
            sockets = Path("/proc/net/udp").read_text("ascii").count(f":{names:04X} ")
            assert sockets == 2, "one of each worker"
        finally:
            proxy.end()
            upstream.sendto(b"", upstream.getsockname())
            thread.join(PATIENCE)


def test_what_is_wrong_is_said_once_and_by_the_exit_code(tmp_path: Path) -> None:
    missing = dict.fromkeys(("certificate", "key"), f"{tmp_path}/none")
    for settings, code, words in (
        ({"identity": {**missing, "roots": [f"{tmp_path}/none"]}}, 64, f"{tmp_path}/none"),
        ({"directory": {"file": f"{tmp_path}/gone"}}, 64, f"{tmp_path}/gone"),
    ):
        proxy = Proxy(tmp_path, settings, 1, free_port())
        assert proxy.process.wait(PATIENCE) == code
        lines = [line for line in proxy.logged().splitlines() if line.startswith("isthmus: ")]
        assert len(lines) == 1
        assert words in lines[0]
        proxy.log.unlink()


def test_a_listener_of_another_program_is_not_joined(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEPORT, 1
        )  # which would let the workers in
        taken.bind((HOST, 0))
        taken.listen()
        proxy = Proxy(tmp_path, {}, 1, taken.getsockname()[1])
        assert proxy.process.wait(PATIENCE) == 69
        assert "another process listens there already" in proxy.logged()


def test_a_client_that_resumes_on_another_worker_makes_a_full_handshake(tmp_path: Path) -> None:
    """Tickets are encrypted by the worker that has made them. The other one cannot read them, and
    makes a full handshake."""
    settings, context = identity(tmp_path)
    with application(0) as (back, _):
        proxy = Proxy(tmp_path, settings, back, free_port(), side="inbound")
        try:
            eventually(proxy.ready, "ready")
            session, resumed = None, []
            for _ in range(24):
                with member(proxy, context, session) as tls:
                    assert tls.recv(4096).startswith(b"HTTP/1.1 200")
                    resumed.append(tls.session_reused)
                    session = session or tls.session  # always that of the first worker
            assert set(resumed[1:]) == {True, False}
            eventually(
                lambda: _handshakes(proxy) == (resumed.count(True), resumed.count(False)),
                "as counted by the workers",
            )
            assert not any("isthmus_tls_failures_total{" in name for name in proxy.metrics())
        finally:
            proxy.end()


WHO = SpiffeId("cluster.local", "shop", "web")


def identity(folder: Path) -> tuple[dict[str, Any], ssl.SSLContext]:
    """The settings of a proxy with an identity, and the TLS context of a client with the same
    one."""
    root = make_root("cluster.local")
    leaf = issue(root, WHO)
    for name, pem in (
        ("certificate", leaf.certificate_pem),
        ("key", leaf.key_pem),
        ("roots", root.certificate_pem),
    ):
        (folder / f"{name}.pem").write_bytes(pem)
        (folder / f"{name}.pem").chmod(0o600)
    files = {name: str(folder / f"{name}.pem") for name in ("certificate", "key", "roots")}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # the name is a URI
    context.load_verify_locations(files["roots"])
    context.load_cert_chain(files["certificate"], files["key"])
    context.set_alpn_protocols(["http/1.1"])
    return {"identity": {**files, "roots": [files["roots"]]}}, context


@contextmanager
def member(
    proxy: Proxy,
    context: ssl.SSLContext,
    session: ssl.SSLSession | None = None,
    patience: float = PATIENCE,
) -> Iterator[ssl.SSLSocket]:
    """A connection by mutual TLS, on which a request has been sent."""
    with (
        socket.create_connection((HOST, proxy.port), timeout=patience) as sock,
        context.wrap_socket(sock, server_hostname=WHO.sni, session=session) as tls,
    ):
        tls.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        yield tls


@pytest.mark.parametrize("attack", ["idle", "refused", "handshakes"])
def test_members_come_in_at_all_workers_whatever_others_do(tmp_path: Path, attack: str) -> None:
    settings, context = identity(tmp_path)
    rules = {"inbound": {"require_identity": True, "max_connections": 60, "max_pending": 128}}
    with application(0) as (back, _), ExitStack() as stack:
        proxy = Proxy(tmp_path, settings, back, free_port(), side="inbound", rules=rules)
        stack.callback(proxy.end)
        eventually(proxy.ready, "ready")
        command = [
            sys.executable,
            "-m",
            "perf.reliability.attacker",
            attack,
            HOST,
            str(proxy.port),
            "60",
            "300",
        ]
        attacker = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        stack.callback(attacker.wait)
        stack.callback(attacker.kill)
        if attack != "refused":  # a refused client is disconnected before it blocks another one
            name = 'isthmus_connections_evicted_total{listener="inbound",reason="pending"}'
            eventually(lambda: proxy.metrics().get(name, 0) > 200, "the slots are taken")
        for _ in range(20):
            tls = stack.enter_context(member(proxy, context, patience=5.0))
            assert tls.recv(4096).startswith(b"HTTP/1.1 200")
            began = time.perf_counter()
            assert proxy.admin("/live")[0] == 200
            assert time.perf_counter() - began < 1.0
        assert attacker.poll() is None


def _handshakes(proxy: Proxy) -> tuple[int, int]:
    """(resumed, full)"""
    found = {"true": 0.0, "false": 0.0}
    for name, value in proxy.metrics().items():
        if name.startswith("isthmus_tls_handshakes_total") and 'result="ok"' in name:
            found["true" if 'resumed="true"' in name else "false"] += value
    return int(found["true"]), int(found["false"])
