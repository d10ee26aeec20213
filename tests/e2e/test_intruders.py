"""Clients without the right to be served are not served, and servers with a wrong identity get no
requests.

Rules: three observations judge each attack: what the client got, what the server's application (or
the impostor) saw, which must be nothing, and the reason in the sidecars' logs and metrics."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import trio
import yaml

from lab.capture import Capture
from lab.pod import Pod
from lab.process import Process
from lab.sidecar import Authority
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import (
    ECHO,
    LAST_GET,
    WEB,
    Pair,
    counted,
    curl,
    echo_server,
    eventually,
    exchange_raw,
    logged,
    prepare,
    web_server,
)

pytestmark = [pytest.mark.lab, pytest.mark.real]

LISTED, OPEN = 8081, 8082
SECRET = "the-password-is-tangerine"
HELLO = b"hello from the shop"
# After a failed handshake the next request waits until the circuit is half open: one second,
# however long that takes a busy machine. Then it fails in the same way.
PATIENT = {"queue": {"timeout": "30s"}}

# An impostor: servers with another identity than in the directory. Each writes the clear text that
# it receives, which must be none.
IMPOSTOR = """
import socket, ssl, sys, threading
def serve(port, name, version, roots):
    listener = socket.create_server(("", port))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if name != "clear":
        context.load_cert_chain(name + ".pem", name + ".key")
        context.maximum_version = version
        context.set_alpn_protocols(["http/1.1", "isthmus-tcp"])
    while True:
        stream, _ = listener.accept()
        stream.settimeout(5)
        try:
            if name != "clear":
                stream = context.wrap_socket(stream, server_side=True)
            print(name, "heard", stream.recv(1000), flush=True)
            stream.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 7\\r\\n\\r\\nHACKED!")
        except OSError as error:
            print(name, "refused", error, flush=True)
        finally:
            stream.close()
newest, old = ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2
plan = [("other-root", newest), ("expired", newest), ("wrong-name", newest), ("right", old), ("nameless", newest), ("clear", newest)]
for port, (name, version) in enumerate(plan, 9001):
    threading.Thread(target=serve, args=(port, name, version, None)).start()
"""
OTHER_ROOT, EXPIRED, WRONG_NAME, OLD_TLS, NAMELESS, CLEAR = range(9001, 9007)


@pytest.fixture(scope="module")
def pair(laboratory: Laboratory) -> Pair:
    async def build() -> Pair:
        required = {"require_identity": {"default": True, OPEN: False}}
        pair = prepare(
            laboratory.lab,
            dict.fromkeys((WEB, LISTED, OPEN), "detect") | {ECHO: "opaque"},
            shop={"inbound": required},
        )
        allowed = {LISTED: [str(pair.near.identity)], ECHO: [str(pair.near.identity)]}
        pair.far.settings["inbound"]["allow"] = allowed
        pair.mesh.join(pair.cluster.pod("guest"))
        pair.mesh.join(pair.cluster.pod("forger"), "web", authority=Authority())
        pair.cluster.pod("stranger")
        pair.mesh.service(
            "bank",
            [pair.cluster.pod("impostor")],
            dict.fromkeys(range(9001, 9007), "detect"),
            policy=PATIENT,
        )
        pair.service.traits["policy"] = PATIENT
        for port in (WEB, LISTED, OPEN):
            await web_server(pair.shop, port)
        await echo_server(pair.shop)
        await impostor(pair)
        await pair.mesh.start()
        document = pair.mesh.document()
        for endpoint in document["services"][1]["endpoints"]:
            endpoint["identity"] = str(pair.mesh.authority.identity("bank"))
        # The impostor listens on IPv4 only.
        document["services"][1]["endpoints"] = document["services"][1]["endpoints"][:1]
        pair.near.write_directory(document)
        await eventually(
            lambda: counted(pair.near, "isthmus_directory_reloads_total", result="ok"),
            "the directory is loaded",
        )
        return pair

    return laboratory.run(build)


async def impostor(pair: Pair) -> Process:
    pod, ours, theirs = pair.cluster.pods["impostor"], pair.mesh.authority, Authority()
    bank = ours.identity("bank")
    certificates = {
        "other-root": theirs.issue(bank),
        "expired": ours.issue_expired(bank),
        "wrong-name": ours.issue(ours.identity("guest")),
        "right": ours.issue(bank),
        "nameless": ours.issue(ours.identity("bank", "other")),
    }
    for name, issued in certificates.items():
        (pod.directory / f"{name}.pem").write_bytes(issued.certificate_pem)
        (pod.directory / f"{name}.key").write_bytes(issued.key_pem)
    return await pod.python("impostor", IMPOSTOR, port=CLEAR)


def url(port: int = WEB) -> str:
    return f"http://shop:{port}/"


async def served(pair: Pair) -> float:
    """How many requests the shop's sidecar has forwarded to the application."""
    return await counted(
        pair.far, "isthmus_responses_total", direction="inbound", status_class="2xx"
    )


# Unauthorised clients...


async def test_who_may_is_served(pair: Pair) -> None:
    for port in (WEB, LISTED, OPEN):
        assert HELLO in (await curl(pair.web, url(port))).body
    stream = await pair.web.connect(pair.service.ipv4, ECHO)
    async with stream:
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"


async def test_clear_text_to_a_port_that_requires_an_identity_is_answered_403(pair: Pair) -> None:
    stranger, before = pair.cluster.pods["stranger"], await served(pair)
    seen = await curl(stranger, f"http://{pair.shop.ipv4}:{WEB}/")
    assert (seen.status, seen.error) == (403, "http_request_denied")
    assert (
        "shop" not in str(seen.headers) + seen.body.decode()
    )  # strangers get no information about the pod
    assert await served(pair) == before
    await logged(pair.far, "requires a verified identity", reason="identity_required")
    assert (
        await counted(
            pair.far, "isthmus_errors_total", direction="inbound", reason="identity_required"
        )
        >= 1
    )


async def test_clear_text_to_a_port_that_is_open_to_all_is_served(pair: Pair) -> None:
    assert (
        HELLO
        in (await curl(pair.cluster.pods["stranger"], f"http://{pair.shop.ipv4}:{OPEN}/")).body
    )


@pytest.mark.parametrize("version", [4, 6])
async def test_clear_bytes_to_an_opaque_port_with_an_allow_list_are_cut(
    pair: Pair, version: int
) -> None:
    assert (
        await exchange_raw(
            pair.cluster.pods["stranger"], pair.shop.address(version), ECHO, b"\x00anybody there?"
        )
        == b""
    )


async def test_a_member_that_is_not_on_the_list_gets_403_with_the_reason(pair: Pair) -> None:
    guest = pair.cluster.pods["guest"]
    assert HELLO in (await curl(guest, url(WEB))).body
    before = await served(pair)
    seen = await curl(guest, url(LISTED))
    assert (seen.status, seen.error) == (403, "http_request_denied")
    assert await exchange_raw(guest, pair.service.ipv4, ECHO, b"\x00hello") == b""
    assert await served(pair) == before
    for port in (LISTED, ECHO):
        await logged(
            pair.far,
            f"sa/guest is not on the allow-list of port {port}",
            reason="identity_required",
        )


async def test_a_sidecar_with_another_trust_root_is_refused(pair: Pair) -> None:
    forger, before = pair.cluster.pods["forger"], await served(pair)
    seen = await curl(forger, "-H", f"X-Secret: {SECRET}", url())
    assert (seen.status, seen.error) == (502, "tls_certificate_error")
    assert await exchange_raw(forger, pair.service.ipv4, ECHO, b"\x00hello") == b""
    assert await served(pair) == before
    await logged(pair.far, "unknown ca")
    await logged(pair.mesh.sidecars["forger"], "not signed by a trust root")
    assert (
        await counted(
            pair.mesh.sidecars["forger"],
            "isthmus_tls_failures_total",
            direction="outbound",
            kind="certificate",
        )
        >= 2
    )
    assert await counted(pair.far, "isthmus_tls_failures_total", direction="inbound") >= 2


async def s_client(pair: Pair, *arguments: str) -> str:
    """openssl's client, from the pod without a sidecar. Returns its output with its error
    messages."""
    name = pair.far.identity.sni if pair.far.identity else ""
    command = [
        "openssl",
        "s_client",
        "-connect",
        f"{pair.shop.ipv4}:{WEB}",
        "-servername",
        name,
        "-alpn",
        "http/1.1",
        "-ign_eof",
    ]
    done = await pair.cluster.pods["stranger"].run([*command, *arguments], stdin=LAST_GET)
    return (done.stdout + done.stderr).decode(errors="replace")


def credentials(pod: Pod, name: str, issued: Any) -> tuple[str, ...]:
    (pod.directory / f"{name}.pem").write_bytes(issued.certificate_pem)
    (pod.directory / f"{name}.key").write_bytes(issued.key_pem)
    return "-cert", f"{name}.pem", "-key", f"{name}.key"


async def test_openssl_with_a_good_certificate_is_served_so_the_next_tests_can_fail(
    pair: Pair,
) -> None:
    stranger, ours = pair.cluster.pods["stranger"], pair.mesh.authority
    said = await s_client(pair, *credentials(stranger, "good", ours.issue(ours.identity("web"))))
    assert HELLO.decode() in said
    assert "TLSv1.3" in said


async def test_a_client_without_a_certificate_is_rejected(pair: Pair) -> None:
    before = await served(pair)
    said = await s_client(pair)
    assert "certificate required" in said
    assert HELLO.decode() not in said
    assert await served(pair) == before
    await logged(pair.far, "certificate", reason="tls_certificate", peer=await peer(pair))


@pytest.mark.parametrize(
    ("name", "told", "words"),
    [
        ("expired", "certificate expired", "expired"),
        ("other-root", "unknown ca", "not signed by a trust root"),
    ],
)
async def test_a_client_with_a_bad_certificate_is_rejected(
    pair: Pair, name: str, told: str, words: str
) -> None:
    stranger, ours, before = pair.cluster.pods["stranger"], pair.mesh.authority, await served(pair)
    issued = (
        ours.issue_expired(ours.identity("web"))
        if name == "expired"
        else Authority().issue(ours.identity("web"))
    )
    said = await s_client(pair, *credentials(stranger, name, issued))
    assert told in said
    assert HELLO.decode() not in said
    assert await served(pair) == before
    await logged(pair.far, words, reason="tls_certificate", peer=await peer(pair))


async def test_a_client_of_another_trust_domain_is_rejected(pair: Pair) -> None:
    """Its root is not trusted, whatever its identity is."""
    foreign = Authority("example.org")
    said = await s_client(
        pair,
        *credentials(
            pair.cluster.pods["stranger"], "foreign", foreign.issue(foreign.identity("web"))
        ),
    )
    assert HELLO.decode() not in said


async def test_tls_1_2_is_refused(pair: Pair) -> None:
    stranger, ours = pair.cluster.pods["stranger"], pair.mesh.authority
    said = await s_client(
        pair, "-tls1_2", *credentials(stranger, "good", ours.issue(ours.identity("web")))
    )
    assert "protocol version" in said
    assert HELLO.decode() not in said


async def peer(pair: Pair) -> str:
    """The last peer in the log of the shop, for lines that are about it."""
    stranger = pair.cluster.pods["stranger"]

    def find() -> str:
        lines = [str(line.get("peer", "")) for line in pair.far.logged()]
        return next((line for line in reversed(lines) if line.startswith(stranger.ipv4)), "")

    found: str = await eventually(find, "a line about the stranger")
    return found


# Servers with a wrong identity...


@pytest.mark.parametrize(
    ("port", "error", "words"),
    [
        (OTHER_ROOT, "tls_certificate_error", "not signed by a trust root"),
        (EXPIRED, "tls_certificate_error", "expired"),
        (
            WRONG_NAME,
            "tls_certificate_error",
            "sa/guest, but spiffe://cluster.local/ns/default/sa/bank was expected",
        ),
        (
            NAMELESS,
            "tls_certificate_error",
            "ns/other/sa/bank, but spiffe://cluster.local/ns/default/sa/bank was expected",
        ),
        (OLD_TLS, "tls_", "TLS"),
        (CLEAR, "tls_protocol_error", "TLS"),
    ],
)
async def test_a_server_with_a_wrong_identity_gets_nothing(
    pair: Pair, port: int, error: str, words: str
) -> None:
    received = pair.cluster.pods["impostor"].processes["impostor"].output
    async with Capture(pair.web) as wire:
        seen = await curl(pair.web, "-H", f"X-Secret: {SECRET}", f"http://bank:{port}/{SECRET}")
        opaque = await exchange_raw(
            pair.web, pair.mesh.services["bank"].ipv4, port, b"\x00" + SECRET.encode()
        )
    assert seen.status == 502
    assert seen.error.startswith(error)
    assert b"HACKED" not in seen.body
    assert opaque == b""
    assert not wire.contains(SECRET.encode())
    assert not any(SECRET in line for line in received.lines)
    await logged(pair.near, words, status=502)
    kind = (
        "certificate"
        if "certificate" in error
        else "protocol"
        if error == "tls_protocol_error"
        else None
    )
    labels = {"kind": kind} if kind else {}
    assert (
        await counted(pair.near, "isthmus_tls_failures_total", direction="outbound", **labels) >= 2
    )


async def test_a_server_with_another_identity_than_in_the_directory_gets_no_request(
    laboratory: Laboratory, pair: Pair
) -> None:
    """Its sidecar takes TLS for another name for the application's own, and forwards it: the
    handshake fails, and nothing gets through."""
    guest, document = pair.mesh.sidecars["guest"], pair.mesh.document()
    for endpoint in document["services"][0]["endpoints"]:
        endpoint["identity"] = str(pair.mesh.authority.identity("somebody-else"))
    before = await counted(guest, "isthmus_directory_reloads_total", result="ok")
    guest.write_directory(document)
    try:
        await eventually(lambda: _more(guest, before), "the directory is loaded")
        async with Capture(guest.pod) as wire:
            seen = await curl(guest.pod, "-H", f"X-Secret: {SECRET}", url())
    finally:
        guest.write_directory(pair.mesh.document())
        with trio.fail_after(60, shield=True):
            await eventually(lambda: _more(guest, before + 1), "the old directory is loaded")
    assert (seen.status, seen.error[:4]) == (502, "tls_")
    assert not wire.contains(SECRET.encode())
    await logged(guest, "as spiffe://cluster.local/ns/default/sa/somebody-else", status=502)


async def _more(sidecar: Any, before: float) -> bool:
    return await counted(sidecar, "isthmus_directory_reloads_total", result="ok") > before


async def test_a_certificate_that_expires_while_the_proxy_runs_is_no_longer_accepted(
    laboratory: Laboratory,
) -> None:
    """Renewal has failed: the peers reject the proxy's certificate, and the proxy is not ready."""
    pair = prepare(laboratory.lab, {WEB: "detect"}, web={"identity": {"session_lifetime": "0s"}})
    await web_server(pair.shop)
    await pair.mesh.start()
    assert HELLO in (await curl(pair.web, url())).body
    assert pair.far.identity is not None
    began = time.monotonic()
    pair.far.write_certificate(pair.mesh.authority.issue(pair.far.identity, timedelta(seconds=6)))
    await logged(pair.far, "new certificate or trust roots in use")
    expired = await eventually(lambda: _not_ready(pair), "the proxy says that it is not ready")
    assert "expired" in expired
    assert time.monotonic() - began >= 4
    # The connection between the two ended together with the certificate.
    seen = await eventually(
        lambda: _refused(pair), "the client's proxy refuses the expired certificate"
    )
    assert (seen.status, seen.error) == (502, "tls_certificate_error")
    await logged(pair.near, "expired", status=502)
    pair.far.write_certificate(pair.mesh.authority.issue(pair.far.identity))
    await eventually(lambda: _ready(pair), "a new certificate makes it ready")
    assert HELLO in (await curl(pair.web, url())).body


async def _not_ready(pair: Pair) -> str:
    status, text = await pair.far.admin("/ready")
    return text if status == 503 else ""


async def _ready(pair: Pair) -> bool:
    return (await pair.far.admin("/ready"))[0] == 200


async def _refused(pair: Pair) -> Any:
    seen = await curl(pair.web, url())
    return seen if seen.status != 200 else None


# A missing sidecar...


@pytest.mark.parametrize("rules", ["with its rules", "without its rules"])
async def test_a_server_whose_sidecar_is_dead_gets_no_clear_text(
    laboratory: Laboratory, rules: str
) -> None:
    pair = prepare(laboratory.lab, {WEB: "detect", ECHO: "opaque"})
    pair.service.traits["policy"] = {
        "queue": {"timeout": "2s"}
    }  # a sidecar that is away may come back
    await web_server(pair.shop)
    echo = await echo_server(pair.shop)
    await pair.mesh.start()
    assert HELLO in (await curl(pair.web, "-H", f"X-Secret: {SECRET}", url())).body
    pair.far.running().kill()
    await pair.far.running().wait()
    if rules == "without its rules":
        await pair.shop.intercept("--remove")
    async with Capture(pair.web) as wire:
        for _ in range(2):
            seen = await curl(pair.web, "-H", f"X-Secret: {SECRET}", url())
            assert seen.status == 502
            assert seen.error in (
                "connection_refused",
                "tls_protocol_error",
                "connection_terminated",
            )
            assert (
                await exchange_raw(pair.web, pair.service.ipv4, ECHO, b"\x00" + SECRET.encode())
                == b""
            )
    assert not wire.contains(SECRET.encode())
    assert HELLO not in b"".join(frame for _, frame in wire.frames)
    assert echo.alive
    # The application itself answers requests that bypass the sidecars: it was running all the time.
    if rules == "without its rules":
        pair.cluster.pod("stranger")
        assert (
            HELLO
            in (await curl(pair.cluster.pods["stranger"], f"http://{pair.shop.ipv4}:{WEB}/")).body
        )
    await pair.far.start()
    assert HELLO in (await eventually(lambda: _answered(pair), "recovery")).body


async def _answered(pair: Pair) -> Any:
    seen = await curl(pair.web, url())
    return seen if seen.status == 200 else None


def test_the_plan_of_the_impostor_is_what_the_tests_expect() -> None:
    names = yaml.safe_load(
        IMPOSTOR[IMPOSTOR.index("plan = [") + 7 : IMPOSTOR.index("]\nfor") + 1]
        .replace("(", "[")
        .replace(")", "]")
    )
    assert [name for name, _ in names] == [
        "other-root",
        "expired",
        "wrong-name",
        "right",
        "nameless",
        "clear",
    ]
