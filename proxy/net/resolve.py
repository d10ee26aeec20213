"""Resolves the name of a service that runs in several replicas."""

from __future__ import annotations

import ipaddress
import random
import socket
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import trio

from proxy.net.address import Address


async def resolve(address: str, chance: random.Random) -> Sequence[Address]:
    """The addresses behind `host:port`, in random order, so that clients spread over them. Raises
    OSError, UnicodeError.
    """
    host, _, port = address.rpartition(":")
    name = host.removeprefix("[").removesuffix("]")
    with suppress(ValueError):
        return [Address(str(ipaddress.ip_address(name)), int(port))]
    found = await trio.to_thread.run_sync(
        partial(socket.getaddrinfo, name, int(port), 0, socket.SOCK_STREAM),
        abandon_on_cancel=True,
    )
    addresses = list(dict.fromkeys(Address(str(info[4][0]), int(port)) for info in found))
    chance.shuffle(addresses)
    return addresses
