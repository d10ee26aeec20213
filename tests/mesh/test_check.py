"""`isthmus check`: every finding is in words, says what to do, and is a failure only when something is wrong.

Real sockets on loopback stand for the proxy and its peers: a TLS server with a real identity, an admin port that answers HTTP.
What needs a packet filter is proven in network namespaces elsewhere; here the verdicts on what it does or does not do are.
"""

import argparse
import base64
import json
import os
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
import trio
from cryptography.hazmat.primitives.serialization import Encoding

from proxy.commands import check
from proxy.commands.check_peers import check_peers
from proxy.commands.check_redirection import ask_admin, check_proxy, check_redirection, outbound_connections
from proxy.commands.checks import Moment, Result, check_certificates, check_clock, check_configuration, check_directory, worst
from proxy.mesh import certificates, directory, files, material
from proxy.metrics import Metrics
from proxy.net.accept import bind
from proxy.net.address import Address
from proxy.net.errors import NetError
from proxy.net.streams import SocketStream
from proxy.net.tls import tls_server
from tests.mesh.workloads import DOMAIN, spiffe, workload

LOOPBACK = Address("127.0.0.1", 0)


@pytest.fixture(scope="module")
def root():
    return certificates.make_root(DOMAIN)


@pytest.fixture
def cart(tmp_path, root):
    return workload(tmp_path, "cart", root)


def mapped(uid):
    """Whether this user namespace has the user: one that an ordinary user has made knows root only."""
    ranges = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    return any(first <= uid < first + count for first, _, count in ranges)


def configuration(tmp_path, **sections):
    """A configuration as the proxy reads it: JSON is YAML too."""
    path = tmp_path / "config.yaml"
    # Where there is no proxy's user to become, packets are marked, as in such a sandbox's pods.
    exempt = {} if mapped(2102) else {"mark": 0x2102}
    quiet = {
        **exempt,
        "trust_domain": DOMAIN,
        "outbound": {"listen": []},
        "inbound": {"listen": []},
        "admin": {"listen": []},
        # Root can become the proxy's user; everybody else is it here.
        "intercept": {"uid": os.geteuid() or 2102},
    }
    path.write_text(json.dumps({**quiet, **sections}))
    results, config = check_configuration(path, {})
    assert config is not None, results
    return config


def identity_section(workload):
    names = workload.files
    return {"certificate": str(names.certificate), "key": str(names.key), "roots": [str(path) for path in names.roots]}


def statuses(results):
    return [result.status for result in results]


def free_port():
    with bind(LOOPBACK) as sock:
        return sock.getsockname()[1]


@contextmanager
def ordinary_user():
    """Root becomes user 1 while the block runs; everybody else is an ordinary user already."""
    before = os.geteuid()
    if mapped(1):
        os.seteuid(before or 1)
    try:
        yield
    finally:
        os.seteuid(before)


@asynccontextmanager
async def serving(handler):
    """A listener on loopback whose connections are given to the handler, as streams of ours; gives its address."""
    with bind(LOOPBACK) as listener:
        async with trio.open_nursery() as nursery:

            async def accept():
                while True:
                    await trio.lowlevel.wait_readable(listener)
                    nursery.start_soon(answer, SocketStream(listener.accept()[0]))

            async def answer(stream):
                async with stream:
                    await handler(stream)

            nursery.start_soon(accept)
            yield Address.of(listener.getsockname())
            nursery.cancel_scope.cancel()


def meshed(workload, seen):
    """What the inbound side of a peer's proxy does with a connection that ends before its first request."""

    identity = workload.identity()

    async def handler(stream):
        try:
            tls = await tls_server(stream, identity.server_context, verify=identity.verify_peer, timeout=5)
            seen.append((tls.info.peer_identity, await tls.receive_some(100)))
            await tls.aclose()
        except NetError as error:
            seen.append((type(error).__name__, str(error)))

    return handler


def admin(answers, *, date=None):
    """An admin port; `answers` maps a path to (status, body), where the body may be made anew for each request."""

    async def handler(stream):
        head = await stream.receive_some(4096)
        status, body = answers.get(head.split()[1].decode(), (404, ""))
        body = (body() if callable(body) else body).encode()
        fields = [f"Content-Length: {len(body)}", "Connection: close", *([f"Date: {date}"] if date else [])]
        await stream.send_all("\r\n".join([f"HTTP/1.1 {status} Whatever", *fields, "", ""]).encode() + body)

    return handler


def snapshot(*endpoints):
    """A directory of one service for each (address, identity)."""
    services = [
        {
            "name": f"s{number}",
            "ports": [{"port": address.port}],
            "endpoints": [{"address": address.host, **({"identity": str(identity)} if identity else {})}],
        }
        for number, (address, identity) in enumerate(endpoints)
    ]
    return directory.parse(json.dumps({"services": services}), "directory.yaml")


# Configuration, certificates, directory


def test_every_mistake_of_the_configuration_is_a_finding(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("cluster: East\noutbond: {}\n")
    results, config = check_configuration(path, {})
    assert config is None
    assert statuses(results) == ["failed"] * len(results)
    assert any("outbond" in result.what for result in results)
    assert check_configuration(tmp_path / "missing.yaml", {})[0][0].status == "failed"


def test_good_certificates_are_said_with_their_lifetimes(tmp_path, cart):
    results, identity = check_certificates(configuration(tmp_path, identity=identity_section(cart)))
    assert identity is not None
    assert statuses(results) == ["ok", "ok"]
    assert "ends in 23 hours 59 minutes" in results[0].what


def test_a_broken_certificate_is_named_with_the_way_to_look_at_it(tmp_path, cart):
    cart.files.certificate.write_text("garbage")
    (result,), identity = check_certificates(configuration(tmp_path, identity=identity_section(cart)))
    assert identity is None
    assert result.status == "failed"
    assert str(cart.files.certificate) in result.what
    assert "isthmus identity show" in result.remedy


def test_malformed_certificates_are_findings(tmp_path, cart, root):
    config = configuration(tmp_path, identity=identity_section(cart))
    der = root.certificate.public_bytes(Encoding.DER).replace(b"mesh.test root", b"\xff\xfesh.test root")
    broken = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"
    for path in (cart.files.roots[0], cart.files.certificate):
        path.write_bytes(path.read_bytes() + broken)
        (result,), identity = check_certificates(config)
        assert identity is None
        assert result.status == "failed"
        assert f"{path}: holds a certificate (number 2 of 2) that cannot be parsed" in result.what
    assert statuses(check_clock(cart.files.certificate, Moment.now(), None)) == ["ok"]


def test_a_short_rest_a_readable_key_and_another_trust_domain_are_warnings(tmp_path, cart, root):
    old_root = certificates.make_root(DOMAIN, now=material.utc_now() - timedelta(days=1))
    cart.renew(old_root, timedelta(hours=20), now=material.utc_now() - timedelta(hours=18))
    cart.files.key.chmod(0o604)
    results, _identity = check_certificates(configuration(tmp_path, identity=identity_section(cart), trust_domain="other.test"))
    assert [result.what for result in results if result.status == "warning" and "every user" in result.what]
    assert [result.what for result in results if result.status == "warning" and "other.test" in result.what]
    assert [result.what for result in results if result.status == "warning" and "ends in 1 hour" in result.what]
    assert worst(results) == "warning"


def test_a_proxy_without_identity_or_directory_is_no_failure(tmp_path):
    config = configuration(tmp_path)
    assert statuses(check_certificates(config)[0]) == ["skipped"]
    assert statuses(check_directory(config)[0]) == ["skipped"]


def test_the_directory_file_is_read_as_the_proxy_reads_it(tmp_path):
    path = tmp_path / "directory.yaml"
    config = configuration(tmp_path, directory={"file": str(path)})
    (missing,), _none = check_directory(config)
    assert missing.status == "failed"
    assert str(path) in missing.what
    path.write_text("services: [{name: cart}]")
    results, found = check_directory(config)
    assert found is None
    assert "services[0].ports" in results[0].what
    path.write_bytes(b"\xff")
    assert "not UTF-8" in check_directory(config)[0][0].what
    path.write_text("services: []")
    assert statuses(check_directory(config)[0]) == ["ok"]
    # Larger than a file of certificates may be, and no larger than the proxy takes.
    path.write_text("services: []\n" + "#" * material.MAX_FILE_BYTES)
    assert statuses(check_directory(config)[0]) == ["ok"]
    path.unlink()
    os.mkfifo(path)
    assert "is not a regular file" in check_directory(config)[0][0].what


# Clock


def clock_of(result):
    (found,) = result
    return found.status, found.what


def test_a_clock_is_judged_by_the_certificate(cart, root, tmp_path):
    started = Moment.now()
    assert clock_of(check_clock(cart.files.certificate, started, None))[0] == "ok"
    future = certificates.make_root(DOMAIN, now=material.utc_now() + timedelta(hours=2))
    early = certificates.issue(future, spiffe("cart"), now=material.utc_now() + timedelta(hours=3))
    files.write_public(cart.files.certificate, early.certificate_pem)
    status, what = clock_of(check_clock(cart.files.certificate, started, None))
    assert status == "failed"
    assert "2 hours 59 minutes later" in what
    past = certificates.make_root(DOMAIN, now=material.utc_now() - timedelta(days=9))
    late = certificates.issue(past, spiffe("cart"), now=material.utc_now() - timedelta(days=8))
    files.write_public(cart.files.certificate, late.certificate_pem)
    assert clock_of(check_clock(cart.files.certificate, started, None))[0] == "warning"


@pytest.mark.parametrize(("ahead", "status"), [(1, "ok"), (-1, "ok"), (10, "warning"), (-10, "warning"), (600, "failed")])
def test_a_clock_is_compared_with_the_running_proxys(ahead, status):
    assert clock_of(check_clock(None, Moment.now(), material.utc_now() + timedelta(seconds=ahead)))[0] == status


def test_a_clock_that_jumps_while_we_look_is_noticed():
    started = Moment.now()
    before = Moment(started.wall - timedelta(seconds=5), started.monotonic)
    status, what = clock_of(check_clock(None, before, None))
    assert status == "warning"
    assert "jumped by +5.0 s" in what


def test_a_clock_with_nothing_to_compare_is_no_failure():
    assert clock_of(check_clock(None, Moment.now(), None))[0] == "ok"


# The running proxy


async def test_a_ready_proxy_is_asked_for_its_time(tmp_path):
    moment = material.utc_now().replace(microsecond=0)
    async with serving(admin({"/ready": (200, "ready")}, date=format_datetime(moment, usegmt=True))) as address:
        config = configuration(tmp_path, admin={"listen": [str(address)]})
        results, reported = await check_proxy(config, 5)
    assert statuses(results) == ["ok"]
    assert reported == moment


async def test_a_proxy_that_is_not_ready_says_why(tmp_path):
    async with serving(admin({"/ready": (503, "no certificate yet\n")}, date="yesterday")) as address:
        results, reported = await check_proxy(configuration(tmp_path, admin={"listen": [str(address)]}), 5)
    assert statuses(results) == ["failed"]
    assert "no certificate yet" in results[0].what
    assert reported is None


async def test_no_proxy_yet_is_no_failure(tmp_path):
    config = configuration(tmp_path, admin={"listen": [f"127.0.0.1:{free_port()}"]})
    assert statuses((await check_proxy(config, 1))[0]) == ["skipped"]


async def test_something_else_on_the_admin_port_is_survived(tmp_path):
    async def mumble(stream):
        await stream.send_all(b"220 mail.test ESMTP\r\n")

    async with serving(mumble) as address:
        assert await ask_admin(configuration(tmp_path, admin={"listen": [str(address)]}), "/ready", 1) is None


# Redirection


def test_the_accepted_connections_are_read_out_of_the_proxys_own_metrics():
    metrics = Metrics()
    assert outbound_connections("up 1\n") is None
    assert outbound_connections(metrics.render().decode()) == 0.0
    for direction, peer, tls in (
        ("outbound", "src", "none"),
        ("outbound", "src", None),
        ("outbound", "dst", "none"),
        ("inbound", "src", "none"),
    ):
        with metrics.connections[direction].connection(peer, tls):
            pass
    assert outbound_connections(metrics.render().decode()) == 2.0


async def test_without_redirection_the_finding_says_how_to_install_it(tmp_path):
    """Whatever the network does with a documentation address (refuses it, drops it, has no route): it does not come to us."""
    config = configuration(tmp_path, outbound={"listen": [f"127.0.0.1:{free_port()}"]}, intercept={"uid": os.geteuid() + 1})
    results = await check_redirection(config, free_port(), 0.3)
    assert all(result.status in {"failed", "skipped"} for result in results)
    assert worst(results) == "failed"
    assert all(result.remedy or "no outbound listener" in result.what for result in results)


async def test_no_outbound_listener_means_nothing_to_redirect(tmp_path):
    (result,) = await check_redirection(configuration(tmp_path, intercept={"uid": os.geteuid() + 1}), 4101, 1)
    assert result.status == "skipped"
    assert "outbound.listen is empty" in result.what


# Peers


async def test_a_meshed_peer_is_proven_without_a_byte_for_its_application(tmp_path, cart, root):
    seen = []
    checkout = workload(tmp_path, "checkout", root)
    async with serving(meshed(checkout, seen)) as address:
        config = configuration(tmp_path)
        (result,) = await check_peers(config, cart.identity(), snapshot((address, checkout.id)), 10, 5)
    assert result.status == "ok", result
    assert "mutual TLS, TLSv1.3, X25519MLKEM768" in result.what
    assert seen == [(str(cart.id), b"")]


async def test_a_peer_of_another_name_is_a_failure_that_names_both(tmp_path, cart, root):
    checkout = workload(tmp_path, "checkout", root)
    async with serving(meshed(checkout, [])) as address:
        (result,) = await check_peers(configuration(tmp_path), cart.identity(), snapshot((address, spiffe("other"))), 10, 5)
    assert result.status == "failed"
    assert str(spiffe("checkout")) in result.what
    assert str(spiffe("other")) in result.what


async def test_a_peer_that_refuses_our_certificate_is_a_failure(tmp_path, cart, root):
    """It trusts itself and us it does not, although we trust it: only the alert after the handshake says so."""
    other = certificates.make_root(DOMAIN)
    stranger = workload(tmp_path, "checkout", other)
    cart.write_roots(other, root)
    async with serving(meshed(stranger, [])) as address:
        (result,) = await check_peers(configuration(tmp_path), cart.identity(), snapshot((address, stranger.id)), 10, 5)
    assert result.status == "failed", result
    assert "refuse" in result.what
    assert "our trust root among its roots" in result.remedy


async def test_a_peer_that_we_do_not_trust_or_that_speaks_no_tls_is_a_failure(tmp_path, cart):
    stranger = workload(tmp_path, "checkout", certificates.make_root(DOMAIN))

    async def plain(stream):
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with serving(meshed(stranger, [])) as first, serving(plain) as second:
        known = snapshot((first, stranger.id), (Address("127.0.0.1", second.port), stranger.id))
        results = await check_peers(configuration(tmp_path), cart.identity(), known, 10, 5)
    assert statuses(results) == ["failed", "failed"]
    assert "not signed by a trust root" in results[0].what
    assert "does not speak" in results[1].what or "not TLS" in results[1].what


async def test_unmeshed_peers_need_a_connection_only(tmp_path, cart):
    async def silent(stream):
        await stream.receive_some(1)

    async with serving(silent) as address:
        known = snapshot((address, None), (Address("127.0.0.1", free_port()), None))
        up, down = await check_peers(configuration(tmp_path), cart.identity(), known, 10, 5)
    assert up.status == "ok"
    assert down.status == "failed"
    assert "cannot connect" in down.what


async def test_who_cannot_become_the_proxys_user_is_warned_that_peers_may_not_be_peers(tmp_path, cart):
    async def silent(stream):
        await stream.receive_some(1)

    config, identity = configuration(tmp_path, mark=None, intercept={"uid": os.geteuid() + 2}), cart.identity()
    async with serving(silent) as address:
        with ordinary_user():
            results = await check_peers(config, identity, snapshot((address, None)), 10, 5)
    assert statuses(results) == ["ok", "warning"]
    assert "our own proxy may have answered" in results[1].what


async def test_a_silent_peer_is_given_up_at_the_deadline(tmp_path, cart, root):
    async def silent(stream):
        await trio.sleep_forever()

    async with serving(silent) as address:
        (result,) = await check_peers(configuration(tmp_path), cart.identity(), snapshot((address, spiffe("checkout"))), 10, 0.2)
    assert result.status == "failed"


async def test_our_own_endpoint_is_left_out_and_the_number_is_bounded(tmp_path, cart):
    known = snapshot(*[(Address("127.0.0.1", 40000 + number), None) for number in range(5)])
    results = await check_peers(configuration(tmp_path), cart.identity(), known, 2, 5)
    assert statuses(results) == ["failed", "failed", "skipped"]
    assert "3 more endpoints" in results[-1].what
    results = await check_peers(configuration(tmp_path), cart.identity(), snapshot((Address("127.0.0.1", 80), cart.id)), 2, 5)
    assert statuses(results) == ["skipped"]


async def test_endpoints_that_are_not_ready_are_not_tried(tmp_path, cart):
    service = {"name": "s", "ports": [{"port": 80}], "endpoints": [{"address": "127.0.0.1", "ready": False}]}
    known = directory.parse(json.dumps({"services": [service]}), "directory.yaml")
    assert statuses(await check_peers(configuration(tmp_path), cart.identity(), known, 10, 5)) == ["skipped"]


async def test_without_an_identity_meshed_peers_are_not_tried(tmp_path):
    async def silent(stream):
        await stream.receive_some(1)

    async with serving(silent) as address:
        (result,) = await check_peers(configuration(tmp_path), None, snapshot((address, spiffe("checkout"))), 10, 5)
    assert result.status == "skipped"


# The command


def run(*arguments):
    parser = argparse.ArgumentParser(prog="isthmus")
    check.add_parser(parser.add_subparsers())
    args = parser.parse_args(["check", *map(str, arguments)])
    return args.run(args)


def test_the_command_says_everything_and_its_exit_code_says_the_worst(tmp_path, cart, capsys):
    configuration(tmp_path, identity=identity_section(cart))
    assert run("--config", tmp_path / "config.yaml") == 0
    shown = capsys.readouterr().out
    assert [name for name in check.CHECKS if name not in shown] == ["peers"]
    cart.files.key.unlink()
    assert run("--config", tmp_path / "config.yaml") == 1
    shown = capsys.readouterr().out
    assert "FAILED" in shown
    assert "-> " in shown


def test_the_results_come_as_json_too(tmp_path, cart, capsys):
    configuration(tmp_path, identity=identity_section(cart))
    assert run("--config", tmp_path / "config.yaml", "--json", "--only", "certificates", "--only", "clock") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["status"] == "ok"
    assert {entry["name"] for entry in told["checks"]} == {"certificates", "clock"}
    assert set(told["checks"][0]) == {"name", "status", "what", "remedy"}


def test_a_broken_configuration_ends_the_command_with_its_mistakes(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("cluster: [")
    assert run("--config", tmp_path / "config.yaml") == 1
    assert "config.yaml" in capsys.readouterr().out


def test_a_text_that_cannot_be_written_is_escaped(tmp_path, capfd):
    assert run("--config", os.fsdecode(bytes(tmp_path / "\udcff.yaml"))) == 1
    assert r"\udcff.yaml: cannot be read" in capfd.readouterr().out


@pytest.mark.parametrize("value", ["0", "-1", "soon", "inf"])
def test_a_timeout_is_a_positive_number(value, capsys):
    with pytest.raises(SystemExit):
        run(f"--timeout={value}")
    assert "number of seconds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([], "skipped"),
        (["skipped"], "skipped"),
        (["ok", "skipped"], "ok"),
        (["ok", "warning"], "warning"),
        (["warning", "failed", "ok"], "failed"),
    ],
)
def test_the_worst_decides(found, expected):
    assert worst([Result("x", status, "") for status in found]) == expected


async def test_gateways_of_other_clusters_are_tried_like_endpoints(tmp_path, cart):
    port, identity = free_port(), str(spiffe("gateway"))
    ways = [{"address": "127.0.0.1", "port": port, "identity": identity}, {"host": "a.invalid", "identity": identity}]
    known = directory.parse(json.dumps({"services": [], "clusters": [{"name": "east", "gateways": ways}]}), "directory.yaml")
    (result,) = await check_peers(configuration(tmp_path), cart.identity(), known, 10, 5)
    assert result.status == "failed"
    assert f"127.0.0.1:{port}" in result.what
