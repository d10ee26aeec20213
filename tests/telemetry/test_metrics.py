"""Metrics: recorded exactly once on every path, bounded label sets, and text that Prometheus can
parse."""

from __future__ import annotations

import contextlib

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from proxy.metric_families import MOST_SERIES
from proxy.telemetry.metrics import Metrics


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    found = metrics.registry.get_sample_value(f"isthmus_{name}", labels)
    return None if found is None else float(found)


def request(metrics: Metrics, name: str, **labels: str) -> float | None:
    return value(metrics, name, direction="inbound", **labels)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_request_is_counted_timed_and_classified() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    with metrics.http["inbound"].request(b"GET") as record:
        clock.now = 0.004
        record.head(200)
        clock.now = 9
    assert request(metrics, "requests_total", method="GET") == 1
    assert request(metrics, "responses_total", status_class="2xx", classification="success") == 1
    assert request(metrics, "response_latency_seconds_sum") == 0.004
    assert request(metrics, "response_latency_seconds_bucket", le="0.005") == 1
    assert request(metrics, "response_latency_seconds_bucket", le="0.003") == 0


@pytest.mark.parametrize(
    ("status", "status_class", "classification"),
    [
        (404, "4xx", "success"),
        (503, "5xx", "failure"),
        (0, "none", "failure"),
        (999, "none", "failure"),
        (101, "1xx", "success"),
    ],
)
def test_a_server_error_and_no_response_are_failures(
    status: int, status_class: str, classification: str
) -> None:
    metrics = Metrics()
    with metrics.http["inbound"].request(b"GET") as record:
        if status:
            record.head(status)
    assert (
        request(
            metrics, "responses_total", status_class=status_class, classification=classification
        )
        == 1
    )


def test_a_request_that_raises_is_a_failure_and_recorded_once() -> None:
    metrics = Metrics()
    with contextlib.suppress(KeyError), metrics.http["inbound"].request(b"GET") as record:
        record.head(200)
        raise KeyError
    assert request(metrics, "responses_total", status_class="2xx", classification="failure") == 1
    assert request(metrics, "responses_total", status_class="2xx", classification="success") == 0


async def test_a_cancelled_request_and_connection_are_recorded() -> None:
    metrics = Metrics()
    with trio.CancelScope() as scope:
        scope.cancel()
        with (
            metrics.connections["inbound"].connection("src", "mutual"),
            metrics.http["inbound"].request(b"GET"),
        ):
            await trio.sleep_forever()
    assert request(metrics, "responses_total", status_class="none", classification="cancelled") == 1
    assert request(metrics, "connections_open", peer="src", tls="mutual") == 0
    assert request(metrics, "connections_closed_total", peer="src", tls="mutual") == 1


def test_a_connection_counts_once_it_is_known_whether_it_is_tls() -> None:
    metrics = Metrics()
    with metrics.connections["inbound"].connection("src") as record:
        assert request(metrics, "connections_open", peer="src", tls="mutual") is None
        record.secured("mutual")
        record.secured("none")
        assert request(metrics, "connections_open", peer="src", tls="mutual") == 1
        record.transferred(10, 4)
        record.transferred(15, 4)
    assert request(metrics, "connections_open", peer="src", tls="mutual") == 0
    assert request(metrics, "connections_opened_total", peer="src", tls="mutual") == 1
    assert request(metrics, "connections_opened_total", peer="src", tls="none") is None
    assert request(metrics, "bytes_total", peer="src", io_direction="receive") == 15
    assert request(metrics, "bytes_total", peer="src", io_direction="transmit") == 4


def test_a_connection_that_ends_before_is_unknown() -> None:
    metrics = Metrics()
    with pytest.raises(KeyError), metrics.connections["inbound"].connection("src"):
        raise KeyError
    assert request(metrics, "connections_opened_total", peer="src", tls="unknown") == 1
    assert request(metrics, "connections_closed_total", peer="src", tls="unknown") == 1


def test_values_that_a_client_chooses_do_not_become_labels() -> None:
    metrics = Metrics()
    for number in range(1000):
        with metrics.http["inbound"].request(b"M%d" % number) as record:
            record.head(number % 700)
    assert request(metrics, "requests_total", method="other") == 1000
    assert len(metrics.render()) < 40_000


def test_a_family_stops_growing_and_counts_on_as_other() -> None:
    metrics = Metrics()
    for number in range(MOST_SERIES + 44):
        metrics.count_error("inbound", f"reason-{number}")
    assert value(metrics, "errors_total", direction="other", reason="other") == 44
    assert value(metrics, "errors_total", direction="inbound", reason="reason-0") == 1


def test_a_gauge_of_many_series_comes_back_to_nothing() -> None:
    metrics = Metrics()
    series = [("inbound", "src", f"kind-{number}") for number in range(MOST_SERIES + 44)]
    for labels in series:
        metrics.open.at(*labels).inc()
    assert value(metrics, "connections_open", direction="other", peer="other", tls="other") == 44
    for labels in series:
        metrics.open.at(*labels).inc(-1)
    assert value(metrics, "connections_open", direction="other", peer="other", tls="other") == 0
    assert value(metrics, "connections_open", direction="inbound", peer="src", tls="kind-0") == 0


def test_the_metrics_of_a_connection_in_the_prometheus_format() -> None:
    metrics = Metrics()
    metrics.count_detection("outbound", "tls", 0.0005)
    metrics.count_detection("outbound", "tls", 11)
    with metrics.connections["outbound"].connection("dst", "mutual") as record:
        metrics.count_handshake("outbound", "client", ("TLSv1.3", "X25519MLKEM768", False))
        record.transferred(10, 4)
        metrics.count_declined_heads("outbound", "request", 0)
        lines = metrics.render().decode().splitlines()
    for line in (
        (
            "# HELP isthmus_connections_opened_total Connections opened (src: from the client, dst:"
            " to the server)."
        ),
        "# TYPE isthmus_connections_opened_total counter",
        'isthmus_connections_opened_total{direction="outbound",peer="dst",tls="mutual"} 1.0',
        "# TYPE isthmus_connections_open gauge",
        'isthmus_connections_open{direction="outbound",peer="dst",tls="mutual"} 1.0',
        "# TYPE isthmus_connections_closed_total counter",
        'isthmus_bytes_total{direction="outbound",io_direction="receive",peer="dst"} 10.0',
        'isthmus_bytes_total{direction="outbound",io_direction="receive",peer="src"} 0.0',
        'isthmus_heads_declined_total{direction="outbound",role="request"} 0.0',
        'isthmus_detections_total{direction="outbound",result="tls"} 2.0',
        "# TYPE isthmus_detection_seconds histogram",
        'isthmus_detection_seconds_bucket{direction="outbound",le="0.0005"} 1.0',
        'isthmus_detection_seconds_bucket{direction="outbound",le="10.0"} 1.0',
        'isthmus_detection_seconds_bucket{direction="outbound",le="+Inf"} 2.0',
        'isthmus_detection_seconds_count{direction="outbound"} 2.0',
        'isthmus_detection_seconds_sum{direction="outbound"} 11.0005',
    ):
        assert line in lines, line
    facts = {
        "side": "client",
        "result": "ok",
        "version": "TLSv1.3",
        "group": "X25519MLKEM768",
        "resumed": "false",
    }
    assert value(metrics, "tls_handshakes_total", direction="outbound", **facts) == 1


def test_prometheus_can_parse_the_text_and_it_has_every_family() -> None:
    metrics = Metrics()
    metrics.count_handshake("inbound", "server", ("TLSv1.3", "X25519MLKEM768", True))
    metrics.count_failed_handshake("outbound", "client", "certificate")
    metrics.count_detection("inbound", "http1", 0.01)
    metrics.count_loop("own-port")
    metrics.count_error("inbound", "connection_refused")
    metrics.count_declined_heads("inbound", "request", 1)
    metrics.set_fast_path_exchanges(2, 1)
    metrics.count_directory_reload("error")
    metrics.count_identity_reload("ok")
    metrics.set_validity(50.0, 100.0, 200.0)
    metrics.pool("idle").inc()
    metrics.count_dropped_logs(3, "slow_reader")
    found = {
        family.name: family for family in text_string_to_metric_families(metrics.render().decode())
    }
    for name in (
        "requests", "responses", "response_latency_seconds", "connections_opened", "connections_open", "connections_closed", "bytes",
        "tls_handshakes", "tls_failures", "detections", "detection_seconds", "loops", "errors", "heads_declined", "fast_path_exchanges",
        "directory_reloads", "identity_reloads", "certificate_expiry_timestamp_seconds", "root_expiry_timestamp_seconds",
        "pool_connections", "dropped_logs", "build_info",
    ):  # fmt: skip
        assert f"isthmus_{name}" in found, name
    assert "process_resident_memory_bytes" in found
    assert value(metrics, "dropped_logs_total", reason="slow_reader") == 3
    assert not [name for name in found if name.endswith("_created")]


def test_two_proxies_in_one_process_do_not_share_their_metrics() -> None:
    one, two = Metrics(), Metrics()
    one.count_loop("own-port")
    assert value(two, "loops_total", kind="own-port") is None
