"""Whether a connection is worth lending."""

from __future__ import annotations

# Exchanges of one connection in a row that had to be given back, after which it is not lent for `REST` exchanges: whoever speaks HTTP/1.0,
# or uploads, will do so again, and each attempt costs 10 to 20 µs.
MOST_DECLINED, REST = 4, 64


class Eligibility:
    """Those of one connection. `row`: how many there were since an exchange ended on the fast path."""

    __slots__ = ("_resting", "row")

    def __init__(self) -> None:
        self.row = self._resting = 0

    def willing(self) -> bool:
        """Whether the connection is worth lending now."""
        if self._resting:
            self._resting -= 1
            return False
        return True

    def declined(self) -> None:
        """One more."""
        self.row += 1
        if self.row >= MOST_DECLINED:
            self.row, self._resting = 0, REST
