"""The proxy's credentials from the control plane: a new key for each certificate, renewal in time,
and no loss of what is known when the control plane is away.

Time is a mock clock that the test moves. The wall clock of both ends follows it. It never jumps by
itself, because the connections are real."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
from trio.abc import Clock
from trio.testing import MockClock

from proxy.enrollment.client import EnrollmentFailed
from proxy.enrollment.token import TokenUnusable
from proxy.identity.credential_files import MaterialError
from proxy.identity.identity import Identity, TLSSettings
from proxy.identity.issue import make_root
from proxy.identity.spiffe import SpiffeId
from proxy.net.address import Address
from proxy.net.dial import Dialer
from proxy.net.exceptions import ConnectFailed
from proxy.net.socket_stream import SocketStream
from tests.kit.issuing import CONTROL, DOMAIN, WEB, Issuing, write_issuer
from tests.kit.mock_time import elapse, settled

HOUR = 3600.0


@pytest.fixture
def clock() -> Clock:
    """Every test that moves the time requests it."""
    return MockClock()


@dataclass
class Line:
    """The way to the control plane, which the test can cut, or hold until `open` is set. `dials`:
    when it was tried."""

    up: bool = True
    open: trio.Event | None = None
    dials: list[float] = field(default_factory=list)

    async def dial(self, address: Address) -> SocketStream:
        self.dials.append(trio.current_time())
        if not self.up:
            raise ConnectFailed(address, "refused", "the test has cut the line")
        if self.open is not None:
            await self.open.wait()
        return await Dialer().dial(address)


class Proxy:
    """A proxy's identity, with its source."""

    def __init__(self, issuing: Issuing, line: Line, seed: int = 1, **settings: float) -> None:
        token = issuing.folder / f"token-{seed}"
        token.write_text(issuing.account_token(pod=(f"web-{seed}", f"uid-{seed}")))
        self.token = token
        self.source = issuing.proxy(token, line.dial, seed, **settings)
        self.identity = Identity(None, TLSSettings(own_domain=DOMAIN), clock=issuing.now)
        self.changes = 0
        self.failures: list[str] = []

    async def run(self) -> None:
        await self.source.run(self.identity, self._changed, self._failed)

    def _changed(self, identity: Identity) -> None:
        assert identity is self.identity
        self.changes += 1

    def _failed(self, error: Exception) -> None:
        self.failures.append(str(error))


def wall(issuing: Issuing, clock: Clock) -> None:
    """The wall clock follows the mock clock."""
    start, zero = datetime.now(UTC), clock.current_time()
    issuing.now = lambda: start + timedelta(seconds=clock.current_time() - zero)
    issuing.issuer._clock = issuing.now


async def test_the_first_certificate_comes_at_once_and_its_key_is_in_memory(
    issuing: Issuing, nursery: trio.Nursery
) -> None:
    async with issuing.serving():
        proxy = Proxy(issuing, Line())
        nursery.start_soon(proxy.run)
        await settled(lambda: proxy.identity.known)
        assert proxy.identity.id == WEB
        assert proxy.identity.warnings == ()
        assert proxy.failures == []
        left = proxy.identity.time_left
        assert timedelta(hours=23, minutes=59) < left <= timedelta(hours=24)
        files = {path.name for path in issuing.folder.rglob("*") if path.is_file()}
        assert files == {"roots.pem", "tls.crt", "tls.key", "token-1"}
        nursery.cancel_scope.cancel()


async def test_it_renews_at_about_half_of_the_lifetime_with_a_new_key(
    issuing: Issuing, nursery: trio.Nursery, clock: Clock
) -> None:
    wall(issuing, clock)
    async with issuing.serving():
        line = Line()
        proxies = [Proxy(issuing, line, seed) for seed in range(8)]
        for proxy in proxies:
            nursery.start_soon(proxy.run)
        await settled(lambda: all(proxy.identity.known for proxy in proxies))
        first = [proxy.identity.certificate for proxy in proxies]
        await elapse(clock, 9 * HOUR)
        assert len(line.dials) == 8
        await elapse(clock, 6 * HOUR)
        await settled(lambda: all(proxy.changes == 2 for proxy in proxies))
        moments = sorted(line.dials[8:])
        assert 9.5 * HOUR < moments[0] < moments[-1] < 14.5 * HOUR
        assert moments[-1] - moments[0] > HOUR
        for proxy, old in zip(proxies, first, strict=True):
            assert proxy.identity.certificate.public_key() != old.public_key()
            assert proxy.failures == []
        nursery.cancel_scope.cancel()


async def test_the_token_is_read_again_for_each_request(
    issuing: Issuing, nursery: trio.Nursery, clock: Clock
) -> None:
    wall(issuing, clock)
    async with issuing.serving():
        proxy = Proxy(issuing, Line())
        nursery.start_soon(proxy.run)
        await settled(lambda: proxy.identity.known)
        # The kubelet has replaced it, and the old one is not valid any more.
        old = proxy.token.read_text()
        await elapse(clock, 9 * HOUR)
        del issuing.server.behaviour.tokens[old]
        proxy.token.write_text(issuing.account_token(jti="another"))
        await elapse(clock, 6 * HOUR)
        await settled(lambda: proxy.changes == 2)
        assert proxy.failures == []
        nursery.cancel_scope.cancel()


async def test_an_outage_does_not_touch_the_certificate_and_its_end_is_no_herd(
    issuing: Issuing, nursery: trio.Nursery, clock: Clock
) -> None:
    """The control plane is away from before the renewal until after half of the lifetime. Then 24
    proxies come back."""
    wall(issuing, clock)
    async with issuing.serving():
        line = Line()
        count = 24
        proxies = [Proxy(issuing, line, seed) for seed in range(count)]
        for proxy in proxies:
            nursery.start_soon(proxy.run)
        await settled(lambda: all(proxy.identity.known for proxy in proxies))
        line.up = False
        await elapse(clock, 16 * HOUR)
        for proxy in proxies:
            assert (proxy.changes, proxy.identity.generation) == (1, 1)
            assert proxy.identity.validity_problem() is None
            assert "the test has cut the line" in proxy.failures[-1]
        # At most one attempt per minute of each, which is half of max_pause.
        last = [moment for moment in line.dials if moment > trio.current_time() - HOUR]
        assert count * 30 <= len(last) <= count * 60
        line.dials.clear()
        line.up = True
        back = trio.current_time()
        await elapse(clock, 130.0, step=2.0)
        await settled(lambda: all(proxy.changes == 2 for proxy in proxies))
        # Each came once, within max_pause, and never many of them at the same moment.
        assert len(line.dials) == count
        assert max(line.dials) - back <= 125.0
        assert max(line.dials.count(moment) for moment in line.dials) <= count / 6
        nursery.cancel_scope.cancel()


async def test_without_a_certificate_it_tries_often_and_says_why(
    issuing: Issuing, nursery: trio.Nursery, clock: Clock
) -> None:
    wall(issuing, clock)
    async with issuing.serving():
        line = Line(up=False)
        proxy = Proxy(issuing, line)
        nursery.start_soon(proxy.run)
        await elapse(clock, 60.0, step=0.25)
        assert not proxy.identity.known
        assert proxy.identity.validity_problem() == "there is no certificate yet"
        # The pauses double from 0.5 s to 5 s.
        assert 12 <= len(line.dials) <= 30
        assert "cannot connect to 127.0.0.1" in proxy.failures[-1]
        line.up = True
        await elapse(clock, 6.0, step=0.25)
        await settled(lambda: proxy.identity.known)
        nursery.cancel_scope.cancel()


async def test_an_expired_certificate_is_renewed_when_the_control_plane_is_back(
    issuing: Issuing, nursery: trio.Nursery, clock: Clock
) -> None:
    wall(issuing, clock)
    async with issuing.serving():
        line = Line()
        proxy = Proxy(issuing, line)
        nursery.start_soon(proxy.run)
        await settled(lambda: proxy.identity.known)
        line.up = False
        await elapse(clock, 25 * HOUR)
        assert "expired on" in (proxy.identity.validity_problem() or "")
        line.up = True
        await elapse(clock, 120.0, step=1.0)
        await settled(lambda: proxy.changes == 2)
        assert proxy.identity.validity_problem() is None
        nursery.cancel_scope.cancel()


async def test_another_root_is_used_with_the_certificate_at_hand(
    issuing: Issuing, nursery: trio.Nursery, clock: Clock
) -> None:
    wall(issuing, clock)
    async with issuing.serving():
        line = Line()
        proxy = Proxy(issuing, line)
        nursery.start_soon(proxy.run)
        await settled(lambda: proxy.identity.known)
        before = proxy.identity.certificate
        new = make_root(DOMAIN)
        issuing.roots.write_bytes(issuing.root.certificate_pem + new.certificate_pem)
        await elapse(clock, 5.0, step=1.0)
        await settled(lambda: proxy.changes == 2)
        assert proxy.identity.certificate is not before  # parsed again
        assert proxy.identity.certificate == before
        assert set(proxy.identity.roots) == {issuing.root.certificate, new.certificate}
        assert len(line.dials) == 1
        nursery.cancel_scope.cancel()


async def test_roots_that_change_during_a_request_are_used(
    issuing: Issuing, nursery: trio.Nursery, clock: Clock
) -> None:
    wall(issuing, clock)
    async with issuing.serving():
        line = Line()
        proxy = Proxy(issuing, line)
        nursery.start_soon(proxy.run)
        await settled(lambda: proxy.identity.known)
        line.open = trio.Event()
        while len(line.dials) == 1:  # until the renewal waits
            await elapse(clock, 60.0, step=60.0)
        new = make_root(DOMAIN)
        issuing.roots.write_bytes(issuing.root.certificate_pem + new.certificate_pem)
        await elapse(clock, 4.0, step=1.0)
        await settled(lambda: proxy.changes == 2)  # the watch uses them
        line.open.set()
        await settled(lambda: proxy.changes == 3)
        await elapse(clock, 30.0, step=1.0)
        assert set(proxy.identity.roots) == {issuing.root.certificate, new.certificate}
        assert proxy.failures == []
        nursery.cancel_scope.cancel()


async def test_roots_that_do_not_verify_the_certificate_are_not_used_before_a_new_one(
    issuing: Issuing, nursery: trio.Nursery, clock: Clock
) -> None:
    """A step too early: the old root is removed while our certificate is from it."""
    wall(issuing, clock)
    async with issuing.serving():
        line = Line()
        proxy = Proxy(issuing, line)
        nursery.start_soon(proxy.run)
        await settled(lambda: proxy.identity.known)
        new = make_root(DOMAIN)
        line.up = False
        issuing.roots.write_bytes(new.certificate_pem)
        await elapse(clock, 20.0, step=1.0)
        assert any("is not signed by the trust roots" in words for words in proxy.failures)
        assert proxy.identity.roots == (issuing.root.certificate,)
        # The issuer follows, and the control plane's own certificate with it.
        write_issuer(issuing.directory, new)
        issuing.issuer.read()
        await settled(lambda: issuing.identity.certificate.issuer == new.certificate.subject)
        line.up = True
        await elapse(clock, 130.0, step=1.0)
        await settled(lambda: proxy.identity.roots == (new.certificate,))
        assert proxy.identity.certificate.issuer == new.certificate.subject
        nursery.cancel_scope.cancel()


async def test_malformed_roots_are_not_used(
    issuing: Issuing, nursery: trio.Nursery, clock: Clock
) -> None:
    wall(issuing, clock)
    async with issuing.serving():
        proxy = Proxy(issuing, Line())
        nursery.start_soon(proxy.run)
        await settled(lambda: proxy.identity.known)
        issuing.roots.write_bytes(b"-----BEGIN CERTIFICATE-----\nMII")
        await elapse(clock, 5.0, step=1.0)
        assert any("it is incomplete or truncated" in words for words in proxy.failures)
        assert proxy.identity.roots == (issuing.root.certificate,)
        nursery.cancel_scope.cancel()


async def test_a_server_with_another_name_gets_no_token(issuing: Issuing) -> None:
    async with issuing.serving():
        proxy = Proxy(issuing, Line())
        name = SpiffeId(DOMAIN, "isthmus", "another")
        source = issuing.proxy(proxy.token, Dialer().dial, identity=str(name))
        with pytest.raises(EnrollmentFailed, match=f"the peer is {CONTROL}, but {name} was exp"):
            await source.enroll()
        assert issuing.server.log == []


async def test_a_server_of_another_root_gets_no_token(issuing: Issuing) -> None:
    async with issuing.serving():
        proxy = Proxy(issuing, Line())
        issuing.roots.write_bytes(make_root(DOMAIN).certificate_pem)
        with pytest.raises(EnrollmentFailed, match="is not signed by a trust root"):
            await proxy.source.enroll()
        assert issuing.server.log == []


async def test_a_refusal_is_explained(issuing: Issuing) -> None:
    async with issuing.serving():
        proxy = Proxy(issuing, Line())
        issuing.server.behaviour.tokens.clear()
        issuing.server.behaviour.tokens[""] = {}
        words = r"gives no certificate: the API server does not accept the token .* \(token\)$"
        with pytest.raises(EnrollmentFailed, match=words):
            await proxy.source.enroll()


async def test_a_wait_that_the_control_plane_asks_for_is_reported(issuing: Issuing) -> None:
    async with issuing.serving():
        proxy = Proxy(issuing, Line())
        issuing.issuer._authority = None
        with pytest.raises(EnrollmentFailed, match="there is no usable issuer") as caught:
            await proxy.source.enroll()
        assert caught.value.retry_after == 5.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("", "is empty"),
        ("secret", "it is not a JSON Web Token"),
        ("a.!.c", "it is not a JSON Web Token"),
        ("a.e30.c", "its audience is 'none'"),
    ],
)
async def test_an_unusable_token_is_not_sent(
    issuing: Issuing, tmp_path: Path, text: str | None, words: str
) -> None:
    token = tmp_path / "unusable"
    if text is not None:
        token.write_text(text)
    source = issuing.proxy(token)
    with pytest.raises(TokenUnusable, match=words) as caught:
        await source.enroll()
    assert not text or text not in str(caught.value)


async def test_a_token_of_no_service_account_is_not_sent(issuing: Issuing) -> None:
    token = issuing.folder / "unusable"
    token.write_text(issuing.account_token(sub="system:node:node-1"))
    with pytest.raises(TokenUnusable, match="not the token of a service account"):
        await issuing.proxy(token).enroll()
    token.write_text(issuing.account_token(sub="system:serviceaccount:a:b:c"))
    with pytest.raises(TokenUnusable, match="has no identity"):
        await issuing.proxy(token).enroll()


async def test_missing_roots_are_reported(issuing: Issuing) -> None:
    proxy = Proxy(issuing, Line())
    issuing.roots.unlink()
    with pytest.raises(MaterialError, match=r"roots.pem: cannot be read"):
        await proxy.source.enroll()
