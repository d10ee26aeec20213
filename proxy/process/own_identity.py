"""The proxy's own identity at run time: loading, reloading, and the end of a certificate.

A changed certificate, key or trust root is used at once. Open connections continue, unless the
change removes the trust root that verified their peer. Then they end as if the peer's certificate
had expired (net/tls/expiry.py).
"""

from __future__ import annotations

import logging

from proxy.config.schema import Config
from proxy.errors import StartError
from proxy.identity import identity as identities
from proxy.identity.identity import Identity, MaterialError, MaterialFiles, TLSSettings
from proxy.net.tls.expiry import Expiries
from proxy.telemetry.metrics import Metrics

_log = logging.getLogger("isthmus")


def load_identity(config: Config) -> Identity | None:
    """The configured identity, or None. Raises StartError."""
    if config.identity is None:
        return None
    files = MaterialFiles(config.identity.certificate, config.identity.key, config.identity.roots)
    try:
        identity = Identity(
            files,
            TLSSettings(
                session_lifetime=config.identity.session_lifetime, settle=config.identity.settle
            ),
        )
    except MaterialError as error:
        raise StartError(str(error), 64) from error
    if identity.id.trust_domain != config.trust_domain:
        raise StartError(
            f"{files.certificate} is for the trust domain {identity.id.trust_domain}, not"
            f" {config.trust_domain}",
            64,
        )
    return identity


class OwnIdentity:
    """The identity of this process, or None. `expiries`: the connections whose lifetime
    certificates limit.
    """

    def __init__(self, config: Config, metrics: Metrics) -> None:
        self.current = load_identity(config)
        self._metrics = metrics
        section = config.identity
        self._interval = section.reload_interval if section is not None else 0.0
        self._bounded = section is not None and section.end_with_certificate
        grace = section.expiry_grace if section is not None else 0.0
        self.expiries = Expiries(grace, metrics.count_certificate_end, enabled=self._bounded)
        if self.current is not None:
            self._note(self.current)

    def not_ready(self) -> str | None:
        """Why peers refuse our certificate now (not yet valid, or expired); None if they accept
        it."""
        return self.current.validity_problem() if self.current is not None else None

    async def watch(self) -> None:
        """Reload changed files until cancelled."""
        if self.current is None:
            return
        for warning in self.current.warnings:
            _log.warning("%s", warning)
        await identities.watch(
            self.current,
            self._interval,
            self._changed,
            self._broken,
            lambda sentence: _log.warning("%s", sentence),
        )

    def _changed(self, identity: Identity) -> None:
        self._metrics.count_identity_reload("ok")
        self._note(identity)
        self.expiries.untrust(identity.roots)
        _log.info(
            "new certificate or trust roots in use: %s, valid until %s",
            identity.id,
            identity.not_after.isoformat(),
        )

    def _broken(self, error: MaterialError) -> None:
        self._metrics.count_identity_reload("error")
        _log.error(
            "cannot use the changed certificate, key or roots, keeping the old ones: %s", error
        )

    def _note(self, identity: Identity) -> None:
        self._metrics.set_validity(
            identity.not_before.timestamp(),
            identity.not_after.timestamp(),
            identity.roots_not_after.timestamp(),
        )
