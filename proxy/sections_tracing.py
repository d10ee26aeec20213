"""The settings of tracing; proxy/sections.py has all others, and says how settings are written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from proxy.settings import Section, described, number, ratio, seconds


# Off unless a collector is named. The numbers of the queue are OpenTelemetry's. No traces are begun by default: an application, or the
# edge, knows better which requests are worth it, and a trace that is begun in the middle has no beginning.
class TracingConfig(Section, frozen=True):
    """Spans for OpenTelemetry. Where a setting is left open, the standard OTEL_ variable counts."""

    exporter: Annotated[
        Literal["auto", "none", "otlp", "console", "jaeger"],
        described("where spans go; auto: otlp if an endpoint is named, else none; from OTEL_TRACES_EXPORTER"),
    ] = "auto"
    endpoint: Annotated[
        str, described("URL of an OTLP/HTTP collector; without a path: /v1/traces; from OTEL_EXPORTER_OTLP_[TRACES_]ENDPOINT", 1024)
    ] = ""
    headers: Annotated[
        tuple[Annotated[str, described("", 4096)], ...],
        described("headers for the collector, as `name=value`; from OTEL_EXPORTER_OTLP_[TRACES_]HEADERS", 64),
    ] = ()
    certificate: Annotated[
        Path | None, described("file with the roots that the collector's certificate is checked against, instead of the system's")
    ] = None
    client_certificate: Annotated[Path | None, described("file with a certificate to show the collector")] = None
    client_key: Annotated[Path | None, described("file with its private key")] = None
    compression: Annotated[Literal["none", "gzip"], described("of what is sent; from OTEL_EXPORTER_OTLP_[TRACES_]COMPRESSION")] = "none"
    timeout: Annotated[float, seconds(0.1, 300, "how long one export may take; from OTEL_EXPORTER_OTLP_[TRACES_]TIMEOUT")] = 10.0
    agent: Annotated[str, described("host and port of a Jaeger agent, for the exporter jaeger", 261)] = "localhost:6831"
    follow: Annotated[bool, described("whether the caller's decision to record a trace counts; from OTEL_TRACES_SAMPLER")] = True
    inbound_ratio: Annotated[
        float, ratio(0, 1, "of requests without a trace from the mesh, the part that begins one; from OTEL_TRACES_SAMPLER_ARG")
    ] = 0.0
    outbound_ratio: Annotated[float, ratio(0, 1, "the same for requests of the application")] = 0.0
    gateway_ratio: Annotated[float, ratio(0, 1, "the same for requests at a gateway")] = 0.0
    query: Annotated[bool, described("whether query strings are shown")] = False
    service_name: Annotated[str, described("the service's name on spans; from OTEL_SERVICE_NAME; empty: by the workload")] = ""
    resource: Annotated[
        tuple[Annotated[str, described("", 4096)], ...],
        described("further attributes of all spans, as `name=value`; from OTEL_RESOURCE_ATTRIBUTES", 128),
    ] = ()
    podinfo: Annotated[Path | None, described("directory with the downward API's files `labels` and `annotations`")] = None
    well_known_labels: Annotated[bool, described("whether app.kubernetes.io/instance, name and version name the service")] = False
    queue: Annotated[
        int, number(1, 1_000_000, "spans that may wait to be sent; more are dropped and counted; from OTEL_BSP_MAX_QUEUE_SIZE", "spans")
    ] = 2048
    batch: Annotated[int, number(1, 65536, "spans sent together; from OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "spans")] = 512
    delay: Annotated[float, seconds(0.01, 300, "how long a span may wait for others; from OTEL_BSP_SCHEDULE_DELAY")] = 5.0

    @property
    def exports(self) -> Literal["none", "otlp", "console", "jaeger"]:
        """Where spans go; none: tracing is off."""
        if self.exporter == "auto":
            return "otlp" if self.endpoint else "none"
        return self.exporter
