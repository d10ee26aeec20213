"""`make soak`: floods and faults, measured; exits with 0 only if all of it held.

python -m perf.reliability [--only NAME,...] [--write]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence

import trio

from lab.cluster import Lab
from lab.pod import ROOT
from lab.process import LabError
from lab.sandbox import available, command_line, inside
from perf.__main__ import machine
from perf.pair import IMAGE
from perf.reliability import faults, floods
from perf.reliability.bed import bed
from perf.reliability.report import Row, table, write

FLOODS = frozenset(flood.name for flood in (*floods.FLOODS, floods.ALL))
FAULTS = frozenset(fault.name for fault in faults.FAULTS)


async def measure(only: frozenset[str]) -> list[Row]:
    """All rows, printed as they come."""
    rows = []

    async def take(some: AsyncIterator[Row]) -> None:
        async for row in some:
            print(row.line(), flush=True)
            rows.append(row)

    if not only or only & FLOODS:
        async with bed() as place:
            await take(floods.run(place, only))
    if not only or only & FAULTS:
        async with Lab() as lab:
            await take(faults.run(lab, only))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all held, 1 if something did not, 64 if it cannot be measured here."""
    parser = argparse.ArgumentParser(prog="python -m perf.reliability", description="Floods and faults, measured beside a member.")
    parser.add_argument("--only", default="", metavar="NAME,...", help=f"of {', '.join(sorted(FLOODS | FAULTS))}")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/reliability.md")
    asked = parser.parse_args(arguments)
    if not all(folder.is_dir() for folder in IMAGE):
        print("perf.reliability: the sidecar is measured as the image has it: run `make aws-lc compiled` first", file=sys.stderr)
        return 64
    if not inside():
        if (why := available()) is not None:
            print(f"perf.reliability: {why}", file=sys.stderr)
            return 64
        return subprocess.run(_sandboxed(sys.argv[1:] if arguments is None else arguments), check=False, env=_environment()).returncode
    try:
        rows = trio.run(measure, frozenset(filter(None, asked.only.split(","))))
    except LabError as error:
        print(f"perf.reliability: {error}", file=sys.stderr)
        return 64
    if asked.write:
        facts = "".join(f"- {name}: {value}\n" for name, value in machine().items() if name != "versions")
        heads = {"floods": floods.HEAD, "faults": faults.HEAD}
        write({"machine": facts} | {name: table(head, [row for row in rows if row.table == name]) for name, head in heads.items()})
    held = sum(row.held for row in rows)
    print(f"{held} of {len(rows)} held")
    return 0 if rows and held == len(rows) else 1


def _sandboxed(arguments: Sequence[str]) -> list[str]:
    return command_line([sys.executable, "-m", "perf.reliability", *arguments])


def _environment() -> dict[str, str]:
    """With what the image has found before the checkout."""
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(map(str, (*IMAGE, ROOT)))}


if __name__ == "__main__":
    sys.exit(main())
