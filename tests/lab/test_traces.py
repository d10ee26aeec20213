"""The collector of the laboratory, its tree of spans, and how spans leave the sandbox."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from lab.collector import RAW, Collector, Span, read
from lab.traces import tree
from tests.kit.ports import free_port
from tests.tracing.exports import FAST, otlp, queue
from tests.tracing.records import Agreed, At, http


def span(name: str, kind: str, ids: str, start: int, **attributes: object) -> Span:
    own, _, parent = ids.partition("<")
    resource = {"k8s.pod.name": name, "k8s.cluster.name": "west"}
    known = {
        "network.peer.address": "10.0.0.1",
        "network.peer.port": 80,
        "tls.established": False,
        **attributes,
    }
    return Span("GET", kind, "t", own, parent, start, start + 1_000_000, known, resource)


def test_the_tree_has_each_span_under_its_parent_in_the_order_of_time() -> None:
    spans = [
        span("c", "server", "3<2", 3), span("d", "server", "5<4", 5), span("a", "client", "2<outside", 1), span("b", "client", "4<3", 4),
        span("e", "client", "6<3", 6, **{"isthmus.service": "default/x"}),
    ]  # fmt: skip
    heads = [line for line in tree(spans) if re.search("west/[a-e]", line)]
    assert [(line.index("GET"), line.split("west/")[1][0]) for line in heads] == [
        (0, "a"),
        (3, "c"),
        (6, "b"),
        (9, "d"),
        (6, "e"),
    ]
    assert any(line.strip(" |`-") == "service: default/x" for line in tree(spans))


def test_spans_whose_parent_is_missing_are_not_indented() -> None:
    assert [
        line[:3]
        for line in tree([span("a", "client", "1<9", 1), span("b", "client", "2<8", 2)])
        if "west/" in line
    ] == ["GET", "GET"]


def test_the_program_writes_decoded_and_raw_requests(tmp_path: Path) -> None:
    file = tmp_path / "spans"
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "lab.collector", str(port), str(file)])
    try:
        with queue(lambda: otlp(f"http://127.0.0.1:{port}"), FAST) as (spans, book):
            spans.put(http("client", tls=Agreed(), peer=At("::1", 1)))
            until = time.monotonic() + 30
            while book.taken + sum(book.lost.values()) < 1 and time.monotonic() < until:
                time.sleep(0.02)
        (found,) = read(file)
        assert (found.name, found.kind, found.attributes["tls.curve"], found.events[0].name) == (
            "GET", "client", "X25519MLKEM768", "isthmus.response.head",
        )  # fmt: skip
        assert file.with_suffix(RAW).stat().st_size > 100
    finally:
        process.terminate()
        process.wait(60)


def test_handed_over_requests_arrive_outside() -> None:
    program = (
        "import sys\nfrom lab.traces import forward_outside,"
        " hand_over\nforward_outside(sys.argv[1])\nassert hand_over(iter([b'', b'']))\nassert not"
        " hand_over(iter([]))\n"
    )
    with Collector() as receiver:
        subprocess.run(
            [sys.executable, "-c", program, receiver.endpoint],
            check=True,
            timeout=60,
            env={**os.environ},
        )
        until = time.monotonic() + 30
        while len(receiver.requests) < 2 and time.monotonic() < until:
            time.sleep(0.02)
    assert [request[":path"] for request in receiver.requests] == ["/v1/traces"] * 2
