"""Metrics, log and traces of the traffic. This package observes connections and exchanges; it
decides nothing.

    records.py            one record for each connection and exchange, closed exactly once
    metrics.py            the metrics of a proxy, as Prometheus reads them
    request_metrics.py    requests, responses and latency
    endpoint_metrics.py   retries, circuit breakers, queues
    directory_metrics.py  the connection to the control plane
    log.py                structured log lines, their queue, and the thread that writes them
    log_output.py         writes lines, and counts those that could not be written
    tracing_setup.py      sampler, queue and exporter, built from the configuration
"""
