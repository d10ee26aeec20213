"""A SPIFFE Workload API as the source of the proxy's credentials: SPIRE's agent, or another one
(https://spiffe.io/docs/latest/spiffe-specs/spiffe_workload_api).

The proxy follows two calls over one Unix socket. FetchX509SVID brings certificates, keys and their
trust roots. FetchX509Bundles brings trust roots, also while the certificate stays the same. Each
message replaces what the proxy has: the newest trust roots of its own trust domain are used,
whichever call has brought them. Keys stay in memory.

The first SVID of a message is the proxy's identity, as the specification says.

Any failure ends both calls: no answer in time, an unusable message, the end of a call. The proxy
reports it and connects again after a pause that doubles and is varied at random. It begins again
with a short pause after a connection that lasted longer than the longest one. What is known stays
in use. There are two exceptions. An agent without FetchX509Bundles (Unimplemented) is used
with the other call. After InvalidArgument the proxy does not ask again, because the specification
recommends that: the same request would fail again.
"""

from __future__ import annotations

import logging
import random
import socket
from collections.abc import Callable

import trio

from proxy.config.endpoint_socket import socket_path
from proxy.config.schema_files import WorkloadApiConfig
from proxy.enrollment.grpc_stream import (
    INVALID_ARGUMENT,
    PERMISSION_DENIED,
    UNIMPLEMENTED,
    CallEnded,
    GrpcStreams,
)
from proxy.enrollment.svid_messages import InvalidSvid, Svid, read_bundle, read_bundles, read_svid
from proxy.identity.credential_files import Contents, MaterialError, MaterialNames
from proxy.identity.credentials import visible
from proxy.identity.identity import Identity
from proxy.identity.source import Changed, Failed

_SVIDS = b"/SpiffeWorkloadAPI/FetchX509SVID"
_BUNDLES = b"/SpiffeWorkloadAPI/FetchX509Bundles"
# Without it the server refuses a request: it might be a forged one of a browser.
_METADATA = [(b"workload.spiffe.io", b"true")]
_NAMES = MaterialNames(
    "the certificate from the Workload API",
    "the key from the Workload API",
    ("the trust roots from the Workload API",),
)
_READ = 64 * 1024
# Names of trust domains that one line of the log has.
_SHOWN = 8

_log = logging.getLogger("isthmus")


class WorkloadApiFailed(Exception):
    """There are no credentials. The message says why. `final`: asking again is useless."""

    def __init__(self, words: str, *, final: bool = False) -> None:
        super().__init__(words)
        self.final = final


class WorkloadCredentials:
    """See the top of this module, and CredentialSource."""

    def __init__(self, settings: WorkloadApiConfig, chance: random.Random | None = None) -> None:
        self._settings = settings
        self._path = socket_path(settings.socket or "")
        self._chance = chance or random.SystemRandom()
        self._reported: tuple[object, ...] = ()

    async def run(self, identity: Identity, changed: Changed, failed: Failed) -> None:
        """See CredentialSource."""

        def use(contents: Contents) -> None:
            if identity.use(contents):
                changed(identity)

        settings, pause = self._settings, 0.0
        while True:
            begin = trio.current_time()
            try:
                await self._follow(use)
            except (WorkloadApiFailed, MaterialError) as error:
                failed(error)
                if isinstance(error, WorkloadApiFailed) and error.final:
                    await trio.sleep_forever()
            if trio.current_time() - begin > settings.max_pause:
                pause = 0.0
            pause = min(settings.max_pause, pause * 2 if pause else settings.min_pause)
            await trio.sleep(pause * (0.5 + self._chance.random() / 2))

    async def fetch(self) -> Contents:
        """Ask once, and return the first credentials. Raises WorkloadApiFailed."""
        found: list[Contents] = []
        await self._follow(found.append, once=True)
        return found[0]

    async def _follow(self, use: Callable[[Contents], None], *, once: bool = False) -> None:
        """Give each set to `use`. Returns after the first one if `once`; otherwise it only ends by
        WorkloadApiFailed, and by what `use` raises."""
        try:
            with trio.CancelScope() as scope:
                scope.deadline = trio.current_time() + self._settings.timeout
                async with await self._connect() as stream:
                    await self._read(stream, use, scope, once)
        except CallEnded as error:
            raise self._explained(error) from None
        except InvalidSvid as error:
            raise WorkloadApiFailed(f"{self} sent an unusable message: {error}") from None
        except trio.TooSlowError:
            words = f"{self} read nothing for {self._settings.timeout:g} s"
            raise WorkloadApiFailed(words) from None
        except (OSError, trio.BrokenResourceError) as error:
            words = getattr(error.__cause__ or error, "strerror", None) or str(error)
            raise WorkloadApiFailed(f"{self} cannot be used: {words}") from error
        if scope.cancelled_caught:
            raise WorkloadApiFailed(
                f"{self} sent no complete message within {self._settings.timeout:g} s"
            )

    async def _connect(self) -> trio.SocketStream:
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            await sock.connect(self._path)
        except BaseException:
            sock.close()
            raise
        return trio.SocketStream(sock)

    async def _read(
        self,
        stream: trio.SocketStream,
        use: Callable[[Contents], None],
        scope: trio.CancelScope,
        once: bool,
    ) -> None:
        calls = GrpcStreams((_SVIDS, _BUNDLES), _METADATA, self._settings.max_message)
        known: Svid | None = None
        while True:
            if data := calls.data_to_send():
                with trio.fail_after(self._settings.timeout):
                    await stream.send_all(data)
            items = calls.receive(await stream.receive_some(_READ), trio.current_time())
            for path, item in items:
                if isinstance(item, CallEnded):
                    if path == _SVIDS or item.status != UNIMPLEMENTED:
                        raise item
                elif path == _SVIDS:
                    known = read_svid(item)
                    self._report(known)
                    use(_contents(known, known.roots))
                    if once:
                        return
                elif known is not None and (roots := _own(item, known)):
                    use(_contents(known, roots))
            # Each message has `timeout` seconds from its first byte, the first one from the start.
            waiting = known is None or calls.partial
            if not waiting:
                scope.deadline = float("inf")
            elif known is not None and (items or scope.deadline == float("inf")):
                scope.deadline = trio.current_time() + self._settings.timeout

    def _report(self, svid: Svid) -> None:
        """Log what a message has beside the identity, if it has changed."""
        found = svid.id, svid.hint, svid.others, svid.federated
        if found == self._reported:
            return
        self._reported = found
        if svid.others:
            _log.info(
                "%s has %d more identities for this process; the first is used: %s%s",
                self,
                svid.others,
                visible(svid.id[:200]),
                f" (hint: {visible(svid.hint[:100])})" if svid.hint else "",
            )
        if svid.federated:
            shown = ", ".join(visible(name[:255]) for name in svid.federated[:_SHOWN])
            more = len(svid.federated) - _SHOWN
            _log.warning(
                "%s has trust roots of other trust domains, which are not used: %s%s",
                self,
                shown,
                f" and {more} more" if more > 0 else "",
            )

    def _explained(self, ended: CallEnded) -> WorkloadApiFailed:
        words = f"{self}: {ended}"
        if ended.status == PERMISSION_DENIED:
            words = f"{self} has no identity for this process ({ended}): is it registered?"
        elif ended.status == INVALID_ARGUMENT:
            words = f"{self} refuses the request ({ended}); the proxy does not ask again"
        return WorkloadApiFailed(words, final=ended.status == INVALID_ARGUMENT)

    def __str__(self) -> str:
        return f"the Workload API at {self._path}"


def _contents(svid: Svid, roots: bytes) -> Contents:
    return Contents(_NAMES, (svid.chain, svid.key, roots))


def _own(message: bytes, svid: Svid) -> bytes:
    """The trust roots of the SVID's trust domain in a message of FetchX509Bundles, in PEM; empty if
    it has none."""
    return read_bundle(read_bundles(message).get(svid.trust_domain, b""))
