"""OpenTelemetry's own variables, and what they mean beside the file and ISTHMUS_ variables; and
what the configuration builds."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from proxy.config.load import load
from proxy.config.schema_tracing import TracingConfig
from proxy.errors import StartError
from proxy.settings.sources import ConfigError
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.tracing_setup import OFF, build, collector


def tracing(
    environ: dict[str, str] | None = None, text: str = "", folder: Path | None = None
) -> TracingConfig:
    path = None
    if folder is not None:
        path = folder / "isthmus.yaml"
        path.write_text(text)
    return load(path, environ or {}).tracing


def test_tracing_is_off_without_an_endpoint() -> None:
    assert tracing().exports == "none"
    assert build(load(None, {}), Metrics(), {}) is OFF


@pytest.mark.parametrize(
    ("environ", "endpoint"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4318"}, "http://a:4318/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4318/base/"}, "http://a:4318/base/v1/traces"),
        (
            {
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://a/exactly",
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://b",
            },
            "http://a/exactly",
        ),
        (
            {"ISTHMUS_TRACING__ENDPOINT": "https://a", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://b"},
            "https://a/v1/traces",
        ),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "http://localhost:4318/v1/traces"),
    ],
)
def test_an_endpoint_turns_tracing_on(environ: dict[str, str], endpoint: str) -> None:
    found = tracing(environ)
    assert found.exports == "otlp"
    assert collector(found, 7).endpoint == endpoint
    assert collector(found, 7).mark == 7


@pytest.mark.parametrize(
    ("environ", "exports"),
    [
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://a"}, "none"),
        ({"OTEL_SDK_DISABLED": "TRUE", "OTEL_TRACES_EXPORTER": "otlp"}, "none"),
        ({"OTEL_TRACES_EXPORTER": "console"}, "console"),
        ({"OTEL_TRACES_EXPORTER": "jaeger", "OTEL_EXPORTER_JAEGER_AGENT_HOST": "agent"}, "jaeger"),
        ({"OTEL_TRACES_EXPORTER": "otlp,console"}, "otlp"),
        ({"OTEL_TRACES_EXPORTER": ""}, "none"),
    ],
)
def test_the_exporter_is_chosen_by_its_variable(environ: dict[str, str], exports: str) -> None:
    assert tracing(environ).exports == exports


@pytest.mark.parametrize(
    ("name", "argument", "follow", "ratio"),
    [
        ("always_on", "", False, 1.0),
        ("always_off", "0.5", False, 0.0),
        ("traceidratio", "0.25", False, 0.25),
        ("parentbased_always_on", "", True, 1.0),
        ("parentbased_always_off", "", True, 0.0),
        ("parentbased_traceidratio", "0.5", True, 0.5),
        ("parentbased_traceidratio", "", True, 1.0),
    ],
)
def test_the_standard_samplers_are_known(
    name: str, argument: str, follow: bool, ratio: float
) -> None:
    found = tracing({"OTEL_TRACES_SAMPLER": name, "OTEL_TRACES_SAMPLER_ARG": argument})
    assert (found.follow, found.inbound_ratio, found.outbound_ratio, found.gateway_ratio) == (
        follow,
        ratio,
        ratio,
        ratio,
    )


def test_all_others_are_read_in_their_units() -> None:
    found = tracing(
        {
            "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "authorization=Bearer%20x, a=b",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "2500",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
            "OTEL_EXPORTER_OTLP_CERTIFICATE": "/ca.pem",
            "OTEL_SERVICE_NAME": "shop",
            "OTEL_RESOURCE_ATTRIBUTES": "team=a%2Cb,deployment.environment.name=test",
            "OTEL_BSP_MAX_QUEUE_SIZE": "100",
            "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "10",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "OTEL_BSP_EXPORT_TIMEOUT": "9000",
        }
    )
    assert found.headers == ("authorization=Bearer x", "a=b")
    assert (found.timeout, found.compression, str(found.certificate), found.service_name) == (
        2.5,
        "gzip",
        "/ca.pem",
        "shop",
    )
    assert found.resource == ("team=a,b", "deployment.environment.name=test")
    assert (found.queue, found.batch, found.delay) == (100, 10, 0.1)
    assert tracing({"OTEL_BSP_EXPORT_TIMEOUT": "9000"}).timeout == 9.0


def test_the_file_counts_before_them_and_our_own_variables_before_the_file(tmp_path: Path) -> None:
    environ = {"OTEL_SERVICE_NAME": "c", "OTEL_BSP_MAX_QUEUE_SIZE": "3"}
    found = tracing(environ, "tracing: {service_name: b, batch: 2}", tmp_path)
    assert (found.service_name, found.batch, found.queue) == ("b", 2, 3)
    assert (
        tracing(
            environ | {"ISTHMUS_TRACING__SERVICE_NAME": "a"}, "tracing: {service_name: b}", tmp_path
        ).service_name
        == "a"
    )


@pytest.mark.parametrize(
    "environ",
    [
        {"OTEL_TRACES_EXPORTER": "zipkin"},
        {"OTEL_TRACES_SAMPLER": "jaeger_remote"},
        {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "half"},
        {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "7"},
        {"OTEL_BSP_MAX_QUEUE_SIZE": "-1"},
        {"OTEL_BSP_MAX_QUEUE_SIZE": "many"},
        {"OTEL_BSP_SCHEDULE_DELAY": "soon"},
        {"OTEL_EXPORTER_OTLP_COMPRESSION": "brotli"},
        {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
        {"OTEL_RESOURCE_ATTRIBUTES": "nonsense"},
    ],
)
def test_unusable_values_are_a_warning_and_the_proxy_starts(
    environ: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "isthmus.config"):
        found = tracing(environ)
    assert found.queue == 2048
    assert any(next(iter(environ)).removesuffix("_ARG") in message for message in caplog.messages)


def test_a_variable_that_is_not_text_is_ignored() -> None:
    assert tracing({"OTEL_SERVICE_NAME": "\udcff", "OTEL_BSP_MAX_QUEUE_SIZE": "7"}).queue == 7


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("tracing: {endpoint: 'collector:4318'}", "tracing.endpoint"),
        ("tracing: {endpoint: 'http://user:hunter2@collector:4318'}", "tracing.endpoint"),
        ("tracing: {agent: 'somewhere'}", "tracing.agent"),
        ("tracing: {headers: ['hunter2']}", "tracing.headers[0]"),
        ("tracing: {resource: ['=b']}", "tracing.resource[0]"),
        ("tracing: {client_key: k}", "tracing.client_key"),
        ("tracing: {inbound_ratio: 2}", "tracing.inbound_ratio"),
        ("tracing: {exporter: zipkin}", "tracing.exporter"),
    ],
)
def test_mistakes_in_the_section_are_named_and_no_secret_is_repeated(
    tmp_path: Path, text: str, path: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        tracing({}, text, tmp_path)
    assert [mistake.split(": ")[0] for mistake in caught.value.mistakes] == [path]


def test_an_exporter_that_is_not_installed_is_an_error_of_the_start() -> None:
    with pytest.raises(StartError, match=r"isthmus\[jaeger\]"):
        build(load(None, {"OTEL_TRACES_EXPORTER": "jaeger"}), Metrics(), {})


def test_each_flow_has_its_own_sampling_ratio() -> None:
    config = load(
        None,
        {"ISTHMUS_TRACING__ENDPOINT": "http://127.0.0.1:9", "ISTHMUS_TRACING__GATEWAY_RATIO": "1"},
    )
    spans = build(config, Metrics(), {})
    try:
        begun = {
            name: tracing.tracer.begin([])
            for name, tracing in spans.flows().items()
            if tracing is not None
        }
        assert {name for name, trace in begun.items() if trace is not None} == {"gateway"}
    finally:
        spans.close()


@pytest.mark.parametrize(
    ("environ", "imported"),
    [({}, False), ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}, True)],
)
def test_opentelemetry_is_imported_only_where_tracing_is_configured(
    environ: dict[str, str], imported: bool
) -> None:
    program = (
        "import sys\nfrom proxy.app import start\nfrom proxy.config.load import load\nfrom"
        " proxy.telemetry.metrics import Metrics\nfrom proxy.telemetry.tracing_setup import"
        f" build\nbuild(load(None, {environ!r}), Metrics(),"
        " {}).close()\nprint(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == str(imported)
