"""Issuing: who gets a certificate, and for which name. Everything else is refused, with the reason in
the answer, in the log and in a metric, and as an event on the pod."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
from OpenSSL import SSL

from control.identity.rate_limit import RateLimit
from lab.kube_api.requests import refuse
from lab.kube_api.server import ApiServer
from lab.kube_api.store import KINDS
from proxy.enrollment.messages import ALPN, AUDIENCE, Ask, encode
from proxy.identity import credentials
from proxy.identity.identity import PeerRefused
from proxy.identity.signing_request import make_key, make_request
from proxy.identity.spiffe import SpiffeId
from proxy.identity.tls_contexts import bare_client_context
from proxy.net.address import Address
from proxy.net.dial import Dialer
from proxy.net.exceptions import NetError
from proxy.net.tls.handshake import TLSOffer, TLSStream, tls_client
from tests.kit.channel import until
from tests.kit.issuing import CONTROL, DOMAIN, LOOPBACK, WEB, Issuing

EVENTS = KINDS["events.k8s.io/v1", "events"]
KEY = make_key()


@pytest.fixture
async def issuing(
    tmp_path: Path, server: ApiServer, request: pytest.FixtureRequest
) -> AsyncIterator[Issuing]:
    limits = getattr(request, "param", {})
    async with Issuing(tmp_path, server, limits=limits).serving() as made:
        yield made


async def connect(issuing: Issuing) -> TLSStream:
    context = bare_client_context([issuing.root.certificate])
    stream = await Dialer().dial(Address(LOOPBACK, issuing.port))
    return await tls_client(
        stream, context, TLSOffer(CONTROL.sni, (ALPN,)), verify=None, timeout=5.0
    )


async def send(issuing: Issuing, data: bytes) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Status, header fields and body of the answer to `data`."""
    stream = await connect(issuing)
    try:
        with trio.fail_after(10):
            await stream.send_all(data)
            answer = b""
            while piece := await stream.receive_some():
                answer += piece
    finally:
        stream.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *fields = head.decode().split("\r\n")
    found = dict(field.lower().split(": ", 1) for field in fields)
    return int(status.split()[1]), found, json.loads(body)


async def ask(
    issuing: Issuing, token: str, request: bytes | None = None
) -> tuple[int, dict[str, str], dict[str, Any]]:
    request = make_request(KEY, WEB) if request is None else request
    return await send(issuing, post(encode(Ask(token, request.decode()))))


def post(body: bytes, path: str = "/v1/certificate", method: str = "POST") -> bytes:
    return (
        f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )


async def until_end(stream: trio.abc.ReceiveStream) -> bytes:
    """What arrives until the other side closes or resets."""
    found = b""
    with trio.fail_after(5), suppress(NetError):
        while piece := await stream.receive_some():
            found += piece
    return found


async def test_a_service_account_gets_a_certificate_for_its_name(
    issuing: Issuing, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    token = issuing.account_token(pod=("web-0", "uid-1"))
    status, _, body = await ask(issuing, token)
    assert status == 200
    (leaf,) = credentials.parse_certificates("answer", body["chain"].encode())
    assert credentials.spiffe_uri(leaf) == str(WEB)
    assert leaf.public_key() == KEY.public_key()
    assert issuing.authority.counts.issued == 1
    assert not issuing.authority.counts.refused
    (line,) = [r.message for r in caplog.records if "certificate for" in r.message]
    assert f"certificate for {WEB} (pod web-0): serial {leaf.serial_number:x}" in line
    assert token not in caplog.text


def another_audience(issuing: Issuing) -> str:
    """As the claims say, and as the API server says of one whose claims lie."""
    return issuing.account_token(aud=["https://kubernetes.default.svc"])


def lying_audience(issuing: Issuing) -> str:
    token = issuing.account_token()
    issuing.server.behaviour.tokens[token]["audiences"] = ["https://kubernetes.default.svc"]
    return token


def of_another_cluster(issuing: Issuing) -> str:
    """Its signature is not by this cluster's key: the API server does not know it."""
    token = issuing.account_token()
    head, claims, _ = token.split(".")
    return f"{head}.{claims}.{'A' * 43}"


def expired(issuing: Issuing) -> str:
    return issuing.account_token(exp=int((issuing.now() - timedelta(seconds=1)).timestamp()))


def of_a_deleted_pod(issuing: Issuing) -> str:
    token = issuing.account_token(pod=("web-0", "uid-1"))
    del issuing.server.behaviour.tokens[token]
    return token


def no_jwt(issuing: Issuing) -> str:
    return "secret"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (another_audience, f"its audience is 'https://kubernetes.default.svc', not '{AUDIENCE}'"),
        (lying_audience, "the API server does not accept the token for this audience"),
        (of_another_cluster, "the API server does not accept the token"),
        (expired, "it has expired"),
        (of_a_deleted_pod, "the API server does not accept the token"),
        (no_jwt, "it is not a JSON Web Token"),
    ],
)
async def test_an_unusable_token_is_refused(
    issuing: Issuing, caplog: pytest.LogCaptureFixture, make: Any, words: str
) -> None:
    token = make(issuing)
    status, _, body = await ask(issuing, token)
    assert (status, body["reason"]) == (401, "token")
    assert words in body["message"]
    assert issuing.authority.counts.refused == {"token": 1}
    assert words in caplog.text
    assert token not in caplog.text
    assert issuing.authority.counts.issued == 0


async def test_a_token_that_cannot_be_good_does_not_reach_the_api_server(issuing: Issuing) -> None:
    before = len(issuing.server.log)
    for make in (another_audience, expired, no_jwt):
        await ask(issuing, make(issuing))
    assert len(issuing.server.log) == before
    await ask(issuing, of_another_cluster(issuing))
    assert len(issuing.server.log) == before + 1


async def test_a_user_that_is_no_service_account_is_refused(issuing: Issuing) -> None:
    token = issuing.account_token()
    issuing.server.behaviour.tokens[token]["user"] = {"username": "system:node:node-1"}
    status, _, body = await ask(issuing, token)
    assert (status, body["reason"]) == (403, "account")


async def test_the_request_of_another_name_is_refused_with_an_event_on_the_pod(
    issuing: Issuing, nursery: trio.Nursery
) -> None:
    nursery.start_soon(issuing.recorder.run)
    token = issuing.account_token(pod=("web-0", "uid-1"))
    other = make_request(KEY, SpiffeId(DOMAIN, "shop", "admin"))
    status, _, body = await ask(issuing, token, other)
    assert (status, body["reason"]) == (403, "request_identity")
    assert issuing.authority.counts.refused == {"request_identity": 1}
    await until(lambda: issuing.recorder.written, "the event is written")
    (event,) = issuing.server.store.objects[EVENTS].values()
    assert event["regarding"] == {
        "kind": "Pod", "namespace": "shop", "name": "web-0", "uid": "uid-1", "apiVersion": "v1",
    }  # fmt: skip
    assert event["reason"] == "CertificateRefused"
    assert "is for spiffe://cluster.local/ns/shop/sa/admin, but its sender is" in event["note"]
    nursery.cancel_scope.cancel()


async def test_a_broken_request_is_refused(issuing: Issuing) -> None:
    status, _, body = await ask(issuing, issuing.account_token(), b"garbage")
    assert (status, body["reason"]) == (403, "request_malformed")


async def test_a_pod_that_was_replaced_is_refused(issuing: Issuing) -> None:
    token = issuing.account_token(pod=("web-0", "uid-1"))
    issuing.pods["shop", "web-0"] = "uid-2"
    status, _, body = await ask(issuing, token)
    assert (status, body["reason"]) == (403, "pod")
    issuing.pods["shop", "web-0"] = "uid-1"
    assert (await ask(issuing, token))[0] == 200


@pytest.mark.parametrize("issuing", [{"identity_rate": 0.01, "identity_burst": 2}], indirect=True)
async def test_the_rate_of_an_identity_is_limited(issuing: Issuing) -> None:
    token = issuing.account_token()
    other = SpiffeId(DOMAIN, "shop", "cart")
    assert [(await ask(issuing, token))[0] for _ in range(2)] == [200, 200]
    status, fields, body = await ask(issuing, token)
    assert (status, body["reason"]) == (429, "identity_rate")
    assert 90 <= int(fields["retry-after"]) <= 100
    found = await ask(issuing, issuing.account_token(other), make_request(KEY, other))
    assert found[0] == 200


@pytest.mark.parametrize("issuing", [{"address_rate": 0.01, "address_burst": 1}], indirect=True)
async def test_an_address_that_connects_too_often_is_closed(issuing: Issuing) -> None:
    token = issuing.account_token()
    assert (await ask(issuing, token))[0] == 200
    with pytest.raises(NetError):
        await connect(issuing)
    assert issuing.authority.counts.refused == {"address_rate": 1}


def test_a_rate_limit_forgets_what_was_not_used() -> None:
    limit = RateLimit(rate=2.0, burst=2, most=2)
    assert [limit.take("a", 0.0) for _ in range(3)] == [0.0, 0.0, 0.5]
    assert limit.take("a", 0.5) == 0.0
    assert limit.take("a", 0.5) == 0.5
    assert limit.take("b", 0.5) == limit.take("c", 0.5) == 0.0
    assert len(limit) == 2
    assert limit.take("a", 0.5) == 0.0


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        (post(b"{}"), 400, "malformed"),
        (post(b"[" * 5000), 400, "malformed"),
        (post(b'{"token": 1, "request": ""}'), 400, "malformed"),
        (post(b"", "/"), 404, "not_found"),
        (post(b"", method="PUT"), 405, "method"),
        (b"\x16\x03\x01\x00garbage\r\n\r\n", 400, "malformed"),
        (b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 5000, 400, "malformed"),
        (post(b"x" * 60_000), 413, "too_large"),
    ],
)
async def test_another_request_gets_an_error(
    issuing: Issuing, data: bytes, status: int, reason: str
) -> None:
    found, _, body = await send(issuing, data)
    assert (found, body["reason"]) == (status, reason)
    assert issuing.authority.counts.refused == {reason: 1}


@pytest.mark.parametrize("issuing", [{"timeout": 0.3}], indirect=True)
@pytest.mark.parametrize("begun", [b"", b"POST /v1/cert", post(b"x" * 100)[:-50]])
async def test_a_slow_sender_is_closed(issuing: Issuing, begun: bytes) -> None:
    stream = await connect(issuing)
    await stream.send_all(begun)
    assert await until_end(stream) == b""
    stream.close()
    await until(lambda: issuing.authority.counts.refused == {"timeout": 1}, "it is counted")


async def test_without_an_answer_of_the_api_server_the_proxy_is_told_to_wait(
    issuing: Issuing,
) -> None:
    issuing.server.faults.append(refuse(403, "Forbidden", only="tokenreviews"))
    status, fields, body = await ask(issuing, issuing.account_token())
    assert (status, body["reason"], fields["retry-after"]) == (503, "review", "1")


async def test_a_client_that_speaks_another_protocol_is_refused(issuing: Issuing) -> None:
    """The directory channel is not here, and clear text is not either."""
    context = bare_client_context([issuing.root.certificate])
    stream = await Dialer().dial(Address(LOOPBACK, issuing.port))
    offer = TLSOffer(CONTROL.sni, (b"isthmus-directory",))
    with pytest.raises(NetError):
        await tls_client(stream, context, offer, verify=None, timeout=5.0)
    plain = await Dialer().dial(Address(LOOPBACK, issuing.port))
    await plain.send_all(post(b"{}"))
    await until_end(plain)
    plain.close()
    assert issuing.authority.counts.issued == 0


async def test_clients_without_a_certificate_are_accepted_nowhere_else(issuing: Issuing) -> None:
    """The context for the directory channel demands a certificate of the client."""
    assert issuing.identity.open_server_context.get_verify_mode() == SSL.VERIFY_NONE
    assert issuing.identity.server_context.get_verify_mode() & SSL.VERIFY_FAIL_IF_NO_PEER_CERT
    with pytest.raises(PeerRefused):
        issuing.identity.verify_chain(())
