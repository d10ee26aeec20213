"""Decides on requests for certificates: who the sender is, what it may have, and how often.

The sender is who the API server says its token is from (TokenReview, for exactly our audience). A
token for the API server itself, or for another service, is refused: its receiver could otherwise
get a certificate in the name of its sender. The only name that is granted is that of the service
account. The API server also checks that the pod to which the token is bound still exists, but
remembers its answer for some seconds. So a pod that discovery knows under this name with another
uid is refused.

Before the API server is asked, the token must look like one for our audience that has not expired.
Nothing relies on that; it only saves the API server the work.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Annotated

import trio

from control.contract import SpiffeId, SpiffeIdError
from control.identity.issuer import Issuer, NoIssuer
from control.identity.rate_limit import RateLimit
from control.kube.api_errors import KubeError
from control.kube.client import Client
from control.kube.event_recorder import EventContent, EventRecorder
from control.kube.objects import ObjectReference, UserInfo
from control.kube.resources import Key
from control.kube.reviews import review_token, service_account
from proxy.enrollment.messages import AUDIENCE, SKEW, Ask, Granted
from proxy.enrollment.token import TokenUnusable, claims_of
from proxy.identity.credentials import utc_now, when
from proxy.identity.issue import Validity
from proxy.identity.signing_request import RequestRefused, check_request
from proxy.settings.declare import Section, number, octets, ratio, seconds

_log = logging.getLogger("isthmus.control")

_POD = "authentication.kubernetes.io/pod-name", "authentication.kubernetes.io/pod-uid"


class IssuingLimits(Section, frozen=True):
    """Certificates for proxies."""

    lifetime: Annotated[
        float,
        seconds(
            60, 30 * 86400, "lifetime of a certificate; it never outlives the issuer's certificate"
        ),
    ] = 86400.0
    identity_rate: Annotated[
        float, ratio(0.01, 100_000, "certificates per second for one identity")
    ] = 20.0
    identity_burst: Annotated[
        int, number(1, 1_000_000, "certificates for one identity at once")
    ] = 1000
    address_rate: Annotated[float, ratio(0.01, 100_000, "requests per second from one address")] = (
        1.0
    )
    address_burst: Annotated[int, number(1, 1_000_000, "requests from one address at once")] = 60
    max_connections: Annotated[
        int, number(1, 100_000, "maximum open connections; above: the oldest is closed")
    ] = 512
    timeout: Annotated[
        float, seconds(0.1, 300, "maximum time for the TLS handshake, and then for the request")
    ] = 10.0
    max_remembered: Annotated[
        int,
        number(16, 10_000_000, "maximum identities, and addresses, whose rate is remembered"),
    ] = 65536
    max_body_bytes: Annotated[int, octets(4096, 2**20, "maximum size of the body of a request")] = (
        48 * 1024
    )


class Refused(Exception):
    """A request is refused. `reason` is a label for metrics and logs. `retry_after`: seconds; 0:
    another attempt with the same request is of no use."""

    def __init__(self, reason: str, words: str, retry_after: float = 0.0) -> None:
        super().__init__(words)
        self.reason = reason
        self.retry_after = retry_after


@dataclass(slots=True)
class IssuingCounts:
    """For metrics. `refused` by reason."""

    issued: int = 0
    refused: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Sender:
    """Who has sent a request: a service account, and the pod of its token ("": of none)."""

    namespace: str
    account: str
    pod: str
    uid: str

    @classmethod
    def of(cls, user: UserInfo) -> Sender | None:
        """The sender by its token's user; None: not a service account."""
        found = service_account(user)
        if found is None:
            return None
        pod, uid = (next(iter((user.extra or {}).get(key) or ()), "") for key in _POD)
        return cls(*found, pod, uid)


@dataclass(frozen=True, slots=True)
class World:
    """What the authority uses. `uid_of`: the uid of a pod by namespace and name, if it is known.
    `clock`: the wall clock."""

    client: Client
    recorder: EventRecorder
    uid_of: Callable[[Key], str | None]
    clock: Callable[[], datetime] = utc_now


class Authority:
    """Issues certificates of one trust domain."""

    def __init__(
        self, trust_domain: str, issuer: Issuer, limits: IssuingLimits, world: World
    ) -> None:
        self.limits = limits
        self.issuer = issuer
        self.counts = IssuingCounts()
        self.addresses = RateLimit(limits.address_rate, limits.address_burst, limits.max_remembered)
        self._identities = RateLimit(
            limits.identity_rate, limits.identity_burst, limits.max_remembered
        )
        self.recorder = world.recorder
        self._trust_domain = trust_domain
        self._world = world

    def check_rate(self, address: str) -> None:
        """Count a connection from an address. Raises Refused."""
        wait = self.addresses.take(address, trio.current_time())
        if wait:
            raise Refused("address_rate", "too many requests from this address", wait)

    async def issue(self, ask: Ask) -> Granted:
        """A certificate for a request. Raises Refused."""
        sender = await self._sender(ask.token)
        try:
            return self._issue(ask, sender)
        except Refused as refused:
            self._report(sender, refused)
            raise

    async def _sender(self, token: str) -> Sender:
        try:
            claims_of(token).check(AUDIENCE, self._world.clock())
        except TokenUnusable as error:
            raise Refused("token", f"the token is not usable: {error}") from None
        try:
            user = await review_token(self._world.client, token, AUDIENCE)
        except KubeError as error:
            _log.warning("a token could not be reviewed: %s", error)
            words = "the API server could not review the token"
            raise Refused("review", words, 1.0) from error
        if user is None:
            words = "the API server does not accept the token for this audience"
            raise Refused("token", words)
        sender = Sender.of(user)
        if sender is None:
            raise Refused("account", f"{user.username!r} is not a service account")
        return sender

    def _issue(self, ask: Ask, sender: Sender) -> Granted:
        if sender.uid:
            known = self._world.uid_of((sender.namespace, sender.pod))
            if known is not None and known != sender.uid:
                words = f"the pod {sender.namespace}/{sender.pod} was replaced by another one"
                raise Refused("pod", words)
        try:
            identity = SpiffeId(self._trust_domain, sender.namespace, sender.account)
        except SpiffeIdError as error:
            raise Refused("account", f"the service account has no identity: {error}") from None
        wait = self._identities.take(str(identity), trio.current_time())
        if wait:
            raise Refused("identity_rate", f"too many requests for {identity}", wait)
        try:
            key = check_request(ask.request.encode(), identity)
        except RequestRefused as error:
            raise Refused(f"request_{error.flaw}", str(error)) from None
        try:
            validity = Validity(timedelta(seconds=self.limits.lifetime), SKEW)
            signed = self.issuer.sign(identity, key, validity)
        except NoIssuer as error:
            raise Refused("issuer", str(error), 5.0) from None
        self.counts.issued += 1
        _log.info(
            "certificate for %s (pod %s): serial %x, valid until %s",
            identity,
            sender.pod or "unknown",
            signed.certificate.serial_number,
            when(signed.certificate.not_valid_after_utc),
        )
        return Granted(signed.chain.decode())

    def _report(self, sender: Sender, refused: Refused) -> None:
        """Tell the owner of the pod."""
        if sender.pod:
            about = ObjectReference("Pod", sender.namespace, sender.pod, sender.uid, "v1")
            words = f"no certificate: {refused} ({refused.reason})"
            self.recorder.record(
                EventContent(about, "CertificateRefused", words, "Issue", warning=True)
            )
