"""Metrics of the connection to the control plane."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import trio
from prometheus_client import Counter, Gauge

if TYPE_CHECKING:
    from proxy.telemetry.series import Series


class Followed(Protocol):
    """The part of the source that is measured (proxy/directory/channel/source.py)."""

    updates: int
    unanswered: int
    since: float | None
    heard: float | None

    @property
    def connects(self) -> Mapping[str, int]: ...

    def states(self) -> Mapping[str, int]: ...


class DirectoryMetrics:
    """`counter` and `gauge` create families (proxy/telemetry/metrics.py)."""

    def __init__(
        self, counter: Callable[..., Series[Counter]], gauge: Callable[..., Series[Gauge]]
    ) -> None:
        self._connected = gauge(
            "directory_connected", "1 while there is a connection to the control plane."
        )
        self._since = gauge(
            "directory_connected_timestamp_seconds",
            "Start of the connection to the control plane (Unix time); 0: there is none.",
        )
        self._silence = gauge(
            "directory_silence_seconds", "Time since the last message of the control plane."
        )
        self._entries = gauge(
            "directory_entries", "Entries that the proxy has asked for, by state.", "state"
        )
        self._connects = counter(
            "directory_connects_total", "Attempts to reach the control plane, by result.", "result"
        )
        self._updates = counter(
            "directory_updates_total", "Entries that the control plane has sent."
        )
        self._unanswered = counter(
            "directory_unanswered_total", "First uses of an entry that got no answer in time."
        )
        self._seen: dict[str, int] = {}

    def observe(self, source: Followed) -> None:
        """Set everything to the current values."""
        self._connected.at().set(source.since is not None)
        self._since.at().set(source.since or 0)
        if source.heard is not None:
            self._silence.at().set(trio.current_time() - source.heard)
        for state, count in source.states().items():
            self._entries.at(state).set(count)
        for result, count in source.connects.items():
            self._connects.at(result).inc(self._more(f"connects {result}", count))
        self._updates.at().inc(self._more("updates", source.updates))
        self._unanswered.at().inc(self._more("unanswered", source.unanswered))

    def _more(self, name: str, count: int) -> int:
        before = self._seen.get(name, 0)
        self._seen[name] = count
        return count - before
