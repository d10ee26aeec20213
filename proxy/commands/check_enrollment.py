"""The check of a certificate that comes from the control plane: the trust roots and the token are
usable, and the control plane issues a certificate. It asks for one as the proxy does, and does not
keep it.
"""

from __future__ import annotations

from datetime import datetime, timedelta

import trio

from proxy.commands.checks import Result, check_lifetime
from proxy.config.schema import Config
from proxy.config.schema_files import EnrollmentConfig, IdentityConfig
from proxy.enrollment.client import EnrollmentFailed
from proxy.enrollment.control_source import ControlCredentials, Place
from proxy.enrollment.messages import AUDIENCE, SKEW
from proxy.enrollment.token import TokenUnusable, expiry, usable_token
from proxy.identity import credentials
from proxy.identity.credential_files import MaterialError, read_file
from proxy.identity.identity import Identity, TLSSettings
from proxy.identity.inspect import in_words
from proxy.net.dial import Dialer

_NAME = "certificates"
_TOLERATED = 5.0


async def check_enrollment(
    config: Config, section: IdentityConfig, control: EnrollmentConfig, timeout: float
) -> tuple[list[Result], Identity | None]:
    """Ask the control plane for a certificate, within `timeout` seconds."""
    now = credentials.utc_now()
    results = [*_roots(section, now), _token(control, now)]
    if any(result.status == "failed" for result in results):
        return results, None
    source = ControlCredentials(section, control, Place(Dialer().dial))
    identity = Identity(
        None,
        TLSSettings(session_lifetime=section.session_lifetime, own_domain=config.trust_domain),
    )
    try:
        with trio.fail_after(timeout):
            identity.use(await source.enroll())
    except trio.TooSlowError:
        failure = f"no certificate from {control.address} within {timeout:g} s"
    except (EnrollmentFailed, TokenUnusable, MaterialError) as error:
        failure = str(error)
    else:
        what = f"{control.address} issues certificates for {identity.id}: the one of this check"
        results.append(check_lifetime(_NAME, what, identity.certificate, now))
        return [*results, *_clock(identity, credentials.utc_now())], identity
    remedy = (
        "running proxies keep their certificate until it expires; the log of the control plane and"
        " `kubectl describe pod` have the reason of a refusal"
    )
    return [*results, Result(_NAME, "failed", failure, remedy)], None


def _roots(section: IdentityConfig, now: datetime) -> list[Result]:
    try:
        parts = tuple(map(read_file, section.roots))
        roots = credentials.parse_roots(section.roots, parts, now)
    except MaterialError as error:
        remedy = f"look at the file with: isthmus identity show {error.path}"
        return [Result(_NAME, "failed", str(error), remedy)]
    return [
        check_lifetime(_NAME, f"trust root {credentials.name_of(root)}", root, now)
        for root in roots
    ]


def _clock(identity: Identity, now: datetime) -> list[Result]:
    """Compare this clock with that of the control plane: the new certificate is valid from SKEW
    before its creation, except if its issuer is that young.
    """
    leaf, *above = identity.chain
    begin = leaf.not_valid_before_utc
    if any(begin <= authority.not_valid_before_utc for authority in above):
        return []
    difference = (begin + SKEW - now).total_seconds()
    # A certificate has whole seconds, and the answer took a moment.
    if abs(difference) <= _TOLERATED:
        return [Result("clock", "ok", "the control plane has the same time")]
    words = in_words(timedelta(seconds=abs(difference)))
    what = f"the control plane's clock is {words} {'ahead' if difference > 0 else 'behind'}"
    return [Result("clock", "warning", what, "synchronise both clocks with NTP")]


def _token(control: EnrollmentConfig, now: datetime) -> Result:
    try:
        _, claims = usable_token(control.token, now)
    except TokenUnusable as error:
        remedy = f"mount a projected service account token with the audience {AUDIENCE}"
        return Result(_NAME, "failed", str(error), remedy)
    left = in_words(expiry(claims) - now)
    account = "/".join(claims.account)
    what = f"the token in {control.token} is of the service account {account}, for {left} more"
    return Result(_NAME, "ok", what)
