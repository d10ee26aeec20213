"""Metrics of the connection to the control plane."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import trio

from proxy.metric_families import Families


class MeasuredSource(Protocol):
    """The part of the source that is measured (proxy/directory/channel/source.py)."""

    updates: int
    unanswered: int
    since: float | None
    last_message: float | None

    @property
    def connects(self) -> Mapping[str, int]: ...

    def states(self) -> Mapping[str, int]: ...


class DirectoryMetrics:
    """The metrics of the connection to the control plane of one proxy."""

    def __init__(self, families: Families) -> None:
        self._connected = families.gauge(
            "directory_connected", "1 while there is a connection to the control plane."
        )
        self._since = families.gauge(
            "directory_connected_timestamp_seconds",
            "Start of the connection to the control plane (Unix time); 0: there is none.",
        )
        self._silence = families.gauge(
            "directory_silence_seconds", "Time since the last message of the control plane."
        )
        self._entries = families.gauge(
            "directory_entries", "Entries that the proxy has asked for, by state.", "state"
        )
        self._connects = families.counter(
            "directory_connects_total", "Attempts to reach the control plane, by result.", "result"
        )
        self._updates = families.counter(
            "directory_updates_total", "Entries that the control plane has sent."
        )
        self._unanswered = families.counter(
            "directory_unanswered_total", "First uses of an entry that got no answer in time."
        )
        self._losses = families.counter(
            "directory_identity_losses_total",
            "What directories have lost that had an identity, by kind.",
            "kind",
        )

    def observe(self, source: MeasuredSource) -> None:
        """Set everything to the current values."""
        self._connected.at().set(source.since is not None)
        self._since.at().set(source.since or 0)
        if source.last_message is not None:
            self._silence.at().set(trio.current_time() - source.last_message)
        for state, count in source.states().items():
            self._entries.at(state).set(count)
        for result, count in source.connects.items():
            self._connects.at(result).set(count)
        self._updates.at().set(source.updates)
        self._unanswered.at().set(source.unanswered)

    def observe_losses(self, losses: Mapping[str, int]) -> None:
        """Set the counter of lost identities to these values."""
        for kind, count in losses.items():
            self._losses.at(kind).set(count)
