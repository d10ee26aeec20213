"""How much work discovery has with slices that list the same addresses. A tenant may write many.

Work is the number of calls, so it does not depend on the machine."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest

from tests.control.cluster import Cluster, Json, endpoint, pod, service, slice_of


def manifests(count: int, kind: str) -> list[Json]:
    """`count` services, each of which lists the same `count` addresses."""
    hosts = [f"10.9.{number // 250}.{number % 250 + 1}" for number in range(count)]
    names = [f"pod-{number}" if kind == "named" else None for number in range(count)]
    ends = [endpoint(host, name) for host, name in zip(hosts, names, strict=True)]
    found: list[Json] = []
    for number in range(count):
        annotations = {"isthmus.dev/endpoint-identity": "?"} if kind == "unreadable" else {}
        name = f"web-{number}"
        found += [
            service(name, "None", metadata={"annotations": annotations}),
            slice_of(name, *ends),
        ]
    return found


def calls(cluster: Cluster) -> int:
    """The calls of a flush."""
    count = 0

    def profile(_frame: FrameType, event: str, _what: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        cluster.flush()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.no_cover  # the tracer uses the same hook
@pytest.mark.parametrize("kind", ["named", "unnamed", "unreadable"])
def test_the_work_of_a_flush_grows_with_the_number_of_endpoints(kind: str) -> None:
    """Not with that number times the number of services that list an address."""
    work = []
    for count in (20, 40):
        cluster = Cluster().put(*manifests(count, kind))
        first = calls(cluster)
        cluster.put(*(pod(f"pod-{number}", f"10.9.0.{number + 1}") for number in range(count)))
        work.append(first + calls(cluster))
    assert work[1] < work[0] * 5, "twice as many services: four times as many endpoints"
