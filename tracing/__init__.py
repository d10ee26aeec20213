"""Traces: contexts in headers, what becomes a span, and its way to a collector. It knows OpenTelemetry, and nothing of proxy/."""
