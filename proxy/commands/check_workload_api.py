"""The check of a SPIFFE Workload API: it answers, and has an identity that the proxy can use.

The agent decides by the process that asks. So another process than the proxy may get another
identity, or none.
"""

from __future__ import annotations

import trio

from proxy.commands.checks import Result, check_lifetime
from proxy.config.schema import Config
from proxy.config.schema_files import IdentityConfig, WorkloadApiConfig
from proxy.enrollment.workload_api import WorkloadApiFailed, WorkloadCredentials
from proxy.identity import credentials
from proxy.identity.credential_files import MaterialError
from proxy.identity.identity import Identity, TLSSettings

_NAME = "certificates"
_REMEDY = (
    "look at the log of the agent, and at its entries for this pod; the agent may know this command"
    " as another process than the proxy"
)


async def check_workload_api(
    config: Config, section: IdentityConfig, spiffe: WorkloadApiConfig, timeout: float
) -> tuple[list[Result], Identity | None]:
    """Ask for an identity, within `timeout` seconds."""
    source = WorkloadCredentials(spiffe)
    identity = Identity(
        None,
        TLSSettings(session_lifetime=section.session_lifetime, own_domain=config.trust_domain),
    )
    try:
        with trio.fail_after(timeout):
            identity.use(await source.fetch())
    except trio.TooSlowError:
        failure = f"{source} sent no complete message within {timeout:g} s"
    except (WorkloadApiFailed, MaterialError) as error:
        failure = str(error)
    else:
        now = credentials.utc_now()
        what = f"{source} has the identity {identity.id}: the certificate"
        results = [check_lifetime(_NAME, what, identity.certificate, now)]
        results += [
            check_lifetime(_NAME, f"trust root {credentials.name_of(root)}", root, now)
            for root in identity.roots
        ]
        return results, identity
    return [Result(_NAME, "failed", failure, _REMEDY)], None
