"""A zone with addresses, and its answers."""

from __future__ import annotations

from proxy.dns.answers import Answers
from proxy.dns.virtual_addresses import VirtualAddresses
from proxy.dns.zone import Zone
from tests.dns.documents import SEARCH, document
from tests.dns.ranges import RANGES

FOUR, SIX = (
    "253.73.238.1",
    "fd69:7374:686d:7573:24b5:f71a:90a0:fc9f",
)  # of c.default.east, see test_virtual_addresses.py


def made(most: int = 1000) -> Answers:
    zone = Zone(document(), "default", SEARCH)
    virtual = VirtualAddresses(RANGES, most, 60.0, lambda: 0.0)
    virtual.publish(zone.names)
    return Answers(zone, virtual, ttl=30.0)
