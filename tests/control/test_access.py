"""The API server's address and the client's credentials, in a pod and by kubeconfig. Unsafe
settings are refused, and no message contains a secret."""

from __future__ import annotations

import base64
import ssl
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from cryptography import x509
from trio.abc import Clock

from control.kube import access
from control.kube.access import Access, Secret, in_cluster, kubeconfig, kubeconfig_file
from control.kube.api_errors import AccessError, Unreachable
from control.kube.client import Client, Selection
from control.kube.resources import SERVICES
from lab.kube_api.server import ApiServer
from lab.kube_api.store import KINDS
from tests.control.stage import FakeStage
from tests.kit.certs import Authority, Credential

SECRET = "s3cret"


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority("kubernetes")


def config(
    authority: Authority, user: dict[str, Any] | None = None, **cluster: Any
) -> dict[str, Any]:
    data = {"certificate-authority-data": b64(authority.root.certificate_pem)}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "west",
        "preferences": {},
        "clusters": [
            {"name": "c", "cluster": {"server": "https://172.31.1.2:6443", **data, **cluster}}
        ],
        "users": [{"name": "admin", "user": {"token": SECRET} if user is None else user}],
        "contexts": [
            {"name": "west", "context": {"cluster": "c", "user": "admin", "namespace": "x"}}
        ],
    }


def read(document: dict[str, Any], context: str = "", folder: Path | None = None) -> Access:
    return kubeconfig(msgspec.yaml.encode(document), context, folder=folder)


def test_a_kubeconfig_with_data(authority: Authority) -> None:
    client = authority.issue(None)
    user = {
        "client-certificate-data": b64(client.certificate_pem),
        "client-key-data": b64(client.key_pem),
    }
    found = read(config(authority, user))
    assert (found.host, found.port, found.prefix, found.token) == ("172.31.1.2", 6443, "", None)
    assert found.authority == "172.31.1.2:6443"
    assert found.trust is not None
    made = found.trust.context()
    assert made.check_hostname
    assert made.verify_mode is ssl.CERT_REQUIRED
    assert made.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert found.trust.context() is made


def test_a_kubeconfig_with_files_beside_it(authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_bytes(authority.root.certificate_pem)
    (tmp_path / "token").write_text(SECRET + "\n")
    document = config(
        authority,
        {"tokenFile": "token"},
        **{"certificate-authority": "ca.crt", "certificate-authority-data": ""},
    )
    (tmp_path / "config").write_bytes(msgspec.json.encode(document))  # JSON is YAML
    assert kubeconfig_file(tmp_path / "config").token is not None
    with pytest.raises(AccessError, match="names a file, which is not allowed here"):
        read(document)


@pytest.mark.parametrize(
    ("server", "host", "port", "prefix"),
    [
        ("https://[fd00::1]:6443", "fd00::1", 6443, ""),
        ("https://api.example.com", "api.example.com", 443, ""),
        (
            "https://rancher.example.com/k8s/clusters/c-1/",
            "rancher.example.com",
            443,
            "/k8s/clusters/c-1",
        ),
    ],
)
def test_servers(authority: Authority, server: str, host: str, port: int, prefix: str) -> None:
    found = read(config(authority, server=server))
    assert (found.host, found.port, found.prefix) == (host, port, prefix)
    assert found.authority == (f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


@pytest.mark.parametrize(
    ("user", "cluster", "message"),
    [
        ({"exec": {"command": "rm", "args": ["-rf", "/"]}}, {}, "exec is not supported"),
        ({"auth-provider": {"name": "gcp"}}, {}, "auth-provider is not supported"),
        ({"username": "a", "password": SECRET}, {}, "username is not supported"),
        ({}, {"insecure-skip-tls-verify": True}, "insecure-skip-tls-verify is not supported"),
        ({}, {"proxy-url": "http://proxy"}, "proxy-url is not supported"),
        ({}, {"server": "ftp://x"}, "is not an address"),
        ({}, {"server": "https://"}, "is not an address"),
        ({}, {"server": "https://u:p@x"}, "is not an address"),
        ({}, {"server": "https://x:99999"}, "Port out of range"),
        ({"token": SECRET}, {"server": "http://10.0.0.1"}, "without TLS only loopback"),
        ({}, {"certificate-authority-data": ""}, "certificate-authority"),
        ({}, {"certificate-authority-data": "!!"}, "is not base64"),
        ({}, {"certificate-authority-data": b64(b"no certificate")}, "cannot be used"),
        ({"client-certificate-data": b64(b"x")}, {}, "belong together"),
        (
            {"client-certificate-data": b64(b"x"), "client-key-data": b64(SECRET.encode())},
            {},
            "cannot be used",
        ),
        ({"token": 7}, {}, "Expected `str`"),
    ],
)
def test_what_is_unsafe_or_wrong_is_refused_with_a_message(
    authority: Authority, user: dict[str, Any], cluster: dict[str, Any], message: str
) -> None:
    with pytest.raises(AccessError, match=message) as error:
        read(config(authority, user, **cluster))
    assert SECRET not in str(error.value)


def test_contexts(authority: Authority) -> None:
    document = config(authority)
    assert read(document, "west").port == 6443
    with pytest.raises(AccessError, match="no context 'east'"):
        read(document, "east")
    document["contexts"][0]["context"]["user"] = "nobody"
    with pytest.raises(AccessError, match="names a cluster or a user that does not exist"):
        read(document)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"\xff\xfe", b"a: [", b"{" * 5000, b"x" * (2**20 + 1)]
)
def test_what_is_not_a_kubeconfig(text: bytes) -> None:
    with pytest.raises(AccessError, match="kubeconfig"):
        kubeconfig(text)


# In a pod...


def folder(tmp_path: Path, authority: Authority) -> Path:
    (tmp_path / "token").write_text(SECRET)
    (tmp_path / "ca.crt").write_bytes(authority.root.certificate_pem)
    return tmp_path


def test_in_a_cluster(tmp_path: Path, authority: Authority) -> None:
    where = folder(tmp_path, authority)
    found = in_cluster(
        {"KUBERNETES_SERVICE_HOST": "fd00:96::1", "KUBERNETES_SERVICE_PORT": "443"}, where
    )
    assert (found.host, found.port, found.authority) == ("fd00:96::1", 443, "[fd00:96::1]:443")
    for environment in (
        {},
        {"KUBERNETES_SERVICE_HOST": "10.96.0.1"},
        {"KUBERNETES_SERVICE_HOST": "x", "KUBERNETES_SERVICE_PORT": "x"},
    ):
        with pytest.raises(AccessError):
            in_cluster(environment, where)
    (where / "token").unlink()
    with pytest.raises(AccessError, match="token"):
        in_cluster(
            {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}, where
        )


async def test_a_token_is_read_again_each_minute_and_kept_while_it_cannot_be(
    clock: Clock, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    path.write_text("one")
    secret = Secret(path=path)
    assert secret.current() == b"one"
    path.write_text("two")
    assert secret.current() == b"one"
    await trio.sleep(access.FRESH)
    assert secret.current() == b"two"
    path.unlink()
    await trio.sleep(access.FRESH)
    assert secret.current() == b"two"
    path.write_text("three")
    assert secret.forget()
    assert secret.current() == b"three"
    assert SECRET not in repr(Secret(SECRET.encode()))


async def test_a_new_authority_makes_another_context(
    clock: Clock, tmp_path: Path, authority: Authority
) -> None:
    where = folder(tmp_path, authority)
    trust = in_cluster(
        {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}, where
    ).trust
    assert trust is not None
    before = trust.context()
    (where / "ca.crt").write_bytes(Authority("another").root.certificate_pem)
    await trio.sleep(access.FRESH)
    assert trust.context() is not before


# With real sockets and TLS...


async def served(
    nursery: trio.Nursery,
    server: ApiServer,
    certificate: Credential,
    tmp_path: Path,
    clients: Authority | None,
) -> int:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate.write(tmp_path, "server"))
    if clients is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=clients.root.certificate_pem.decode())
    listeners = await trio.open_ssl_over_tcp_listeners(
        0, context, host="127.0.0.1", https_compatible=True
    )
    nursery.start_soon(trio.serve_listeners, server.serve, listeners)
    inner = listeners[0].transport_listener
    assert isinstance(inner, trio.SocketListener)
    port: int = inner.socket.getsockname()[1]
    return port


async def test_a_client_certificate_and_the_servers_name_are_verified(
    nursery: trio.Nursery, tmp_path: Path, authority: Authority
) -> None:
    server = ApiServer(nursery)
    ours = authority.issue(
        None, names=(x509.IPAddress(IPv4Address("127.0.0.1")), x509.DNSName("api.test"))
    )
    port = await served(nursery, server, ours, tmp_path, authority)
    shown = authority.issue(None)
    user = {
        "client-certificate-data": b64(shown.certificate_pem),
        "client-key-data": b64(shown.key_pem),
    }
    for more in ({}, {"tls-server-name": "api.test"}):
        client = Client(read(config(authority, user, server=f"https://127.0.0.1:{port}", **more)))
        page = await client.page(SERVICES, Selection(), {})
        assert page.kind == "ServiceList"
        assert len(client._idle) == 1
        assert (
            await client.page(SERVICES, Selection(), {})
        ).kind == "ServiceList"  # on the same connection
        assert server.connections == 1
        await client.aclose()
    wrong = Client(
        read(
            config(
                authority,
                user,
                server=f"https://127.0.0.1:{port}",
                **{"tls-server-name": "other.test"},
            )
        )
    )
    with pytest.raises(Unreachable, match=r"TLS handshake failed.*[Hh]ostname"):
        await wrong.page(SERVICES, Selection(), {}, attempts=1)
    stranger = Client(read(config(Authority("another"), user, server=f"https://127.0.0.1:{port}")))
    with pytest.raises(Unreachable, match=r"TLS handshake failed.*verify failed"):
        await stranger.page(SERVICES, Selection(), {}, attempts=1)


async def test_a_kept_connection_that_the_server_has_closed_does_not_repeat_unsafe_requests(
    nursery: trio.Nursery, tmp_path: Path, authority: Authority
) -> None:
    server = ApiServer(nursery)
    ours = authority.issue(None, names=(x509.IPAddress(IPv4Address("127.0.0.1")),))
    port = await served(nursery, server, ours, tmp_path, None)
    stage = FakeStage(
        Client(read(config(authority, server=f"https://127.0.0.1:{port}"))), "default", server
    )
    for name in ("one", "two"):
        await stage.config_map(name)
        server.cut()
        ((kept, _),) = stage.client._idle
        assert isinstance(kept._stream, trio.SSLStream)
        await trio.lowlevel.wait_readable(
            kept._stream.transport_stream.socket
        )  # until the end has arrived
    assert len(server.store.objects[KINDS["v1", "configmaps"]]) == 2
    assert len(stage.client._idle) == 1
    await stage.client.aclose()


async def test_a_port_without_a_listener_is_unreachable() -> None:
    client = Client(Access("127.0.0.1", 1, None))
    with pytest.raises(Unreachable, match=r"cannot connect to 127\.0\.0\.1:1"):
        await client.page(SERVICES, Selection(), {}, attempts=1)
