"""`isthmus demo`: a small mesh on this machine with real programs in it, and a table of what was
proven.

The command re-executes itself in the sandbox (lab/sandbox.py), so it needs no root and leaves
nothing behind. lab/story.py has the steps.
"""

import argparse
import sys

from lab.sandbox import SandboxError, inside, reexecute

DESCRIPTION = """\
Builds pods with sidecars on this machine and runs unmodified programs through them: HTTP/1.1,
large streamed bodies, a WebSocket, SMTP (the server speaks first), and gRPC, whose calls are
balanced over two pods. Then two clusters, connected only by their gateways: names, a split, a
failover, an outage, a stopped loop, and the trace of a request. Prints what was proven: which
identities and ciphers were used, what an eavesdropper on the wire sees, what the mesh costs, and
that intruders are rejected. The exit code is 0 only if all proofs held.

Everything runs in separate namespaces. The kernel removes them when the command ends for any
reason. Root is not needed where user namespaces are allowed."""

EPILOG = """\
examples:
  isthmus demo           takes about half a minute
  isthmus demo --keep    keeps the pods running and prints how to enter them; Ctrl-C stops them"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand `demo`."""
    parser = subparsers.add_parser(
        "demo",
        help="build a small mesh on this machine and show what it does",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep the pods running until Ctrl-C, and print how to enter them",
    )
    parser.add_argument(
        "--size",
        type=int,
        default=256,
        metavar="MIB",
        help="size of the large bodies in MiB, each way (default: 256)",
    )
    parser.add_argument(
        "--jaeger",
        metavar="URL",
        help=(
            "also send the spans to this OTLP/HTTP collector, such as http://localhost:4318"
            " (Jaeger)"
        ),
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 if all proofs held, 1 if not, 64 if no sandbox can be created here."""
    if not 1 <= args.size <= 4096:
        print(f"isthmus demo: --size {args.size}: must be from 1 to 4096", file=sys.stderr)
        return 64
    if args.jaeger is not None and not args.jaeger.startswith(("http://", "https://")):
        print(
            f"isthmus demo: --jaeger {args.jaeger}: expected an http or https URL", file=sys.stderr
        )
        return 64
    if not inside():
        if args.jaeger is not None:
            # its imports are rarely needed here
            from lab.traces import forward_outside  # noqa: PLC0415

            forward_outside(args.jaeger)
        command = [
            sys.executable,
            "-m",
            "proxy.cli",
            "demo",
            "--size",
            str(args.size),
            *(["--keep"] if args.keep else []),
        ]
        try:
            reexecute(command)
        except SandboxError as error:
            print(f"isthmus demo: {error}", file=sys.stderr)
        return 64
    from lab.story import tell  # noqa: PLC0415  # its imports are only needed inside the sandbox

    return tell(size=args.size * 1024 * 1024, keep=args.keep)
