"""The directory: what an address resolves to, and the mistakes of a document.

A known address gives what the document says about it; an unknown one gives itself. A meshed pod
keeps its identity on every port. A document with mistakes gives all of them, with their paths, and
no directory at all."""

from __future__ import annotations

import time

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from proxy.directory import (
    Directory,
    DirectoryError,
    Endpoint,
    Hint,
    Target,
    directory_schema,
    parse,
)
from proxy.identity.spiffe import SpiffeId
from proxy.net.address import Address
from tests.directory.documents import large

ONE = "spiffe://cluster.local/ns/shop/sa/one"
TEXT = f"""
services:
  - name: web
    namespace: shop
    addresses: [10.96.0.1, "fd00:96::1"]
    ports:
      - {{port: 80, target_port: 8080, protocol: http1}}
      - {{port: 25, protocol: opaque}}
    endpoints:
      - {{address: 10.1.0.1, identity: "{ONE}", zone: a, weight: 2}}
      - {{address: "fd00::2", ports: {{80: 9090}}, ready: false}}
  - name: bare
    ports: [{{port: 81}}]
"""


def directory() -> Directory:
    return parse(TEXT, "test")


def test_a_cluster_address_and_port_resolve_to_the_endpoints_of_the_service() -> None:
    identity = SpiffeId.parse(ONE)
    four = Endpoint(Address("10.1.0.1", 8080), identity, Hint.HTTP1, ready=True, weight=2, zone="a")
    six = Endpoint(Address("fd00::2", 9090), None, Hint.HTTP1, ready=False)
    assert directory().resolve(Address("10.96.0.1", 80)) == Target("shop/web", (four,), Hint.HTTP1)
    assert directory().resolve(Address("fd00:96::1", 80)) == Target("shop/web", (six,), Hint.HTTP1)
    assert directory().services[0].targets[80] == Target("shop/web", (four, six), Hint.HTTP1)
    assert directory().resolve(Address("fd00:96::1", 25)).protocol == "opaque"


def test_a_cluster_address_without_an_endpoint_of_its_family_has_those_of_the_other() -> None:
    text = (
        "services: [{name: a, addresses: [10.0.0.1], ports: [{port: 80}], endpoints: [{address:"
        " 'fd00::1'}, {address: 'fd00::2'}]}]"
    )
    assert len(parse(text, "test").resolve(Address("10.0.0.1", 80)).endpoints) == 2


def test_a_port_without_a_target_port_is_the_same_on_the_endpoints() -> None:
    assert [
        endpoint.address.port for endpoint in directory().services[0].targets[25].endpoints
    ] == [25, 25]


def test_an_endpoint_may_leave_a_port_of_the_service_out() -> None:
    text = TEXT.replace("ports: {80: 9090}", "ports: {80: none}")
    found = parse(text, "test")
    assert [str(endpoint.address) for endpoint in found.services[0].targets[80].endpoints] == [
        "10.1.0.1:8080"
    ]
    assert [str(endpoint.address) for endpoint in found.services[0].targets[25].endpoints] == [
        "10.1.0.1:25",
        "[fd00::2]:25",
    ]
    assert found.resolve(Address("fd00::2", 8080)) == Target(
        None, (Endpoint(Address("fd00::2", 8080), ready=False),)
    )
    jsonschema.validate(
        yaml.safe_load(text.replace("80: none", "'80': none")), dict(directory_schema())
    )
    with pytest.raises(DirectoryError, match=r"endpoints\[1\]\.ports\.80: must be given"):
        parse(TEXT.replace("ports: {80: 9090}", "ports: {80: }"), "test")


def test_a_pod_on_its_target_port_has_the_protocol_of_the_service() -> None:
    target = directory().resolve(Address("10.1.0.1", 8080))
    assert (target.service, target.protocol, len(target.endpoints)) == ("shop/web", Hint.HTTP1, 1)
    assert str(target.endpoints[0].identity) == ONE


def test_a_pod_keeps_its_identity_on_every_other_port() -> None:
    target = directory().resolve(Address("10.1.0.1", 9999))
    assert (target.service, target.protocol) == (None, Hint.DETECT)
    assert target.endpoints[0].address == Address("10.1.0.1", 9999)
    assert str(target.endpoints[0].identity) == ONE


@pytest.mark.parametrize(
    "address", [Address("8.8.8.8", 53), Address("10.96.0.1", 81), Address("fe80::1", 1)]
)
def test_an_unknown_address_is_one_plain_endpoint_at_exactly_that_address(address: Address) -> None:
    assert directory().resolve(address) == Target(None, (Endpoint(address),), Hint.DETECT)
    assert Directory().resolve(address) == Target(None, (Endpoint(address),), Hint.DETECT)


def test_an_ipv4_mapped_address_is_the_ipv4_address() -> None:
    assert directory().resolve(Address("::ffff:10.96.0.1", 80)).service == "shop/web"
    mapped = TEXT.replace("10.96.0.1,", '"::ffff:10.96.0.1",')
    assert parse(mapped, "test").resolve(Address("10.96.0.1", 80)).service == "shop/web"


def test_different_spellings_of_an_ipv6_address_are_one_address() -> None:
    spelt = TEXT.replace("fd00:96::1", "FD00:96:0:0:0:0:0:1")
    assert parse(spelt, "test").resolve(Address("fd00:96::1", 80)).service == "shop/web"


def test_a_service_without_endpoints_has_a_target_without_endpoints() -> None:
    text = "services: [{name: a, addresses: [10.0.0.1], ports: [{port: 80}]}]"
    assert parse(text, "test").resolve(Address("10.0.0.1", 80)) == Target(
        "default/a", (), Hint.DETECT
    )


def test_a_pod_of_two_services_on_one_port_is_said_to_be_of_neither() -> None:
    text = """
services:
  - {name: a, ports: [{port: 80, target_port: 8080, protocol: http1}], endpoints: [{address: 10.1.0.1}]}
  - {name: b, ports: [{port: 90, target_port: 8080}], endpoints: [{address: 10.1.0.1}]}
"""
    target = parse(text, "test").resolve(Address("10.1.0.1", 8080))
    assert (target.service, target.protocol) == (None, Hint.DETECT)


WRONG = """
servces: 1
services:
  - name: A_b
    addresses: [10.0.0.1, 10.0.0.1, x]
    ports: [{port: 80, protocol: htp1}, {port: 80}]
    endpoints:
      - {address: 10.1.0.1, identity: foo}
      - {address: 10.1.0.1, weight: 0, redy: 1}
      - {address: 224.0.0.1, identity: null, ports: {81: 9}, ready: 1, zone: 3}
  - {name: b, addresses: [10.0.0.1], ports: [{port: 80}], endpoints: [{address: 10.1.0.2, identity: "spiffe://t/ns/a/sa/b"}]}
  - {name: c, ports: [{port: 99999}], endpoints: [{address: 10.1.0.2}]}
  - {name: c, ports: []}
  - 3
"""


def test_all_mistakes_are_reported_together_with_their_paths() -> None:
    with pytest.raises(DirectoryError) as caught:
        parse(WRONG, "dir.yaml")
    paths = [mistake.split(": ")[0] for mistake in caught.value.mistakes]
    for path in (
        "servces", "services[0].name", "services[0].addresses[1]", "services[0].addresses[2]", "services[0].ports[0].protocol",
        "services[0].ports[1].port", "services[0].endpoints[0].identity", "services[0].endpoints[1].address",
        "services[0].endpoints[1].weight", "services[0].endpoints[1].redy", "services[0].endpoints[2].address",
        "services[0].endpoints[2].identity", "services[0].endpoints[2].ports.81", "services[0].endpoints[2].ready",
        "services[0].endpoints[2].zone", "services[1].addresses[0]", "services[2].ports[0].port", "services[2].endpoints[0]",
        "services[3]", "services[3].ports", "services[4]",
    ):  # fmt: skip
        assert path in paths, path
    assert str(caught.value).startswith("dir.yaml: ")
    assert "servces: unknown key (did you mean 'services'?)" in caught.value.mistakes


def test_an_endpoint_that_is_meshed_in_one_service_and_not_in_another_is_refused() -> None:
    """Otherwise a missing line would mean clear text to a meshed pod."""
    with pytest.raises(
        DirectoryError,
        match=(
            r"services\[2\].endpoints\[0\]: 10.1.0.2 has no identity here, but spiffe://t/ns/a/sa/b"
        ),
    ):
        parse(WRONG, "dir.yaml")


def identities(text: str) -> dict[str, bool]:
    """Whether these addresses, of one pod and of a service on it, have an identity."""
    found = parse(text, "test")
    asked = [
        "10.1.0.1:4191",
        "10.1.0.1:9000",
        "10.1.0.1:8080",
        "10.1.0.1:1",
        "10.96.0.1:80",
        "10.96.0.1:91",
    ]
    return {
        address: found.resolve(Address.parse(address)).endpoints[0].identity is not None
        for address in asked
    }


@pytest.mark.parametrize(
    ("top", "own", "plain"),
    [
        ("", "", {"10.1.0.1:4191", "10.96.0.1:91"}),
        ("skip_ports: [9000]", "", {"10.1.0.1:9000"}),
        ("skip_ports: []", "", set()),
        ("", ", skip_ports: []", set()),
        (
            "",
            ", skip_ports: [4191, 9000, 8080]",
            {"10.1.0.1:4191", "10.96.0.1:91", "10.1.0.1:9000", "10.1.0.1:8080", "10.96.0.1:80"},
        ),
        ("skip_ports: [9000]", ", skip_ports: [8080]", {"10.1.0.1:8080", "10.96.0.1:80"}),
    ],
)
def test_an_identity_holds_for_all_ports_but_those_that_the_proxy_does_not_stand_before(
    top: str, own: str, plain: set[str]
) -> None:
    """By the pod's address and by a service's address, whose target port decides."""
    ports = "[{port: 80, target_port: 8080}, {port: 91, target_port: 4191}]"
    endpoint = f'{{address: 10.1.0.1, identity: "{ONE}"{own}}}'
    found = identities(
        f"{top}\nservices: [{{name: a, addresses: [10.96.0.1], ports: {ports}, endpoints:"
        f" [{endpoint}]}}]"
    )
    assert {address for address, meshed in found.items() if not meshed} == plain


def test_a_pod_of_two_services_skips_the_same_ports_in_both() -> None:
    text = f"""
services:
  - {{name: a, ports: [{{port: 80}}], endpoints: [{{address: 10.1.0.1, identity: "{ONE}"}}]}}
  - {{name: b, ports: [{{port: 80}}], endpoints: [{{address: 10.1.0.1, identity: "{ONE}", skip_ports: [80]}}]}}
"""
    words = (
        r"services\[1\].endpoints\[0\]: 10.1.0.1 has skip_ports \[80\] here, but \[4191\] in"
        r" another service"
    )
    with pytest.raises(DirectoryError, match=words):
        parse(text, "test")


@pytest.mark.parametrize("value", ["4191", "[0]", "[70000]", "[a]", "{}"])
def test_skip_ports_that_are_no_ports_are_refused(value: str) -> None:
    endpoint = f"{{address: 10.1.0.1, skip_ports: {value}}}"
    for text in (
        f"skip_ports: {value}\nservices: []",
        f"services: [{{name: a, ports: [{{port: 80}}], endpoints: [{endpoint}]}}]",
    ):
        with pytest.raises(DirectoryError, match="skip_ports"):
            parse(text, "test")


@pytest.mark.parametrize("text", ["", "[]", "services: 3", "services: {a: 1}", "a: [", "{}"])
def test_a_document_that_is_not_a_directory_is_an_error(text: str) -> None:
    with pytest.raises(DirectoryError):
        parse(text, "f")


_SCRAP = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(["10.0.0.1", "a", "http1", "spiffe://t/ns/a/sa/b", "", "::1"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "services",
                    "name",
                    "addresses",
                    "ports",
                    "port",
                    "endpoints",
                    "address",
                    "identity",
                    "80",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=30,
)


@given(_SCRAP)
def test_any_document_is_a_directory_or_a_directory_error(value: object) -> None:
    try:
        parse(yaml.safe_dump({"services": value}), "f")
    except DirectoryError as error:
        assert error.mistakes  # noqa: PT017  (either is right)


def test_the_schema_takes_the_document_and_refuses_the_wrong_one() -> None:
    schema = directory_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(yaml.safe_load(TEXT.replace("80: 9090", '"80": 9090')))
    assert not validator.is_valid(yaml.safe_load(WRONG.replace("81: 9", '"81": 9')))


def test_a_thousand_services_are_read_quickly_and_a_lookup_does_not_depend_on_their_number() -> (
    None
):
    text = large(1000)
    started = time.perf_counter()
    found = parse(text, "large")
    assert time.perf_counter() - started < 20, "about 0.15 s on an idle machine"
    assert (len(found.services), found.endpoint_count) == (1000, 5000)
    assert found.resolve(Address("10.64.3.231", 80)).service == "default/s-999"
