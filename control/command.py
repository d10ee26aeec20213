"""`isthmus control`: runs the control plane."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from pathlib import Path

import trio

from control.app import Control, ControlConfig
from control.contract import SpiffeIdError
from control.kube.access import Access, in_cluster, kubeconfig_file
from control.kube.client import Client
from control.kube.errors import AccessError

# EX_USAGE of sysexits.h: the command line or a file that it names is not usable.
USAGE = 64


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand `control`."""
    parser = subparsers.add_parser(
        "control",
        help="run the control plane of a Kubernetes cluster",
        description=(
            "Watch the Services, EndpointSlices, pods and nodes of a cluster. In a pod its service"
            " account says where the API server is; elsewhere a kubeconfig does. Of several"
            " replicas one leads. SIGTERM ends it."
        ),
        epilog="docs/control-plane.md describes what it does, and its limits.",
    )
    environment = os.environ
    parser.add_argument(
        "--kubeconfig",
        type=Path,
        metavar="FILE",
        help="a kubeconfig (default: the service account of this pod)",
    )
    parser.add_argument(
        "--context",
        default="",
        metavar="NAME",
        help="a context of the kubeconfig (default: its current one)",
    )
    parser.add_argument(
        "--trust-domain",
        default="cluster.local",
        metavar="NAME",
        help="of identities (default: cluster.local)",
    )
    namespace, name = (
        environment.get("POD_NAMESPACE", "isthmus"),
        environment.get("POD_NAME", socket.gethostname()),
    )
    parser.add_argument(
        "--namespace",
        default=namespace,
        metavar="NAME",
        help="of the lease (default: $POD_NAMESPACE, or isthmus)",
    )
    parser.add_argument(
        "--name",
        default=name,
        metavar="NAME",
        help="of this replica (default: $POD_NAME, or the host's)",
    )
    parser.add_argument(
        "--admin",
        default="[::]:4191",
        metavar="ADDRESS",
        help='/live, /ready and /metrics (default: [::]:4191; "": none)',
    )
    parser.add_argument(
        "--log-level",
        default="info",
        choices=["debug", "info", "warning", "error"],
        help="(default: info)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command. Returns 0 after SIGTERM or SIGINT, 64 if the settings are not usable."""
    logging.basicConfig(
        level=args.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        access = (
            kubeconfig_file(args.kubeconfig, args.context)
            if args.kubeconfig is not None
            else in_cluster(os.environ)
        )
        config = ControlConfig(args.trust_domain, args.namespace, args.name, _address(args.admin))
        trio.run(_main, config, access)
    except (AccessError, SpiffeIdError, ValueError, OSError) as error:
        print(f"isthmus: {error}", file=sys.stderr)
        return USAGE
    return 0


async def _main(config: ControlConfig, access: Access) -> None:
    control = Control(config, Client(access))
    listeners = []
    if config.admin is not None:
        host, port = config.admin
        # host None: all addresses of both families.
        listeners = await trio.open_tcp_listeners(port, host=host if host != "::" else None)
    await control.run(listeners)


def _address(text: str) -> tuple[str, int] | None:
    """Parse an address such as `[::]:4191` or `127.0.0.1:0`. "" gives None. Raises ValueError."""
    if not text:
        return None
    host, colon, port = text.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError(f"{text!r} is not an address such as [::]:4191")
    return host.removeprefix("[").removesuffix("]"), int(port)
