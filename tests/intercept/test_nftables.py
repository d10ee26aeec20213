"""The interception ruleset as text.

Rules: the text depends on the settings only. nft accepts the output for all valid settings. Invalid
settings are refused with all mistakes at once. tests/lab/test_interception.py shows what the kernel
does with the rules."""

import argparse
import dataclasses
import ipaddress
import itertools
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.commands import intercept as command
from proxy.intercept import nftables
from proxy.intercept.nftables import Captured, InterceptSettings, SettingsInvalid

GOLDEN = """\
add table inet isthmus
delete table inet isthmus
table inet isthmus {
\tset skip_outbound_ports {
\t\ttype inet_service
\t\tflags interval
\t\telements = { 25, 4000-4010 }
\t}

\tset skip_outbound_subnets4 {
\t\ttype ipv4_addr
\t\tflags interval
\t\telements = { 10.0.0.0/8 }
\t}

\tset skip_outbound_subnets6 {
\t\ttype ipv6_addr
\t\tflags interval
\t\telements = { fd00::/8 }
\t}

\t# Connections of the pod's programs go to the outbound port.
\tchain output {
\t\ttype nat hook output priority -100; policy accept;
\t\t# The proxy's own connections.
\t\tmeta skuid 2102 return
\t\tmeta mark 0x00002102 return
\t\t# Traffic inside the pod.
\t\toifname "lo" return
\t\t# Only a first SYN opens a connection; open connections are not touched.
\t\tmeta l4proto != tcp return
\t\ttcp flags & (fin | syn | rst | ack) != syn return
\t\t# Link-local: the proxy could not dial it.
\t\tip6 daddr fe80::/10 return
\t\ttcp dport @skip_outbound_ports return
\t\tip daddr @skip_outbound_subnets4 return
\t\tip6 daddr @skip_outbound_subnets6 return
\t\tmeta l4proto tcp redirect to :4140
\t}

\t# A new connection that is not redirected would leave the pod without the mesh.
\tchain guard_output {
\t\ttype filter hook output priority 0; policy accept;
\t\t# The proxy's own connections.
\t\tmeta skuid 2102 return
\t\tmeta mark 0x00002102 return
\t\t# Traffic inside the pod, which includes all redirected traffic.
\t\tfib daddr type local return
\t\t# Only a first SYN opens a connection; open connections are not touched.
\t\tmeta l4proto != tcp return
\t\ttcp flags & (fin | syn | rst | ack) != syn return
\t\t# Link-local: the proxy could not dial it.
\t\tip6 daddr fe80::/10 return
\t\ttcp dport @skip_outbound_ports return
\t\tip daddr @skip_outbound_subnets4 return
\t\tip6 daddr @skip_outbound_subnets6 return
\t\tmeta l4proto tcp counter reject with tcp reset
\t}

\tset skip_inbound_ports {
\t\ttype inet_service
\t\tflags interval
\t\telements = { 22 }
\t}

\tset skip_inbound_subnets4 {
\t\ttype ipv4_addr
\t\tflags interval
\t\telements = { 192.0.2.1/32 }
\t}

\t# Connections from outside go to the inbound port.
\tchain prerouting {
\t\ttype nat hook prerouting priority -100; policy accept;
\t\tiifname "lo" return
\t\tfib daddr type != local return
\t\t# Only a first SYN opens a connection; open connections are not touched.
\t\tmeta l4proto != tcp return
\t\ttcp flags & (fin | syn | rst | ack) != syn return
\t\ttcp dport 4191 return
\t\ttcp dport @skip_inbound_ports return
\t\tip saddr @skip_inbound_subnets4 return
\t\tmeta l4proto tcp redirect to :4143
\t}

\t# A new connection that is not redirected would reach the application without the proxy's checks.
\tchain guard_input {
\t\ttype filter hook input priority 0; policy accept;
\t\tiifname "lo" return
\t\t# Only a first SYN opens a connection; open connections are not touched.
\t\tmeta l4proto != tcp return
\t\ttcp flags & (fin | syn | rst | ack) != syn return
\t\t# Redirected traffic.
\t\ttcp dport 4143 return
\t\ttcp dport 4191 return
\t\ttcp dport @skip_inbound_ports return
\t\tip saddr @skip_inbound_subnets4 return
\t\tmeta l4proto tcp counter reject with tcp reset
\t\t# Everything else is unreadable, such as fragments within fragments.
\t\tcounter drop
\t}
}
"""

RESOLVERS = (Captured("10.96.0.10", 53, 4153), Captured("fd00::a", 5353, 4154))
ports = st.one_of(
    st.integers(1, 65535),
    st.tuples(st.integers(1, 65535), st.integers(1, 65535)).map(
        lambda pair: f"{min(pair)}-{max(pair)}"
    ),
)
# st.ip_addresses builds a strategy for each reserved address that it draws, which takes most of the
# time of these tests.
addresses4 = st.one_of(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["0.0.0.0", "10.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255"]),
).map(ipaddress.IPv4Address)
addresses6 = st.one_of(
    st.integers(0, 2**128 - 1),
    st.sampled_from(["::", "::1", "::ffff:10.0.0.1", "2001:db8::", "fe80::1", "ff02::1"]),
).map(ipaddress.IPv6Address)
subnets = st.one_of(
    st.tuples(addresses4, st.integers(0, 32)).map(
        lambda pair: str(ipaddress.ip_network(pair, strict=False))
    ),
    st.tuples(addresses6, st.integers(0, 128)).map(
        lambda pair: str(ipaddress.ip_network(pair, strict=False))
    ),
    addresses4.map(str),
    addresses6.map(str),
)
port_lists = st.lists(ports, max_size=6).map(tuple)
subnet_lists = st.lists(subnets, max_size=6).map(tuple)
all_settings = st.builds(
    InterceptSettings,
    uid=st.integers(0, 2**32 - 2),
    mark=st.none() | st.integers(1, 2**32 - 1),
    skip_outbound_ports=port_lists,
    skip_inbound_ports=port_lists,
    skip_outbound_subnets=subnet_lists,
    skip_inbound_subnets=subnet_lists,
    redirect_outbound_ports=port_lists,
    redirect_inbound_ports=port_lists,
    dns_port=st.none() | st.just(4153),
    resolvers=st.sampled_from([(), RESOLVERS]),
)


def test_the_ruleset_reads_as_documented() -> None:
    given_settings = InterceptSettings(
        mark=0x2102,
        skip_outbound_ports=("4005-4010", 25, "4000-4005"),
        skip_inbound_ports=("22",),
        skip_outbound_subnets=("fd00::/8", "10.1.0.0/16", "10.0.0.0/8"),
        skip_inbound_subnets=("192.0.2.1",),
    )
    assert nftables.render(given_settings) == GOLDEN


QUESTIONS = """\
\t\t# Queries to the pod's resolvers.
\t\tip daddr 10.96.0.10 udp dport 53 redirect to :4153
\t\tip daddr 10.96.0.10 tcp dport 53 tcp flags & (fin | syn | rst | ack) == syn redirect to :4153
\t\tip6 daddr fd00::a udp dport 5353 redirect to :4154
\t\tip6 daddr fd00::a tcp dport 5353 tcp flags & (fin | syn | rst | ack) == syn redirect to :4153
\t\t# Traffic inside the pod.
"""
REFUSED = """\
\t\tfib daddr type local return
\t\t# Queries that were not redirected.
\t\tip daddr 10.96.0.10 udp dport 53 counter reject
\t\tip6 daddr fd00::a udp dport 5353 counter reject
\t\t# Only a first SYN opens a connection; open connections are not touched.
"""


def test_questions_to_the_pods_resolvers_are_captured_before_all_exceptions_but_the_proxys_own() -> (
    None
):
    chosen = InterceptSettings(
        dns_port=4153,
        resolvers=RESOLVERS,
        skip_outbound_ports=(53,),
        skip_outbound_subnets=("10.0.0.0/8",),
    )
    text = nftables.render(chosen)
    assert f"\t\tmeta skuid 2102 return\n{QUESTIONS}" in text
    assert REFUSED in text
    without = nftables.render(dataclasses.replace(chosen, dns_port=None))
    assert "udp" not in without
    added = {line.strip() for line in (QUESTIONS + REFUSED).splitlines()} - {
        line.strip() for line in without.splitlines()
    }
    assert [
        line for line in text.splitlines() if line.strip() not in added
    ] == without.splitlines(), "nothing else is different"


def test_names_without_an_outbound_port_and_odd_resolvers_are_mistakes() -> None:
    with pytest.raises(SettingsInvalid, match="dns_port: DNS answers lead to the outbound port"):
        nftables.render(InterceptSettings(outbound_port=None, dns_port=4153))
    for captured in (
        Captured("dns.example", 53, 4153),
        Captured("10.0.0.1", 0, 4153),
        Captured("10.0.0.1", 53, 70000),
    ):
        with pytest.raises(SettingsInvalid, match="resolvers: "):
            nftables.render(InterceptSettings(dns_port=4153, resolvers=(captured,)))
    with pytest.raises(SettingsInvalid, match="dns_port"):
        nftables.render(InterceptSettings(dns_port=4140))


def test_a_direction_without_a_port_is_not_redirected() -> None:
    only_inbound = nftables.render(InterceptSettings(outbound_port=None))
    assert re.findall(r"hook (\w+)", only_inbound) == ["prerouting", "input"]
    only_outbound = nftables.render(InterceptSettings(inbound_port=None))
    assert re.findall(r"hook (\w+)", only_outbound) == ["output", "output"]


@settings(max_examples=200)
@given(all_settings)
def test_rendering_is_pure_and_verdicts_come_last(chosen: InterceptSettings) -> None:
    text = nftables.render(chosen)
    assert text == nftables.render(dataclasses.replace(chosen))
    chains = _rules(text)
    assert list(chains) == ["output", "guard_output", "prerouting", "guard_input"]
    for name, found in chains.items():
        # Those for DNS are above them, see above.
        rules = [
            rule
            for rule in found
            if not any(f"daddr {resolver.host} " in rule for resolver in RESOLVERS)
        ]
        assert {"output": "4140", "prerouting": "4143"}.get(name, "reset") in rules[
            -2 if name == "guard_input" else -1
        ]
        exceptions = [
            rule for rule in rules if not re.search(r"redirect to|reject with|drop", rule)
        ]
        assert exceptions == rules[: len(exceptions)]
        assert all(rule.endswith(" return") for rule in exceptions)


@settings(max_examples=200)
@given(all_settings)
def test_a_guard_makes_the_same_exceptions_as_its_redirection(chosen: InterceptSettings) -> None:
    chains = {
        name: {rule for rule in rules if rule.endswith(" return")}
        for name, rules in _rules(nftables.render(chosen)).items()
    }
    # Where these differ: the guards come after NAT, so redirected traffic is an exception of the
    # guards.
    assert chains["output"] - chains["guard_output"] == {'oifname "lo" return'}
    assert chains["guard_output"] - chains["output"] == {"fib daddr type local return"}
    assert chains["prerouting"] - chains["guard_input"] == {"fib daddr type != local return"}
    assert chains["guard_input"] - chains["prerouting"] == {"tcp dport 4143 return"}


def _rules(text: str) -> dict[str, list[str]]:
    """The rules of each chain, without comments."""
    found = {}
    for chain in text.split("\tchain ")[1:]:
        lines = [line.strip() for line in chain.partition("\t}")[0].splitlines()[2:]]
        found[chain.split()[0]] = [line for line in lines if not line.startswith("#")]
    return found


@settings(max_examples=200)
@given(port_lists)
def test_merged_ports_are_the_same_ports_without_overlap(specs: tuple[int | str, ...]) -> None:
    def covered(items: Sequence[int | str]) -> set[int]:
        found: set[int] = set()
        for spec in items:
            low, high = nftables.parse_ports(spec)
            found.update(range(low, high + 1))
        return found

    merged = nftables.merge_ports(specs)
    assert covered(merged) == covered(specs)
    bounds = [nftables.parse_ports(spec) for spec in merged]
    assert all(left[1] + 1 < right[0] for left, right in itertools.pairwise(bounds))


def _nft_check(script: str) -> subprocess.CompletedProcess[str]:
    # `nft --check` asks the kernel too, and so needs a namespace with that right.
    prefix = ["unshare", "--user", "--map-root-user", "--net"]
    return subprocess.run(
        [*prefix, "nft", "--check", "-f", "-"],
        input=script,
        capture_output=True,
        text=True,
        check=False,
    )


def _nft_works() -> bool:
    return bool(shutil.which("nft") and shutil.which("unshare")) and _nft_check("").returncode == 0


needs_nft = pytest.mark.skipif(
    not _nft_works(), reason="nft is not installed, or user namespaces are forbidden"
)


@needs_nft
@settings(max_examples=40, deadline=None)
@given(all_settings)
def test_nft_accepts_every_rendered_ruleset(chosen: InterceptSettings) -> None:
    done = _nft_check(nftables.render(chosen))
    assert done.returncode == 0, done.stderr


@needs_nft
def test_the_check_by_nft_can_fail() -> None:
    assert _nft_check("table inet isthmus { nonsense }").returncode != 0


def test_all_mistakes_are_named_together() -> None:
    wrong = InterceptSettings(
        outbound_port=0,
        inbound_port=4191,
        uid=None,
        skip_inbound_ports=("http", "9-3", "70000"),
        skip_outbound_subnets=("10.0.0.1/8", "example.com"),
    )
    with pytest.raises(SettingsInvalid) as caught:
        nftables.render(wrong)
    text = str(caught.value)
    assert len(caught.value.mistakes) == 8
    for part in ("outbound_port: 0 is not", "must differ", "uid, mark: one of them"):
        assert part in text
    for part in ("'http' is neither", "'9-3' ends", "'70000' is outside"):
        assert f"skip_inbound_ports: {part}" in text
    assert "skip_outbound_subnets: '10.0.0.1/8'" in text
    assert "host bits set" in text
    assert "'example.com'" in text


@pytest.mark.parametrize("mark", [0, -1, 2**32])
def test_a_mark_that_every_packet_has_or_none_can_have_is_refused(mark: int) -> None:
    with pytest.raises(SettingsInvalid, match="packet mark"):
        nftables.render(InterceptSettings(mark=mark))


@pytest.mark.parametrize("spec", ["", "-", "1-", "-5", "1-2-3", "٣", "0x50", "80,81", "+1"])
def test_odd_port_texts_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="neither a port nor a range"):
        nftables.parse_ports(spec)


@pytest.mark.parametrize(
    ("stderr", "says"),
    [
        ("netlink: Error: cache initialization failed: Operation not permitted\n", "NET_ADMIN"),
        ("Operation not permitted (you must be root)\n", "NET_ADMIN"),
        (
            (
                "/dev/stdin:5:1-2: Error: Could not process rule: No such file or directory\nfib"
                " daddr\n^^\n"
            ),
            "kernel lacks",
        ),
        (
            "/dev/stdin:5:1-2: Error: Could not process rule: Operation not supported\n",
            "kernel lacks",
        ),
        (
            "/dev/stdin:1:1-2: Error: syntax error\nfoo\n",
            "rejected the rules: /dev/stdin:1:1-2: Error: syntax error",
        ),
        ("", "no reason given"),
    ],
)
def test_an_error_of_nft_becomes_one_line_of_advice(stderr: str, says: str) -> None:
    message = nftables.explain(stderr)
    assert says in message
    assert "\n" not in message


def _run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["intercept", *arguments])
    code: int = args.run(args)
    return code


def test_dry_run_prints_the_rules_that_the_flags_ask_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = _run(
        "--dry-run",
        "--no-uid",
        "--mark",
        "0x2102",
        "--skip-inbound-ports",
        "22,9000-9010",
        "--outbound-port",
        "5140",
    )
    assert code == 0
    expected = InterceptSettings(
        uid=None, mark=0x2102, skip_inbound_ports=("22", "9000-9010"), outbound_port=5140
    )
    assert capsys.readouterr().out == nftables.render(expected)


def test_wrong_flags_end_with_64_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("--dry-run", "--no-uid", "--skip-outbound-ports", "0") == 64
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "uid, mark" in error
    assert "skip_outbound_ports" in error


def test_a_missing_nft_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nftables, "SYSTEM_PATH", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _run() == 1
    assert "nft is not installed" in capsys.readouterr().err
