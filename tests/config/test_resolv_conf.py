"""The resolvers of the pod: resolv.conf as the C library reads it, and the settings that override
it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config.resolv_conf import Resolvers, parse
from proxy.config.schema_clusters import DnsConfig
from proxy.net.address import Address
from proxy.settings.sources import ConfigError

KUBERNETES = """\
search default.svc.cluster.local svc.cluster.local cluster.local example.com.
nameserver 10.96.0.10
options ndots:5
"""


def test_the_file_of_kubernetes_is_understood() -> None:
    found = parse(KUBERNETES)
    assert found.upstreams == (Address("10.96.0.10", 53),)
    assert found.search == (
        "default.svc.cluster.local",
        "svc.cluster.local",
        "cluster.local",
        "example.com",
    )


def test_at_most_three_resolvers_count_each_once_and_the_last_search() -> None:
    servers = [
        "10.0.0.1",
        "fd00::1",
        "fe80::1%eth0",
        "nonsense",
        "10.0.0.1",
        "10.0.0.2",
        "10.0.0.3",
    ]
    lines = [f"nameserver {server}" for server in servers]
    text = "\n".join(
        [*lines, "domain a.example", "search b.example", "# nameserver 1.1.1.1", "nameserver"]
    )
    found = parse(text)
    assert [str(address) for address in found.upstreams] == [
        "10.0.0.1:53",
        "[fd00::1]:53",
        "10.0.0.2:53",
    ]
    assert found.search == ("b.example",)


def test_each_resolver_has_a_port_of_its_own_in_its_own_family() -> None:
    upstreams = (Address("10.0.0.1", 53), Address("fd00::1", 53), Address("10.0.0.2", 53))
    ways = [
        (str(ours), str(theirs))
        for ours, theirs in Resolvers(upstreams, ()).listen_addresses(DnsConfig())
    ]
    assert ways == [
        ("127.0.0.1:4153", "10.0.0.1:53"),
        ("[::1]:4154", "[fd00::1]:53"),
        ("127.0.0.1:4155", "10.0.0.2:53"),
    ]
    only_ipv4 = DnsConfig(listen=(Address("127.0.0.1", 4153),))
    assert len(list(Resolvers(upstreams, ()).listen_addresses(only_ipv4))) == 2


def test_settings_override_the_file_and_the_file_fills_missing_settings(
    tmp_path: Path,
) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text(KUBERNETES)
    resolvers = Resolvers.of(DnsConfig(upstreams=(Address("192.0.2.53", 5353),), resolv_conf=path))
    assert resolvers.upstreams == (Address("192.0.2.53", 5353),)
    assert resolvers.search[0] == "default.svc.cluster.local"
    assert Resolvers.of(DnsConfig(resolv_conf=path)).upstreams == (Address("10.96.0.10", 53),)


def test_without_any_resolver_the_error_names_the_setting(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    with pytest.raises(ConfigError, match=r"resolv\.conf"):
        Resolvers.of(DnsConfig(resolv_conf=path))
    path.write_text("search example.com\n")
    with pytest.raises(ConfigError, match=r"dns\.upstreams"):
        Resolvers.of(DnsConfig(resolv_conf=path))
    assert (
        Resolvers.of(
            DnsConfig(resolv_conf=tmp_path / "none", upstreams=(Address("192.0.2.1", 53),))
        ).search
        == ()
    )


@given(st.text(alphabet="nameserver search10.:#\n\t \0", max_size=200))
def test_no_text_is_too_odd(text: str) -> None:
    assert len(parse(text).upstreams) <= 3
