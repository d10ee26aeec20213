"""`make soak`: measures floods and faults; the exit code is 0 only if everything held.

    python -m perf.reliability [--only NAME,...] [--write]

`--only floods` and `--only faults` measure one table each, in five to seven minutes. `--write`
keeps the other table then.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence

import trio
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lab.cluster import Lab
from lab.console import put, wide_console
from lab.pod import ROOT
from lab.process import LabError
from lab.sandbox import available, command_line, inside
from perf.__main__ import machine
from perf.pair import IMAGE, IMAGE_ENVIRONMENT
from perf.reliability import faults, floods
from perf.reliability.bed import all_first, bed
from perf.reliability.report import Row, table, write

FLOODS = frozenset(flood.name for flood in (*floods.FLOODS, floods.ALL))
FAULTS = frozenset(fault.name for fault in faults.FAULTS)
TABLES = {"floods": FLOODS, "faults": FAULTS}
HEADS = {"floods": floods.HEAD, "faults": faults.HEAD}


def chosen(only: str) -> frozenset[str]:
    """The names of the rows that `--only` asks for; all rows if it is empty. Raises ValueError for
    a name that does not exist."""
    names = frozenset(filter(None, only.split(","))) or frozenset(TABLES)
    if unknown := names - FLOODS - FAULTS - frozenset(TABLES):
        raise ValueError(f"there is no row {', '.join(sorted(unknown))}")
    return (names - frozenset(TABLES)).union(*(TABLES[name] for name in names & frozenset(TABLES)))


def texts(rows: Sequence[Row]) -> dict[str, str]:
    """The text of each table all of whose rows were measured."""
    names = {row.name for row in rows}
    return {
        name: table(HEADS[name], [row for row in rows if row.table == name])
        for name, whole in TABLES.items()
        if whole <= names
    }


async def measure(only: frozenset[str]) -> list[Row]:
    """The rows of these names; each is printed as soon as it is measured."""
    rows = []
    output = wide_console()
    progress = Progress(
        TextColumn("floods and faults"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=output,
        transient=True,
        disable=not output.is_interactive,
    )
    task = progress.add_task("", total=len(only))

    async def take(some: AsyncIterator[Row]) -> None:
        async for row in some:
            put(output, row.text())
            progress.advance(task)
            rows.append(row)

    with progress:
        if only & FLOODS:
            async with bed() as place:
                await take(floods.run(place, only))
        if only & FAULTS:
            with all_first():
                async with Lab() as lab:
                    await take(faults.run(lab, only))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if everything held, 1 if not, 64 if it cannot be measured here."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.reliability",
        description="Measures the effect of floods and faults on a member.",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="NAME,...",
        help=f"only these: {', '.join((*TABLES, *sorted(FLOODS | FAULTS)))}",
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="write each table that is measured as a whole into docs/reliability.md",
    )
    args = parser.parse_args(arguments)
    try:
        only = chosen(args.only)
    except ValueError as error:
        parser.error(str(error))
    if args.write and not any(whole <= only for whole in TABLES.values()):
        parser.error("--write needs a whole table: --only floods, --only faults, or all")
    if not all(folder.is_dir() for folder in IMAGE):
        print(
            "perf.reliability: the sidecar is measured as in the image: run `make aws-lc compiled`"
            " first",
            file=sys.stderr,
        )
        return 64
    if not inside():
        if (why := available()) is not None:
            print(f"perf.reliability: {why}", file=sys.stderr)
            return 64
        return subprocess.run(
            _sandboxed(sys.argv[1:] if arguments is None else arguments),
            check=False,
            env=_environment(),
        ).returncode
    try:
        rows = trio.run(measure, only)
    except LabError as error:
        print(f"perf.reliability: {error}", file=sys.stderr)
        return 64
    if args.write:
        facts = "".join(
            f"- {name}: {value}\n" for name, value in machine().items() if name != "versions"
        )
        write({"machine": facts} | texts(rows))
    held = sum(row.held for row in rows)
    print(f"{held} of {len(rows)} passed")
    return 0 if rows and held == len(rows) else 1


def _sandboxed(arguments: Sequence[str]) -> list[str]:
    return command_line([sys.executable, "-m", "perf.reliability", *arguments])


def _environment() -> dict[str, str]:
    """The environment in which the image's packages come before the checkout's."""
    return {
        **os.environ,
        **IMAGE_ENVIRONMENT,
        "PYTHONPATH": os.pathsep.join(map(str, (*IMAGE, ROOT))),
    }


if __name__ == "__main__":
    sys.exit(main())
