"""Sets up tracing from the configuration: the sampler of each flow, the queue, the exporter, and
the counters.

If tracing is off, OpenTelemetry is not imported, no thread runs, and the flows have no tracing
layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from proxy.config.load import DOWNWARD
from proxy.config.schema import Config
from proxy.config.schema_tracing import TracingConfig
from proxy.errors import StartError
from proxy.exchange.trace_layer import Tracing
from proxy.telemetry.metrics import Metrics, own_version
from tracing.otlp import Collector
from tracing.queue import Exporter, QueueSettings, SpanQueue
from tracing.resource import About, Resource
from tracing.sampling import Sampling, Tracer

_log = logging.getLogger("isthmus.tracing")

# Seconds to send the last spans when the process ends. The grace period for connections is over
# then, but Kubernetes' is not.
CLOSING = 3.0
_LOCAL = "http://localhost:4318"


@dataclass(frozen=True, slots=True)
class FlowTracing:
    """The tracing of each flow; None if it is off. Call `close` when no flow can end a span any
    more.
    """

    inbound: Tracing | None = None
    outbound: Tracing | None = None
    gateway: Tracing | None = None
    queue: SpanQueue | None = None

    def flows(self) -> dict[str, Tracing | None]:
        """The tracing by direction name."""
        return {"inbound": self.inbound, "outbound": self.outbound, "gateway": self.gateway}

    def waiting(self) -> int:
        return len(self.queue) if self.queue is not None else 0

    def close(self) -> None:
        """Send the remaining spans; blocks for at most `CLOSING` seconds."""
        if self.queue is not None:
            self.queue.close(CLOSING)


OFF = FlowTracing()


def build(config: Config, metrics: Metrics, environ: Mapping[str, str]) -> FlowTracing:
    """Set up tracing as configured; its thread starts here. Raises StartError."""
    settings = config.tracing
    if settings.exports == "none":
        return OFF
    try:
        exporter = _exporter(config, environ)
    except (ImportError, ValueError, OSError) as error:
        raise StartError(f"tracing: {error}", 64) from error
    limits = QueueSettings(
        settings.queue, min(settings.batch, settings.queue), settings.delay, settings.timeout
    )
    queue = SpanQueue(exporter, limits, metrics.spans, _complain)
    one, two, three = (
        Tracing(Tracer(Sampling(ratio, settings.follow)), queue.put)
        for ratio in (settings.inbound_ratio, settings.outbound_ratio, settings.gateway_ratio)
    )
    return FlowTracing(one, two, three, queue)


def _exporter(config: Config, environ: Mapping[str, str]) -> Callable[[], Exporter]:
    """A function that creates the exporter, called in the queue's thread. Configuration errors are
    raised here, before anything runs.
    """
    # Only imported if spans are exported: the SDK takes 10 MiB.
    from tracing import export  # noqa: PLC0415

    settings = config.tracing
    spans = export.SpanFactory(
        Resource(_about(config, environ), _complain), own_version(), settings.query
    )
    if settings.exports == "console":
        return lambda: export.console(spans)
    if settings.exports == "jaeger":
        host, _, port = settings.agent.rpartition(":")
        exporter = export.jaeger(spans, host.strip("[]"), int(port))
        return lambda: exporter
    otlp = export.OtlpExporter(spans, collector(settings, config.mark))
    return lambda: otlp


def collector(settings: TracingConfig, mark: int | None) -> Collector:
    """The OTLP destination in the terms of tracing/. For a URL without a path, the default path for
    traces is added.
    """
    endpoint = settings.endpoint or _LOCAL
    if urlsplit(endpoint).path in ("", "/"):
        endpoint = endpoint.rstrip("/") + "/v1/traces"
    files = (settings.certificate, settings.client_certificate, settings.client_key)
    trust, certificate, key = (str(path) if path is not None else None for path in files)
    return Collector(
        endpoint,
        _pairs(settings.headers),
        trust,
        certificate,
        key,
        settings.compression == "gzip",
        mark,
    )


def _about(config: Config, environ: Mapping[str, str]) -> About:
    """The resource attributes of this proxy. The configuration already contains the downward API's
    values.
    """
    settings, pod = config.tracing, config.pod
    values = {name: getattr(pod, name) for name in DOWNWARD}
    known = {variable: str(values[name]) for name, variable in DOWNWARD.items() if values[name]}
    return About(
        {**environ, **known}, config.cluster, settings.podinfo, settings.service_name,
        _pairs(settings.resource), settings.well_known_labels, own_version(),
    )  # fmt: skip


def _pairs(members: tuple[str, ...]) -> dict[str, str]:
    return {name: value for name, _, value in (member.partition("=") for member in members)}


def _complain(sentence: str) -> None:
    _log.warning("%s", sentence)
