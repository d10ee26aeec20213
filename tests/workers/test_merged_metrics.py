"""Several workers' metrics as one proxy's.

Rules: counters are added and never decrease; each gauge has its own way of merging."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from proxy.metric_families import Families
from proxy.telemetry.metrics import Metrics
from proxy.workers.merged_metrics import MergedMetrics, MetricSamples, reading
from tests.workers.exposition import samples

RULES = Metrics().families.rules


def counted(value: float) -> list[MetricSamples]:
    families = Families("")
    families.counter("a_total", "Things.").at().inc(value)
    families.gauge("b", "State.").at().set(value)
    return reading(families.registry)


def test_one_worker_alone_reads_as_it_would_by_itself() -> None:
    metrics = Metrics()
    metrics.http["inbound"].latency.observe(0.2)
    metrics.count_error("outbound", 'a "quoted"\nreason')
    mine = reading(metrics.registry)
    assert MergedMetrics(RULES).render(mine) == MergedMetrics(RULES).render(mine)
    ours = {
        name: value
        for name, value in samples(MergedMetrics(RULES).render(mine)).items()
        if name.startswith("isthmus_")
    }
    assert ours == {
        name: value
        for name, value in samples(metrics.render()).items()
        if name.startswith("isthmus_")
    }


def test_counters_and_every_part_of_a_histogram_are_added() -> None:
    totals = MergedMetrics(RULES)
    for place, seconds in ((1, 0.2), (2, 0.002), (3, 100.0)):
        metrics = Metrics()
        with metrics.http["inbound"].request(b"GET") as record:
            record.head(200)
        metrics.http["outbound"].latency.observe(seconds)
        totals.take(place, reading(metrics.registry))
    found = samples(totals.render(reading(Metrics().registry)))
    assert found['isthmus_requests_total{direction="inbound",method="GET"}'] == 3
    assert found['isthmus_response_latency_seconds_count{direction="outbound"}'] == 3
    assert found['isthmus_response_latency_seconds_sum{direction="outbound"}'] == 100.202
    assert found['isthmus_response_latency_seconds_bucket{direction="outbound",le="0.002"}'] == 1
    assert found['isthmus_response_latency_seconds_bucket{direction="outbound",le="+Inf"}'] == 3


def test_gauges_are_added_or_follow_their_rule() -> None:
    totals = MergedMetrics(RULES)
    for place, (connections, expiry, addresses, away) in enumerate(
        [(3, 500.0, 7, True), (4, 400.0, 7, False)], 1
    ):
        metrics = Metrics()
        metrics.pool("idle").set(connections)
        metrics.set_validity(expiry - 10, expiry, expiry + 1)
        metrics.set_virtual_addresses(addresses, 0)
        metrics.set_failover("shop", away)
        totals.take(place, reading(metrics.registry))
    found = samples(totals.render([]))
    assert found['isthmus_pool_connections{state="idle"}'] == 7
    assert found["isthmus_certificate_expiry_timestamp_seconds"] == 400
    assert found["isthmus_root_expiry_timestamp_seconds"] == 401
    assert found['isthmus_virtual_addresses{state="existing"}'] == 7
    assert found['isthmus_failover_active{service="shop"}'] == 1
    assert (
        next(value for name, value in found.items() if name.startswith("isthmus_build_info")) == 1
    )


def test_a_gauge_that_only_the_workers_have_is_not_drawn_down_by_the_supervisor() -> None:
    """Its own registry has no certificate, and 0 would be the minimum."""
    worker = Metrics()
    worker.set_validity(400.0, 500.0, 600.0)
    totals = MergedMetrics(RULES)
    totals.take(1, reading(worker.registry))
    assert (
        samples(totals.render(reading(Metrics().registry)))[
            "isthmus_certificate_expiry_timestamp_seconds"
        ]
        == 500
    )


def test_the_counters_of_a_dead_worker_stay_and_its_gauges_go() -> None:
    totals = MergedMetrics(RULES)
    totals.take(1, counted(5))
    totals.take(2, counted(7))
    totals.gone(1)
    assert samples(totals.render([])) == {"a_total": 12.0, "b": 7.0}
    totals.take(1, counted(1))
    assert samples(totals.render([])) == {"a_total": 13.0, "b": 8.0}
    totals.gone(2)
    totals.gone(2)
    assert samples(totals.render([])) == {"a_total": 13.0, "b": 1.0}


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 3), st.one_of(st.none(), st.integers(0, 9)))))
def test_a_total_never_decreases_when_a_worker_dies(events: list[tuple[int, int | None]]) -> None:
    totals, workers, before = MergedMetrics(RULES), {1: 0, 2: 0, 3: 0}, 0.0
    for place, more in events:
        if more is None:
            totals.gone(place)
            workers[place] = 0
        else:
            workers[place] += more
            totals.take(place, counted(workers[place]))
        now = samples(totals.render([])).get("a_total", 0.0)
        assert now >= before
        before = now


def test_the_text_is_one_that_prometheus_reads() -> None:
    totals = MergedMetrics(RULES)
    metrics = Metrics()
    metrics.count_error("outbound", 'a "quoted"\nreason')
    totals.take(1, reading(metrics.registry))
    families = {
        family.name: family for family in text_string_to_metric_families(totals.render([]).decode())
    }
    assert families["isthmus_errors"].samples[0].labels["reason"] == 'a "quoted"\nreason'
    assert families["isthmus_response_latency_seconds"].type == "histogram"


def test_the_rules_are_for_gauges_that_exist() -> None:
    gauges = {family.name for family in reading(Metrics().registry) if family.type == "gauge"}
    assert RULES
    assert set(RULES) <= gauges
