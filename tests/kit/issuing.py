"""Issuing on loopback: the control plane's end with an API server in memory, and proxies' ends."""

from __future__ import annotations

import base64
import json
import random
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import trio

from control.contract import SpiffeId
from control.identity.authority import Authority, IssuingLimits, World
from control.identity.issuer import Issuer
from control.identity.own import OwnCredentials
from control.identity.service import IssuingService
from control.kube.access import Access
from control.kube.client import Client
from control.kube.event_recorder import EventRecorder
from control.kube.resources import Key
from lab.kube_api.server import ApiServer
from proxy.config.schema_files import EnrollmentConfig, IdentityConfig
from proxy.enrollment.client import Dial
from proxy.enrollment.control_source import ControlCredentials, Place
from proxy.enrollment.messages import ALPN, AUDIENCE
from proxy.identity.identity import Identity, TLSSettings
from proxy.identity.issue import Issued, Validity, make_root
from proxy.net.accept import bind
from proxy.net.address import Address
from proxy.net.dial import Dialer

DOMAIN = "cluster.local"
CONTROL = SpiffeId(DOMAIN, "isthmus", "isthmus-control")
WEB = SpiffeId(DOMAIN, "shop", "web")
LOOPBACK = "127.0.0.1"


def jwt(claims: dict[str, Any]) -> str:
    """A token with these claims. Its signature is not one."""
    parts = [{"alg": "RS256"}, claims]
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in parts]
    return b".".join((*encoded, secrets.token_urlsafe(32).encode())).decode()


def write_issuer(folder: Path, issuer: Issued, *above: Issued) -> None:
    """Write the files of a Secret, as cert-manager names them."""
    chain = b"".join(issued.certificate_pem for issued in (issuer, *above))
    (folder / "tls.crt").write_bytes(chain)
    (folder / "tls.key").write_bytes(issuer.key_pem)
    (folder / "tls.key").chmod(0o600)


@dataclass
class Issuing:
    """The control plane's end. `folder` has the issuer and the roots. `now` is the wall clock of
    both ends."""

    folder: Path
    server: ApiServer
    root: Issued = field(default_factory=lambda: make_root(DOMAIN))
    limits: dict[str, Any] = field(default_factory=dict)
    pods: dict[Key, str] = field(default_factory=dict)
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    port: int = 0

    def __post_init__(self) -> None:
        self.directory = self.folder / "issuer"
        self.directory.mkdir()
        self.roots = self.folder / "roots.pem"
        self.roots.write_bytes(self.root.certificate_pem)
        write_issuer(self.directory, self.root)
        self.server.behaviour.tokens[""] = {}  # the control plane's own requests
        client = Client(Access("api.test", 6443, None), dial=self.server.dial)
        self.recorder = EventRecorder(client, "isthmus.dev/control", "control-0")
        self.issuer = Issuer(self.directory, (self.roots,), CONTROL, self.now)
        self.authority = Authority(
            DOMAIN,
            self.issuer,
            IssuingLimits(**self.limits),
            World(client, self.recorder, self.pods.get, self.now),
        )
        self.identity = Identity(
            None, TLSSettings(session_lifetime=0.0, open_protocols=frozenset((ALPN,)))
        )
        self.service = IssuingService(self.authority, self.identity)

    def account_token(self, name: SpiffeId = WEB, **changes: Any) -> str:
        """A token that the API server accepts for our audience. `changes`: of the claims. With
        `pod`: bound to that pod."""
        user = f"system:serviceaccount:{name.namespace}:{name.service_account}"
        pod = changes.pop("pod", None)
        end = (self.now() + timedelta(days=7)).timestamp()
        token = jwt({"sub": user, "aud": [AUDIENCE], "exp": int(end), **changes})
        found: dict[str, Any] = {"username": user}
        if pod is not None:
            found["extra"] = {
                "authentication.kubernetes.io/pod-name": [pod[0]],
                "authentication.kubernetes.io/pod-uid": [pod[1]],
            }
        self.server.behaviour.tokens[token] = {"user": found, "audiences": [AUDIENCE]}
        return token

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Issuing]:
        """Serve on loopback, with the own certificate by the issuer."""
        self.issuer.read()
        listener = bind(Address(LOOPBACK, 0))
        self.port = listener.getsockname()[1]
        known = trio.Event()
        own = OwnCredentials(
            self.issuer, CONTROL, Validity(timedelta(days=3), timedelta(minutes=5))
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(own.run, self.identity, lambda _: known.set(), lambda _: None)
            await known.wait()
            nursery.start_soon(self.service.serve, [listener])  # noqa: ASYNC113  # the socket listens already
            yield self
            nursery.cancel_scope.cancel()

    def proxy(
        self, token: Path, dial: Dial | None = None, seed: int = 1, **settings: Any
    ) -> ControlCredentials:
        """A proxy's end."""
        control = EnrollmentConfig(
            **{
                "address": f"{LOOPBACK}:{self.port}",
                "identity": str(CONTROL),
                "token": token,
                **settings,
            }
        )
        section = IdentityConfig(
            source="control", roots=(self.roots,), control=control, settle=0.0, reload_interval=1.0
        )
        place = Place(dial or Dialer().dial, self.now, random.Random(seed))
        return ControlCredentials(section, control, place)
