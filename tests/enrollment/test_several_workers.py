"""A proxy with several workers: each worker process has its own key and certificate, and the proxy is
ready when all have one."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import h11
import trio
import yaml

from tests.kit.apps import HOST
from tests.kit.issuing import CONTROL, WEB, Issuing
from tests.kit.ports import free_port

WORKERS = 2


async def ready(port: int) -> tuple[int, str]:
    """Status and text of /ready; 0: nothing listens yet."""
    try:
        stream = await trio.open_tcp_stream(HOST, port)
    except OSError:
        return 0, ""
    http = h11.Connection(h11.CLIENT)
    status, text = 0, b""
    async with stream:
        request = h11.Request(
            method="GET", target="/ready", headers=[("Host", "x"), ("Connection", "close")]
        )
        await stream.send_all((http.send(request) or b"") + (http.send(h11.EndOfMessage()) or b""))
        while not isinstance(event := http.next_event(), h11.EndOfMessage | h11.ConnectionClosed):
            if event is h11.NEED_DATA:
                http.receive_data(bytes(await stream.receive_some()))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                text += event.data
    return status, text.decode()


async def until_answer(port: int, status: int, words: str) -> None:
    """Wait until /ready has this status, and these words in its text."""
    with trio.fail_after(60):
        while True:
            found = await ready(port)
            if found[0] == status and found[1].count(words) == (WORKERS if status != 200 else 1):
                return
            await trio.sleep(0.05)


async def test_each_worker_gets_its_own_certificate(issuing: Issuing, tmp_path: Path) -> None:
    async with issuing.serving():
        inbound, admin = free_port(), free_port()
        token = tmp_path / "token"
        control = {
            "address": f"{HOST}:{issuing.port}",
            "identity": str(CONTROL),
            "token": str(token),
            "max_first_pause": "500ms",
        }
        settings = {
            "workers": WORKERS,
            "identity": {"source": "control", "roots": [str(issuing.roots)], "control": control},
            "inbound": {"listen": [f"{HOST}:{inbound}"], "fixed_destination": f"{HOST}:9"},
            "outbound": {"listen": []},
            "admin": {"listen": [f"{HOST}:{admin}"]},
        }
        file = tmp_path / "isthmus.yaml"
        file.write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "proxy.cli", "run", "--config", str(file)]
        process = await trio.lowlevel.open_process(command)
        try:
            await until_answer(admin, 503, "there is no certificate yet")
            assert issuing.authority.counts.issued == 0
            token.write_text(issuing.account_token(WEB))
            await until_answer(admin, 200, "ready")
            assert issuing.authority.counts.issued == WORKERS
        finally:
            process.send_signal(signal.SIGTERM)
            with trio.fail_after(30, shield=True):
                assert await process.wait() == 0
