"""The command `isthmus`. Each subcommand does one job and has its own --help."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Exit codes of sysexits.h: wrong usage, or a file given on the command line cannot be used.
USAGE = 64
UNAVAILABLE = 69
CUT_SHORT = 141  # what a shell reports for a program that SIGPIPE ended


# Imported on demand: the proxy does not load the code of the other commands, and an init container
# does not wait for it.
COMMANDS = {
    "intercept": "proxy.commands.intercept",
    "identity": "proxy.commands.identity",
    "check": "proxy.commands.check",
    "directory": "proxy.commands.directory",
    "control": "control.command",
    "demo": "lab.demo",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code. argparse's own code for wrong usage, 2, becomes
    64.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    parser = _parser(words[0] if words else None)
    try:
        args = parser.parse_args(words)
    except SystemExit as stop:
        return USAGE if stop.code == 2 else int(stop.code or 0)
    try:
        result: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output has closed the pipe (`| head`). What is still buffered would
        # raise the same error when the interpreter exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CUT_SHORT
    return result


def _parser(wanted: str | None) -> argparse.ArgumentParser:
    """The parser with the subcommand `wanted` only, or with all of them if there is no such
    subcommand.
    """
    parser = argparse.ArgumentParser(
        prog="isthmus",
        description=(
            "A service-mesh data plane: a small process beside every pod that upgrades its traffic"
            " to mutual TLS."
        ),
        epilog=(
            "In a checkout, start with `isthmus demo`: it builds a small mesh on this machine and"
            " shows what it does."
        ),
    )
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    everything = wanted not in {"run", *COMMANDS}
    if everything or wanted == "run":
        _add_run(subparsers)
    for name, module in COMMANDS.items():
        if everything or wanted == name:
            _add(subparsers, name, module)
    return parser


def _add(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser], name: str, module: str
) -> None:
    """Add the subcommand `demo`. It needs the package `lab`, which the container image does not
    have; there the subcommand only says so.
    """
    if name == "demo" and importlib.util.find_spec("lab") is None:
        absent = subparsers.add_parser(
            "demo", help="not available in this installation: run `make demo` in a checkout"
        )
        absent.set_defaults(run=_no_demo)
        return
    importlib.import_module(module).add_parser(subparsers)


def _no_demo(_: argparse.Namespace) -> int:
    print(
        "isthmus: the demonstration needs the package lab, which is not installed here: use a"
        " checkout",
        file=sys.stderr,
    )
    return UNAVAILABLE


def _add_run(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "run",
        help="run the proxy",
        description=(
            "Run the proxy. As a pod's sidecar it listens on 4140 (outbound), 4143 (inbound), 4191"
            " (admin), and 4153 (DNS) if configured. As a gateway it listens on 4143 (other"
            " clusters) and 4191 (admin). On SIGTERM, open connections may finish within the grace"
            " period; a second SIGTERM ends the proxy at once."
        ),
        epilog=(
            "docs/configuration.md describes every setting; ISTHMUS_<SECTION>__<FIELD>=value in the"
            " environment overrides the file."
        ),
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="the configuration file in YAML (default: $ISTHMUS_CONFIG)",
    )
    parser.add_argument(
        "--gateway",
        action="store_true",
        help="run as this cluster's gateway instead of a pod's sidecar (gateway.enabled)",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        help="run N worker processes that share the same ports (workers; default 1)",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from proxy.net.tls.openssl_config import configure

    configure(os.environ)
    from proxy.config.load import load
    from proxy.errors import StartError
    from proxy.settings.sources import SETTLE, ConfigError

    overrides = {"ISTHMUS_GATEWAY__ENABLED": "true"} if args.gateway else {}
    if args.workers is not None:
        overrides["ISTHMUS_WORKERS"] = args.workers
    try:
        config = load(args.config, {**os.environ, **overrides}, SETTLE)
    except ConfigError as error:
        print(f"isthmus: {error}", file=sys.stderr)
        return USAGE
    try:
        if config.workers > 1:
            from proxy.supervisor import supervise

            return supervise(config)
        from proxy.app import start

        return start(config)
    except StartError as error:
        print(f"isthmus: {error}", file=sys.stderr)
        return error.code


if __name__ == "__main__":
    sys.exit(main())
