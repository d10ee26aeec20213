"""The settings of the control plane: limits, waits and queues, each with its range and default.

Each section is declared beside the code that obeys it (proxy/settings/declare.py). They come from
one YAML file and the environment, written like the proxy's (docs/configuration.md):
`ISTHMUS_WATCH__PAGE_SIZE=100` is the setting `watch.page_size`. docs/control-plane.md is generated
from the declarations.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from control.admin import AdminLimits
from control.channel.server import ChannelLimits
from control.discovery.discovery import DiscoveryRules
from control.identity.authority import IssuingLimits
from control.kube.backoff import BackoffRules
from control.kube.client import ClientLimits
from control.kube.event_recorder import RecorderRules
from control.kube.leader_election import LeaseRules
from control.kube.reflector import WatchRules
from proxy.settings.declare import Section
from proxy.settings.document import Mistakes
from proxy.settings.load import Loader
from proxy.settings.sources import SETTLE


class Settings(Section, frozen=True):
    """All settings."""

    api: ClientLimits = ClientLimits()
    watch: WatchRules = WatchRules()
    backoff: BackoffRules = BackoffRules()
    discovery: DiscoveryRules = DiscoveryRules()
    lease: LeaseRules = LeaseRules()
    events: RecorderRules = RecorderRules()
    channel: ChannelLimits = ChannelLimits()
    issuing: IssuingLimits = IssuingLimits()
    admin: AdminLimits = AdminLimits()


def _check(found: Settings, mistakes: Mistakes) -> None:
    """Add a mistake for each contradiction between settings."""
    lease, watch = found.lease, found.watch
    if lease.renew_timeout >= lease.duration:
        mistakes.add(
            "lease.renew_timeout",
            "is not below lease.duration: two replicas could lead at the same time",
        )
    if lease.duration != int(lease.duration):
        mistakes.add("lease.duration", "is not a whole number of seconds")
    if lease.retry_interval >= lease.renew_timeout:
        mistakes.add(
            "lease.retry_interval",
            "is not below lease.renew_timeout: the leader could not renew in time",
        )
    for name, low, high in (
        ("watch.max_duration", watch.min_duration, watch.max_duration),
        ("backoff.max_delay", found.backoff.min_delay, found.backoff.max_delay),
    ):
        if high < low:
            mistakes.add(name, f"is below {name.replace('max', 'min')}")
    if found.discovery.max_delay < found.discovery.settle_time:
        mistakes.add("discovery.max_delay", "is below discovery.settle_time")


_loader = Loader(Settings, _check)


def load(path: Path | None, environ: Mapping[str, str], settle: float = SETTLE) -> Settings:
    """The settings from the file at `path` (None: the one in ISTHMUS_CONFIG, if any) and the
    environment. `settle`: see Loader.load. Raises ConfigError with all mistakes.
    """
    return _loader.load(path, environ, settle)
