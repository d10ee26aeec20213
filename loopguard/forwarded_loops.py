"""Loops that only `Forwarded` shows: a gateway that reads there that it has been on the way already.

The tokens of l7.py tell a loop from everything else, as long as they are carried. Some software drops fields that it does not know and
keeps `Forwarded`, which is a standard (RFC 7239). Then a gateway meets no token of its own, and its own `by=` all the same. That is the
only case in which `Forwarded` says more than the tokens, and the only one in which it is asked.

It says less than they do: the gateway and the authority, but neither method nor path, and replicas of a gateway are one. An application
that calls back its caller, or that calls the same service of another cluster for each page of an answer, and copies `Forwarded` as it
copies `traceparent`, makes new requests that look the same here. So one return is no loop (Linkerd refuses at the first: linkerd2 #6569);
more than `max_returns` for the same authority are. A gateway's `by=` names its cluster beside its identity, since the gateways of two
clusters may have one identity.

Trust: whoever writes a gateway's `by=` into a request has that request refused, and no other. What others have written is read aloud
only if it is an obfuscated name of RFC 7239: `_` and harmless characters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from loopguard.l4 import Loop
from loopguard.l7 import UNNAMED, told

_NODE = re.compile(rb"_[-A-Za-z0-9._]{1,320}")


def noted(way: Sequence[tuple[bytes, bytes]], own: tuple[bytes, bytes], name: str, max_returns: int) -> Loop | None:
    """The verdict on a request. `way`: (by, host) of each element of Forwarded, the oldest first; `own`: what we are about to add;
    `name`: ours, for the words."""
    by, host = own[0].lower(), own[1].lower()
    mine = [index for index, element in enumerate(way) if element[0].lower() == by and element[1].lower() == host]
    if len(mine) <= max_returns:
        return None
    stops = [name]
    for other, _ in way[mine[-1] + 1 :]:  # from its last time here to now is once round
        stop = name if other.lower() == by else other[1:].decode("ascii") if _NODE.fullmatch(other) else UNNAMED
        if stop != stops[-1]:
            stops.append(stop)
    if len(stops) == 1 or stops[-1] != name:
        stops.append(name)
    cycle = told(stops)
    often = f"{len(mine)} times" if len(mine) > 1 else "once"
    return Loop("forwarded", f"Forwarded says that the request has been here {often} for the same host: {cycle}", cycle)
