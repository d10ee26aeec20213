"""How busy an endpoint is: what a request is likely to take there, times what is there already.

Response times are remembered as a peak exponentially weighted moving average (Finagle's; Linkerd uses it too):

- One that is higher than what was expected counts at once and whole (the peak): an endpoint that has become slow must not get the next
  thousand requests while an average makes up its mind.
- One that is lower counts by how much time has passed since the last: after `decay` seconds two thirds of the difference are made up. So
  one quick error does not win all the traffic, and the number of requests does not matter, only time.
- What is not confirmed fades, at the same rate and towards nothing. An endpoint that was slow and therefore gets no requests is
  tried again some time, or nobody would notice that it has recovered.

An endpoint that never answered is expected to take `default_rtt`: longer than most, so that a newcomer is tried, but not by all at once.

Requests that are out count too: with two of them, a third will be the third. An endpoint with twice the weight may have twice as many.
"""

from __future__ import annotations

from math import exp

# Seconds. What was known then has faded to nothing at the usual `decay`; at a longer one, it is old all the same.
_FORGET = 300.0


class PeakEwma:
    """Of one endpoint. Seconds of any one clock."""

    __slots__ = ("pending", "rtt", "stamp")

    def __init__(self, rtt: float, now: float) -> None:
        self.pending = 0  # requests or connections that are out
        self.rtt = rtt  # what was expected at `stamp`
        self.stamp = now

    def expected(self, now: float, decay: float) -> float:
        """Seconds that a response will take."""
        return self.rtt * exp((self.stamp - now) / decay)

    def observe(self, seconds: float, now: float, decay: float) -> None:
        """A response has taken `seconds`."""
        kept = exp((self.stamp - now) / decay)
        # In the case of a lower one: the fading of what was expected is the first term.
        self.rtt = seconds if seconds > self.rtt * kept else self.rtt * kept + seconds * (1.0 - kept)
        self.stamp = now

    def cost(self, now: float, decay: float, part: float) -> float:
        """What one more request would find: the lower the better. `part`: how much one request is for an endpoint of this weight, 1 for
        one of mean weight."""
        return self.rtt * exp((self.stamp - now) / decay) * (self.pending * part + 1.0)

    def idle(self, now: float) -> bool:
        """Nothing is out, and nothing has come for so long that it says nothing any more."""
        return not self.pending and now - self.stamp > _FORGET
