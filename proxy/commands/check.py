"""`isthmus check`: checks that this pod is set up correctly, or says what is wrong and how to fix
it.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import trio

from proxy.commands.check_enrollment import check_enrollment
from proxy.commands.check_names import check_names
from proxy.commands.check_peers import MAX_PEERS, check_peers
from proxy.commands.check_redirection import PROBE_PORT, check_proxy, check_redirection
from proxy.commands.check_workload_api import check_workload_api
from proxy.commands.checks import (
    Moment,
    Result,
    check_certificates,
    check_clock,
    check_configuration,
    check_control,
    check_directory,
    worst,
)
from proxy.commands.terminal import verdict
from proxy.identity.inspect import write_everything

DESCRIPTION = """\
Check that this pod is set up correctly, and say what is wrong and how to fix it:

  configuration   the file and the environment are valid
  certificates    certificate, key and trust roots fit together and are valid; with
                  `identity.source: control`, the control plane issues a certificate; with
                  `spiffe`, the Workload API has an identity
  proxy           if a proxy already runs here: it is ready
  clock           this machine's time is plausible
  directory       the directory file is valid, or the control plane answers
  redirection     a connection to an unused address arrives at the proxy (it carries no data)
  names           if `dns` is configured: queries to the pod's resolvers arrive at the proxy
  peers           the directory's endpoints and gateways answer and have the expected identities

Run it as root, preferably in an init container after `isthmus intercept`. The proxy's own user is
exempt from redirection, so it cannot test it. Other users cannot bypass it to reach the peers
directly.
The exit code is 0 if no check failed, else 1. Warnings do not count as failures."""

EPILOG = """\
examples:
  isthmus check --config /etc/isthmus/isthmus.yaml
  isthmus check --only configuration --only redirection   in an init container: no peers needed
  isthmus check --only certificates --only clock
  isthmus check --json | jq '.checks[] | select(.status != "ok")'"""

CHECKS = (
    "configuration",
    "certificates",
    "proxy",
    "clock",
    "directory",
    "redirection",
    "names",
    "peers",
)
_LABELS = {"ok": "ok", "warning": "WARNING", "failed": "FAILED", "skipped": "skipped"}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand `check`."""
    parser = subparsers.add_parser(
        "check",
        help="check redirection, certificates, clock, directory and peers",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="the proxy's configuration file"
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=CHECKS,
        metavar="CHECK",
        help="run only this check; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument(
        "--timeout",
        type=_positive,
        default=3.0,
        metavar="SECONDS",
        help="timeout of each connection (default 3)",
    )
    parser.add_argument(
        "--probe-port",
        type=int,
        default=PROBE_PORT,
        metavar="PORT",
        help=f"destination port of the redirection test (default {PROBE_PORT})",
    )
    parser.add_argument(
        "--max-peers",
        type=int,
        default=MAX_PEERS,
        metavar="N",
        help=f"maximum endpoints to try (default {MAX_PEERS})",
    )
    parser.set_defaults(run=run)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds between 0 and 3600")
    return value


def run(args: argparse.Namespace) -> int:
    """0 if no check failed, else 1."""
    results = trio.run(examine, args)
    write_everything()
    print(_as_json(results) if args.json else _as_text(results))
    return 1 if worst(results) == "failed" else 0


async def examine(args: argparse.Namespace) -> list[Result]:
    """Run the requested checks in the order of CHECKS. What later checks need is loaded even if not
    requested.
    """
    started = Moment.now()
    results, config = check_configuration(args.config, os.environ)
    if config is None:
        return [
            *results,
            Result(
                "everything else",
                "skipped",
                "without a valid configuration nothing more can be checked",
            ),
        ]
    section = config.identity
    if section is not None and section.control is not None:
        found, identity = await check_enrollment(config, section, section.control, args.timeout)
    elif section is not None and section.spiffe is not None:
        found, identity = await check_workload_api(config, section, section.spiffe, args.timeout)
    else:
        found, identity = check_certificates(config)
    results += found
    wanted = frozenset(args.only or CHECKS)
    reported = None
    if wanted & {"proxy", "clock"}:
        found, reported = await check_proxy(config, args.timeout)
        results += found
    found, directory = check_directory(config)
    results += found
    if "directory" in wanted:
        results += await check_control(config, identity, args.timeout)
    if "redirection" in wanted:
        results += await check_redirection(config, args.probe_port, args.timeout)
    if "names" in wanted:
        results += await check_names(config, args.timeout)
    if "peers" in wanted and directory is not None:
        results += await check_peers(config, identity, directory, args.max_peers, args.timeout)
    certificate = section.certificate if section is not None else None
    # Last, so that the clock is observed over the time of all other checks.
    results += check_clock(certificate, started, reported)
    selected = [result for result in results if result.name in wanted]
    return sorted(selected, key=lambda result: CHECKS.index(result.name))


def _as_json(results: Sequence[Result]) -> str:
    checks = [
        {"name": r.name, "status": r.status, "what": r.what, "remedy": r.remedy} for r in results
    ]
    return json.dumps({"status": worst(results), "checks": checks}, indent=2)


def _as_text(results: Sequence[Result]) -> str:
    lines = []
    for result in results:
        lines.append(f"{verdict(_LABELS[result.status], 8)} {result.name:<14} {result.what}")
        if result.remedy and result.status != "ok":
            lines.append(f"{'':<23} -> {result.remedy}")
    count = {status: sum(result.status == status for result in results) for status in _LABELS}
    lines += ["", ", ".join(f"{number} {status}" for status, number in count.items() if number)]
    return "\n".join(lines)
