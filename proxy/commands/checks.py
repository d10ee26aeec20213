"""The checks of `isthmus check` that need no traffic, or one connection to the control plane:
configuration, certificates, clock, directory.

Every check returns results and never raises: a failed check is a finding, and the next checks still
run.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509

from proxy import directory
from proxy.commands.directory import counted
from proxy.config import load as config
from proxy.config.schema import Config
from proxy.directory import Directory, DirectoryError, watcher
from proxy.directory.channel.connector import Connector
from proxy.directory.channel.messages import ChannelError, Hello
from proxy.directory.channel.source import ControlSource
from proxy.directory.former_identities import FormerIdentities
from proxy.identity import credential_files, credentials
from proxy.identity.identity import WARN_AT, Identity, MaterialError, MaterialFiles, TLSSettings
from proxy.identity.inspect import expiry_in_words, in_words, life_left
from proxy.net.dial import Dialer
from proxy.net.tls.expiry import Expiries
from proxy.settings.sources import ConfigError

Status = Literal["ok", "warning", "failed", "skipped"]

# A time before this software was written means that the clock was never set (machines without a
# battery start in 1970 or 2000).
_EARLIEST = datetime(2026, 1, 1, tzinfo=UTC)
# Differences below the first are normal (the Date header has whole seconds). Beyond the second,
# certificates that last hours and traces stop working.
_SKEW_WARNING = 3.0
_SKEW_FAILURE = 60.0
# The allowed difference between wall clock and monotonic clock over the few seconds of a check.
_STEP = 1.0


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one check: `what` is the finding, `remedy` says how to fix it ("" if nothing is
    to be done).
    """

    name: str
    status: Status
    what: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Moment:
    """Both clocks, read together."""

    wall: datetime
    monotonic: float

    @classmethod
    def now(cls) -> "Moment":
        return cls(credentials.utc_now(), time.monotonic())


def check_configuration(
    path: Path | None, environment: Mapping[str, str]
) -> tuple[list[Result], Config | None]:
    """Read the configuration; every mistake becomes a result."""
    name = "configuration"
    try:
        found = config.load(path, environment)
    except ConfigError as error:
        remedy = "docs/configuration.md lists all settings and their limits"
        return [
            Result(name, "failed", f"{error.source}: {mistake}", remedy)
            for mistake in error.mistakes
        ], None
    source = str(path) if path is not None else "defaults and environment"
    return [
        Result(name, "ok", f"{source}: cluster {found.cluster}, trust domain {found.trust_domain}")
    ], found


def check_certificates(settings: Config) -> tuple[list[Result], Identity | None]:
    """Load the identity as the proxy does, with all its checks."""
    name = "certificates"
    section = settings.identity
    if section is None:
        return [
            Result(
                name,
                "skipped",
                "no identity is configured: traffic is clear text",
                "configure the section identity",
            )
        ], None
    if section.certificate is None or section.key is None:
        what = f"the certificate comes from another source ({section.source})"
        return [Result(name, "skipped", what)], None
    files = MaterialFiles(section.certificate, section.key, tuple(section.roots))
    try:
        identity = Identity(
            files, TLSSettings(session_lifetime=section.session_lifetime, settle=section.settle)
        )
    except MaterialError as error:
        return [
            Result(
                name,
                "failed",
                str(error),
                f"look at the file with: isthmus identity show {error.path}",
            )
        ], None
    results = [Result(name, "warning", warning) for warning in identity.warnings]
    if identity.id.trust_domain != settings.trust_domain:
        what = (
            f"the certificate is for the trust domain {identity.id.trust_domain}, but trust_domain"
            f" is {settings.trust_domain}"
        )
        results.append(
            Result(name, "warning", what, "set trust_domain to that of the certificates")
        )
    now = credentials.utc_now()
    results.append(
        check_lifetime(name, f"{identity.id}: the certificate", identity.certificate, now)
    )
    results += [
        check_lifetime(name, f"trust root {credentials.name_of(root)}", root, now)
        for root in identity.roots
    ]
    return results, identity


def check_lifetime(name: str, what: str, certificate: x509.Certificate, now: datetime) -> Result:
    """How long a certificate is valid; `what` names it."""
    words = f"{what} {expiry_in_words(certificate, now)}"
    if life_left(certificate, now) > WARN_AT[0]:
        return Result(name, "ok", words)
    return Result(
        name,
        "warning",
        words,
        "find out why it was not renewed: less than a third of its lifetime is left",
    )


def check_clock(
    certificate: Path | None, started: Moment, reported: datetime | None
) -> list[Result]:
    """Check this machine's clock against the certificate, the running proxy's Date header
    (`reported`), and itself.

    `started` was read before the other checks: if the two clocks have diverged since, the time was
    changed.
    """
    name = "clock"
    now = Moment.now()
    results = []
    if now.wall < _EARLIEST:
        what = f"it is {credentials.when(now.wall)} here, before this software was written"
        results.append(Result(name, "failed", what, "set the clock of this machine (NTP)"))
    drift = (now.wall - started.wall).total_seconds() - (now.monotonic - started.monotonic)
    if abs(drift) > _STEP:
        what = f"the clock jumped by {drift:+.1f} s while these checks ran"
        results.append(Result(name, "warning", what, "the time is set in steps; let NTP slew it"))
    results += _clock_by_certificate(name, certificate, now.wall)
    if reported is not None:
        results.append(_clock_by_proxy(name, now.wall, reported))
    return results or [
        Result(
            name,
            "ok",
            f"it is {credentials.when(now.wall)} here; there is nothing to compare it with",
        )
    ]


def _clock_by_certificate(name: str, path: Path | None, now: datetime) -> list[Result]:
    if path is None:
        return []
    try:
        leaf = credentials.parse_certificates(path, credential_files.read_file(path))[0]
    except MaterialError:
        return []  # check_certificates reports it
    start, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    if now < start:
        what = (
            f"it is {credentials.when(now)} here, but our certificate becomes valid"
            f" {in_words(start - now)} later: this clock is slow"
        )
        return [
            Result(
                name, "failed", f"{what}, or the issuer's is fast", "compare both clocks with NTP"
            )
        ]
    if now > end:
        what = (
            f"it is {credentials.when(now)} here, and our certificate expired"
            f" {in_words(now - end)} ago"
        )
        return [
            Result(
                name,
                "warning",
                what,
                "if the certificate is new this clock is fast; otherwise renew it",
            )
        ]
    return [
        Result(
            name,
            "ok",
            f"it is {credentials.when(now)} here, {in_words(now - start)} after the start of our"
            " certificate",
        )
    ]


def _clock_by_proxy(name: str, now: datetime, reported: datetime) -> Result:
    difference = (reported - now).total_seconds()
    if abs(difference) <= _SKEW_WARNING:
        return Result(name, "ok", "the running proxy has the same time")
    status: Status = "failed" if abs(difference) > _SKEW_FAILURE else "warning"
    words = (
        f"the running proxy's clock is {in_words(timedelta(seconds=abs(difference)))}"
        f" {'ahead' if difference > 0 else 'behind'}"
    )
    return Result(name, status, words, "synchronise both clocks with NTP")


def check_directory(settings: Config) -> tuple[list[Result], Directory | None]:
    """Read the directory file as the proxy does; every mistake becomes a result."""
    name = "directory"
    if settings.directory is None:
        what = (
            "no directory is configured: connections go to their original destination, in clear"
            " text"
        )
        return [Result(name, "skipped", what, "configure directory.file")], None
    path = settings.directory.file
    if path is None:  # check_control has the result
        return [], None
    try:
        text = watcher.read(path)
        found = directory.parse(text, str(path))
        if settings.directory.require_end and not watcher.ended(text):
            raise DirectoryError(
                str(path), ["does not end with a line `...`, which directory.require_end requires"]
            )
    except DirectoryError as error:
        remedy = "fix the file, or directory.file"
        return [
            Result(name, "failed", f"{error.source}: {mistake}", remedy)
            for mistake in error.mistakes
        ], None
    return [
        Result(
            name,
            "ok",
            f"{path}: {counted(len(found.services), 'service')},"
            f" {counted(found.endpoint_count, 'endpoint')}",
        )
    ], found


async def check_control(
    settings: Config, identity: Identity | None, timeout: float
) -> list[Result]:
    """If the directory comes from the control plane: connect to it as the proxy does. `timeout` in
    seconds."""
    section = settings.directory
    if section is None or section.control is None:
        return []
    name, control = "directory", section.control
    if identity is None:
        what = f"the control plane at {control.address} was not tried without a valid certificate"
        return [Result(name, "skipped", what, "see the results for certificates")]
    source = ControlSource(
        control,
        Hello(settings.pod.node, settings.pod.zone, settings.pod.name),
        # this connection is closed at once, so no certificate ends it
        Connector(identity, Dialer().dial, Expiries(0.0, lambda _: None, enabled=False)),
        FormerIdentities(section.remember, section.max_remembered),
    )
    try:
        replica = await source.probe(timeout)
    except ChannelError as error:
        what = f"the control plane at {control.address} cannot be used: {error}"
        remedy = "fix directory.control, or look at the pods and logs of the control plane"
        return [Result(name, "failed", what, remedy)]
    what = f"the control plane at {control.address} answers, replica {replica}"
    return [Result(name, "ok", what)]


def worst(results: Iterable[Result]) -> Status:
    """The overall status: failed before warning before ok; skipped only if there is nothing
    else."""
    found = {result.status for result in results}
    order: tuple[Status, ...] = ("failed", "warning", "ok")
    return next((status for status in order if status in found), "skipped")
