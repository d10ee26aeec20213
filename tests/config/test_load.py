"""The configuration: defaults, file, environment; all mistakes together; and a documentation that
agrees with the code."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from proxy.config.load import DOWNWARD, DOWNWARD_ADDRESSES, config_schema, load
from proxy.config.schema import Config
from proxy.directory import parse
from proxy.identity.spiffe import SpiffeId
from proxy.net.address import Address
from proxy.settings.declare import fields, is_struct
from proxy.settings.document import DocumentError
from proxy.settings.document import load as load_document
from proxy.settings.reference import tables
from proxy.settings.sources import MOST_BYTES, ConfigError, variable
from proxy.settings.units import parse_duration, parse_size, show_duration, show_size

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "configuration.md"
IDENTITY = "identity: {certificate: c.pem, key: k.pem, roots: [r.pem]}\n"

EXPECTED = "spiffe://cluster.local/ns/a/sa/b"
ENROLLED = (
    "identity: {{source: control, roots: [r], control: {{address: '{}', token: t, identity: {}}}}}"
)


SPIFFE = "identity: {{source: spiffe, spiffe: {{socket: {}}}}}"


def mistakes(tmp_path: Path, text: str, environ: dict[str, str] | None = None) -> list[str]:
    file = tmp_path / "isthmus.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file, environ or {})
    assert caught.value.source == str(file)
    return list(caught.value.mistakes)


def config(tmp_path: Path, text: str, environ: dict[str, str] | None = None) -> Config:
    file = tmp_path / "isthmus.yaml"
    file.write_text(text)
    return load(file, environ or {})


def test_without_a_file_and_an_environment_everything_has_a_default() -> None:
    found = load(None, {})
    assert found == Config()
    assert found.outbound.listen == (Address("127.0.0.1", 4140), Address("::1", 4140))
    assert found.admin_ports == {4191}


def test_the_defaults_pass_their_own_checks(tmp_path: Path) -> None:
    """A default that its own limits refuse could not be written into a file."""
    written: dict[str, object] = {}
    for name, default, form in fields(Config):
        if is_struct(form.type) and default is not None:
            schema = config_schema()["properties"][name]["properties"]
            written[name] = {
                key: node["default"]
                for key, node in schema.items()
                if node.get("default") is not None
            }
    assert config(tmp_path, yaml.safe_dump(written)) == Config()


def test_units_become_seconds_bytes_and_addresses(tmp_path: Path) -> None:
    found = config(
        tmp_path,
        'outbound: {listen: ["[::1]:5"], detect_timeout: 500ms}\nhttp: {max_head_bytes: 1MiB}\ntcp:'
        " {idle_timeout: 1h, keepalive: 0}\n",
    )
    assert found.outbound.listen == (Address("::1", 5),)
    assert (found.outbound.detect_timeout, found.http.max_head_bytes) == (0.5, 2**20)
    assert (found.tcp.idle_timeout, found.tcp.keepalive) == (3600.0, 0.0)


def service_links(service: str, host: str, ports: dict[str, tuple[int, str]]) -> dict[str, str]:
    """What Kubernetes puts into each container for a Service: pkg/kubelet/envvars of its source has
    the forms."""
    name, netloc = service.upper().replace("-", "_"), f"[{host}]" if ":" in host else host
    found = {f"{name}_SERVICE_HOST": host}
    for index, (port_name, (port, protocol)) in enumerate(ports.items()):
        url, link = f"{protocol.lower()}://{netloc}:{port}", f"{name}_PORT_{port}_{protocol}"
        if index == 0:
            found |= {f"{name}_SERVICE_PORT": str(port), f"{name}_PORT": url}
        if port_name:
            found[f"{name}_SERVICE_PORT_{port_name.upper().replace('-', '_')}"] = str(port)
        found |= {
            link: url,
            f"{link}_PROTO": protocol.lower(),
            f"{link}_PORT": str(port),
            f"{link}_ADDR": host,
        }
    return found


@pytest.mark.parametrize("host", ["10.96.0.7", "fd00::7"])
@pytest.mark.parametrize(
    "service",
    [
        "isthmus",
        "isthmus--east",
        "isthmus-log--level",
        "isthmus-cluster",
        "otel",
        "otel-exporter-jaeger-agent",
        "pod",
        "node",
    ],
)
def test_the_variables_that_kubernetes_sets_for_a_service_are_no_settings(
    tmp_path: Path, service: str, host: str
) -> None:
    links = service_links(
        service, host, {"http": (80, "TCP"), "dns-udp": (53, "UDP"), "": (9, "SCTP")}
    )
    assert len(links) == 17
    assert config(tmp_path, "", links) == Config()
    jaeger = {"OTEL_EXPORTER_JAEGER_AGENT_HOST": "agent"}
    assert config(tmp_path, "", links | jaeger).tracing.agent == "agent:6831"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ISTHMUS_ADMIN__PORT", "4191"),
        ("ISTHMUS_ADMIN__PORT", "tcp://10.0.0.1:80"),  # no Service is called `isthmus-admin-`
        ("ISTHMUS_POD__SERVICE_HOST", "10.0.0.1"),
        ("ISTHMUS__EAST_SERVICE_HOST", "east"),
        ("ISTHMUS__EAST_SERVICE_PORT_HTTP", "http"),
        ("ISTHMUS__EAST_PORT", "80"),
        ("ISTHMUS__EAST_PORT_80_TCP_ADDR", "true"),
        ("ISTHMUS_LOG__LEVL", "debug"),
    ],
)
def test_a_variable_that_only_looks_like_a_services_is_a_mistake(
    tmp_path: Path, name: str, value: str
) -> None:
    assert mistakes(tmp_path, "", {name: value})[0].startswith(f"{name}: no such setting")


def test_no_setting_has_a_name_that_a_service_could_take() -> None:
    sections = [
        (name, fields(form.type) if is_struct(form.type) else None)
        for name, _, form in fields(Config)
    ]
    names = [
        variable(name, field)
        for name, inner in sections
        if inner is not None
        for field, _, _ in inner
    ]
    names += [variable("", name) for name, inner in sections if inner is None]
    assert len(names) > 100
    ending = re.compile(
        r".*[A-Z0-9]_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
    )
    assert [
        name for name in [*names, *DOWNWARD.values(), DOWNWARD_ADDRESSES] if ending.fullmatch(name)
    ] == []


SOCKET = {"SPIFFE_ENDPOINT_SOCKET": "unix:///run/agent.sock"}


@pytest.mark.parametrize(
    ("text", "environ", "address"),
    [
        ("identity: {source: spiffe}", {}, "unix:///run/agent.sock"),
        ("identity: {source: spiffe, spiffe: {timeout: 1s}}", {}, "unix:///run/agent.sock"),
        ("identity: {source: spiffe, spiffe: {socket: 'unix:/a'}}", {}, "unix:/a"),
        ("{}", {"ISTHMUS_IDENTITY__SOURCE": "spiffe"}, "unix:///run/agent.sock"),
    ],
)
def test_the_standard_variable_has_the_address_of_the_workload_api(
    tmp_path: Path, text: str, environ: dict[str, str], address: str
) -> None:
    found = config(tmp_path, text, {**SOCKET, **environ})
    assert found.identity is not None
    assert found.identity.spiffe is not None
    assert found.identity.spiffe.socket == address


@pytest.mark.parametrize("text", ["{}", IDENTITY])
def test_the_standard_variable_changes_no_other_source(tmp_path: Path, text: str) -> None:
    assert config(tmp_path, text, SOCKET) == config(tmp_path, text)


def test_the_environment_names_the_file_and_overrides_it(tmp_path: Path) -> None:
    file = tmp_path / "named.yaml"
    file.write_text("cluster: east\nlog: {level: error, access: true}\n")
    environ = {
        "ISTHMUS_CONFIG": str(file),
        "ISTHMUS_LOG__LEVEL": "debug",
        "ISTHMUS_MARK": "0x10",
        "ISTHMUS_OUTBOUND__OPAQUE_PORTS": "[1, 2]",
        "ISTHMUS_DIRECTORY__FILE": "/d.yaml",
    }
    found = load(None, environ)
    assert (found.cluster, found.log.level, found.log.access, found.mark) == (
        "east",
        "debug",
        True,
        16,
    )
    assert found.outbound.opaque_ports == (1, 2)
    assert found.directory is not None
    assert found.directory.file == Path("/d.yaml")


def test_the_downward_api_fills_missing_settings(tmp_path: Path) -> None:
    environ = {
        "POD_NAME": "web-1",
        "POD_NAMESPACE": "shop",
        "POD_IPS": "10.0.0.1, fd00::1",
        "ISTHMUS_POD__NODE": "n1",
        "NODE_NAME": "n2",
    }
    pod = config(tmp_path, "pod: {namespace: mine}", environ).pod
    assert (pod.name, pod.namespace, pod.node) == ("web-1", "mine", "n1")
    assert [str(address) for address in pod.addresses] == ["10.0.0.1", "fd00::1"]


CONTROL_ID = "spiffe://cluster.local/ns/isthmus/sa/isthmus-control"
CONTROL = f"address: 'control.isthmus:4190', identity: '{CONTROL_ID}'"

WRONG = """
cluter: x
mark: 0
outbound:
  listen: ["127.0.0.1:x", 3, [1]]
  detect_timeout: 10
  opaque_ports: [0, a, 99999]
inbound: [1]
http: {max_head_bytes: 10MB, head_timeout: 5y, idle_timout: 3s, body_timeout: 90d}
log: {level: loud, access: 1}
identity: {key: ""}
intercept: {skip_inbound_subnets: [10.0.0.1/8]}
"""


def test_all_mistakes_are_reported_together_with_their_paths(tmp_path: Path) -> None:
    found = mistakes(tmp_path, WRONG)
    assert [mistake.split(": ")[0] for mistake in found] == [
        "cluter", "mark", "outbound.listen[0]", "outbound.listen[1]", "outbound.listen[2]", "outbound.opaque_ports[0]",
        "outbound.opaque_ports[1]", "outbound.opaque_ports[2]", "outbound.detect_timeout", "inbound", "identity.key",
        "http.idle_timout", "http.max_head_bytes", "http.head_timeout", "http.body_timeout", "log.level",
        "log.access", "intercept.skip_inbound_subnets[0]",
    ]  # fmt: skip
    assert "cluter: unknown key (did you mean 'cluster'?)" in found
    assert "http.body_timeout: must be from 100ms to 1d, found '90d'" in found
    assert any("a number needs a unit" in mistake for mistake in found)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("inbound: {listen: ['127.0.0.1:4191']}", "admin.listen[0]"),
        ("outbound: {listen: ['127.0.0.1:9', '127.0.0.1:9']}", "outbound.listen[1]"),
        ("outbound: {fixed_destination: '10.0.0.1:4143'}", "outbound.fixed_destination"),
        ("inbound: {require_identity: true}", "inbound.require_identity"),
        ("inbound: {http_ports: [80, 25]}", "inbound.http_ports"),
        ("inbound: {require_identity: [80]}", "inbound.require_identity"),
        ("inbound: {allow: {80: ['*']}}", "inbound.allow"),
        (
            IDENTITY + "inbound: {allow: {80: ['*']}, require_identity: {80: false}}",
            "inbound.allow.80",
        ),
        ("identity: {certificate: c, key: k, roots: []}", "identity.roots"),
        ("identity: {certificate: c, roots: [r]}", "identity.key"),
        ("identity: {key: k, roots: [r]}", "identity.certificate"),
        ("identity: {source: spiffe, key: k, spiffe: {socket: 'unix:/a'}}", "identity.key"),
        ("identity: {source: spiffe, roots: [r], spiffe: {socket: 'unix:/a'}}", "identity.roots"),
        ("identity: {source: spiffe}", "identity.spiffe.socket"),
        (SPIFFE.format("tcp://10.0.0.1:8081"), "identity.spiffe.socket"),
        (SPIFFE.format("/run/agent.sock"), "identity.spiffe.socket"),
        (SPIFFE.format("unix://host/a"), "identity.spiffe.socket"),
        (SPIFFE.format("'unix:///a?b'"), "identity.spiffe.socket"),
        (SPIFFE.format("unix:///" + "a" * 107), "identity.spiffe.socket"),
        (SPIFFE.format("unix:///a, max_pause: 100ms"), "identity.spiffe.max_pause"),
        (IDENTITY[:-2] + ", spiffe: {}}", "identity.spiffe"),
        ("identity: {source: control, roots: [r]}", "identity.control"),
        (IDENTITY[:-2] + ", end_with_certificate: false, revoked: f}", "identity.revoked"),
        (ENROLLED.format("x", EXPECTED), "identity.control.address"),
        (ENROLLED.format("x:1", "x"), "identity.control.identity"),
        (ENROLLED.format("x:1", "spiffe://y/ns/a/sa/b"), "identity.control.identity"),
        (ENROLLED.format("x:1", f"{EXPECTED}, max_pause: 100ms"), "identity.control.max_pause"),
        ("http: {max_head_bytes: 1KiB}", "http.max_target_bytes"),
        ("pool: {max_connections_per_endpoint: 1}", "pool.max_idle_per_endpoint"),
        ("pool: {idle_timeout: 10m}", "pool.idle_timeout"),
        ("cluster: East", "cluster"),
        ("trust_domain: a/b", "trust_domain"),
        ("dns: {}\noutbound: {listen: []}", "dns"),
        ("dns: {listen: []}", "dns.listen"),
        ("dns: {listen: ['127.0.0.1:4140']}", "dns.listen[0]"),
        ("dns: {listen: ['127.0.0.1:53', '127.0.0.2:53']}", "dns.listen"),
        ("dns: {ranges: []}", "dns.ranges"),
        ("dns: {ranges: [240.0.0.0/24]}", "dns.ranges[0]"),
        ("dns: {ranges: [240.0.0.0/8, 241.0.0.0/8]}", "dns.ranges"),
        ("dns: {ttl: 1h}", "dns.quarantine"),
        ("dns: {upstreams: ['127.0.0.1:4153']}", "dns.upstreams[0]"),
        ("directory: {poll_interval: 1s}", "directory"),
        (IDENTITY + f"directory: {{file: f, control: {{{CONTROL}}}}}", "directory"),
        (f"directory: {{control: {{{CONTROL}}}}}", "directory.control"),
        (
            IDENTITY + "directory: {control: {address: control, identity: " + CONTROL_ID + "}}",
            "directory.control.address",
        ),
        (
            IDENTITY + "directory: {control: {address: 'c:1', identity: control}}",
            "directory.control.identity",
        ),
        (
            IDENTITY + f"trust_domain: other\ndirectory: {{control: {{{CONTROL}}}}}",
            "directory.control.identity",
        ),
        (
            IDENTITY + f"directory: {{control: {{{CONTROL}, min_pause: 1m}}}}",
            "directory.control.max_pause",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_mistakes(
    tmp_path: Path, text: str, path: str
) -> None:
    assert [mistake.split(": ")[0] for mistake in mistakes(tmp_path, text)] == [path]


@pytest.mark.parametrize(
    ("text", "on"), [("", False), ("dns:", False), ("dns: {}", True), ("dns: {ttl: 1s}", True)]
)
def test_names_are_answered_for_only_if_that_is_asked_for(
    tmp_path: Path, text: str, on: bool
) -> None:
    assert (config(tmp_path, text).dns is not None) is on


def test_a_listener_on_all_ipv6_addresses_does_not_meet_one_on_ipv4(tmp_path: Path) -> None:
    config(
        tmp_path,
        'inbound: {listen: ["0.0.0.0:1", "[::]:1"]}\nadmin: {listen: ["127.0.0.1:0"]}\noutbound:'
        ' {listen: ["127.0.0.1:0"]}',
    )


@pytest.mark.parametrize(
    ("written", "required"),
    [
        ("true", {80, 81}),
        ("false", set()),
        ("[80]", {80}),
        ("{80: true}", {80}),
        ("{default: true, 80: false}", {81}),
    ],
)
def test_identity_is_required_for_all_or_some_ports(
    tmp_path: Path, written: str, required: set[int]
) -> None:
    inbound = config(tmp_path, IDENTITY + f"inbound: {{require_identity: {written}}}").inbound
    assert {port for port in (80, 81) if inbound.requires_identity(port)} == required
    assert {port for port in (80, 81) if not inbound.allows(port, None)} == required


@pytest.mark.parametrize(
    "written", ["[0]", "{a: true}", "{80: 1}", "x", "3", "{80: true, default: maybe}"]
)
def test_values_other_than_a_boolean_or_ports_are_a_mistake(tmp_path: Path, written: str) -> None:
    (mistake,) = mistakes(tmp_path, IDENTITY + f"inbound: {{require_identity: {written}}}")
    assert mistake.startswith("inbound.require_identity: ")


def test_an_allow_list_admits_the_named_identities_and_requires_an_identity(tmp_path: Path) -> None:
    text = IDENTITY + "inbound: {allow: {80: ['spiffe://t/ns/a/sa/b', 'spiffe://t/ns/c/*']}}"
    inbound = config(tmp_path, text).inbound
    assert inbound.allows(80, "spiffe://t/ns/a/sa/b")
    assert inbound.allows(80, "spiffe://t/ns/c/sa/x")
    for other in (
        None,
        "spiffe://t/ns/a/sa/bb",
        "spiffe://t/ns/cc/sa/x",
        "spiffe://other/ns/a/sa/b",
    ):
        assert not inbound.allows(80, other)
        assert other is None or not inbound.allows(80, SpiffeId.parse(other))
    assert inbound.allows(80, SpiffeId.parse("spiffe://t/ns/c/sa/x"))
    assert not inbound.allows(80, "spiffe://t/ns/c/sa/")
    assert inbound.allows(81, None)
    assert inbound.requires_identity(80)


@pytest.mark.parametrize(
    "pattern", ["x", "spiffe://t*", "spiffe://*/ns/a/sa/b", "http://t/ns/a/sa/b", "3"]
)
def test_a_pattern_that_no_identity_can_match_is_a_mistake(tmp_path: Path, pattern: str) -> None:
    (mistake,) = mistakes(tmp_path, IDENTITY + f"inbound: {{allow: {{80: ['{pattern}']}}}}")
    assert mistake.startswith("inbound.allow.80[0]: ")


def test_a_slip_in_a_variable_is_a_mistake_and_a_variable_of_kubernetes_is_not(
    tmp_path: Path,
) -> None:
    found = mistakes(
        tmp_path,
        "",
        {
            "ISTHMUS_LOG__LEVL": "debug",
            "ISTHMUS_CLUTSER": "a",
            "ISTHMUS_HTTP__MAX_HEADERS": "[",
            "OTHER": "x",
        },
    )
    assert found[0] == "ISTHMUS_CLUTSER: no such setting (did you mean 'ISTHMUS_CLUSTER'?)"
    assert found[1].startswith("ISTHMUS_HTTP__MAX_HEADERS: line 2, column 1: not YAML")
    assert found[2] == "ISTHMUS_LOG__LEVL: no such setting (did you mean 'ISTHMUS_LOG__LEVEL'?)"


@pytest.mark.parametrize("text", ["[]", "3", "a: [", "log: {level: debug, level: info}"])
def test_a_file_that_is_not_a_configuration_is_an_error(tmp_path: Path, text: str) -> None:
    assert len(mistakes(tmp_path, text)) == 1


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml: cannot be read: No such file"):
        load(tmp_path / "none.yaml", {})
    (tmp_path / "bytes.yaml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"bytes.yaml: not UTF-8 at byte 0"):
        load(tmp_path / "bytes.yaml", {})


@pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_a_file_that_is_not_regular_is_an_error_and_does_not_block(
    tmp_path: Path, put: Callable[[Path], None]
) -> None:
    put(tmp_path / "isthmus.yaml")
    with pytest.raises(ConfigError, match=r"isthmus.yaml: is not a regular file"):
        load(tmp_path / "isthmus.yaml", {})


def test_a_file_that_is_too_large_is_an_error(tmp_path: Path) -> None:
    assert mistakes(tmp_path, "#" * (MOST_BYTES + 1)) == [
        "is larger than 4 MiB: is it the right file?"
    ]


def test_variables_that_are_not_utf8_are_mistakes(tmp_path: Path) -> None:
    """The system gives them like this: each byte that is not UTF-8 is half of a surrogate pair."""
    environ = {
        "ISTHMUS_CLUSTER": "\udcff",
        "ISTHMUS_LOG__LEVEL": "loud",
        "POD_NAME": "a\udcfe",
        "ISTHMUS_\udcfd": "",
        "PATH": "\udcff",
    }
    found = mistakes(tmp_path, "", environ)
    assert found[:3] == [
        "ISTHMUS_CLUSTER: not UTF-8",
        r"ISTHMUS_\udcfd: not UTF-8",
        "POD_NAME: not UTF-8",
    ]
    assert [mistake.split(": ")[0] for mistake in found[3:]] == ["log.level"]
    with pytest.raises(ConfigError, match="the environment: ISTHMUS_CONFIG: not UTF-8"):
        load(None, {"ISTHMUS_CONFIG": "\udcff.yaml"})


def test_text_that_is_not_unicode_is_not_a_document() -> None:
    with pytest.raises(DocumentError, match="x: not Unicode text at character 3"):
        load_document("a: \ud800", "x")


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Config().log.level = "debug"  # type: ignore[misc]


_SCRAP = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.text("abc:/[]{}109.smh", max_size=12)
    | st.lists(st.integers(), max_size=2)
)
_SECTIONS = {
    name: [field for field, _, _ in fields(form.type)]
    for name, _, form in fields(Config)
    if is_struct(form.type)
}


@given(
    st.sampled_from(sorted(_SECTIONS)).flatmap(
        lambda name: st.tuples(
            st.just(name), st.dictionaries(st.sampled_from(_SECTIONS[name]), _SCRAP)
        )
    )
)
def test_any_values_are_a_configuration_or_mistakes(
    tmp_path_factory: pytest.TempPathFactory, given_section: tuple[str, dict[str, object]]
) -> None:
    name, section = given_section
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(yaml.safe_dump({name: section}))
    try:
        load(file, {})
    except ConfigError as error:
        # PT017: only some of the drawn files have mistakes
        assert all(re.match(r"[a-z0-9_]+(\.|\[|: |$)", mistake) for mistake in error.mistakes), (  # noqa: PT017
            error.mistakes
        )


@given(st.integers(0, 10**9))
def test_a_duration_and_a_size_are_written_as_they_are_read(amount: int) -> None:
    assert parse_size(show_size(amount)) == amount
    shown = show_duration(amount / 1000)
    assert parse_duration(0 if shown == "0" else shown) == pytest.approx(amount / 1000)


def test_every_setting_has_a_meaning_and_a_bound() -> None:
    def check(struct: type, path: str) -> None:
        for name, _, form in fields(struct):
            if is_struct(form.type):
                check(form.type, f"{path}{name}.")
                continue
            assert form.meta.description, f"{path}{name} has no description"
            if form.type in (int, float):
                assert form.meta.ge is not None, f"{path}{name} has no lower limit"
                assert form.meta.le is not None, f"{path}{name} has no upper limit"

    check(Config, "")


def blocks(marker: str) -> list[str]:
    return re.findall(rf"```yaml\n(# {marker}.*?)```", DOCUMENT.read_text(), re.DOTALL)


def test_the_documentation_agrees_with_the_code() -> None:
    """To fix it: put what `tables(Config)` returns between the two marks."""
    text = DOCUMENT.read_text()
    written = text.split("<!-- settings -->\n")[1].split("<!-- /settings -->")[0]
    assert written.strip() == tables(Config).strip()


def test_the_examples_of_the_documentation_are_valid(tmp_path: Path) -> None:
    (example,), (directory,) = blocks("isthmus.yaml"), blocks("directory.yaml")
    found = config(tmp_path, example)
    jsonschema.Draft202012Validator(config_schema()).validate(
        yaml.safe_load(re.sub(r"(?m)^(\s+)(\d+):", r'\1"\2":', example))
    )
    assert found.identity is not None
    known = parse(directory, "directory.yaml")
    assert known.resolve(Address("10.96.0.10", 80)).service == "shop/web"


def test_the_schema_is_a_schema_and_refuses_what_the_code_refuses() -> None:
    schema = config_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid({})
    assert (
        len(
            list(
                validator.iter_errors(
                    {"cluter": 1, "log": {"level": "loud"}, "mark": 0, "tcp": {"keepalive": 10}}
                )
            )
        )
        == 4
    )
