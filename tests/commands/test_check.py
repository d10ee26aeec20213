"""`isthmus check`: every finding has a text and a remedy, and is a failure only when something is
wrong. Real sockets on loopback replace the proxy and its peers: a TLS server with a real identity,
and an admin port that answers HTTP. Tests in network namespaces cover the packet filter; here only
the verdicts on its behaviour are tested."""

import argparse
import base64
import json
import os
from datetime import timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from proxy import files
from proxy.commands import check
from proxy.commands.check_redirection import (
    ask_admin,
    check_proxy,
    check_redirection,
    outbound_connections,
)
from proxy.commands.checks import (
    Moment,
    Result,
    Status,
    check_certificates,
    check_clock,
    check_configuration,
    check_directory,
    worst,
)
from proxy.exchange.exchange import Direction
from proxy.identity import credential_files, credentials, issue
from proxy.identity.issue import Issued
from proxy.net.socket_stream import SocketStream
from proxy.telemetry.metrics import Metrics, Peer, Tls
from tests.commands.probed import admin, configuration, identity_section, serving, statuses
from tests.kit.ports import free_port
from tests.kit.workloads import DOMAIN, Workload, spiffe

# Configuration, certificates, directory


def test_every_mistake_of_the_configuration_is_a_finding(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("cluster: East\noutbond: {}\n")
    results, config = check_configuration(path, {})
    assert config is None
    assert statuses(results) == ["failed"] * len(results)
    assert any("outbond" in result.what for result in results)
    assert check_configuration(tmp_path / "missing.yaml", {})[0][0].status == "failed"


def test_good_certificates_are_said_with_their_lifetimes(tmp_path: Path, cart: Workload) -> None:
    results, identity = check_certificates(configuration(tmp_path, identity=identity_section(cart)))
    assert identity is not None
    assert statuses(results) == ["ok", "ok"]
    assert "ends in 23 hours 59 minutes" in results[0].what


def test_a_broken_certificate_is_named_with_the_way_to_look_at_it(
    tmp_path: Path, cart: Workload
) -> None:
    cart.files.certificate.write_text("garbage")
    (result,), identity = check_certificates(
        configuration(tmp_path, identity=identity_section(cart))
    )
    assert identity is None
    assert result.status == "failed"
    assert str(cart.files.certificate) in result.what
    assert "isthmus identity show" in result.remedy


def test_malformed_certificates_are_findings(tmp_path: Path, cart: Workload, root: Issued) -> None:
    config = configuration(tmp_path, identity=identity_section(cart))
    der = root.certificate.public_bytes(Encoding.DER).replace(
        b"mesh.test root", b"\xff\xfesh.test root"
    )
    broken = (
        b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"
    )
    for path in (cart.files.roots[0], cart.files.certificate):
        path.write_bytes(path.read_bytes() + broken)
        (result,), identity = check_certificates(config)
        assert identity is None
        assert result.status == "failed"
        assert f"{path}: holds a certificate (number 2 of 2) that cannot be parsed" in result.what
    assert statuses(check_clock(cart.files.certificate, Moment.now(), None)) == ["ok"]


def test_a_short_rest_a_readable_key_and_another_trust_domain_are_warnings(
    tmp_path: Path, cart: Workload, root: Issued
) -> None:
    old_root = issue.make_root(DOMAIN, now=credentials.utc_now() - timedelta(days=1))
    cart.renew(old_root, timedelta(hours=20), now=credentials.utc_now() - timedelta(hours=18))
    cart.files.key.chmod(0o604)
    results, _identity = check_certificates(
        configuration(tmp_path, identity=identity_section(cart), trust_domain="other.test")
    )
    assert [
        result.what
        for result in results
        if result.status == "warning" and "every user" in result.what
    ]
    assert [
        result.what
        for result in results
        if result.status == "warning" and "other.test" in result.what
    ]
    assert [
        result.what
        for result in results
        if result.status == "warning" and "ends in 1 hour" in result.what
    ]
    assert worst(results) == "warning"


def test_a_proxy_without_identity_or_directory_is_not_a_failure(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    assert statuses(check_certificates(config)[0]) == ["skipped"]
    assert statuses(check_directory(config)[0]) == ["skipped"]


def test_the_directory_file_is_read_as_the_proxy_reads_it(tmp_path: Path) -> None:
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
    path.write_text("services: []\n" + "#" * credential_files.MAX_FILE_BYTES)
    assert statuses(check_directory(config)[0]) == ["ok"]
    path.unlink()
    os.mkfifo(path)
    assert "is not a regular file" in check_directory(config)[0][0].what


# Clock


def clock_of(result: list[Result]) -> tuple[str, str]:
    (found,) = result
    return found.status, found.what


def test_a_clock_is_judged_by_the_certificate(cart: Workload, root: Issued, tmp_path: Path) -> None:
    started = Moment.now()
    assert clock_of(check_clock(cart.files.certificate, started, None))[0] == "ok"
    future = issue.make_root(DOMAIN, now=credentials.utc_now() + timedelta(hours=2))
    early = issue.issue(future, spiffe("cart"), now=credentials.utc_now() + timedelta(hours=3))
    files.write_public(cart.files.certificate, early.certificate_pem)
    status, what = clock_of(check_clock(cart.files.certificate, started, None))
    assert status == "failed"
    assert "2 hours 59 minutes later" in what
    past = issue.make_root(DOMAIN, now=credentials.utc_now() - timedelta(days=9))
    late = issue.issue(past, spiffe("cart"), now=credentials.utc_now() - timedelta(days=8))
    files.write_public(cart.files.certificate, late.certificate_pem)
    assert clock_of(check_clock(cart.files.certificate, started, None))[0] == "warning"


@pytest.mark.parametrize(
    ("ahead", "status"), [(1, "ok"), (-1, "ok"), (10, "warning"), (-10, "warning"), (600, "failed")]
)
def test_a_clock_is_compared_with_the_running_proxys(ahead: int, status: str) -> None:
    assert (
        clock_of(check_clock(None, Moment.now(), credentials.utc_now() + timedelta(seconds=ahead)))[
            0
        ]
        == status
    )


def test_a_clock_that_jumps_while_we_look_is_noticed() -> None:
    started = Moment.now()
    before = Moment(started.wall - timedelta(seconds=5), started.monotonic)
    status, what = clock_of(check_clock(None, before, None))
    assert status == "warning"
    assert "jumped by +5.0 s" in what


def test_a_clock_with_nothing_to_compare_is_not_a_failure() -> None:
    assert clock_of(check_clock(None, Moment.now(), None))[0] == "ok"


# The running proxy


async def test_a_ready_proxy_is_asked_for_its_time(tmp_path: Path) -> None:
    moment = credentials.utc_now().replace(microsecond=0)
    async with serving(
        admin({"/ready": (200, "ready")}, date=format_datetime(moment, usegmt=True))
    ) as address:
        config = configuration(tmp_path, admin={"listen": [str(address)]})
        results, reported = await check_proxy(config, 5)
    assert statuses(results) == ["ok"]
    assert reported == moment


async def test_a_proxy_that_is_not_ready_says_why(tmp_path: Path) -> None:
    async with serving(
        admin({"/ready": (503, "no certificate yet\n")}, date="yesterday")
    ) as address:
        results, reported = await check_proxy(
            configuration(tmp_path, admin={"listen": [str(address)]}), 5
        )
    assert statuses(results) == ["failed"]
    assert "no certificate yet" in results[0].what
    assert reported is None


async def test_a_missing_proxy_is_not_a_failure(tmp_path: Path) -> None:
    config = configuration(tmp_path, admin={"listen": [f"127.0.0.1:{free_port()}"]})
    assert statuses((await check_proxy(config, 1))[0]) == ["skipped"]


async def test_something_else_on_the_admin_port_is_survived(tmp_path: Path) -> None:
    async def mumble(stream: SocketStream) -> None:
        await stream.send_all(b"220 mail.test ESMTP\r\n")

    async with serving(mumble) as address:
        assert (
            await ask_admin(configuration(tmp_path, admin={"listen": [str(address)]}), "/ready", 1)
            is None
        )


# Redirection


def test_the_accepted_connections_are_read_out_of_the_proxys_own_metrics() -> None:
    metrics = Metrics()
    assert outbound_connections("up 1\n") is None
    assert outbound_connections(metrics.render().decode()) == 0.0
    where: list[tuple[Direction, Peer, Tls | None]] = [
        ("outbound", "src", "none"),
        ("outbound", "src", None),
        ("outbound", "dst", "none"),
        ("inbound", "src", "none"),
    ]
    for direction, peer, tls in where:
        with metrics.connections[direction].connection(peer, tls):
            pass
    assert outbound_connections(metrics.render().decode()) == 2.0


async def test_without_redirection_the_finding_says_how_to_install_it(tmp_path: Path) -> None:
    """The network may refuse, drop or not route a documentation address. In any case it does not
    arrive here."""
    config = configuration(
        tmp_path,
        outbound={"listen": [f"127.0.0.1:{free_port()}"]},
        intercept={"uid": os.geteuid() + 1},
    )
    results = await check_redirection(config, free_port(), 0.3)
    assert all(result.status in {"failed", "skipped"} for result in results)
    assert worst(results) == "failed"
    assert all(result.remedy or "no outbound listener" in result.what for result in results)


async def test_no_outbound_listener_means_nothing_to_redirect(tmp_path: Path) -> None:
    (result,) = await check_redirection(
        configuration(tmp_path, intercept={"uid": os.geteuid() + 1}), 4101, 1
    )
    assert result.status == "skipped"
    assert "outbound.listen is empty" in result.what


# The command


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser(prog="isthmus")
    check.add_parser(parser.add_subparsers())
    args = parser.parse_args(["check", *map(str, arguments)])
    status: int = args.run(args)
    return status


def test_the_command_says_everything_and_its_exit_code_says_the_worst(
    tmp_path: Path, cart: Workload, capsys: pytest.CaptureFixture[str]
) -> None:
    configuration(tmp_path, identity=identity_section(cart))
    assert run("--config", tmp_path / "config.yaml") == 0
    shown = capsys.readouterr().out
    assert [name for name in check.CHECKS if name not in shown] == ["peers"]
    cart.files.key.unlink()
    assert run("--config", tmp_path / "config.yaml") == 1
    shown = capsys.readouterr().out
    assert "FAILED" in shown
    assert "-> " in shown


def test_the_results_come_as_json_too(
    tmp_path: Path, cart: Workload, capsys: pytest.CaptureFixture[str]
) -> None:
    configuration(tmp_path, identity=identity_section(cart))
    assert (
        run(
            "--config",
            tmp_path / "config.yaml",
            "--json",
            "--only",
            "certificates",
            "--only",
            "clock",
        )
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["status"] == "ok"
    assert {entry["name"] for entry in report["checks"]} == {"certificates", "clock"}
    assert set(report["checks"][0]) == {"name", "status", "what", "remedy"}


def test_a_broken_configuration_ends_the_command_with_its_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("cluster: [")
    assert run("--config", tmp_path / "config.yaml") == 1
    assert "config.yaml" in capsys.readouterr().out


def test_a_text_that_cannot_be_written_is_escaped(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("--config", os.fsdecode(bytes(tmp_path / "\udcff.yaml"))) == 1
    assert r"\udcff.yaml: cannot be read" in capfd.readouterr().out


@pytest.mark.parametrize("value", ["0", "-1", "soon", "inf"])
def test_a_timeout_is_a_positive_number(value: str, capsys: pytest.CaptureFixture[str]) -> None:
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
def test_the_worst_decides(found: list[Status], expected: str) -> None:
    assert worst([Result("x", status, "") for status in found]) == expected
