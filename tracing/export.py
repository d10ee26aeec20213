"""Converts records to OpenTelemetry spans and exports them.

Only this module uses the SDK. It is imported only if tracing is configured, because it takes 10
MiB. A record becomes a ReadableSpan of the SDK with our own ids. There is no tracer and no span
processor: they would move work from this thread to the data path. For OTLP, the SDK encodes the
spans and our own client sends them. The SDK's other exporters get the spans directly.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from opentelemetry.attributes import BoundedAttributes
from opentelemetry.sdk.resources import Resource as SdkResource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.sdk.version import __version__ as sdk_version
from opentelemetry.trace import (
    Link,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
)

from tracing.otlp import Collector, CollectorResponse, Post
from tracing.queue import TAKEN, Exporter, Outcome
from tracing.spans import Kind, Record, describe
from tracing.w3c import parse_state

_KINDS: Mapping[Kind, SpanKind] = {"server": SpanKind.SERVER, "client": SpanKind.CLIENT}
_FLAGS = TraceFlags(TraceFlags.SAMPLED)
# The schema of the installed conventions. tests/tracing/test_conventions.py compares the names.
_SCHEMA = "https://opentelemetry.io/schemas/1.44.0"


class Attributes(Protocol):
    """The current attributes that all spans have in common."""

    def attributes(self) -> Mapping[str, str | int]: ...


@dataclass(slots=True)
class SpanFactory:
    """Creates spans from records. `query`: whether query strings may be shown."""

    resource: Attributes
    version: str
    query: bool = False
    _known: tuple[Mapping[str, str | int], SdkResource] | None = None
    _scope: InstrumentationScope | None = None

    def make(self, record: Record) -> ReadableSpan:
        trace_id = int(record.trace_id, 16)
        state = TraceState(list(parse_state(record.state))) if record.state else None

        def context(span_id: bytes, *, remote: bool) -> SpanContext:
            return SpanContext(trace_id, int(span_id, 16), remote, _FLAGS, state)

        described = describe(record, query=self.query)
        status = (
            Status(StatusCode.UNSET)
            if described.error is None
            else Status(StatusCode.ERROR, described.error or None)
        )
        return ReadableSpan(
            name=described.name,
            context=context(record.span_id, remote=False),
            parent=context(record.parent, remote=record.remote) if record.parent else None,
            resource=self.current(),
            attributes=described.attributes,
            events=[
                Event(name, BoundedAttributes(attributes=attributes), at)
                for name, at, attributes in described.events
            ],
            links=[Link(context(record.follows, remote=False))] if record.follows else (),
            kind=_KINDS[record.kind],
            status=status,
            start_time=record.started,
            end_time=record.ended,
            instrumentation_scope=self.scope(),
        )

    def current(self) -> SdkResource:
        attributes = self.resource.attributes()
        if self._known is None or self._known[0] is not attributes:
            sdk = {
                "telemetry.sdk.language": "python",
                "telemetry.sdk.name": "opentelemetry",
                "telemetry.sdk.version": sdk_version,
            }
            self._known = attributes, SdkResource({**attributes, **sdk}, _SCHEMA)
        return self._known[1]

    def scope(self) -> InstrumentationScope:
        if self._scope is None:
            self._scope = InstrumentationScope("isthmus", self.version, _SCHEMA)
        return self._scope


class OtlpExporter:
    """Exports to a collector by OTLP over HTTP."""

    def __init__(self, spans: SpanFactory, collector: Collector) -> None:
        # Imported here: protocol buffers take memory that the other exporters do not need.
        from opentelemetry.exporter.otlp.proto.common import trace_encoder  # noqa: PLC0415
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2  # noqa: PLC0415  # as above

        self._encode = trace_encoder.encode_spans
        self._response = trace_service_pb2.ExportTraceServiceResponse
        self._spans = spans
        self._post = Post(collector)
        self._batch: list[bytes] = []

    def prepare(self, records: Sequence[Record]) -> None:
        # Concatenated messages of Protocol Buffers form one message with all their elements.
        self._batch.append(
            self._encode([self._spans.make(record) for record in records]).SerializeToString()
        )

    def send(self, seconds: float) -> Outcome:
        found = self._post.send(b"".join(self._batch), seconds)
        if not isinstance(found, CollectorResponse):
            return found
        try:
            answer = self._response.FromString(found.body)
        # google.protobuf's DecodeError, which the type stubs lack. The collector has the spans.
        except Exception as error:  # noqa: BLE001, RUF100
            return Outcome(words=f"the answer cannot be parsed: {error}")
        partial = answer.partial_success
        return (
            Outcome(lost=partial.rejected_spans, words=partial.error_message)
            if partial.rejected_spans
            else TAKEN
        )

    def forget(self) -> None:
        self._batch.clear()

    def close(self) -> None:
        self._post.close()


class SdkExporter:
    """Exports by an exporter of the SDK."""

    def __init__(self, spans: SpanFactory, exporter: SpanExporter) -> None:
        self._spans = spans
        self._exporter = exporter
        self._batch: list[ReadableSpan] = []

    def prepare(self, records: Sequence[Record]) -> None:
        self._batch += [self._spans.make(record) for record in records]

    # The SDK's exporters take no deadline. `SpanQueue.close` does not wait for them.
    def send(self, seconds: float) -> Outcome:  # noqa: ARG002
        try:
            result = self._exporter.export(self._batch)
        # Third-party code: whatever it raises, the batch was not sent.
        except Exception as error:  # noqa: BLE001, RUF100
            return Outcome("failed", words=f"{type(error).__name__}: {error}")
        return (
            TAKEN
            if result is SpanExportResult.SUCCESS
            else Outcome("failed", words=f"{type(self._exporter).__name__} could not send")
        )

    def forget(self) -> None:
        self._batch = []

    def close(self) -> None:
        self._exporter.shutdown()


def console(spans: SpanFactory) -> Exporter:
    """Writes spans to standard output: one line of JSON each."""
    return SdkExporter(
        spans,
        ConsoleSpanExporter(
            out=sys.stdout, formatter=lambda span: span.to_json(indent=None) + "\n"
        ),
    )


def jaeger(spans: SpanFactory, host: str, port: int) -> Exporter:
    """Exports datagrams in Thrift to a Jaeger agent.

    Needs the extra `isthmus[jaeger]`. Without it, raises ImportError that explains what to do.
    """
    try:
        # of an extra
        from opentelemetry.exporter.jaeger.thrift import (  # noqa: PLC0415
            JaegerExporter,
        )
    except ImportError as error:
        raise ImportError(
            f"the Jaeger exporter cannot be imported ({error}): install isthmus[jaeger], which"
            " brings an older opentelemetry-sdk, or let Jaeger take OTLP on its port 4318"
            " (exporter: otlp)"
        ) from error
    # tests/jaeger runs this with the older SDK, where coverage is not measured.
    return SdkExporter(  # pragma: no cover
        spans,
        JaegerExporter(agent_host_name=host, agent_port=port, udp_split_oversized_batches=True),
    )
