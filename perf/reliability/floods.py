"""The floods, one by one and all at once, and their effect on a well-behaved member."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass

import trio

from lab.sidecar import ADMIN_PORT
from perf.reliability.bed import LIMIT, MIB, OPEN, STALL, WEB, Attack, Bed, Watched, watch
from perf.reliability.report import Row

SECONDS, TOGETHER = 12.0, 60.0  # seconds of one flood, of all at once
SETTLE, RECOVER = 5.0, 60.0  # seconds after one flood, after all
# Limits: the member's requests (seconds), probes (milliseconds), memory a minute later (relative to
# before).
P99, SLOWEST_PROBE, RETURN = 0.250, 100, 1.20


@dataclass(frozen=True, slots=True)
class Flood:
    name: str
    title: str
    attacks: tuple[Attack, ...]


FLOODS = (
    Flood(
        "admin-idle", "256 idle connections to the admin port", (Attack("idle", ADMIN_PORT, 256),)
    ),
    Flood(
        "admin-scrapers",
        "16 scrapers that request /metrics without a pause",
        (Attack("scrape", ADMIN_PORT, 16),),
    ),
    Flood(
        "windows",
        "120 HTTP/2 connections, 40 uploads on each, to a server that does not read",
        (Attack("windows", STALL, 120, 40),),
    ),
    Flood(
        "uploads",
        "1,000 HTTP/1.1 uploads to a server that does not read",
        (Attack("uploads", STALL, 1000),),
    ),
    Flood(
        "headers",
        "60 HTTP/2 connections, 200 requests at once on each, to a protected port",
        (Attack("headers", WEB, 60, 200),),
    ),
    Flood(
        "headers-open",
        "60 HTTP/2 connections, 200 requests at once on each, to an open port",
        (Attack("headers", STALL, 60, 200),),
    ),
    Flood(
        "churn",
        "4,000 clients that connect and disconnect at once, every second",
        (Attack("churn", WEB, 4000),),
    ),
    Flood(
        "refused",
        "2,000 connections that stay open after their 403",
        (Attack("refused", WEB, 2000),),
    ),
    Flood(
        "handshakes",
        "2,000 TLS handshakes that stop within the ClientHello",
        (Attack("handshakes", WEB, 2000),),
    ),
    Flood("heads", "1,000 request heads, one byte per second", (Attack("heads", OPEN, 1000),)),
    Flood(
        "resets",
        "20 HTTP/2 connections, requests that are reset at once (CVE-2023-44487)",
        (Attack("resets", OPEN, 20, 100),),
    ),
    Flood(
        "continuation",
        "20 HTTP/2 heads that never end (CVE-2024-27316)",
        (Attack("continuation", OPEN, 20),),
    ),
    Flood("pings", "20 HTTP/2 connections, PING without a pause", (Attack("pings", OPEN, 20),)),
)
# All at once, as far as one core can send them.
ALL = Flood(
    "all",
    "all of these at once, for 60 s",
    tuple(attack for flood in FLOODS for attack in flood.attacks),
)


async def run(bed: Bed, only: frozenset[str]) -> AsyncIterator[Row]:
    """The rows of the table, as they are measured."""
    for flood in (*FLOODS, ALL):
        if flood.name not in only:
            continue
        together = flood is ALL
        seen = await watch(bed, list(flood.attacks), TOGETHER if together else SECONDS)
        await trio.sleep(RECOVER if together else SETTLE)
        seen.after = bed.resident()
        yield row(flood, seen, bed, together=together)


def row(flood: Flood, seen: Watched, bed: Bed, *, together: bool) -> Row:
    """The measured values as text, and whether the limits held."""
    member, probes = seen.member, seen.probes
    alive = bed.victim.running().alive
    faults = []
    if member.errors:
        faults.append(f"the member's errors: {seen.outcomes}")
    if member.p99 > P99 or not member.requests:
        faults.append(f"p99 over {P99 * 1000:.0f} ms")
    if probes.get("failed"):
        faults.append(f"{probes['failed']} probes failed")
    if probes.get("slowest", 0) > SLOWEST_PROBE:
        faults.append(f"a probe took more than {SLOWEST_PROBE} ms")
    if bed.cgroup.kills():
        faults.append("the sidecar was killed: out of memory")
    elif not alive:
        victim = bed.victim.running()
        faults.append(f"the sidecar ended with {victim.returncode}")
        print(victim.output.path.read_text("utf-8", "replace")[-4000:], file=sys.stderr)
    if together and seen.after > seen.before * RETURN:
        faults.append(f"memory is {seen.after / seen.before:.2f} times what it was")
    cells = (
        flood.title,
        f"{member.requests} ({member.errors})",
        f"{member.p50 * 1000:.1f} / {member.p99 * 1000:.0f} / {seen.slowest * 1000:.0f}",
        f"{probes.get('probes', 0)} ({probes.get('failed', 0)}), {probes.get('slowest', 0)}",
        f"{seen.before / MIB:.0f} / {seen.most / MIB:.0f} / {seen.after / MIB:.0f}",
    )
    return Row("floods", flood.name, cells, tuple(faults), dict(seen.attackers or {}))


HEAD = (
    f"Flood, {SECONDS:.0f} s",
    "Member's requests (errors)",
    "p50 / p99 / slowest, ms",
    "Probes (failed), slowest in ms",
    f"Memory before / peak / after, MiB of {LIMIT // MIB}",
    "Result",
)
