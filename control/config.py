"""The settings of the control plane: limits, waits and queues, each with its range and default.

They come from one YAML file and the environment, written like the proxy's (docs/configuration.md):
`ISTHMUS_WATCH__PAGE_SIZE=100` is the setting `watch.page_size`. The defaults are those of the
classes that use them. docs/control-plane.md is generated from the annotations here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from control.admin import AdminLimits
from control.channel.server import ChannelLimits
from control.discovery.discovery import DiscoveryRules
from control.kube.access import FRESH
from control.kube.backoff import BackoffRules
from control.kube.client import Limits
from control.kube.leases import LeaseRules
from control.kube.recorder import RecorderRules
from control.kube.reflector import WatchRules
from proxy.config.decode import Section, decode, described, number, octets, ratio, seconds
from proxy.config.document import Mistakes
from proxy.config.sources import PREFIX, SETTLE, ConfigError, override, read_file, readable

__all__ = ["ConfigError", "Settings", "load"]

_KIB, _MIB, _GIB = 2**10, 2**20, 2**30
_HOUR = 3600.0

_api, _watch, _backoff = Limits(), WatchRules(), BackoffRules()
_discovery, _lease, _events = DiscoveryRules(), LeaseRules(), RecorderRules()
_channel, _admin = ChannelLimits(), AdminLimits()


class ApiConfig(Section, frozen=True):
    """Requests to the API server."""

    connect_timeout: Annotated[
        float, seconds(0.1, 300, "maximum time for a connection and its TLS handshake")
    ] = _api.connect_timeout
    response_timeout: Annotated[
        float, seconds(0.1, 600, "maximum time from a request to the head of its response")
    ] = _api.response_timeout
    request_timeout: Annotated[
        float,
        seconds(
            0.1, _HOUR, "maximum time for one attempt of a request, with its wait for a connection"
        ),
    ] = _api.request_timeout
    max_response_bytes: Annotated[
        int,
        octets(
            64 * _KIB,
            _GIB,
            "maximum size of a response; above: a list is requested in smaller pages, and any"
            " other request fails",
        ),
    ] = _api.max_response_bytes
    max_head_bytes: Annotated[
        int, octets(4 * _KIB, _MIB, "maximum size of the head of a response")
    ] = _api.max_head_bytes
    max_error_bytes: Annotated[
        int,
        octets(
            _KIB, _MIB, "maximum size of an error response; above: only its status code is used"
        ),
    ] = _api.max_error_bytes
    max_attempts: Annotated[
        int,
        number(
            1, 100, "maximum attempts of a request that can safely be repeated; lists have one each"
        ),
    ] = _api.max_attempts
    max_retry_after: Annotated[
        float,
        seconds(
            0,
            _HOUR,
            "maximum `Retry-After` that a request obeys; above: it fails. The delay between two"
            " attempts is at most half of it, without jitter",
        ),
    ] = _api.max_retry_after
    max_connections: Annotated[
        int,
        number(
            1,
            1000,
            "maximum concurrent requests; others wait. Each watch has a connection in addition",
        ),
    ] = _api.max_connections
    max_idle_connections: Annotated[int, number(0, 1000, "maximum idle connections")] = (
        _api.max_idle_connections
    )
    idle_timeout: Annotated[
        float, seconds(0, _HOUR, "maximum time that an idle connection is kept")
    ] = _api.idle_timeout
    credentials_interval: Annotated[
        float,
        seconds(
            1,
            _HOUR,
            "time between two reads of the files with the token and the certificates; after a 401"
            " the token is read at once",
        ),
    ] = FRESH


class WatchConfig(Section, frozen=True):
    """Lists and watches."""

    page_size: Annotated[int, number(1, 10_000, "objects in a page of a list")] = _watch.page_size
    max_objects: Annotated[
        int,
        number(
            100,
            100_000_000,
            "maximum objects of one kind; above: the last complete list stays in use",
        ),
    ] = _watch.max_objects
    max_event_bytes: Annotated[
        int, octets(64 * _KIB, _GIB, "maximum size of one event of a watch, so of one object")
    ] = _watch.max_event_bytes
    # Bookmarks come about once a minute.
    silence_timeout: Annotated[
        float, seconds(90, _HOUR, "maximum time without data; above: the watch is started again")
    ] = _watch.silence_timeout
    stream_timeout: Annotated[
        float,
        seconds(
            1,
            _HOUR,
            "maximum time without a new object in a streamed list; above: the list is requested in"
            " pages",
        ),
    ] = _watch.stream_timeout
    list_timeout: Annotated[float, seconds(1, _HOUR, "maximum time for a complete list")] = (
        _watch.list_timeout
    )
    min_duration: Annotated[
        float, seconds(10, _HOUR, "shortest watch that is requested (`timeoutSeconds`)")
    ] = _watch.min_duration
    max_duration: Annotated[
        float,
        seconds(
            10, _HOUR, "longest watch that is requested; each one is a random time from this range"
        ),
    ] = _watch.max_duration
    min_healthy: Annotated[
        float, seconds(0, 60, "a watch that the server ends sooner counts as a failure")
    ] = _watch.min_healthy
    max_retry_after: Annotated[
        float, seconds(0, _HOUR, "maximum `Retry-After` that is obeyed; above: this time is used")
    ] = _watch.max_retry_after


class BackoffConfig(Section, frozen=True):
    """Delays between attempts of a list or a watch."""

    min_delay: Annotated[float, seconds(0.1, 60, "first delay; each failure doubles it")] = (
        _backoff.min_delay
    )
    max_delay: Annotated[float, seconds(0.1, 600, "maximum delay, without jitter")] = (
        _backoff.max_delay
    )
    jitter: Annotated[
        float, ratio(0, 10, "maximum random part that is added to a delay, as a fraction of it")
    ] = _backoff.jitter
    reset_after: Annotated[
        float, seconds(0, _HOUR, "time without a failure after which delays start at `min_delay`")
    ] = _backoff.reset_after


class DiscoveryConfig(Section, frozen=True):
    """Changes of the directory."""

    settle_time: Annotated[
        float, seconds(0, 10, "changes are reported when none has come for this time")
    ] = _discovery.settle_time
    max_delay: Annotated[float, seconds(0, 60, "maximum time until changes are reported")] = (
        _discovery.max_delay
    )


class LeaseConfig(Section, frozen=True):
    """The Lease of the leader."""

    name: Annotated[
        str, described("name of the Lease; replicas with the same name form a group")
    ] = "isthmus-control"
    # Whole seconds in the API.
    duration: Annotated[
        float,
        seconds(
            2,
            _HOUR,
            "time after its last renewal in which no other replica takes the lease; whole seconds",
        ),
    ] = float(_lease.duration)
    renew_timeout: Annotated[
        float,
        seconds(
            1,
            _HOUR,
            "time without a renewal after which the leader stops leading; less than `duration`",
        ),
    ] = _lease.renew_timeout
    retry_interval: Annotated[
        float,
        seconds(0.1, 600, "time between two renewals, and between two attempts to get the lease"),
    ] = _lease.retry_interval
    release_timeout: Annotated[
        float, seconds(0, 60, "maximum time to release the lease when the process ends")
    ] = _lease.release_timeout


class EventsConfig(Section, frozen=True):
    """Kubernetes events about Services with a problem."""

    max_queued: Annotated[
        int, number(1, 100_000, "maximum events that wait; above: the oldest is dropped")
    ] = _events.max_queued
    max_remembered: Annotated[
        int,
        number(
            1,
            100_000,
            "maximum events that are kept to count their repetitions; above: the least recent one"
            " is forgotten",
        ),
    ] = _events.max_remembered
    forget_after: Annotated[
        float, seconds(1, 86400, "time for which an event is kept to count its repetitions")
    ] = _events.forget_after
    repeat_interval: Annotated[
        float, seconds(1, 86400, "minimum time between two writes of the same event")
    ] = _events.repeat_interval
    interval: Annotated[float, seconds(0.01, 60, "minimum time between any two writes")] = (
        _events.interval
    )


class ChannelConfig(Section, frozen=True):
    """The connections of proxies."""

    max_connections: Annotated[
        int, number(1, 1_000_000, "maximum proxies that are connected; above: new ones are closed")
    ] = _channel.max_connections
    max_connections_per_identity: Annotated[
        int,
        number(1, 1_000_000, "maximum connections of one identity; above: new ones are closed"),
    ] = _channel.max_connections_per_identity
    max_handshakes: Annotated[
        int,
        number(
            1,
            100_000,
            "maximum connections whose peer is not known yet, in addition to `max_connections`",
        ),
    ] = _channel.max_handshakes
    max_subscriptions: Annotated[
        int, number(16, 1_000_000, "maximum entries that one proxy follows; above: it is refused")
    ] = _channel.max_subscriptions
    max_message_bytes: Annotated[
        int,
        octets(
            64 * _KIB,
            _GIB,
            "maximum size of a message to a proxy; above: the proxy does not get the entry",
        ),
    ] = _channel.max_message_bytes
    handshake_timeout: Annotated[
        float, seconds(0.1, 300, "maximum time for the TLS handshake, and for the first message")
    ] = _channel.handshake_timeout
    write_timeout: Annotated[
        float,
        seconds(0.1, 300, "maximum time for sending to a proxy; above: the connection is closed"),
    ] = _channel.write_timeout
    heartbeat_interval: Annotated[
        float, seconds(1, 300, "time without a message after which both sides send one")
    ] = _channel.heartbeat_interval
    max_missed_heartbeats: Annotated[
        int, number(2, 100, "a connection is dead when so many heartbeats are missing")
    ] = _channel.max_missed_heartbeats
    max_age: Annotated[
        float,
        seconds(
            10,
            7 * 86400,
            "maximum age of a connection, varied by a quarter; then the proxy connects again",
        ),
    ] = _channel.max_age
    reload_interval: Annotated[
        float, seconds(0.1, _HOUR, "time between two checks of the certificate, key and roots")
    ] = 10.0


class AdminConfig(Section, frozen=True):
    """The admin listener."""

    max_connections: Annotated[
        int, number(1, 100_000, "maximum open connections; above: new ones are closed")
    ] = _admin.max_connections
    timeout: Annotated[float, seconds(0.1, 300, "maximum time for a request and its response")] = (
        _admin.timeout
    )
    max_head_bytes: Annotated[int, octets(_KIB, _MIB, "maximum size of the head of a request")] = (
        _admin.max_head_bytes
    )


class Settings(Section, frozen=True):
    """All settings."""

    api: ApiConfig = ApiConfig()
    watch: WatchConfig = WatchConfig()
    backoff: BackoffConfig = BackoffConfig()
    discovery: DiscoveryConfig = DiscoveryConfig()
    lease: LeaseConfig = LeaseConfig()
    events: EventsConfig = EventsConfig()
    channel: ChannelConfig = ChannelConfig()
    admin: AdminConfig = AdminConfig()

    def limits(self) -> Limits:
        """The limits of requests."""
        return Limits(**_values(self.api, "credentials_interval"))

    def watching(self) -> WatchRules:
        """The rules of lists and watches, with their delays."""
        return WatchRules(**_values(self.watch), backoff=BackoffRules(**_values(self.backoff)))

    def changes(self) -> DiscoveryRules:
        """When changes of the directory are reported."""
        return DiscoveryRules(**_values(self.discovery))

    def leadership(self) -> LeaseRules:
        """The times of the lease."""
        return LeaseRules(int(self.lease.duration), **_values(self.lease, "name", "duration"))

    def recording(self) -> RecorderRules:
        """The limits of Kubernetes events."""
        return RecorderRules(**_values(self.events))

    def proxies(self) -> ChannelLimits:
        """The limits of the connections of proxies."""
        return ChannelLimits(**_values(self.channel, "reload_interval"))

    def listener(self) -> AdminLimits:
        """The limits of the admin listener."""
        return AdminLimits(**_values(self.admin))


def _values(section: Section, *without: str) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.structs.asdict(section)
    return {name: value for name, value in found.items() if name not in without}


def load(path: Path | None, environ: Mapping[str, str], settle: float = SETTLE) -> Settings:
    """The settings from the file at `path` (None: the one in ISTHMUS_CONFIG, if any) and the
    environment. `settle`: see proxy.config.load.load. Raises ConfigError with all mistakes.
    """
    mistakes = Mistakes()
    environ = readable(environ, lambda name: name.startswith(PREFIX), mistakes)
    if path is None and (named := environ.get(f"{PREFIX}CONFIG")):
        path = Path(named)
    source = str(path) if path is not None else "the environment"
    values = read_file(path, source, settle) if path is not None else {}
    override(values, environ, Settings, mistakes)
    found: Settings | None = decode(values, Settings, "", mistakes)
    if found is not None:
        _contradictions(found, mistakes)
    if found is None or mistakes:
        raise ConfigError(source, mistakes.found())
    return found


def _contradictions(found: Settings, mistakes: Mistakes) -> None:
    """Mistakes that only a comparison of settings shows."""
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
