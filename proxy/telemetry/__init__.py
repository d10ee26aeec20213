"""Metrics, log and traces of what passes. It sees exchanges and connections when they end; nothing here decides anything.

records.py            one record for each connection and exchange, closed exactly once
metrics.py            the metrics of a proxy, as Prometheus reads them
request_metrics.py    requests, responses, latency: plain numbers on the path of a request
endpoint_metrics.py   retries, circuit breakers, queues
counters.py           plain counters that a collector reads
log.py                structured lines, written by a thread; log_output.py: where they go
tracing_setup.py      samplers, queue and exporter, built from the configuration
"""
