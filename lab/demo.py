"""`isthmus demo`: a small mesh on this machine, real programs in it, and a table of what was proven.

The command re-executes itself in the sandbox (lab/sandbox.py), so it needs no root and leaves nothing behind.  The story itself is
in lab/story.py.
"""

import argparse
import sys

from lab.sandbox import SandboxError, inside, reexecute

DESCRIPTION = """\
Builds pods with sidecars on this machine, and lets real programs that know nothing of it talk through them: HTTP/1.1,
large streamed bodies, a WebSocket, SMTP, in which the server speaks first, and gRPC, whose calls are spread over two
pods. Then two clusters, joined by their gateways only: names, a split, a failover, an outage, a loop that is cut, and
the trace of a request. Prints what was proven: who talked to whom, by which identities and ciphers, what a listener on
the wire sees, what the mesh costs, and that intruders get nowhere. Exits with 0 only if all of it held.

Everything runs in namespaces of its own, which the kernel removes when the command ends, however it ends. Root is not
needed where user namespaces are allowed."""

EPILOG = """\
examples:
  isthmus demo           takes about half a minute
  isthmus demo --keep    leaves the pods running and says how to enter them; Ctrl-C ends it"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand `demo`."""
    parser = subparsers.add_parser(
        "demo",
        help="build a small mesh on this machine and show what it does",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--keep", action="store_true", help="keep the pods running until Ctrl-C, and say how to enter them")
    parser.add_argument("--size", type=int, default=256, metavar="MIB", help="size of the large bodies in MiB, each way (default: 256)")
    parser.add_argument(
        "--jaeger", metavar="URL", help="send the spans to this OTLP/HTTP collector too, for instance http://localhost:4318 (Jaeger)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 when everything held, 1 when something did not, 64 when a sandbox cannot be made here."""
    if not 1 <= args.size <= 4096:
        print(f"isthmus demo: --size {args.size}: must be from 1 to 4096", file=sys.stderr)
        return 64
    if args.jaeger is not None and not args.jaeger.startswith(("http://", "https://")):
        print(f"isthmus demo: --jaeger {args.jaeger}: expected an http or https URL", file=sys.stderr)
        return 64
    if not inside():
        if args.jaeger is not None:
            from lab.traces import forward_outside  # noqa: PLC0415  # what it imports is seldom needed here

            forward_outside(args.jaeger)
        command = [sys.executable, "-m", "proxy.cli", "demo", "--size", str(args.size), *(["--keep"] if args.keep else [])]
        try:
            reexecute(command)
        except SandboxError as error:
            print(f"isthmus demo: {error}", file=sys.stderr)
        return 64
    from lab.story import tell  # noqa: PLC0415  # what it imports is not needed outside of the sandbox

    return tell(size=args.size * 1024 * 1024, keep=args.keep)
