"""`isthmus directory`: the document's JSON schema, and a check that finds all mistakes at once."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from proxy.directory import Cluster, Directory, DirectoryError, directory_schema, parse
from proxy.directory.watcher import read

DESCRIPTION = """\
The directory is the file that says which services there are, where they are served and by whom, which other clusters there are, and how
requests are shared out among all of these. docs/configuration.md describes it."""

EPILOG = """\
examples:
  isthmus directory check /etc/isthmus/directory.yaml
  isthmus directory schema > directory.schema.json"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand `directory`."""
    parser = subparsers.add_parser(
        "directory",
        help="check a directory file, or print its JSON schema",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    jobs = parser.add_subparsers(title="jobs", required=True, metavar="JOB")
    check = jobs.add_parser(
        "check",
        help="find all mistakes of directory files, circles included",
        description="Read directory files as the proxy does, and print every mistake with its path. Exit code 0: none; 1: some.",
    )
    check.add_argument("files", type=Path, nargs="+", metavar="FILE", help="a directory file in YAML")
    check.set_defaults(run=run_check)
    schema = jobs.add_parser("schema", help="print the JSON schema", description="Print the JSON schema (2020-12) of directory files.")
    schema.set_defaults(run=run_schema)


def run_check(args: argparse.Namespace) -> int:
    """0 when all files are good, 1 when one is not."""
    wrong = False
    for path in args.files:
        try:
            print(f"{path}: {summary(parse(read(path), str(path)))}")
        except DirectoryError as error:
            wrong = True
            for mistake in error.mistakes:
                print(f"{path}: {mistake}", file=sys.stderr)
    return 1 if wrong else 0


def run_schema(_: argparse.Namespace) -> int:
    """Always 0."""
    print(json.dumps(directory_schema(), indent=2))
    return 0


def summary(found: Directory) -> str:
    """What a good directory has, in one line."""
    planned = sum(any(target.plan is not None for target in service.targets.values()) for service in found.services)
    exported = sum(service.exported for service in found.services)
    own = f"{counted(len(found.services), 'service')} ({exported} exported, {planned} with split or failover)"
    return f"ok: {own}, {counted(found.endpoint_count, 'endpoint')}, {_others(found.clusters)}"


def _others(clusters: Mapping[str, Cluster]) -> str:
    if not clusters:
        return "no other cluster"
    has = {name: (counted(len(found.gateways), "gateway"), counted(len(found.services), "service")) for name, found in clusters.items()}
    return "; ".join(f"{name}: {', '.join(what)}" for name, what in has.items())


def counted(number: int, what: str) -> str:
    """So many, in words: `1 service`, `2 services`."""
    return f"{number} {what}{'' if number == 1 else 's'}"
