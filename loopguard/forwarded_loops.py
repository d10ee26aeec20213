"""Loops that only `Forwarded` shows: a gateway finds itself in this field.

While requests carry the tokens of l7.py, these tell a loop from all other traffic. Some software
drops unknown fields, but keeps `Forwarded`, which is a standard (RFC 7239). Then a gateway finds no
token of its own, but its own `by=`. This is the only case in which `Forwarded` says more than the
tokens, so it is checked only then.

`Forwarded` says less: it has the gateway and the authority, but neither method nor path, and all
replicas of a gateway look the same. An application may call back its caller, or call the same
service of another cluster for each page of an answer. If it copies `Forwarded`, as it copies
`traceparent`, its new requests look like a loop. So one return is not a loop (Linkerd refuses the
first one: linkerd2 #6569), but more than `max_returns` for the same authority are. A gateway's
`by=` has its cluster and its identity, because gateways of two clusters may have the same identity.

Trust: a forged `by=` of a gateway causes the refusal of the request that has it, and of no other.
Text of other senders is quoted only if it is an obfuscated name of RFC 7239: `_` and harmless
characters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from loopguard.l4 import Loop
from loopguard.l7 import UNNAMED, describe_path

_NODE = re.compile(rb"_[-A-Za-z0-9._]{1,320}")


def check_forwarded(
    way: Sequence[tuple[bytes, bytes]], own: tuple[bytes, bytes], name: str, max_returns: int
) -> Loop | None:
    """Return the verdict on a request; None: no loop.

    `way`: (by, host) of each element of Forwarded, the oldest first. `own`: the pair that we are
    about to add. `name`: our name for the message.
    """
    by, host = own[0].lower(), own[1].lower()
    mine = [
        index
        for index, element in enumerate(way)
        if element[0].lower() == by and element[1].lower() == host
    ]
    if len(mine) <= max_returns:
        return None
    stops = [name]
    for other, _ in way[mine[-1] + 1 :]:  # one cycle: from our last element to now
        stop = (
            name
            if other.lower() == by
            else other[1:].decode("ascii")
            if _NODE.fullmatch(other)
            else UNNAMED
        )
        if stop != stops[-1]:
            stops.append(stop)
    if len(stops) == 1 or stops[-1] != name:
        stops.append(name)
    cycle = describe_path(stops)
    often = f"{len(mine)} times" if len(mine) > 1 else "once"
    return Loop(
        "forwarded", f"Forwarded has this gateway {often} already for the same host: {cycle}", cycle
    )
