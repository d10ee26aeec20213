"""Waiting for a socket, by more than one task.

trio lets one task wait for one direction of a descriptor; a second one gets BusyResourceError. Both halves of a TLS connection may
need the same direction at the same time, rarely. Then the first waits for the kernel and the others wait for the first: when it
returns, for whatever reason, all of them try again.
"""

from __future__ import annotations

import socket

import trio


class Readiness:
    """The two directions of one socket. Wake-ups may be spurious: the caller tries its operation again and comes back."""

    __slots__ = ("_readers", "_socket", "_writers")

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        # The tasks that wait for a task; None while nobody waits for the kernel. Made only when somebody has to wait.
        self._readers: trio.lowlevel.ParkingLot | None = None
        self._writers: trio.lowlevel.ParkingLot | None = None

    async def wait_readable(self) -> None:
        """Raises ClosedResourceError if the socket is closed meanwhile."""
        if self._readers is not None:
            await self._readers.park()
            return
        lot = self._readers = trio.lowlevel.ParkingLot()
        try:
            await trio.lowlevel.wait_readable(self._socket)
        finally:
            self._readers = None
            lot.unpark_all()

    async def wait_writable(self) -> None:
        """Raises ClosedResourceError if the socket is closed meanwhile."""
        if self._writers is not None:
            await self._writers.park()
            return
        lot = self._writers = trio.lowlevel.ParkingLot()
        try:
            await trio.lowlevel.wait_writable(self._socket)
        finally:
            self._writers = None
            lot.unpark_all()
