"""The state of one HTTP/2 stream (RFC 9113 §5.1).

The state is two bits, one for each direction: a direction is open until END_STREAM or RST_STREAM
passes in it.

        idle --HEADERS--> open --END_STREAM from one side--> half closed --END_STREAM--> closed
                            +--------------------- RST_STREAM, either side ----------------^
"""

from __future__ import annotations


class StreamState:
    """One stream.

    `sends`, `receives`: whether the direction is still open. `expected`: bytes of the body that are
    announced by the head and have not arrived; None: the head announces no length.
    """

    __slots__ = (
        "expected",
        "headless",
        "method",
        "number",
        "opened",
        "receives",
        "send_window",
        "sends",
        "taken",
        "window",
    )

    def __init__(self, number: int, send_window: int, window: int, opened: float = 0.0) -> None:
        self.number = number
        self.opened = opened
        self.sends = True
        self.receives = True
        self.headless = True  # the peer's (final) head has not arrived
        self.method = b""
        self.expected: int | None = None
        self.send_window = send_window
        self.window = window  # bytes that the peer may still send
        self.taken = 0  # bytes that are consumed, but not returned to the peer yet
