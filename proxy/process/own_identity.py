"""The proxy's own identity at run time: its source, and the end of a certificate.

A changed certificate, key or trust root is used at once. Open connections continue, unless the
change removes the trust root that verified their peer. Then they end as if the peer's certificate
had expired (net/tls/expiry.py).

Files are read at the start: a proxy with invalid files does not start. Another source brings the
first certificate later. Until then the proxy is not ready, and no flow starts, so nothing is sent
or accepted without the identity (`known`).
"""

from __future__ import annotations

import logging

import trio

from proxy.config.schema import Config
from proxy.config.schema_files import IdentityConfig
from proxy.enrollment.client import Dial
from proxy.enrollment.control_source import ControlCredentials, Place
from proxy.enrollment.workload_api import WorkloadCredentials
from proxy.errors import StartError
from proxy.identity.identity import Identity, MaterialError, MaterialFiles, TLSSettings
from proxy.identity.revocation import RevocationList, Revoked
from proxy.identity.source import CredentialSource, FileSource, report_expiry
from proxy.net.tls.expiry import Expiries
from proxy.telemetry.metrics import Metrics

_log = logging.getLogger("isthmus")


def load_identity(config: Config) -> Identity | None:
    """The configured identity, or None. From files it is complete; another source brings the
    credentials later. Raises StartError.
    """
    section = config.identity
    if section is None:
        return None
    try:
        return Identity(
            _files(section),
            TLSSettings(
                session_lifetime=section.session_lifetime,
                settle=section.settle,
                own_domain=config.trust_domain,
            ),
        )
    except MaterialError as error:
        raise StartError(str(error), 64) from error


def _files(section: IdentityConfig) -> MaterialFiles | None:
    if section.certificate is None or section.key is None:
        return None
    return MaterialFiles(section.certificate, section.key, section.roots)


def _source(section: IdentityConfig, dial: Dial) -> CredentialSource:
    """The source of the credentials. Raises StartError."""
    if section.source == "files":
        return FileSource(section.reload_interval)
    if section.control is not None:
        return ControlCredentials(section, section.control, Place(dial))
    if section.spiffe is not None:
        return WorkloadCredentials(section.spiffe)
    raise StartError(f"identity.{section.source} is missing", 64)


class OwnIdentity:
    """The identity of this process, or None. `known` is set when its credentials are there, or none
    are configured. `expiries`: the connections whose lifetime certificates limit. `dial` opens
    connections to where the credentials come from. Raises StartError.
    """

    def __init__(self, config: Config, metrics: Metrics, dial: Dial) -> None:
        self.current = load_identity(config)
        self.known = trio.Event()
        self._metrics = metrics
        self._section = section = config.identity
        self._source = _source(section, dial) if section is not None else None
        self._why = ""
        self._unusable = "cannot use the changed certificate, key or roots"
        if section is not None and section.source != "files":
            self._unusable = "cannot renew the certificate, key or roots"
        self._bounded = section is not None and section.end_with_certificate
        grace = section.expiry_grace if section is not None else 0.0
        self.expiries = Expiries(grace, metrics.count_certificate_end, enabled=self._bounded)
        self._revocations = self._load_revocations(section) if section is not None else None
        if self.current is None:
            self.known.set()
        elif self.current.known:
            self._note(self.current)

    def _load_revocations(self, section: IdentityConfig) -> RevocationList | None:
        """Raises StartError."""
        if section.revoked is None or self.current is None:
            return None
        try:
            found = RevocationList(section.revoked, section.settle)
        except MaterialError as error:
            raise StartError(str(error), 64) from error
        self.current.revoked = found.current
        return found

    def not_ready(self) -> str | None:
        """Why peers refuse our certificate now (not yet valid, or expired), or why there is none
        yet; None if they accept it."""
        if self.current is None:
            return None
        problem = self.current.validity_problem()
        if problem is not None and not self.current.known and self._why:
            return f"{problem}: {self._why}"
        return problem

    async def watch(self) -> None:
        """Keep the credentials current until cancelled."""
        identity, source, section = self.current, self._source, self._section
        if identity is None or source is None or section is None:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(report_expiry, identity, section.reload_interval, _warn)
            if self._revocations is not None:
                nursery.start_soon(
                    self._revocations.watch,
                    section.reload_interval,
                    self._revoke,
                    self._not_revoked,
                )
            if identity.known:
                _warn_of(identity)
            await source.run(identity, self._changed, self._failed)

    def _changed(self, identity: Identity) -> None:
        self._metrics.count_identity_reload("ok")
        first = not self.known.is_set()
        self._note(identity)
        if first:
            _warn_of(identity)
        self.expiries.untrust(identity.roots)
        _log.info(
            "new certificate or trust roots in use: %s, valid until %s",
            identity.id,
            identity.not_after.isoformat(),
        )

    def _revoke(self, revoked: Revoked) -> None:
        """Use a new list, for open connections too."""
        if self.current is None:
            return
        self.current.revoked = revoked
        self.expiries.revoke(lambda info: revoked.has(info.peer_identity or "", info.peer_serial))
        self._metrics.count_identity_reload("ok")
        count = len(revoked.identities), len(revoked.serials)
        _log.warning("new list of revoked peers in use: %d identities, %d certificates", *count)

    def _not_revoked(self, error: Exception) -> None:
        self._metrics.count_identity_reload("error")
        _log.error("cannot use the list of revoked peers, keeping the old one: %s", error)

    def _failed(self, error: Exception) -> None:
        self._metrics.count_identity_reload("error")
        self._why = str(error)
        if self.known.is_set():
            _log.error("%s, keeping the old ones: %s", self._unusable, error)
        else:
            _log.error("there is no certificate yet: %s", error)

    def _note(self, identity: Identity) -> None:
        self.known.set()
        self._metrics.set_validity(
            identity.not_before.timestamp(),
            identity.not_after.timestamp(),
            identity.roots_not_after.timestamp(),
        )


def _warn(sentence: str) -> None:
    _log.warning("%s", sentence)


def _warn_of(identity: Identity) -> None:
    for warning in identity.warnings:
        _warn(warning)
