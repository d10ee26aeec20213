"""Decides whether a connection is lent to the fast path."""

from __future__ import annotations

# After `MOST_DECLINED` exchanges in a row that the fast path could not finish, the connection is
# not lent for `REST` exchanges. A client that speaks HTTP/1.0 or uploads will probably do so again,
# and each attempt costs 10 to 20 µs.
MOST_DECLINED, REST = 4, 64


class Eligibility:
    """The state of one connection. `declined`: exchanges that were declined since one last ended on
    the fast path."""

    __slots__ = ("_resting", "declined")

    def __init__(self) -> None:
        self.declined = self._resting = 0

    def admit(self) -> bool:
        """Return whether to lend the connection now. Counts one exchange while it rests."""
        if self._resting:
            self._resting -= 1
            return False
        return True

    def record_decline(self) -> None:
        """Count one more exchange that the fast path could not finish."""
        self.declined += 1
        if self.declined >= MOST_DECLINED:
            self.declined, self._resting = 0, REST
