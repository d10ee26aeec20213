"""The load of an endpoint: the expected response time, times the number of pending requests.

The expected response time is a peak exponentially weighted moving average (from Finagle, also used
by Linkerd):

- A response time above the expected value counts at once and in full (the peak). So an endpoint
  that becomes slow does not get the next thousand requests while an average slowly rises.
- A lower response time counts by the time since the last one: after `decay` seconds the value has
  moved by two thirds of the difference. So one quick error does not attract all traffic, and only
  time matters, not the number of requests.
- Without new responses the value decays towards zero at the same rate. So an endpoint that gets no
  requests because it was slow is tried again at some time. Otherwise its recovery would stay
  unnoticed.

An endpoint without any response has the expected time `default_rtt`. That is longer than most, so
new endpoints get requests, but not from all clients at once. Pending requests count: if two are
pending, a further one is the third. An endpoint of twice the weight may have twice as many."""

from __future__ import annotations

from math import exp

# Seconds. By then the value has decayed to almost nothing with the usual `decay`. With a longer
# one, it is outdated.
_FORGET = 300.0


class PeakEwma:
    """The load of one endpoint. Times are seconds of the caller's clock."""

    __slots__ = ("pending", "rtt", "stamp")

    def __init__(self, rtt: float, now: float) -> None:
        self.pending = 0  # requests or connections in progress
        self.rtt = rtt  # the expected value at `stamp`
        self.stamp = now

    def expected(self, now: float, decay: float) -> float:
        """Expected seconds of a response."""
        return self.rtt * exp((self.stamp - now) / decay)

    def observe(self, seconds: float, now: float, decay: float) -> None:
        """Record a response time."""
        kept = exp((self.stamp - now) / decay)
        # The first term of the lower case is the decayed old value.
        self.rtt = (
            seconds if seconds > self.rtt * kept else self.rtt * kept + seconds * (1.0 - kept)
        )
        self.stamp = now

    def cost(self, now: float, decay: float, part: float) -> float:
        """The cost of one more request; the lowest is best. `part`: the size of one request for an
        endpoint of this weight, 1 for one of mean weight."""
        return self.rtt * exp((self.stamp - now) / decay) * (self.pending * part + 1.0)

    def idle(self, now: float) -> bool:
        """Whether nothing is in progress, and the last response is too old to be meaningful."""
        return not self.pending and now - self.stamp > _FORGET
