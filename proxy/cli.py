"""The command `isthmus`: one subcommand a job, each with a --help that a newcomer can follow."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# sysexits.h: the command, or a file it was given, is not usable.
USAGE = 64
UNAVAILABLE = 69
CUT_SHORT = 141  # as a shell says of a program that SIGPIPE has ended


# Imported when they are asked for: a proxy need not carry the code of the other commands, nor an init container wait for it.
COMMANDS = {
    "intercept": "proxy.commands.intercept",
    "identity": "proxy.commands.identity",
    "check": "proxy.commands.check",
    "directory": "proxy.commands.directory",
    "demo": "lab.demo",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit code. argparse's own exit code for bad usage, 2, becomes 64."""
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
        # Whoever read what we say has read enough (`| head`). What is left in the buffer would fail once more when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CUT_SHORT
    return result


def _parser(wanted: str | None) -> argparse.ArgumentParser:
    """The parser with the one subcommand that is `wanted`, or with all of them if it is none of them."""
    parser = argparse.ArgumentParser(
        prog="isthmus",
        description="A service-mesh data plane: a small process beside every pod that upgrades its traffic to mutual TLS.",
        epilog="In a checkout begin with `isthmus demo`, which builds a small mesh on this machine and shows what it does.",
    )
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    everything = wanted not in {"run", *COMMANDS}
    if everything or wanted == "run":
        _add_run(subparsers)
    for name, module in COMMANDS.items():
        if everything or wanted == name:
            _add(subparsers, name, module)
    return parser


def _add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser], name: str, module: str) -> None:
    """The laboratory belongs to a checkout; the container image has only what runs, and then the command says so."""
    if name == "demo" and importlib.util.find_spec("lab") is None:
        absent = subparsers.add_parser("demo", help="not in this installation: run `make demo` in a checkout")
        absent.set_defaults(run=_no_demo)
        return
    importlib.import_module(module).add_parser(subparsers)


def _no_demo(_: argparse.Namespace) -> int:
    print("isthmus: the demonstration needs the laboratory (package lab), which is not installed here: use a checkout", file=sys.stderr)
    return UNAVAILABLE


def _add_run(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "run",
        help="run the proxy",
        description=(
            "Run the proxy: as a pod's sidecar with outbound (4140), inbound (4143) and admin (4191) listeners, and DNS (4153) if it is "
            "configured; as a gateway with one for other clusters (4143), and admin. SIGTERM lets open connections finish within the "
            "grace period; a second one ends at once."
        ),
        epilog="docs/configuration.md describes every setting; ISTHMUS_<SECTION>__<FIELD>=value in the environment overrides the file.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="the configuration file in YAML (default: $ISTHMUS_CONFIG, or none)")
    parser.add_argument("--gateway", action="store_true", help="be a gateway of this cluster instead of a pod's sidecar (gateway.enabled)")
    parser.add_argument("--workers", metavar="N", help="share connections among N processes behind the same ports (workers; default 1)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from proxy.net.tls.openssl_config import configure

    configure(os.environ)
    from proxy.config.load import SETTLE, ConfigError, load
    from proxy.errors import StartError

    said = {"ISTHMUS_GATEWAY__ENABLED": "true"} if args.gateway else {}
    if args.workers is not None:
        said["ISTHMUS_WORKERS"] = args.workers
    try:
        config = load(args.config, {**os.environ, **said}, SETTLE)
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
