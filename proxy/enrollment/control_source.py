"""The control plane as the source of the proxy's credentials.

The proxy makes a new key for each certificate. The key stays in memory. The name to ask for is that
of the service account token, which is read again for each request: the kubelet replaces it.

Renewal. The proxy asks again at a random moment between 40 % and 60 % of the time that is left when
it gets a certificate. So the proxies that started together do not renew together. When a request
fails, it tries again after a pause that doubles and is varied at random. While the old certificate
is valid, the longest pause is long (`max_pause`): after an outage of the control plane, the proxies
return spread over that time, and not at once. Traffic does not notice; the old certificate is used
until it expires. Without a valid certificate the longest pause is short (`max_first_pause`).

Trust roots come from files. A change is used with the certificate at hand. If the new roots do not
verify it, they are not used yet; the proxy reports that, and asks for a new certificate.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import trio
from cryptography.hazmat.primitives import serialization

from proxy.config.schema_files import EnrollmentConfig, IdentityConfig
from proxy.enrollment.client import Dial, Enroller, EnrollmentFailed
from proxy.enrollment.messages import Ask
from proxy.enrollment.token import TokenUnusable, usable_token
from proxy.files import Settling, signature
from proxy.identity.credential_files import (
    Contents,
    MaterialError,
    MaterialNames,
    read_file,
)
from proxy.identity.credentials import parse_roots, utc_now
from proxy.identity.identity import Identity
from proxy.identity.key_strength import PrivateKey
from proxy.identity.signing_request import make_key, make_request
from proxy.identity.source import Changed, Failed
from proxy.identity.spiffe import SpiffeId, SpiffeIdError

_CHAIN = "the certificate from the control plane"
_KEY = "the key in memory"
# The part of the remaining lifetime after which a certificate is renewed.
_RENEW_FROM, _RENEW_TO = 0.4, 0.6
# Seconds between two looks at the wall clock: it may be set, or the machine may be suspended.
_LOOK = 60.0


@dataclass(frozen=True, slots=True)
class Place:
    """What the process provides: how to dial, the wall clock, and chance."""

    dial: Dial
    clock: Callable[[], datetime] = utc_now
    chance: random.Random = field(default_factory=random.Random)


class ControlCredentials:
    """See the top of this module, and CredentialSource."""

    def __init__(self, section: IdentityConfig, control: EnrollmentConfig, place: Place) -> None:
        self._settings = control
        self._paths = section.roots
        self._interval = section.reload_interval
        self._settle = section.settle
        self._clock, self._chance = place.clock, place.chance
        self._enroller = Enroller(control, place.dial, place.clock, place.chance)
        self._trust_domain = SpiffeId.parse(control.identity).trust_domain
        self._own: tuple[bytes, bytes] | None = None  # chain and key, in PEM
        self._digest = b""  # of the credentials in use
        self._wake = trio.Event()  # the certificate at hand does not fit the roots
        self._seen: tuple[object, ...] = ()  # signatures of the root files that were compared

    async def run(self, identity: Identity, changed: Changed, failed: Failed) -> None:
        """See CredentialSource."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_roots, identity, changed, failed)
            pause = 0.0
            while True:
                asked = 0.0
                try:
                    self._use(identity, await self.enroll(), changed)
                    self._seen = ()  # the roots may have changed meanwhile
                except EnrollmentFailed as error:
                    asked = error.retry_after
                    failed(error)
                except (TokenUnusable, MaterialError) as error:
                    failed(error)
                else:
                    pause = 0.0
                    await self._until_renewal(identity.not_after)
                    continue
                valid = identity.known and identity.validity_problem() is None
                most = self._settings.max_pause if valid else self._settings.max_first_pause
                pause = min(most, pause * 2 if pause else self._settings.min_pause)
                await trio.sleep(max(pause, min(asked, most)) * (0.5 + self._chance.random() / 2))

    async def enroll(self) -> Contents:
        """Ask once for a certificate of a new key. Raises EnrollmentFailed, TokenUnusable, and
        MaterialError if the trust roots are not usable."""
        roots = parse_roots(self._paths, self._read_roots(), self._clock())
        token, claims = usable_token(self._settings.token, self._clock())
        try:
            name = SpiffeId(self._trust_domain, *claims.account)
        except SpiffeIdError as error:
            raise TokenUnusable(f"its service account has no identity: {error}") from None
        key = make_key()
        request = make_request(key, name).decode()
        chain = await self._enroller.ask(Ask(token, request), roots)
        # read again: the watch may use newer roots by now
        return self._contents(chain.encode(), _pem(key), self._read_roots())

    def _use(self, identity: Identity, contents: Contents, changed: Changed) -> None:
        """Use a new certificate. Raises MaterialError."""
        identity.use(contents)
        self._own = contents.parts[0], contents.parts[1]
        self._digest = contents.digest
        changed(identity)

    def _contents(self, chain: bytes, key: bytes, roots: Sequence[bytes]) -> Contents:
        return Contents(MaterialNames(_CHAIN, _KEY, self._paths), (chain, key, *roots))

    def _read_roots(self) -> tuple[bytes, ...]:
        return tuple(map(read_file, self._paths))

    async def _until_renewal(self, end: datetime) -> None:
        """Wait until it is time to renew a certificate that expires at `end`."""
        now = self._clock()
        part = self._chance.uniform(_RENEW_FROM, _RENEW_TO)
        moment = now + max(end - now, timedelta()) * part
        self._wake = trio.Event()
        while (left := (moment - self._clock()).total_seconds()) > 0:
            with trio.move_on_after(min(left, _LOOK)):
                await self._wake.wait()
            if self._wake.is_set():
                # Roots change in all pods at about the same time.
                await trio.sleep(self._chance.random() * self._settings.max_first_pause)
                return

    async def _watch_roots(self, identity: Identity, changed: Changed, failed: Failed) -> None:
        """Use changed trust roots with the certificate at hand."""
        settling = Settling(self._settle)
        while True:
            found = self._signatures()
            if self._own is not None and (found != self._seen or settling.waiting):
                self._seen = found
                try:
                    contents = self._contents(*self._own, self._read_roots())
                    if contents.digest == self._digest:
                        settling.forget()
                    elif settling.agreed(contents.digest, trio.current_time()):
                        self._use(identity, contents, changed)
                except MaterialError as error:
                    failed(error)
                    self._wake.set()
            await trio.sleep(
                min(self._interval, settling.settle) if settling.waiting else self._interval
            )

    def _signatures(self) -> tuple[object, ...]:
        return tuple(map(signature, self._paths))


def _pem(key: PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
