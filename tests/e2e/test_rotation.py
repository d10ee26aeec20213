"""New certificates, keys and trust roots under load: no request fails, and no connection is ended.

Rules: the files are replaced as a deployment does it, one proxy after the other. The outcome of
every request is recorded."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import pytest
import trio

from lab.load import Load
from lab.sidecar import Authority, Sidecar
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import (
    ECHO,
    LAST_GET,
    WEB,
    Pair,
    counted,
    echo_server,
    eventually,
    exchange_raw,
    logged,
    prepare,
    web_server,
)

pytestmark = pytest.mark.lab

QUIET = {
    "log": {"access": False},
    "pool": {"max_age": "1s"},
}  # so that there are handshakes all the time


@pytest.fixture(scope="module")
def pair(laboratory: Laboratory) -> Pair:
    async def build() -> Pair:
        pair = prepare(laboratory.lab, {WEB: "detect", ECHO: "opaque"}, web=QUIET, shop=QUIET)
        await web_server(pair.shop)
        await echo_server(pair.shop)
        await pair.mesh.start()
        return pair

    return laboratory.run(build)


class LongLived:
    """A connection that is opened before the change and still has to be the same afterwards."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream

    @classmethod
    async def open(cls, pair: Pair) -> LongLived:
        return cls(await pair.web.connect(pair.service.ipv4, ECHO))

    async def talks(self, word: bytes) -> None:
        with trio.fail_after(30):
            await self._stream.send_all(word)
            assert await self._stream.receive_some() == word

    async def close(self) -> None:
        await self._stream.aclose()


async def reloads(sidecar: Sidecar, result: str = "ok") -> float:
    return await counted(sidecar, "isthmus_identity_reloads_total", result=result)


async def change(sidecar: Sidecar, write: Callable[[], None], result: str = "ok") -> None:
    """Replace files, and wait until the proxy has read them. While two files are being replaced
    they may not match for a moment. Then the proxy keeps the old ones, and reads again."""
    before = await reloads(sidecar, result)
    write()

    async def seen() -> bool:
        return await reloads(sidecar, result) > before

    await eventually(seen, f"the proxy of {sidecar.pod.name} has counted a reload ({result})")


def leaf(sidecar: Sidecar, authority: Authority) -> Callable[[], None]:
    assert sidecar.identity is not None
    issued = authority.issue(sidecar.identity)
    return lambda: sidecar.write_certificate(issued)


async def renew(sidecar: Sidecar, authority: Authority) -> None:
    """Give it a new leaf."""
    await change(sidecar, leaf(sidecar, authority))


async def under_load(pair: Pair, steps: Sequence[Callable[[], Awaitable[None]]]) -> Load:
    """Do `steps` during requests, with some hundred requests after each. Returns the finished
    load."""
    old = await LongLived.open(pair)
    await old.talks(b"before")
    async with Load(pair.web, pair.service.ipv4, WEB) as load:
        await load.more(100)
        for step in steps:
            await step()
            await load.more(200)
            await old.talks(b"still here")
            young = await LongLived.open(pair)
            await young.talks(b"new connections work too")
            await young.close()
    await old.close()
    return load


async def test_new_leaves_without_a_failed_request(pair: Pair) -> None:
    expiry = await counted(pair.far, "isthmus_certificate_expiry_timestamp_seconds")
    await trio.sleep(1.1)  # the expiry is counted in whole seconds
    ours = pair.mesh.authority
    steps = [partial(renew, sidecar, ours) for sidecar in (*pair.both, *pair.both)]
    load = await under_load(pair, steps)
    print(f"{load.succeeded} requests, {load.connections} connections, {load.bad}")
    assert load.bad == {}
    assert load.raced == 0
    assert load.connections == 6  # no client's connection was ended either
    assert await counted(pair.far, "isthmus_certificate_expiry_timestamp_seconds") > expiry
    await logged(pair.far, "new certificate or trust roots in use")


async def test_a_new_trust_root_without_a_failed_request(pair: Pair) -> None:
    """First both roots are trusted, then the leaves change, then the old root is removed: at each
    step all trust each other."""
    old, new = pair.mesh.authority, Authority()
    handshakes = await counted(pair.far, "isthmus_tls_handshakes_total", result="ok")
    failures = [await counted(sidecar, "isthmus_tls_failures_total") for sidecar in pair.both]

    def roots(*authorities: Authority) -> list[Callable[[], Awaitable[None]]]:
        return [
            partial(change, sidecar, partial(sidecar.write_roots, *authorities))
            for sidecar in pair.both
        ]

    leaves = [partial(renew, sidecar, new) for sidecar in pair.both]
    load = await under_load(pair, [*roots(old, new), *leaves, *roots(new)])
    print(f"{load.succeeded} requests, {load.connections} connections, {load.bad}")
    assert load.bad == {}
    assert load.raced == 0
    assert load.connections == 6
    assert await counted(pair.far, "isthmus_tls_handshakes_total", result="ok") > handshakes
    for sidecar, before in zip(pair.both, failures, strict=True):
        assert await counted(sidecar, "isthmus_tls_failures_total") == before
        sidecar.authority = new
    pair.mesh.authority = new


async def test_a_client_that_still_has_the_old_root_is_rejected(pair: Pair) -> None:
    """This shows that the change really happened."""
    assert pair.near.identity is not None
    stale = Authority()
    await change(pair.near, lambda: _become(pair.near, stale))
    try:
        # The pool may have a connection from before for a moment.
        answer = await eventually(lambda: _refused(pair), "the old root is refused")
        assert b"error=tls_certificate_error" in answer
    finally:
        with trio.move_on_after(60, shield=True):
            await change(pair.near, lambda: _become(pair.near, pair.mesh.authority))
    await eventually(lambda: _served(pair), "the right root is served again")


def _become(sidecar: Sidecar, authority: Authority) -> None:
    assert sidecar.identity is not None
    sidecar.write_roots(authority)
    sidecar.write_certificate(authority.issue(sidecar.identity))


async def _refused(pair: Pair) -> bytes:
    answer = await exchange_raw(pair.web, pair.service.ipv4, WEB, LAST_GET)
    return answer if answer.startswith(b"HTTP/1.1 502") else b""


async def _served(pair: Pair) -> bool:
    return (await exchange_raw(pair.web, pair.service.ipv4, WEB, LAST_GET)).startswith(
        b"HTTP/1.1 200"
    )


BROKEN = {
    "no certificate": ("certificate.pem", b"this is no certificate"),
    "half a certificate": ("certificate.pem", b"-----BEGIN CERTIFICATE-----\nMIIB\n"),
    "another's key": ("key.pem", None),
    "an empty file of roots": ("roots.pem", b""),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_broken_new_material_keeps_the_old_and_says_so(pair: Pair, name: str) -> None:
    file, data = BROKEN[name]
    path = pair.far.directory / file
    before = path.read_bytes()
    assert pair.far.identity is not None
    async with Load(pair.web, pair.service.ipv4, WEB, clients=2) as load:
        broken = pair.mesh.authority.issue(pair.far.identity).key_pem if data is None else data
        await change(pair.far, lambda: pair.far.write(path, broken, mode=0o600), "error")
        await load.more(200)
        line = await logged(pair.far, "keeping the old ones", level="error")
        assert str(pair.far.directory) in line["message"]
        assert (await pair.far.admin("/ready"))[0] == 200
        pair.far.write(path, before, mode=0o600)
        await load.more(100)
    assert load.bad == {}


async def test_a_missing_certificate_file_keeps_the_old_one_and_says_so(pair: Pair) -> None:
    path = pair.far.directory / "certificate.pem"
    before = path.read_bytes()
    await change(pair.far, path.unlink, "error")
    await logged(pair.far, "certificate.pem", level="error")
    assert await _served(pair)
    await change(pair.far, lambda: _again(pair.far, before))
    assert await _served(pair)


def _again(sidecar: Sidecar, before: bytes) -> None:
    """The old contents are not a change, so only a new leaf shows that the file was read again."""
    assert sidecar.identity is not None
    sidecar.write(sidecar.directory / "certificate.pem", before)
    assert sidecar.authority is not None
    sidecar.write_certificate(sidecar.authority.issue(sidecar.identity))
