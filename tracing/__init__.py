"""Tracing: trace contexts in headers, spans, and their export. Uses OpenTelemetry, not proxy/."""
