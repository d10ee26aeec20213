"""Metric families: what a family shows of its series, how it limits them, and how its name, type
and merge rule reach the registry."""

from __future__ import annotations

import threading

import pytest
from prometheus_client.registry import DuplicateTimeseries

from proxy.metric_families import MOST_SERIES, Families


@pytest.fixture
def families() -> Families:
    return Families("x_")


def lines(families: Families) -> list[str]:
    return families.render().decode().splitlines()


def test_a_family_without_labels_has_its_series_from_the_start(families: Families) -> None:
    families.counter("events_total", "Events.")
    families.gauge("open", "Open.")
    families.histogram("seconds", "Time.", (0.5,))
    assert lines(families) == [
        "# HELP x_events_total Events.",
        "# TYPE x_events_total counter",
        "x_events_total 0.0",
        "# HELP x_open Open.",
        "# TYPE x_open gauge",
        "x_open 0.0",
        "# HELP x_seconds Time.",
        "# TYPE x_seconds histogram",
        'x_seconds_bucket{le="0.5"} 0.0',
        'x_seconds_bucket{le="+Inf"} 0.0',
        "x_seconds_count 0.0",
        "x_seconds_sum 0.0",
    ]


def test_a_labelled_family_shows_the_series_that_were_looked_up(families: Families) -> None:
    family = families.counter("events_total", "Events.", "kind", "way")
    assert lines(families) == ["# HELP x_events_total Events.", "# TYPE x_events_total counter"]
    family.at("a", "in").inc()
    family.at("a", "in").inc(2)
    family.at("b", "out")
    assert lines(families)[2:] == [
        'x_events_total{kind="a",way="in"} 3.0',
        'x_events_total{kind="b",way="out"} 0.0',
    ]


def test_a_gauge_goes_down_and_a_count_that_is_kept_elsewhere_is_set(families: Families) -> None:
    gauge, count = families.gauge("open", "Open."), families.counter("events_total", "Events.")
    gauge.at().inc(3)
    gauge.at().inc(-1)
    count.at().set(7)
    assert families.registry.get_sample_value("x_open") == 2
    assert families.registry.get_sample_value("x_events_total") == 7
    gauge.at().set(True)
    assert families.registry.get_sample_value("x_open") == 1


def test_a_histogram_counts_a_bound_in_its_own_bucket(families: Families) -> None:
    series = families.histogram("seconds", "Time.", (0.5, 1), "way").at("in")
    for value in (0.5, 0.6, 1, 9):
        series.observe(value)
    assert lines(families)[2:] == [
        'x_seconds_bucket{le="0.5",way="in"} 1.0',
        'x_seconds_bucket{le="1.0",way="in"} 3.0',
        'x_seconds_bucket{le="+Inf",way="in"} 4.0',
        'x_seconds_count{way="in"} 4.0',
        'x_seconds_sum{way="in"} 11.1',
    ]


def test_new_series_beyond_the_limit_are_other(families: Families) -> None:
    family = families.counter("events_total", "Events.", "kind")
    histogram = families.histogram("seconds", "Time.", (1,), "kind")
    for number in range(MOST_SERIES + 3):
        family.at(f"k{number}").inc()
        histogram.at(f"k{number}").observe(2)
    family.at("k0").inc()
    assert families.registry.get_sample_value("x_events_total", {"kind": "k0"}) == 2
    assert families.registry.get_sample_value("x_events_total", {"kind": "other"}) == 3
    assert families.registry.get_sample_value("x_seconds_count", {"kind": "other"}) == 3
    assert len(lines(families)) < 2 + 2 + (1 + 4) * (MOST_SERIES + 1) + 1


def test_replaced_series_are_gone(families: Families) -> None:
    family = families.gauge("state", "State.", "name")
    family.at("a").set(1)
    family.replace({("b",): 2.0})
    assert lines(families)[2:] == ['x_state{name="b"} 2.0']
    family.replace({})
    assert lines(families)[2:] == []


def test_a_name_is_declared_once(families: Families) -> None:
    families.counter("events_total", "Events.")
    with pytest.raises(DuplicateTimeseries):
        families.counter("events_total", "Events.")


def test_the_name_of_a_counter_ends_as_the_text_shows_it(families: Families) -> None:
    with pytest.raises(ValueError, match="_total"):
        families.counter("events", "Events.")


def test_only_what_is_not_added_has_a_rule(families: Families) -> None:
    families.gauge("open", "Open.")
    families.gauge("expiry", "Expiry.", merge="first")
    families.gauge("active", "Active.", "name", merge="max")
    assert families.rules == {"x_expiry": "first", "x_active": "max"}


def test_the_declared_families_have_name_kind_and_labels(families: Families) -> None:
    families.counter("events_total", "Events.", "kind")
    families.histogram("seconds", "Time.", (1,))
    assert [(one.name, one.kind, one.labels) for one in families.declared] == [
        ("x_events_total", "counter", ("kind",)),
        ("x_seconds", "histogram", ()),
    ]


def test_series_that_several_threads_create_lose_no_count(families: Families) -> None:
    """Each thread counts in a series of its own, and all create them in one family."""
    family = families.counter("events_total", "Events.", "thread")

    def count(thread: str) -> None:
        for _ in range(99):
            family.at(thread).inc()

    threads = [threading.Thread(target=count, args=(f"t{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(lines(families)[2:]) == [
        f'x_events_total{{thread="t{number}"}} 99.0' for number in range(8)
    ]
