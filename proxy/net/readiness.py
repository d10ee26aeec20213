"""Waiting for a socket by several tasks.

trio lets one task wait for one direction of a descriptor; a second task gets BusyResourceError. In
rare cases, both halves of a TLS connection need the same direction at the same time. Then the first
task waits for the kernel, and the others wait for the first: when it returns, for any reason, all
of them try again.
"""

from __future__ import annotations

import socket

import trio


class Readiness:
    """The readiness of both directions of one socket.

    Wake-ups may be spurious: the caller tries its operation again, and waits again if necessary.
    """

    __slots__ = ("_readers", "_reading", "_socket", "_writers", "_writing")

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._reading = self._writing = False  # whether a task waits for the kernel
        # The tasks that wait for that task. Created on demand.
        self._readers: trio.lowlevel.ParkingLot | None = None
        self._writers: trio.lowlevel.ParkingLot | None = None

    async def wait_readable(self) -> None:
        """Wait until readable. Raises ClosedResourceError if the socket is closed meanwhile."""
        if self._reading:
            lot = self._readers = self._readers or trio.lowlevel.ParkingLot()
            await lot.park()
            return
        self._reading = True
        try:
            await trio.lowlevel.wait_readable(self._socket)
        finally:
            self._reading = False
            if self._readers is not None:
                self._readers.unpark_all()

    async def wait_writable(self) -> None:
        """Wait until writable. Raises ClosedResourceError if the socket is closed meanwhile."""
        if self._writing:
            lot = self._writers = self._writers or trio.lowlevel.ParkingLot()
            await lot.park()
            return
        self._writing = True
        try:
            await trio.lowlevel.wait_writable(self._socket)
        finally:
            self._writing = False
            if self._writers is not None:
                self._writers.unpark_all()
