"""Workloads for tests: real certificates in real files, and handshakes between them over a real
socket pair."""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from OpenSSL import SSL

from proxy import files
from proxy.identity import issue
from proxy.identity.identity import Identity, MaterialError, MaterialFiles, SpiffeId, TLSSettings
from proxy.identity.issue import Issued

DOMAIN = "mesh.test"
DAY = timedelta(days=1)


def spiffe(name: str, trust_domain: str = DOMAIN) -> SpiffeId:
    return SpiffeId(trust_domain, "shop", name)


@dataclass
class Workload:
    """A directory with certificate, key and roots, whose contents a test replaces as an issuer
    would."""

    directory: Path
    id: SpiffeId

    @property
    def files(self) -> MaterialFiles:
        return MaterialFiles(
            self.directory / "certificate.pem",
            self.directory / "key.pem",
            (self.directory / "roots.pem",),
        )

    def write(self, issued: Issued, roots: Sequence[Issued]) -> None:
        files.make_private_directory(self.directory)
        files.write_private(self.files.key, issued.key_pem)
        files.write_public(self.files.certificate, issued.certificate_pem)
        self.write_roots(*roots)

    def write_roots(self, *roots: Issued) -> None:
        files.write_public(self.files.roots[0], b"".join(root.certificate_pem for root in roots))

    def renew(
        self,
        root: Issued,
        lifetime: timedelta = issue.WORKLOAD_LIFETIME,
        *,
        now: datetime | None = None,
    ) -> Issued:
        issued = issue.issue(root, self.id, lifetime, now=now)
        self.write(issued, [root])
        return issued

    def identity(
        self, settings: TLSSettings | None = None, clock: Callable[[], datetime] | None = None
    ) -> Identity:
        return (
            Identity(self.files, settings, clock=clock) if clock else Identity(self.files, settings)
        )


def workload(directory: Path, name: str, root: Issued) -> Workload:
    made = Workload(
        directory / name, spiffe(name, issue.root_trust_domain(root.certificate) or DOMAIN)
    )
    made.renew(root)
    return made


@contextmanager
def handshake(
    client: SSL.Context,
    server: SSL.Context,
    *,
    alpn: Sequence[bytes] = (b"h2",),
    session: SSL.Session | None = None,
) -> Iterator[tuple[SSL.Connection, SSL.Connection]]:
    """A client and a server that have completed a handshake and exchanged one byte each way; closes
    the sockets. Raises SSL.Error."""
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        right.setblocking(False)
        dialled, accepted = SSL.Connection(client, left), SSL.Connection(server, right)
        dialled.set_connect_state()
        accepted.set_accept_state()
        dialled.set_tlsext_host_name(b"name.test")
        if alpn:
            dialled.set_alpn_protos(list(alpn))
        if session is not None:
            dialled.set_session(session)
        waiting = [dialled, accepted]
        for _round in range(10):
            waiting = [connection for connection in waiting if not _shaken(connection)]
        assert not waiting
        # In TLS 1.3 a client sees only here that the server refused its certificate, and only here
        # it gets its tickets.
        accepted.send(b"a")
        assert dialled.recv(1) == b"a"
        yield dialled, accepted


def _shaken(connection: SSL.Connection) -> bool:
    try:
        connection.do_handshake()
    except SSL.WantReadError:
        return False
    return True


def resumed(connection: SSL.Connection) -> bool:
    """Whether the handshake used a ticket, as the library reports it. pyOpenSSL has no name for
    that."""
    library: Any = vars(SSL)["_lib"]
    reused = bool(library.SSL_session_reused(connection._ssl))
    assert reused is (connection.get_app_data() is None), (
        "and then no certificate has been verified in it"
    )
    return reused


class Clock:
    """A wall clock that a test moves. It starts at the real present, because OpenSSL's handshake
    uses the real time."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now


def authority(root: Issued) -> Issued:
    """An intermediate authority, signed by the root."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "middle")])
    )
    builder = (
        builder.issuer_name(root.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
    )
    builder = builder.not_valid_before(now - DAY / 24).not_valid_after(now + DAY)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return issue.Issued(builder.sign(root.key, hashes.SHA256()), key)


def refusal(workload: Workload, **settings: Any) -> tuple[str, str]:
    """The file with the fault when a workload's identity cannot be loaded, and the reason."""
    with pytest.raises(MaterialError) as caught:
        workload.identity(**settings)
    assert str(caught.value).startswith(f"{caught.value.path}: ")
    return Path(caught.value.path).name, caught.value.reason


class Log:
    """What a watcher reported, in order."""

    def __init__(self) -> None:
        self.reports: list[tuple[str, object]] = []

    def changed(self, identity: Identity) -> None:
        self.reports.append(("changed", identity.generation))

    def failed(self, error: Exception) -> None:
        assert isinstance(error, MaterialError)
        self.reports.append(("failed", Path(error.path).name))

    def warned(self, sentence: str) -> None:
        self.reports.append(("warned", sentence))
