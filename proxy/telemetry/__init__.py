"""Metrics, log and traces of the traffic. This package observes connections and exchanges; it
decides nothing.

    records.py            one record for each connection and exchange, closed exactly once
    metrics.py            the metrics of a proxy, as Prometheus reads them
    request_metrics.py    requests, responses and latency, as plain numbers on the hot path
    endpoint_metrics.py   retries, circuit breakers, queues
    counters.py           plain counters that a collector reads
    series.py             the children of a Prometheus family
    log.py                structured log lines, written by a thread; log_output.py writes them
    tracing_setup.py      sampler, queue and exporter, built from the configuration
"""
