"""`isthmus directory`: prints the document's JSON schema, and reports all mistakes in a directory
file at once.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from proxy.directory import Cluster, Directory, DirectoryError, directory_schema, parse
from proxy.directory.watcher import read

DESCRIPTION = """\
The directory file lists the services, their endpoints and identities, and the other clusters. It
defines how requests are distributed among them. docs/configuration.md describes it."""

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
        help="report all mistakes in directory files, including cycles",
        description=(
            "Read directory files as the proxy does, and print every mistake with its path. The"
            " exit code is 0 if there are none, else 1."
        ),
    )
    check.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="a directory file in YAML"
    )
    check.set_defaults(run=run_check)
    schema = jobs.add_parser(
        "schema",
        help="print the JSON schema",
        description="Print the JSON schema (2020-12) of directory files.",
    )
    schema.set_defaults(run=run_schema)


def run_check(args: argparse.Namespace) -> int:
    """0 if all files are valid, else 1."""
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
    """A summary of a valid directory in one line."""
    planned = sum(
        any(target.plan is not None for target in service.targets.values())
        for service in found.services
    )
    exported = sum(service.exported for service in found.services)
    own = (
        f"{counted(len(found.services), 'service')} ({exported} exported, {planned} with split or"
        " failover)"
    )
    return f"ok: {own}, {counted(found.endpoint_count, 'endpoint')}, {_others(found.clusters)}"


def _others(clusters: Mapping[str, Cluster]) -> str:
    if not clusters:
        return "no other cluster"
    has = {
        name: (counted(len(found.gateways), "gateway"), counted(len(found.services), "service"))
        for name, found in clusters.items()
    }
    return "; ".join(f"{name}: {', '.join(what)}" for name, what in has.items())


def counted(number: int, what: str) -> str:
    """A count with its noun: `1 service`, `2 services`."""
    return f"{number} {what}{'' if number == 1 else 's'}"
