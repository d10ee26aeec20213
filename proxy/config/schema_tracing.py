"""The settings of tracing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from proxy.settings.declare import Section, described, number, ratio, seconds


# Tracing is off unless a collector is configured. The queue has OpenTelemetry's numbers. By default
# the proxy starts no traces. An application, or the edge of the mesh, knows better which requests
# to trace. A trace that starts in the middle is incomplete.
class TracingConfig(Section, frozen=True):
    """OpenTelemetry spans. If a setting is not given, the proxy uses the standard OTEL_
    variable."""

    exporter: Annotated[
        Literal["auto", "none", "otlp", "console", "jaeger"],
        described(
            "exporter for spans; auto: otlp if an endpoint is given, else none; from"
            " OTEL_TRACES_EXPORTER"
        ),
    ] = "auto"
    endpoint: Annotated[
        str,
        described(
            "URL of an OTLP/HTTP collector; the default path is /v1/traces; from"
            " OTEL_EXPORTER_OTLP_[TRACES_]ENDPOINT",
            1024,
        ),
    ] = ""
    headers: Annotated[
        tuple[Annotated[str, described("", 4096)], ...],
        described(
            "headers for the collector, as `name=value`; from OTEL_EXPORTER_OTLP_[TRACES_]HEADERS",
            64,
        ),
    ] = ()
    certificate: Annotated[
        Path | None,
        described(
            "file with the trust roots for the collector's certificate, instead of the roots of the"
            " system"
        ),
    ] = None
    client_certificate: Annotated[
        Path | None, described("file with the client certificate for the collector")
    ] = None
    client_key: Annotated[
        Path | None, described("file with the private key of the client certificate")
    ] = None
    compression: Annotated[
        Literal["none", "gzip"],
        described("compression of exports; from OTEL_EXPORTER_OTLP_[TRACES_]COMPRESSION"),
    ] = "none"
    timeout: Annotated[
        float,
        seconds(0.1, 300, "maximum time for one export; from OTEL_EXPORTER_OTLP_[TRACES_]TIMEOUT"),
    ] = 10.0
    agent: Annotated[
        str, described("host and port of a Jaeger agent, for the jaeger exporter", 261)
    ] = "localhost:6831"
    follow: Annotated[
        bool,
        described(
            "whether the proxy follows the caller's sampling decision; from OTEL_TRACES_SAMPLER"
        ),
    ] = True
    inbound_ratio: Annotated[
        float,
        ratio(
            0,
            1,
            "fraction of inbound requests without a trace context that start a trace; from"
            " OTEL_TRACES_SAMPLER_ARG",
        ),
    ] = 0.0
    outbound_ratio: Annotated[
        float,
        ratio(
            0,
            1,
            "fraction of the application's requests without a trace context that start a trace",
        ),
    ] = 0.0
    gateway_ratio: Annotated[
        float,
        ratio(0, 1, "fraction of requests without a trace context at a gateway that start a trace"),
    ] = 0.0
    query: Annotated[bool, described("whether spans include query strings")] = False
    service_name: Annotated[
        str,
        described(
            "service name on spans; from OTEL_SERVICE_NAME; empty: derived from the workload"
        ),
    ] = ""
    resource: Annotated[
        tuple[Annotated[str, described("", 4096)], ...],
        described(
            "additional attributes of all spans, as `name=value`; from OTEL_RESOURCE_ATTRIBUTES",
            128,
        ),
    ] = ()
    podinfo: Annotated[
        Path | None, described("directory with the downward API files `labels` and `annotations`")
    ] = None
    well_known_labels: Annotated[
        bool,
        described(
            "whether the labels app.kubernetes.io/instance, name and version set the service name"
            " and version"
        ),
    ] = False
    queue: Annotated[
        int,
        number(
            1,
            1_000_000,
            "maximum spans that wait to be sent; more are dropped and counted; from"
            " OTEL_BSP_MAX_QUEUE_SIZE",
            "spans",
        ),
    ] = 2048
    batch: Annotated[
        int,
        number(
            1, 65536, "maximum spans in one export; from OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "spans"
        ),
    ] = 512
    delay: Annotated[
        float,
        seconds(
            0.01, 300, "maximum time that a span waits for its batch; from OTEL_BSP_SCHEDULE_DELAY"
        ),
    ] = 5.0

    @property
    def exports(self) -> Literal["none", "otlp", "console", "jaeger"]:
        """Where spans go; none: tracing is off."""
        if self.exporter == "auto":
            return "otlp" if self.endpoint else "none"
        return self.exporter
