"""The interfaces between the fast path and the connections, exchanges and relays on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from proxy.fastpath.event_loop import EventLoop


class Carried(Protocol):
    """A connection or stream that has an exchange on the fast path."""

    moved: float  # trio's time of the last step
    limit: float  # trio's time at which the exchange must be over

    def hand_over(self) -> None:
        """Hand the exchange over to the ordinary path."""
        ...


class LentHttp1(Carried, Protocol):
    """A lent HTTP/1 connection."""

    def due(self) -> float:
        """Return trio's time at which it has been idle for too long."""
        ...

    def recall(self) -> None:
        """Return it to its server if it is between two exchanges."""
        ...

    def leave(self) -> None:
        """Return it to its server in any case."""
        ...


class Relay(Protocol):
    """Two lent connections that are relayed to each other."""

    def expire(self, now: float) -> float:
        """End it if it has been idle for too long. Return the seconds that are left otherwise."""
        ...

    def leave(self) -> None:
        """Return it to its task."""
        ...


class Host(ABC):
    """The fast path (fast_path.py). An abstract class instead of a Protocol: calls to it are native
    calls in the compiled build."""

    @property
    @abstractmethod
    def event_loop(self) -> EventLoop:
        """The loop that calls the steps."""

    @property
    @abstractmethod
    def patience(self) -> float:
        """The time in seconds that an exchange must have until its deadline."""

    @abstractmethod
    def exchange_began(self, carried: Carried) -> None:
        """An exchange of `record_upstream` has begun."""

    @abstractmethod
    def exchange_left(self, carried: Carried, *, finished: bool = True) -> None:
        """The exchange of `record_upstream` is no longer here. `finished`: it ended here without an
        error."""

    @abstractmethod
    def count_handoff(self) -> None:
        """Count one exchange that was handed over."""

    @abstractmethod
    def lend(self, connection: LentHttp1) -> bool:
        """`connection` is lent from now on. False: the fast path accepts nothing."""

    @abstractmethod
    def connection_left(self, connection: LentHttp1) -> None:
        """`connection` is back at its server."""

    @abstractmethod
    def relay_left(self, relay: Relay) -> None:
        """`relay` has left the fast path."""
