"""What OpenSSL is configured with before it starts, shown by what it sends. It reads the
configuration once, so each check is its own process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from proxy.net.tls.openssl_config import CONFIGURATION, configure
from tests.kit.certs import Authority, spiffe
from tests.kit.library import AWS_LC

openssl_only = pytest.mark.skipif(AWS_LC, reason="AWS-LC reads no configuration")

# Handshakes in memory, between a client of the proxy and a server; prints how many key shares there
# were, the group, and how many records the server has sent after its handshake.
_LOOK = """
import sys
from OpenSSL import SSL
from cryptography.hazmat.primitives.asymmetric import ec

def records(data):
    while data:
        size = 5 + int.from_bytes(data[3:5])
        yield data[:size]
        data = data[size:]

def shares(hello):
    at = 5 + 4 + 2 + 32
    at += 1 + hello[at]
    at += 2 + int.from_bytes(hello[at : at + 2])
    at += 1 + hello[at] + 2
    while at < len(hello):
        kind, size = int.from_bytes(hello[at : at + 2]), int.from_bytes(hello[at + 2 : at + 4])
        if kind == 51:
            body, count = hello[at + 6 : at + 4 + size], 0
            while body:
                body, count = body[4 + int.from_bytes(body[2:4]) :], count + 1
            return count
        at += 4 + size

def step(end, data=b""):
    # Whether the end is done, and what it says.
    if data:
        end.bio_write(data)
    try:
        end.do_handshake()
    except SSL.WantReadError:
        return False, end.bio_read(65536)
    return True, end.bio_read(65536)

one, other = SSL.Context(SSL.TLS_CLIENT_METHOD), SSL.Context(SSL.TLS_SERVER_METHOD)
other.use_certificate_file(sys.argv[1])
other.use_privatekey_file(sys.argv[1])
if sys.argv[2:] == ["old"]:
    other.set_tmp_ecdh(ec.SECP256R1())
client, server = SSL.Connection(one, None), SSL.Connection(other, None)
client.set_connect_state()
server.set_accept_state()
_, said = step(client)
hello = said
while True:
    done, answer = step(server, said)
    if done:
        break
    _, said = step(client, answer)
print(shares(hello), client.get_group_name(), len(list(records(answer))))
"""


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """The certificate of a server, and its key."""
    leaf = Authority().issue(spiffe("server"))
    path = tmp_path / "server.pem"
    path.write_bytes(leaf.certificate_pem + leaf.key_pem)
    return path


def look(server: Path, *words: str, **environment: str) -> list[str]:
    bare = {key: value for key, value in os.environ.items() if key != "OPENSSL_CONF"}
    done = subprocess.run(
        [sys.executable, "-c", _LOOK, server, *words],
        env=bare | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def ours(given: dict[str, str] | None = None) -> dict[str, str]:
    environment = dict(given or {})
    configure(environment)
    return environment


@openssl_only
def test_a_client_makes_one_key_share_and_a_server_one_ticket(server: Path) -> None:
    assert look(server, **ours()) == ["1", "X25519MLKEM768", "1"]


@openssl_only
def test_openssl_by_itself_would_make_two_of_each(server: Path) -> None:
    """Otherwise the configuration would be unnecessary."""
    assert look(server) == ["2", "X25519MLKEM768", "2"]


@openssl_only
def test_a_peer_without_the_hybrid_group_gets_one_that_it_supports(server: Path) -> None:
    assert look(server, "old", **ours()) == ["1", "secp256r1", "1"]


def test_a_configuration_that_is_named_already_stays(tmp_path: Path) -> None:
    assert ours({"OPENSSL_CONF": str(tmp_path)}) == {"OPENSSL_CONF": str(tmp_path)}
    assert ours() == {"OPENSSL_CONF": str(CONFIGURATION)}
