"""The API server's address, the trust in it, and our credentials.

In a pod, these come from the service account's folder: a token and the CA certificate. Both are
replaced at run time, so they are read again every minute. Elsewhere they come from a kubeconfig,
with certificates and tokens as data or as files. Some features of kubeconfigs are not supported: it
runs no program (`exec`) and cannot switch off verification. A kubeconfig from a Secret cannot name
files.

Keys that come as data are never written to disk. The TLS library needs a path, so it gets the path
of an anonymous file in memory.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import os
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import trio

from control.kube.api_errors import AccessError

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
# Seconds before a file is read again: the default of the setting `api.credentials_interval`. A
# kubelet renews a token after 80 % of its lifetime, which is an hour or more.
FRESH = 60.0
# Bytes of a kubeconfig, and of each file that it names.
MOST_BYTES = 1024 * 1024


@dataclass(slots=True)
class Secret:
    """A secret as data or in a file. A file is read again `interval` seconds after the last
    read."""

    text: bytes = b""
    path: Path | None = None
    interval: float = FRESH
    _read_at: float = field(default=float("-inf"), repr=False)

    def __repr__(self) -> str:
        return f"<Secret {self.path or 'given as data'}>"

    def current(self) -> bytes:
        """The current value. If a file is not readable any more, its last value is used. Raises
        AccessError if it was never readable.
        """
        if self.path is not None and trio.current_time() - self._read_at >= self.interval:
            try:
                self.text = _read(self.path)
                self._read_at = trio.current_time()
            except AccessError:
                if not self.text:
                    raise
        return self.text

    def forget(self) -> bool:
        """Read the file again on the next use. Returns False for data, which cannot change."""
        self._read_at = float("-inf")
        return self.path is not None


class Trust:
    """Makes the TLS contexts from the CA certificate and an optional client certificate."""

    def __init__(
        self, authority: Secret, certificate: Secret | None = None, key: Secret | None = None
    ) -> None:
        self._parts = (authority, certificate, key)
        self._cached: ssl.SSLContext | None = None
        self._of: tuple[bytes, ...] = ()

    def context(self) -> ssl.SSLContext:
        """The context for a new connection. It is made again when a file has changed. Raises
        AccessError.
        """
        current = tuple(part.current() if part is not None else b"" for part in self._parts)
        if self._cached is None or current != self._of:
            self._cached, self._of = _context(*current), current
        return self._cached


@dataclass(frozen=True, slots=True)
class Access:
    """How to connect to an API server. `host` is an IP literal or a name. `prefix` is put before
    every path. Without `trust` there is no TLS, which only loopback addresses may use.
    """

    host: str
    port: int
    trust: Trust | None
    token: Secret | None = None
    server_name: str = ""
    prefix: str = ""

    @property
    def authority(self) -> str:
        """The value of the Host field."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def in_cluster(
    environment: Mapping[str, str], folder: Path = SERVICE_ACCOUNT, interval: float = FRESH
) -> Access:
    """The access of a pod to its own cluster's API server. The files in `folder` are read again
    every `interval` seconds. Raises AccessError.
    """
    host, port = (
        environment.get("KUBERNETES_SERVICE_HOST", ""),
        environment.get("KUBERNETES_SERVICE_PORT", ""),
    )
    if not host or not port:
        raise AccessError(
            "not in a cluster: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set"
        )
    token, authority = folder / "token", folder / "ca.crt"
    for path in (token, authority):
        _read(path)
    return Access(
        host.strip("[]"),
        _port(port, "KUBERNETES_SERVICE_PORT"),
        Trust(Secret(path=authority, interval=interval)),
        Secret(path=token, interval=interval),
    )


# kubeconfig


class _Struct(msgspec.Struct, frozen=True, rename="kebab"):
    pass


class _Cluster(_Struct, frozen=True):
    server: str
    certificate_authority: str = ""
    certificate_authority_data: str = ""
    tls_server_name: str = ""
    insecure_skip_tls_verify: bool = False
    proxy_url: str = ""


class _User(_Struct, frozen=True):
    client_certificate: str = ""
    client_certificate_data: str = ""
    client_key: str = ""
    client_key_data: str = ""
    token: str = ""
    token_file: str = msgspec.field(default="", name="tokenFile")
    username: str = ""
    exec: msgspec.Raw | dict[str, object] | None = None
    auth_provider: dict[str, object] | None = None


class _Context(_Struct, frozen=True):
    cluster: str
    user: str = ""


class _NamedCluster(_Struct, frozen=True):
    name: str
    cluster: _Cluster


class _NamedUser(_Struct, frozen=True):
    name: str
    user: _User = _User()


class _NamedContext(_Struct, frozen=True):
    name: str
    context: _Context


class _Kubeconfig(_Struct, frozen=True):
    current_context: str = ""
    clusters: list[_NamedCluster] | None = None
    users: list[_NamedUser] | None = None
    contexts: list[_NamedContext] | None = None


def kubeconfig_file(path: Path, context: str = "", interval: float = FRESH) -> Access:
    """The access that a kubeconfig file describes. Raises AccessError."""
    return kubeconfig(_read(path), context, folder=path.parent, interval=interval)


def kubeconfig(
    data: bytes, context: str = "", *, folder: Path | None = None, interval: float = FRESH
) -> Access:
    """The access that a kubeconfig describes.

    `context` "": the current context. `folder` is the base of relative paths; None: files are not
    allowed. Files are read again every `interval` seconds. Raises AccessError.
    """
    if len(data) > MOST_BYTES:
        raise AccessError(f"kubeconfig: larger than {MOST_BYTES} bytes")
    try:
        found = msgspec.yaml.decode(data, type=_Kubeconfig)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        # Not `from error`: the error may contain a secret.
        raise AccessError(f"kubeconfig: {error}") from None
    contexts = {entry.name: entry.context for entry in found.contexts or ()}
    name = context or found.current_context
    chosen = contexts.get(name)
    if chosen is None:
        raise AccessError(f"kubeconfig: there is no context {name!r}")
    clusters = {entry.name: entry.cluster for entry in found.clusters or ()}
    users = {entry.name: entry.user for entry in found.users or ()}
    cluster = clusters.get(chosen.cluster)
    user = users.get(chosen.user) if chosen.user else _User()
    if cluster is None or user is None:
        raise AccessError(
            f"kubeconfig: the context {name!r} names a cluster or a user that does not exist"
        )
    return _Reader(folder, interval).access(cluster, user)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads the parts of a kubeconfig."""

    folder: Path | None
    interval: float

    def access(self, cluster: _Cluster, user: _User) -> Access:
        self._check(cluster, user)
        url = urlsplit(cluster.server)
        try:
            host, port = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
        except ValueError as error:
            raise AccessError(f"kubeconfig: server {cluster.server!r}: {error}") from None
        if (
            url.scheme not in ("https", "http")
            or not host
            or url.query
            or url.fragment
            or url.username
        ):
            raise AccessError(
                f"kubeconfig: server {cluster.server!r} is not an address such as"
                " https://10.0.0.1:6443"
            )
        token = self._secret("token", user.token, user.token_file, encoded=False)
        prefix = url.path.rstrip("/")
        if url.scheme == "http":
            if not _loopback(host):
                raise AccessError(
                    f"kubeconfig: server {cluster.server!r}: without TLS only loopback addresses"
                    " are allowed"
                )
            return Access(host, port, None, token, prefix=prefix)
        authority = self._secret(
            "certificate-authority",
            cluster.certificate_authority_data,
            cluster.certificate_authority,
        )
        if authority is None:
            raise AccessError(
                "kubeconfig: certificate-authority or certificate-authority-data must be given"
            )
        certificate = self._secret(
            "client-certificate", user.client_certificate_data, user.client_certificate
        )
        key = self._secret("client-key", user.client_key_data, user.client_key)
        if (certificate is None) != (key is None):
            raise AccessError("kubeconfig: client-certificate and client-key belong together")
        parts = [part.text if part is not None else b"" for part in (authority, certificate, key)]
        _context(*parts)  # to find a mistake now, not at the first connection
        return Access(
            host, port, Trust(authority, certificate, key), token, cluster.tls_server_name, prefix
        )

    def _check(self, cluster: _Cluster, user: _User) -> None:
        forbidden = {
            "exec": user.exec is not None,
            "auth-provider": user.auth_provider is not None,
            "username": bool(user.username),
            "insecure-skip-tls-verify": cluster.insecure_skip_tls_verify,
            "proxy-url": bool(cluster.proxy_url),
        }
        for name, used in forbidden.items():
            if used:
                raise AccessError(
                    f"kubeconfig: {name} is not supported: use a token or a client certificate,"
                    " with the certificate authority"
                )

    def _secret(self, name: str, data: str, path: str, *, encoded: bool = True) -> Secret | None:
        if data:
            try:
                return Secret(
                    base64.b64decode(data, validate=True) if encoded else data.encode("ascii")
                )
            except (binascii.Error, ValueError):
                raise AccessError(
                    f"kubeconfig: {name} is not base64"
                    if encoded
                    else f"kubeconfig: {name} is not ASCII"
                ) from None
        if not path:
            return None
        if self.folder is None:
            raise AccessError(
                f"kubeconfig: {name} names a file, which is not allowed here: use data instead"
            )
        where = self.folder / path
        return Secret(_read(where), where, self.interval)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise AccessError(f"{path}: {error.strerror}") from error
    if not data.strip() or len(data) > MOST_BYTES:
        raise AccessError(
            f"{path}: {'empty' if len(data) <= MOST_BYTES else f'larger than {MOST_BYTES} bytes'}"
        )
    return data


def _port(text: str, name: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 65535:
        raise AccessError(f"{name}: {text!r} is not a port")
    return int(text)


def _loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _context(authority: bytes, certificate: bytes, key: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies the chain and the name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cadata=authority.decode("ascii"))
        if certificate:
            with _in_memory(certificate) as chain, _in_memory(key) as private:
                context.load_cert_chain(chain, private, lambda: "")
    except (ssl.SSLError, ValueError) as error:
        raise AccessError(f"certificates for the API server cannot be used: {error}") from None
    return context


@contextmanager
def _in_memory(data: bytes) -> Iterator[str]:
    """The path of an anonymous file with `data`. It exists only in memory."""
    descriptor = os.memfd_create("isthmus", os.MFD_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
