"""Checks that the packet filter redirects this pod's connections to the proxy.

The test is a TCP connection to an unused address (RFC 5737 and RFC 3849 reserve it for
documentation). Without redirection no host answers there. With redirection the outbound listener
answers, and the kernel gives it the dialled address. Only the TCP handshake is sent.

There are two cases. Before the proxy runs (an init container), the check listens on the outbound
port itself and reads the original destination from the kernel: a complete proof. While the proxy
runs, the port is taken. Then the connection must be answered, and the running proxy must have
counted it (`isthmus_connections_opened_total` on the admin port). An answer alone proves little,
since some networks answer for every address.

The proxy's own user is exempt from redirection, so the check must run as another user.
"""

import errno
import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime

import h11
import trio

from proxy.commands.checks import Result
from proxy.config.schema import Config
from proxy.net.accept import BindFailed, bind, original_destination
from proxy.net.address import Address
from proxy.net.dial import Dialer
from proxy.net.exceptions import ConnectFailed

# Documentation addresses: TEST-NET-1 (RFC 5737) and the IPv6 documentation prefix (RFC 3849). No
# router has a route to them.
PROBES = ("192.0.2.1", "2001:db8::1")
# A port that is unlikely to be excluded from redirection, or to be answered by a network device.
PROBE_PORT = 4101

_NAME = "redirection"
_INSTALL = (
    "install the rules with `isthmus intercept` (as root), and inspect them with `isthmus intercept"
    " --dry-run`"
)
_OPENED = "isthmus_connections_opened_total"
# bytes of /metrics; with a thousand services a proxy needs a tenth of it
_MAX_ANSWER = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class AdminAnswer:
    """The admin port's response: status code, time of its Date header (or None), body."""

    status: int
    date: datetime | None
    body: str


async def check_redirection(config: Config, probe_port: int, timeout: float) -> list[Result]:
    """Dial each documentation address and find out where the connection arrives. `timeout` in
    seconds, per address.
    """
    exempt = config.intercept.uid
    if os.geteuid() == exempt:
        what = (
            f"this runs as user {exempt}, the proxy's own, whose connections are never redirected:"
            " cannot test it"
        )
        return [
            Result(_NAME, "skipped", what, "run it as another user, in an init container as root")
        ]
    if not config.outbound.listen:
        return [
            Result(_NAME, "skipped", "outbound.listen is empty: connections are not redirected")
        ]
    results = [await _probe(config, Address(host, probe_port), timeout) for host in PROBES]
    if all(result.status == "skipped" for result in results):
        what = "cannot test it: there is no route, so no connection can be redirected"
        results.append(Result(_NAME, "failed", what, "give this network namespace a default route"))
    return results


async def _probe(config: Config, target: Address, timeout: float) -> Result:
    listeners = [
        address
        for address in config.outbound.listen
        if address.is_ipv6 == target.is_ipv6 and address.port
    ]
    family = "IPv6" if target.is_ipv6 else "IPv4"
    if not listeners:
        return Result(_NAME, "skipped", f"{family}: the proxy has no outbound listener for it")
    with ExitStack() as stack:
        sockets = []
        try:
            sockets = [stack.enter_context(bind(address)) for address in listeners]
        except BindFailed as error:
            if not _taken(error):
                return Result(
                    _NAME,
                    "skipped",
                    f"{family}: {error}",
                    "if the pod has no such address, remove the listener",
                )
        if len(sockets) == len(listeners):
            return await _probe_ourselves(sockets, target, timeout)
    return await _probe_running(config, target, timeout)


def _taken(error: BindFailed) -> bool:
    return isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE


async def _probe_ourselves(
    listeners: Sequence[socket.socket], target: Address, timeout: float
) -> Result:
    """No proxy runs yet: listen in its place."""
    dialled: list[Address | ConnectFailed] = []
    arrived: list[tuple[Address, Address | None]] = []
    with trio.move_on_after(timeout):
        async with trio.open_nursery() as nursery:

            async def accept(listener: socket.socket) -> None:
                while not any(original == target for _peer, original in arrived):
                    arrived.extend(await _accept_some(listener))
                nursery.cancel_scope.cancel()

            for listener in listeners:
                nursery.start_soon(accept, listener)
            dialled.append(await _dial(target, timeout))
            if isinstance(dialled[0], ConnectFailed):
                nursery.cancel_scope.cancel()
    if any(original == target for _peer, original in arrived):
        return Result(
            _NAME,
            "ok",
            f"a connection to {target} arrives at the outbound port, and the kernel reports its"
            " original destination",
        )
    outcome = dialled[0] if dialled else None
    # Other programs of the pod may have connected meanwhile: recognise our connection by its local
    # address.
    for peer, original in arrived:
        if peer == outcome:
            what = (
                f"a connection to {target} arrives at the outbound port, but the kernel reports the"
                f" original destination {original or 'of the proxy itself'}"
            )
            return Result(
                _NAME,
                "failed",
                what,
                "connection tracking is missing (module nf_conntrack), or another rule rewrites"
                " first",
            )
    return _not_redirected(target, outcome, timeout)


async def _accept_some(listener: socket.socket) -> list[tuple[Address, Address | None]]:
    """Accept and close the next connection; returns its peer and its original destination."""
    await trio.lowlevel.wait_readable(listener)
    try:
        accepted, peer = listener.accept()
    except OSError:
        return []
    with accepted:
        return [
            (Address.of(peer), original_destination(accepted, Address.of(accepted.getsockname())))
        ]


async def _dial(target: Address, timeout: float) -> Address | ConnectFailed:
    """Connect and close at once; returns the local address, or the error."""
    try:
        stream = await Dialer(timeout=timeout).dial(target)
    except ConnectFailed as error:
        return error
    with closing(stream):
        return stream.local


def _not_redirected(
    target: Address, outcome: Address | ConnectFailed | None, timeout: float
) -> Result:
    if (
        isinstance(outcome, ConnectFailed)
        and outcome.reason in {"unreachable", "other"}
        and not _routed(target)
    ):
        what = f"{outcome}: without a route no connection can be redirected"
        return Result(
            _NAME,
            "skipped",
            what,
            "give the pod a default route if it should use this address family",
        )
    if isinstance(outcome, Address):
        what = (
            f"a connection to {target} was answered, but not by the outbound port: the network"
            " answers for every address"
        )
        return Result(_NAME, "failed", what, _INSTALL)
    why = (
        str(outcome).removeprefix(f"cannot connect to {target}: ")
        if outcome is not None
        else f"no answer within {timeout:g} s"
    )
    return Result(
        _NAME,
        "failed",
        f"a connection to {target} is not redirected to the proxy ({why})",
        _INSTALL,
    )


def _routed(target: Address) -> bool:
    """Whether the kernel has a route to it. "Unreachable" may also come from a router; then the
    packet left the pod.
    """
    try:
        with socket.socket(
            socket.AF_INET6 if target.is_ipv6 else socket.AF_INET, socket.SOCK_DGRAM
        ) as probe:
            probe.connect((target.host, target.port))  # sends nothing
    except OSError:
        return False
    return True


async def _probe_running(config: Config, target: Address, timeout: float) -> Result:
    """A proxy already runs: it must answer and count the connection."""
    before = await _accepted(config, timeout)
    outcome = await _dial(target, timeout)
    if isinstance(outcome, ConnectFailed):
        return _not_redirected(target, outcome, timeout)
    # The proxy counts a connection when it accepts it; give its event loop some time.
    with trio.move_on_after(timeout):
        while before is not None:
            after = await _accepted(config, timeout)
            if after is not None and after > before:
                return Result(
                    _NAME,
                    "ok",
                    f"a connection to {target} is answered by the running proxy, which has"
                    " counted it",
                )
            await trio.sleep(0.05)
    if before is None:
        what = (
            f"a connection to {target} is answered, but the proxy's admin port does not answer, so"
            " it is unknown which process did"
        )
        return Result(
            _NAME,
            "warning",
            what,
            "configure admin.listen, or run the check before the proxy starts",
        )
    what = (
        f"a connection to {target} is answered, but not by the running proxy: it has not counted it"
    )
    return Result(_NAME, "failed", what, _INSTALL)


async def _accepted(config: Config, timeout: float) -> float | None:
    answer = await ask_admin(config, "/metrics", timeout)
    return None if answer is None or answer.status != 200 else outbound_connections(answer.body)


def outbound_connections(exposition: str) -> float | None:
    """How many connections the outbound side has accepted, from the text of /metrics; None if it is
    not a proxy's.
    """
    if _OPENED not in exposition:
        return None
    found = 0.0
    for line in exposition.splitlines():
        if (
            line.startswith(f"{_OPENED}{{")
            and 'direction="outbound"' in line
            and 'peer="src"' in line
        ):
            with suppress(ValueError, IndexError):
                found += float(line.rpartition("} ")[2].split()[0])
    return found


async def check_proxy(config: Config, timeout: float) -> tuple[list[Result], datetime | None]:
    """Ask a running proxy whether it is ready. Also returns the time of its Date header, if
    present.
    """
    name = "proxy"
    answer = await ask_admin(config, "/ready", timeout)
    if answer is None:
        return [
            Result(
                name,
                "skipped",
                "no proxy answers on the admin port: it does not run yet, or runs elsewhere",
            )
        ], None
    if answer.status == 200:
        return [Result(name, "ok", "the running proxy is ready")], answer.date
    reason = " ".join(answer.body.split())[:200] or f"status {answer.status}"
    return [
        Result(name, "failed", f"the running proxy is not ready: {reason}", "see its log")
    ], answer.date


async def ask_admin(config: Config, path: str, timeout: float) -> AdminAnswer | None:
    """GET a path from the first admin listener that answers with HTTP; None if none answers within
    `timeout` seconds each.
    """
    for listener in config.admin.listen:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listener.host, listener.host)
        with trio.move_on_after(timeout):
            try:
                stream = await Dialer(timeout=timeout).dial(Address(host, listener.port))
                async with stream:
                    return await _get(stream, path)
            except (ConnectFailed, trio.BrokenResourceError, h11.RemoteProtocolError):
                continue
    return None


async def _get(stream: trio.abc.Stream, path: str) -> AdminAnswer:
    connection = h11.Connection(h11.CLIENT)
    request = h11.Request(
        method="GET", target=path, headers=[("Host", "localhost"), ("Connection", "close")]
    )
    await stream.send_all(
        (connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b"")
    )
    status, date, body = 0, None, b""
    while True:
        match connection.next_event():
            case h11.Response() as response:
                status, date = response.status_code, _date(dict(response.headers).get(b"date"))
            case h11.Data() as data if len(body) <= _MAX_ANSWER:
                body += bytes(data.data)
            case h11.EndOfMessage() | h11.ConnectionClosed() | h11.Data():
                return AdminAnswer(status, date, body.decode("utf-8", "replace"))
            case h11.NEED_DATA:
                connection.receive_data(bytes(await stream.receive_some(65536)))
            case _:
                continue


def _date(field: bytes | None) -> datetime | None:
    if field is None:
        return None
    try:
        return parsedate_to_datetime(field.decode("ascii", "replace"))
    except ValueError:
        return None
