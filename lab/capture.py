"""Captures the frames on a link, to prove what is visible on it and what is not.

An AF_PACKET socket in the pod's namespace sees every frame on eth0, after the redirection and
before the other pod: the view of an eavesdropper between the two pods. Memory is bounded. Frames
beyond the limit are counted, and a capture that lost frames never reports success.
"""

import contextlib
import socket
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import trio

from lab import network
from lab.flows import Flow, TLSFacts, examine, flows
from lab.pod import Pod
from lab.process import LabError

MAX_BYTES = 64 * 1024 * 1024  # of stored frames
_RECEIVE_BUFFER = 32 * 1024 * 1024  # bytes in the kernel, while this process is busy
_SO_RCVBUFFORCE, _SOL_PACKET, _PACKET_STATISTICS = 33, 263, 6
_ETH_P_ALL = 3
_SNAPLEN = (
    262144  # larger than any frame: the kernel hands over up to 64 KiB that the card would split
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether everything on the examined flows is TLS 1.3."""

    flows: int
    problems: tuple[str, ...]
    facts: tuple[TLSFacts, ...]

    @property
    def ok(self) -> bool:
        """True if there was traffic and no problem was found: an empty capture proves nothing."""
        return not self.problems and self.flows > 0


@dataclass(slots=True)
class Capture:
    """The frames of one pod's link, captured within `async with Capture(pod) as wire`."""

    pod: Pod
    interface: str = "eth0"
    max_bytes: int = MAX_BYTES
    frames: list[tuple[float, bytes]] = field(default_factory=list)  # (Unix time in seconds, frame)
    kept_bytes: int = 0
    dropped: int = 0  # frames that are not in `frames`
    _socket: socket.socket | None = None
    _scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    _done: trio.Event = field(default_factory=trio.Event)

    async def __aenter__(self) -> Self:
        self._socket = network.open_socket(
            self.pod.netns, socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK
        )
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
        except (
            PermissionError
        ):  # needs the capability in the first user namespace; the lab may be rootless
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        # a packet socket without a protocol receives nothing before this
        self._socket.bind((self.interface, _ETH_P_ALL))
        self.pod.cluster.lab.nursery.start_soon(self._listen)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
            await self._done.wait()

    def stop(self) -> None:
        """Read the rest from the kernel's buffer and stop; the captured frames stay."""
        if self._socket is None:
            return
        self._scope.cancel()
        self._take()
        _, lost = struct.unpack("II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        self.dropped += lost
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()
        self._socket = None

    async def _listen(self) -> None:
        try:
            with self._scope, contextlib.suppress(trio.ClosedResourceError):
                while self._socket is not None:
                    await trio.lowlevel.wait_readable(self._socket)
                    self._take()
        finally:
            self._done.set()

    def _take(self) -> None:
        while self._socket is not None:
            try:
                frame = self._socket.recv(_SNAPLEN)
            except BlockingIOError:
                return
            except OSError as error:  # the link was cut
                if error.errno != 100:  # ENETDOWN
                    raise
                return
            if self.kept_bytes + len(frame) > self.max_bytes:
                self.dropped += 1
                continue
            self.frames.append((time.time(), frame))
            self.kept_bytes += len(frame)

    def flows(self, *ports: int) -> list[Flow]:
        """The TCP connections seen so far; with `ports` only those to (or from) servers on them."""
        return [
            flow
            for flow in flows(frame for _, frame in self.frames)
            if not ports or flow.server[1] in ports
        ]

    def verdict(self, *ports: int) -> Verdict:
        """Whether all TCP connections (to these ports) are TLS 1.3."""
        seen = self.flows(*ports)
        facts = tuple(examine(flow) for flow in seen)
        problems = [
            f"{flow.name}: {fact.problem}"
            for flow, fact in zip(seen, facts, strict=True)
            if fact.problem
        ]
        if self.dropped:
            problems.insert(0, f"the capture lost {self.dropped} frames")
        return Verdict(len(seen), tuple(problems), facts)

    def contains(self, needle: bytes) -> bool:
        """Whether these bytes are on the wire as they are, in any frame or put together from
        several segments."""
        return any(needle in frame for _, frame in self.frames) or any(
            flow.carries(needle) for flow in self.flows()
        )

    def write_pcap(self, path: Path) -> None:
        """Write a file that tcpdump, tshark and Wireshark read (pcap 2.4, Ethernet,
        microseconds)."""
        try:
            with path.open("wb") as file:
                file.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, _SNAPLEN, 1))
                for when, frame in self.frames:
                    micros = int(when * 1_000_000)
                    file.write(
                        struct.pack(
                            "<IIII", micros // 1_000_000, micros % 1_000_000, len(frame), len(frame)
                        )
                        + frame
                    )
        except OSError as error:
            raise LabError(f"the capture cannot be written to {path}: {error.strerror}") from error
