"""`isthmus check` and `isthmus intercept` in a pod of a running mesh.

Rules: the real commands run as root in the pod. Each fault is made, found with its message and exit
code, and repaired."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
import trio

from lab.faults import broken_directory, expired_certificate
from lab.pod import CLI, OPERATOR, PACKAGES, Pod
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import ECHO, Pair, exchange_raw, web_and_echo

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def pair(laboratory: Laboratory) -> Pair:
    return laboratory.run(web_and_echo, laboratory.lab)


async def check(pair: Pair, *arguments: str) -> tuple[int, dict[str, list[dict[str, Any]]], str]:
    """The command's exit code, its results by name, and its whole output."""
    command = [
        *CLI,
        "check",
        "--config",
        str(pair.near.config_file),
        "--json",
        "--timeout",
        "20",
        *arguments,
    ]
    done = await pair.web.run(command, user=OPERATOR, env=PACKAGES, timeout=120)
    results: dict[str, list[dict[str, Any]]] = {}
    for each in json.loads(done.stdout)["checks"]:
        results.setdefault(each["name"], []).append(each)
    return done.returncode, results, (done.stdout + done.stderr).decode()


def failed(results: dict[str, list[dict[str, Any]]]) -> set[str]:
    return {
        name for name, found in results.items() if any(each["status"] == "failed" for each in found)
    }


async def test_a_pod_that_is_right_is_found_right(pair: Pair) -> None:
    code, results, output = await check(pair)
    assert (code, failed(results)) == (0, set()), output
    assert set(results) == {
        "configuration",
        "certificates",
        "proxy",
        "clock",
        "directory",
        "redirection",
        "names",
        "peers",
    }
    (names,) = results.pop("names")
    assert (names["status"], "no section `dns`" in names["what"]) == ("skipped", True)
    assert {each["status"] for found in results.values() for each in found} == {"ok"}, output
    peers = [each["what"] for each in results["peers"]]
    assert len(peers) == 4  # two ports, two addresses
    assert all("mutual TLS, TLSv1.3, X25519MLKEM768" in each for each in peers)


async def test_it_prints_text_too(pair: Pair) -> None:
    command = [*CLI, "check", "--config", str(pair.near.config_file)]
    done = await pair.web.run(command, user=OPERATOR, env=PACKAGES, timeout=120)
    assert done.returncode == 0
    assert "ok" in done.text.splitlines()[-1]


async def test_rules_that_are_missing_are_found(pair: Pair) -> None:
    await pair.web.intercept("--remove")
    try:
        code, results, output = await check(pair)
        assert (code, failed(results)) == (1, {"redirection"}), output
        assert any("isthmus intercept" in each["remedy"] for each in results["redirection"]), output
    finally:
        with trio.move_on_after(60, shield=True):
            await pair.web.intercept("--config", str(pair.near.config_file))
    assert (await check(pair, "--only", "redirection"))[0] == 0


async def test_a_certificate_that_has_expired_is_found(pair: Pair) -> None:
    with expired_certificate(pair.near):
        code, results, output = await check(pair)
    assert code == 1, output
    assert "certificates" in failed(results)
    assert any("expired" in each["what"] for each in results["certificates"])


async def test_a_peer_that_is_dead_is_found(pair: Pair) -> None:
    pair.far.running().kill()
    await pair.far.running().wait()
    try:
        code, results, output = await check(pair)
    finally:
        with trio.move_on_after(60, shield=True):
            await pair.far.start(intercept=False)
    assert (code, failed(results)) == (1, {"peers"}), output
    assert all(
        str(pair.far.identity) in each["what"] and "refused" in each["what"]
        for each in results["peers"]
    )
    assert (await check(pair, "--only", "peers"))[0] == 0


async def test_a_peer_with_another_identity_is_found(pair: Pair) -> None:
    good = pair.near.directory_file.read_bytes()
    pair.near.write(pair.near.directory_file, good.replace(b"sa/shop", b"sa/bank"))
    try:
        code, results, output = await check(pair)
    finally:
        pair.near.write(pair.near.directory_file, good)
    assert (code, failed(results)) == (1, {"peers"}), output


async def test_a_broken_directory_is_found(pair: Pair) -> None:
    with broken_directory(pair.near):
        code, results, output = await check(pair)
    assert code == 1
    assert "directory" in failed(results), output
    assert any(str(pair.near.directory_file) in each["what"] for each in results["directory"])


async def test_a_proxy_that_does_not_run_yet_can_be_checked_for(pair: Pair) -> None:
    """As an init container does it, after `isthmus intercept`."""
    await pair.near.running().aclose()
    try:
        code, results, output = await check(
            pair, "--only", "configuration", "--only", "certificates", "--only", "redirection"
        )
    finally:
        with trio.move_on_after(60, shield=True):
            await pair.near.start(intercept=False)
    assert (code, failed(results)) == (0, set()), output
    assert {each["status"] for each in results["redirection"]} == {"ok"}, output


def rules(pod: Pod) -> str:
    return subprocess.run(
        ["ip", "netns", "exec", pod.netns, "nft", "list", "ruleset"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


async def test_removing_the_rules_leaves_nothing_and_the_pod_as_it_was(pair: Pair) -> None:
    assert "table inet isthmus" in rules(pair.shop)
    await pair.shop.intercept("--remove")
    assert rules(pair.shop) == ""
    stranger = pair.cluster.pod("stranger")
    assert (
        await exchange_raw(stranger, pair.shop.ipv4, ECHO, b"without a proxy", end=True)
        == b"without a proxy"
    )
    await pair.shop.intercept("--config", str(pair.far.config_file))
    assert (await check(pair, "--only", "peers"))[0] == 0
