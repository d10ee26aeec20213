"""Names of another cluster's services, as ordinary programs resolve them: the C library, dig and
kdig through real interception. A real resolver (dnsmasq) in another pod serves all other names.
Over IPv4 and IPv6, UDP and TCP.

Rules: programs find virtual addresses under every form of a name. The resolver's answers pass
unchanged, and so do queries to another resolver. No query waits for ever when a resolver is down. A
name keeps its address over a restart of the proxy."""

from __future__ import annotations

import ipaddress
import json
import shutil
from typing import Any

import pytest
import trio

from lab.mesh import Mesh
from lab.pod import CLI, OPERATOR, PACKAGES, Pod, User
from lab.process import Completed
from lab.sidecar import Sidecar
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import counted, eventually

pytestmark = [pytest.mark.lab, pytest.mark.real]

SEARCH = ("default.svc.cluster.local", "svc.cluster.local", "cluster.local")
RANGES = {
    4: ipaddress.ip_network("240.0.0.0/4"),
    6: ipaddress.ip_network("fd69:7374:686d:7573::/64"),
}
VERSIONS = pytest.mark.parametrize("version", [4, 6])
LONG = [
    f"--txt-record=long.example.com,{number:03}{'x' * 200}" for number in range(20)
]  # too large for a datagram

# The error of getaddrinfo(3), and after how many seconds.
FAILS = """
import socket, sys, time
started = time.monotonic()
try:
    socket.getaddrinfo(sys.argv[1], 80)
except OSError as error:
    print(error.errno, time.monotonic() - started)
"""


class Stage:
    """A pod `web` with a sidecar that answers for names, the pod's resolver `dns`, and a resolver
    `other` that is not the pod's. `hasty` is a second pod whose sidecar has short timeouts for
    resolvers, too short for a busy machine."""

    hasty: Stage

    def __init__(self, web: Pod, dns: Pod, other: Pod, sidecar: Sidecar) -> None:
        self.web, self.dns, self.other, self.sidecar = web, dns, other, sidecar

    async def publish(self, *services: str) -> None:
        """Another cluster has these services from now on."""
        before = await counted(self.sidecar, "isthmus_directory_reloads_total", result="ok")
        self.sidecar.write_directory(directory(*services))

        async def taken() -> bool:
            return (
                await counted(self.sidecar, "isthmus_directory_reloads_total", result="ok") > before
            )

        await eventually(taken, "the directory is in use")

    async def resolve(self, name: str, version: int) -> list[str]:
        """The result of getaddrinfo(3)."""
        done = await self.web.run(["getent", f"ahostsv{version}", name], timeout=60)
        return sorted({line.split()[0] for line in done.text.splitlines()})

    async def quiet(self) -> None:
        """Wait until no query is in progress. A client with a late answer has asked twice, and the
        second answer counts too."""

        async def none() -> bool:
            return await counted(self.sidecar, "isthmus_dns_in_flight") == 0

        await eventually(none, "no query is in progress")

    async def dig(
        self, name: str, *arguments: str, at: str | None = None, program: str = "dig"
    ) -> Completed:
        server = [f"@{at}"] if at is not None else []
        return await self.web.run([program, *server, name, *arguments], timeout=60)


def directory(*services: str) -> dict[str, Any]:
    gateway = {
        "address": "192.0.2.1",
        "port": 4143,
        "identity": "spiffe://cluster.local/ns/isthmus/sa/gateway",
    }
    split = [service.split(".") for service in services]
    remote = [
        {"name": name, "namespace": namespace, "ports": [{"port": 80}]} for name, namespace in split
    ]
    return {
        "services": [],
        "clusters": [{"name": "east", "gateways": [gateway], "services": remote}],
    }


async def resolver(pod: Pod, *records: str) -> None:
    """dnsmasq, which knows these records and has no upstream."""
    alone = [
        "--keep-in-foreground",
        "--no-resolv",
        "--no-hosts",
        "--local=/#/",
        "--pid-file=",
        "--log-facility=-",
    ]
    await pod.start("dnsmasq", ["dnsmasq", *alone, *records], port=53, user=User(never_root=True))


async def build(laboratory: Laboratory) -> Stage:
    cluster = laboratory.lab.cluster("names")
    web, dns, other = cluster.pod("web"), cluster.pod("dns"), cluster.pod("other")
    await resolver(dns, "--host-record=www.example.com,192.0.2.7,2001:db8::7", *LONG)
    await resolver(
        other, "--host-record=www.example.com,192.0.2.99", "--host-record=c.east,192.0.2.98"
    )
    cluster.resolve_by(dns.ipv4, dns.ipv6, search=SEARCH, ndots=5)
    mesh = Mesh(cluster)
    sidecar = mesh.join(web, dns={"timeout": "30s"})
    mesh.join(cluster.pod("hasty"), dns={"timeout": "1s"})
    await mesh.start()
    stage = Stage(web, dns, other, sidecar)
    stage.hasty = Stage(cluster.pods["hasty"], dns, other, mesh.sidecars["hasty"])
    for each in (stage, stage.hasty):
        await each.publish("c.default", "db.shop")
    return stage


@pytest.fixture(scope="module")
def stage(laboratory: Laboratory) -> Stage:
    return laboratory.run(build, laboratory)


@VERSIONS
@pytest.mark.parametrize(
    "name",
    [
        "c.east",
        "c.default.east",
        "c-east",
        "c-east.default",
        "c-east.default.svc.cluster.local",
        "C.East.",
    ],
)
async def test_the_c_library_finds_a_virtual_address_under_every_form_of_a_name(
    stage: Stage, name: str, version: int
) -> None:
    (host,) = await stage.resolve(name, version)
    assert ipaddress.ip_address(host) in RANGES[version]
    assert [host] == await stage.resolve("c.east", version)
    assert [host] != await stage.resolve("db.shop.east", version)


# getent(1) for a C library without it: the addresses of a name, or the error of getaddrinfo(3).
GETENT = r"""
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
int main(int argc, char **argv) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;
    int code = getaddrinfo(argv[1], "80", &hints, &found);
    if (code) return printf("%s\n", gai_strerror(code)), 1;
    for (; found; found = found->ai_next) {
        char text[64];
        void *a = found->ai_family == AF_INET6 ? (void *)&((struct sockaddr_in6 *)found->ai_addr)->sin6_addr
                                               : (void *)&((struct sockaddr_in *)found->ai_addr)->sin_addr;
        puts(inet_ntop(found->ai_family, a, text, sizeof text));
    }
}
"""


@pytest.mark.skipif(shutil.which("musl-gcc") is None, reason="there is no musl to link with")
async def test_musl_the_c_library_of_alpine_finds_them_too(stage: Stage) -> None:
    source, program = stage.web.directory / "getent.c", stage.web.directory / "getent"
    source.write_text(GETENT)
    done = await stage.web.run(
        ["musl-gcc", "-static", "-o", str(program), str(source)], user=OPERATOR
    )
    assert done.ok, done.stderr.decode()
    for name in (
        "c.east",
        "c.default.east",
        "c-east",
        "c-east.default.svc.cluster.local",
        "c.east.",
    ):
        done = await stage.web.run([str(program), name], timeout=60)
        assert sorted(done.text.split()) == sorted(
            [*await stage.resolve("c.east", 4), *await stage.resolve("c.east", 6)]
        ), name
    done = await stage.web.run([str(program), "www.example.com"], timeout=60)
    assert sorted(done.text.split()) == ["192.0.2.7", "2001:db8::7"]
    for name in ("gone.east", "c.gone.east"):
        done = await stage.web.run([str(program), name], timeout=60)
        assert "not resolve" in done.text or "not exist" in done.text, done.text


async def test_the_resolver_is_not_asked_for_them(stage: Stage) -> None:
    await stage.quiet()
    forwarded = await counted(stage.sidecar, "isthmus_dns_queries_total", result="forwarded")
    assert await stage.resolve("db.shop.east", 4)
    assert await stage.resolve("gone.east.", 4) == []
    assert (
        await counted(stage.sidecar, "isthmus_dns_queries_total", result="forwarded") == forwarded
    )


@VERSIONS
@pytest.mark.parametrize("transport", ["+notcp", "+tcp"])
@pytest.mark.parametrize("program", ["dig", "kdig"])
async def test_other_names_are_answered_by_the_pods_resolver(
    stage: Stage, program: str, transport: str, version: int
) -> None:
    over = "udp" if transport == "+notcp" else "tcp"
    await stage.quiet()
    before = await counted(
        stage.sidecar, "isthmus_dns_upstream_total", transport=over, result="answered"
    )
    for kind, found in (("A", "192.0.2.7"), ("AAAA", "2001:db8::7")):
        done = await stage.dig(
            "www.example.com",
            kind,
            transport,
            "+short",
            at=stage.dns.address(version),
            program=program,
        )
        assert done.text.split() == [found], done.stderr
    assert (
        await counted(
            stage.sidecar, "isthmus_dns_upstream_total", transport=over, result="answered"
        )
        == before + 2
    )


@VERSIONS
@pytest.mark.parametrize("transport", ["+notcp", "+tcp"])
async def test_dig_gets_the_names_of_the_other_cluster_over_both_transports(
    stage: Stage, transport: str, version: int
) -> None:
    where = stage.dns.address(version)
    done = await stage.dig("c.east", "AAAA" if version == 6 else "A", transport, "+short", at=where)
    assert ipaddress.ip_address(done.text.strip()) in RANGES[version]
    done = await stage.dig("gone.east", transport, at=where)
    assert "status: NXDOMAIN" in done.text
    assert "SOA" in done.text
    done = await stage.dig("c.east", "HTTPS", transport, at=where)
    assert "status: NOERROR" in done.text
    assert "ANSWER: 0" in done.text


async def test_a_virtual_address_has_its_name(stage: Stage) -> None:
    (host,) = await stage.resolve("db.shop.east", 4)
    done = await stage.web.run(["dig", "+short", "-x", host])
    assert done.text.split() == ["db.shop.east."]


async def test_what_is_too_long_for_a_datagram_comes_over_tcp(stage: Stage) -> None:
    await stage.quiet()
    before = await counted(
        stage.sidecar, "isthmus_dns_upstream_total", transport="tcp", result="answered"
    )
    done = await stage.dig("long.example.com", "TXT", "+short", "+bufsize=512", at=stage.dns.ipv4)
    assert len(done.text.splitlines()) == 20
    assert (
        await counted(
            stage.sidecar, "isthmus_dns_upstream_total", transport="tcp", result="answered"
        )
        == before + 1
    )


async def test_a_query_to_another_resolver_is_answered_by_that_resolver(stage: Stage) -> None:
    for transport in ("+notcp", "+tcp"):
        done = await stage.dig("c.east", "A", transport, "+short", at=stage.other.ipv4)
        assert done.text.split() == ["192.0.2.98"]


async def test_names_come_and_go_with_the_directory_and_keep_their_address(stage: Stage) -> None:
    was = await stage.resolve("c.east", 4)
    await stage.publish("db.shop")
    assert await stage.resolve("c.east", 4) == []
    assert "status: NXDOMAIN" in (await stage.dig("c.east", at=stage.dns.ipv4)).text
    assert await counted(stage.sidecar, "isthmus_virtual_addresses", state="quarantined") == 1
    await stage.publish("c.default", "db.shop")
    assert await stage.resolve("c.east", 4) == was


async def check(stage: Stage, timeout: int = 20) -> dict[str, list[str]]:
    command = [
        *CLI,
        "check",
        "--config",
        str(stage.sidecar.config_file),
        "--only",
        "names",
        "--json",
        "--timeout",
        str(timeout),
    ]
    done = await stage.web.run(command, user=OPERATOR, env=PACKAGES, timeout=150)
    found: dict[str, list[str]] = {}
    for one in json.loads(done.text)["checks"]:
        found.setdefault(one["status"], []).append(one["what"])
    return found


async def test_the_check_proves_it_while_the_proxy_runs_before_and_says_when_it_is_not_so(
    stage: Stage,
) -> None:
    found = await check(stage)
    assert {status: len(what) for status, what in found.items()} == {
        "ok": 4
    }  # two resolvers, UDP and TCP
    assert all("running proxy" in what for what in found["ok"])
    await stage.web.intercept("--remove")
    assert list(await check(stage, 2)) == ["failed"]
    await stage.web.intercept("--config", str(stage.sidecar.config_file), "--no-dns")
    assert list(await check(stage, 2)) == ["failed"]
    assert await stage.resolve("c.east", 4) == []
    await stage.sidecar.running().aclose()
    await stage.web.intercept("--config", str(stage.sidecar.config_file))
    await stage.web.intercept("--config", str(stage.sidecar.config_file))
    found = await check(stage)
    assert {status: len(what) for status, what in found.items()} == {"ok": 4}
    assert all("arrives at the proxy's port" in what for what in found["ok"])
    await stage.sidecar.start(intercept=False)
    assert await stage.resolve("c.east", 4)


async def test_without_a_running_proxy_queries_fail_at_once_and_the_address_is_the_same_after_it_is_back(
    stage: Stage,
) -> None:
    was = await stage.resolve("c.east", 4), await stage.resolve("c.east", 6)
    await stage.sidecar.running().aclose()
    number, seconds = (
        await stage.web.run_python(FAILS, "www.example.com", timeout=60)
    ).text.split()
    assert int(number) == -3  # EAI_AGAIN: a failure, not an answer that the name does not exist
    assert float(seconds) < 8  # with timeouts it would be 2 s for each of 2 servers and 4 names
    await stage.sidecar.start(intercept=False)
    assert (await stage.resolve("c.east", 4), await stage.resolve("c.east", 6)) == was


async def test_a_dead_resolver_is_a_failure_for_its_own_names_and_nothing_for_ours(
    stage: Stage,
) -> None:
    stage = stage.hasty
    stage.dns.processes["dnsmasq"].pause()
    try:
        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(stage.dig, f"n{number}.example.com", "+tries=1", "+timeout=5")
            await eventually(
                lambda: counted(stage.sidecar, "isthmus_dns_in_flight"), "questions wait"
            )
            assert await stage.resolve("c.east", 4)
            done = await stage.dig("www.example.com", "+tries=1", "+timeout=20", at=stage.dns.ipv4)
            assert "status: SERVFAIL" in done.text
    finally:
        stage.dns.processes["dnsmasq"].resume()
    assert (
        await counted(
            stage.sidecar, "isthmus_dns_upstream_total", transport="udp", result="timeout"
        )
        >= 11
    )
    assert await stage.resolve("www.example.com", 4) == ["192.0.2.7"]


async def test_nothing_is_left_when_the_rules_are_removed(stage: Stage) -> None:
    await stage.web.intercept("--remove")
    assert await stage.resolve("www.example.com", 4) == ["192.0.2.7"]
    assert await stage.resolve("c.east", 4) == []
    await stage.web.intercept("--config", str(stage.sidecar.config_file))
    assert await stage.resolve("c.east", 4)
