"""OpenTelemetry's standard environment variables, as settings of the section `tracing`.

They apply where the file and the ISTHMUS_ variables set nothing: settings for this proxy take
precedence over settings for the whole pod. As the specification requires, an empty value counts as
unset, and an unusable value is a warning, not an error. Operators set these variables in all
containers, and a proxy that did not start would stop its pod.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from urllib.parse import unquote

from proxy.config.schema_tracing import TracingConfig
from proxy.settings.declare import fields
from proxy.settings.decode import leaf
from proxy.settings.document import Plain

_log = logging.getLogger("isthmus.config")

PREFIX = "OTEL_"
# Sampler -> (whether the caller's decision is followed, the ratio; None: from the argument).
SAMPLERS: Mapping[str, tuple[bool, float | None]] = {
    "always_on": (False, 1.0),
    "always_off": (False, 0.0),
    "traceidratio": (False, None),
    "parentbased_always_on": (True, 1.0),
    "parentbased_always_off": (True, 0.0),
    "parentbased_traceidratio": (True, None),
}
_RATIOS = ("inbound_ratio", "outbound_ratio", "gateway_ratio")
# In order of precedence: setting, variables, unit to add to the number.
_PLAIN: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("certificate", ("EXPORTER_OTLP_TRACES_CERTIFICATE", "EXPORTER_OTLP_CERTIFICATE"), ""),
    (
        "client_certificate",
        ("EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE", "EXPORTER_OTLP_CLIENT_CERTIFICATE"),
        "",
    ),
    ("client_key", ("EXPORTER_OTLP_TRACES_CLIENT_KEY", "EXPORTER_OTLP_CLIENT_KEY"), ""),
    ("compression", ("EXPORTER_OTLP_TRACES_COMPRESSION", "EXPORTER_OTLP_COMPRESSION"), ""),
    (
        "timeout",
        ("EXPORTER_OTLP_TRACES_TIMEOUT", "EXPORTER_OTLP_TIMEOUT", "BSP_EXPORT_TIMEOUT"),
        "ms",
    ),
    ("service_name", ("SERVICE_NAME",), ""),
    ("queue", ("BSP_MAX_QUEUE_SIZE",), "int"),
    ("batch", ("BSP_MAX_EXPORT_BATCH_SIZE",), "int"),
    ("delay", ("BSP_SCHEDULE_DELAY",), "ms"),
)


def standard(environ: Mapping[str, str]) -> dict[str, Plain]:
    """The settings from the variables; each of them is valid."""
    found: dict[str, Plain] = {}
    shapes = {name: form for name, _, form in fields(TracingConfig)}
    for name, value, variable in _settings(environ):
        try:
            if not isinstance(value, list):
                leaf(value, shapes[name])
        except ValueError as error:
            _log.warning("%s is ignored: %s", variable, error)
        else:
            found[name] = value
    return found


def _settings(environ: Mapping[str, str]) -> Iterator[tuple[str, Plain, str]]:
    """(setting, value, source variable)"""

    def first(*names: str) -> tuple[str, str]:
        return next(
            (
                (f"{PREFIX}{n}", text)
                for n in names
                if (text := environ.get(f"{PREFIX}{n}", "").strip())
            ),
            ("", ""),
        )

    yield from _exporter(environ)
    yield from _endpoint(environ)
    for setting, names, unit in _PLAIN:
        variable, text = first(*names)
        if text:
            yield (
                setting,
                int(text)
                if unit == "int" and text.isdecimal()
                else f"{text}{unit if unit == 'ms' else ''}",
                variable,
            )
    for setting, names in (
        ("headers", ("EXPORTER_OTLP_TRACES_HEADERS", "EXPORTER_OTLP_HEADERS")),
        ("resource", ("RESOURCE_ATTRIBUTES",)),
    ):
        variable, text = first(*names)
        if text:
            yield setting, list(pairs(text, variable)), variable
    yield from _sampler(environ)


def pairs(text: str, variable: str) -> Iterator[str]:
    """The members of a list `key=value,key=value`, percent-decoded (W3C baggage without
    properties).
    """
    for member in text.split(","):
        key, equals, value = member.partition("=")
        if key.strip() and equals:
            yield f"{unquote(key.strip())}={unquote(value.strip())}"
        elif member.strip():
            _log.warning("%s: %r is ignored: expected key=value", variable, member.strip())


def _exporter(environ: Mapping[str, str]) -> Iterator[tuple[str, Plain, str]]:
    if environ.get(f"{PREFIX}SDK_DISABLED", "").strip().lower() == "true":
        yield "exporter", "none", f"{PREFIX}SDK_DISABLED"
        return
    variable = f"{PREFIX}TRACES_EXPORTER"
    names = [name.strip() for name in environ.get(variable, "").split(",") if name.strip()]
    if len(names) > 1:
        _log.warning("%s lists several exporters: the first one is used", variable)
    if names:
        yield "exporter", names[0], variable
    if environ.get(f"{PREFIX}EXPORTER_JAEGER_AGENT_HOST"):
        host, port = (
            environ[f"{PREFIX}EXPORTER_JAEGER_AGENT_HOST"],
            environ.get(f"{PREFIX}EXPORTER_JAEGER_AGENT_PORT") or "6831",
        )
        yield "agent", f"{host}:{port}", f"{PREFIX}EXPORTER_JAEGER_AGENT_HOST"


def _endpoint(environ: Mapping[str, str]) -> Iterator[tuple[str, Plain, str]]:
    for name in ("EXPORTER_OTLP_TRACES_PROTOCOL", "EXPORTER_OTLP_PROTOCOL"):
        protocol = environ.get(f"{PREFIX}{name}", "").strip()
        if protocol and protocol != "http/protobuf":
            _log.warning(
                "%s%s=%s is not supported; spans are sent with http/protobuf, usually to port 4318",
                PREFIX,
                name,
                protocol,
            )
            break
    variable = f"{PREFIX}EXPORTER_OTLP_TRACES_ENDPOINT"
    if exact := environ.get(variable, "").strip():
        yield "endpoint", exact, variable
    elif base := environ.get(f"{PREFIX}EXPORTER_OTLP_ENDPOINT", "").strip():
        yield "endpoint", f"{base.rstrip('/')}/v1/traces", f"{PREFIX}EXPORTER_OTLP_ENDPOINT"


def _sampler(environ: Mapping[str, str]) -> Iterator[tuple[str, Plain, str]]:
    variable, argument = f"{PREFIX}TRACES_SAMPLER", f"{PREFIX}TRACES_SAMPLER_ARG"
    name = environ.get(variable, "").strip()
    if not name:
        return
    if name not in SAMPLERS:
        _log.warning("%s=%s is ignored: expected one of %s", variable, name, ", ".join(SAMPLERS))
        return
    follow, fixed = SAMPLERS[name]
    yield "follow", follow, variable
    text = environ.get(argument, "").strip() or "1"
    try:
        ratio = fixed if fixed is not None else float(text)
    except ValueError:
        _log.warning("%s=%s is ignored: expected a number from 0 to 1", argument, text)
        return
    for setting in _RATIOS:
        yield setting, ratio, argument if fixed is None else variable
