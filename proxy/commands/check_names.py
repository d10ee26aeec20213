"""Checks that DNS queries of the pod's programs arrive at the proxy, over UDP and TCP, for each of
its resolvers.

As with redirection there are two cases. Before the proxy runs, the check takes its place: it
listens where datagrams and connections for the resolver should arrive. While the proxy runs, the
check asks the resolver for a name that no resolver has (RFC 6761 reserves `.invalid`) and that the
proxy answers itself: an answer proves the redirection.
"""

from __future__ import annotations

import os
import secrets
import socket
from contextlib import ExitStack, suppress

import dns.exception
import dns.message
import dns.rdatatype
import trio

from proxy.commands.checks import Result
from proxy.config.resolv_conf import Resolvers
from proxy.config.schema import Config
from proxy.config.schema_clusters import DnsConfig
from proxy.dns.answers import PROBE, PROBE_TEXT
from proxy.net.accept import BindFailed, bind, bind_datagrams
from proxy.net.address import Address
from proxy.net.dial import Dialer
from proxy.net.exceptions import ConnectFailed, NetError
from proxy.settings.sources import ConfigError

_NAME = "names"
_INSTALL = (
    "install the rules with `isthmus intercept --config FILE`, and inspect them with `isthmus"
    " intercept --dry-run --config FILE`"
)


async def check_names(config: Config, timeout: float) -> list[Result]:
    """Query each resolver over UDP and TCP, and find out where the query arrives. `timeout` in
    seconds, per query.
    """
    if config.dns is None:
        return [Result(_NAME, "skipped", "DNS is not redirected: there is no section `dns`")]
    if os.geteuid() == config.intercept.uid:
        what = (
            f"this runs as user {config.intercept.uid}, the proxy's own, whose queries are never"
            " redirected: cannot test it"
        )
        return [
            Result(_NAME, "skipped", what, "run it as another user, in an init container as root")
        ]
    try:
        resolvers = Resolvers.of(config.dns)
    except ConfigError as error:
        return [Result(_NAME, "failed", str(error), "set dns.upstreams, or fix the file")]
    results = []
    for ours, upstream in resolvers.listen_addresses(config.dns):
        results.append(await _datagram(ours, upstream, timeout))
        results.append(await _connection(config.dns, upstream, timeout))
    return results


async def _datagram(ours: Address, upstream: Address, timeout: float) -> Result:
    with ExitStack() as stack:
        try:
            listener = stack.enter_context(bind_datagrams(ours))
        except BindFailed:
            listener = None
        token = secrets.token_hex(8)
        try:
            sock = stack.enter_context(Dialer().dial_datagrams(upstream))
            sock.send(token.encode() if listener is not None else _question(token))
        except (ConnectFailed, OSError) as error:
            return Result(_NAME, "failed", f"UDP to {upstream}: {error}", _INSTALL)
        found: bytes | None = None
        with trio.move_on_after(timeout):
            await trio.lowlevel.wait_readable(listener or sock)
            with suppress(OSError):
                found = (listener or sock).recv(65535)
    if listener is not None:
        return _result("UDP", upstream, "arrives at the proxy's port", found == token.encode())
    return _result("UDP", upstream, "is answered by the running proxy", _is_ours(found))


async def _connection(config: DnsConfig, upstream: Address, timeout: float) -> Result:
    with ExitStack() as stack:
        listeners: list[socket.socket] = []
        with suppress(BindFailed):
            listeners = [
                stack.enter_context(bind(address))
                for address in config.listen
                if address.is_ipv6 == upstream.is_ipv6
            ]
        try:
            stream = await Dialer(timeout=timeout).dial(upstream)
        except ConnectFailed as error:
            return Result(_NAME, "failed", f"TCP: a query is not redirected: {error}", _INSTALL)
        async with stream:
            for listener in listeners:
                with suppress(OSError):
                    accepted, peer = listener.accept()
                    accepted.close()
                    return _result(
                        "TCP",
                        upstream,
                        "arrives at the proxy's port",
                        Address.of(peer) == stream.local,
                    )
            question = _question(secrets.token_hex(8))
            found = b""
            with trio.move_on_after(timeout), suppress(NetError):
                await stream.send_all(len(question).to_bytes(2, "big") + question)
                while len(found) < 2 or len(found) < 2 + int.from_bytes(found[:2], "big"):
                    piece = await stream.receive_some()
                    if not piece:
                        break
                    found += piece
    return _result("TCP", upstream, "is answered by the running proxy", _is_ours(found[2:]))


def _question(token: str) -> bytes:
    return dns.message.make_query(f"{token}.{PROBE}", dns.rdatatype.TXT).to_wire()


def _is_ours(answer: bytes | None) -> bool:
    try:
        message = dns.message.from_wire(answer or b"")
    except dns.exception.DNSException:
        return False
    return [record.to_text() for rrset in message.answer for record in rrset] == [f'"{PROBE_TEXT}"']


def _result(transport: str, upstream: Address, what: str, good: bool) -> Result:
    if good:
        return Result(_NAME, "ok", f"{transport}: a query to {upstream} {what}")
    return Result(
        _NAME,
        "failed",
        f"{transport}: a query to {upstream} does not arrive at the proxy",
        _INSTALL,
    )
