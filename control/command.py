"""`isthmus control`: runs the control plane."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import resource
import socket
import sys
from contextlib import suppress
from pathlib import Path

import trio

from control.app import ChannelConfig, Control, ControlConfig, IssuingConfig
from control.config import load
from control.contract import SpiffeIdError
from control.kube.access import Access, in_cluster, kubeconfig_file
from control.kube.api_errors import AccessError
from control.kube.client import Client
from proxy.identity.identity import MaterialError, MaterialFiles
from proxy.net.accept import BindFailed, bind
from proxy.net.address import Address
from proxy.settings.sources import ConfigError

# EX_USAGE of sysexits.h: the command line or a file that it names is not usable.
USAGE = 64


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand `control`."""
    parser = subparsers.add_parser(
        "control",
        help="run the control plane of a Kubernetes cluster",
        description=(
            "Run a replica of the control plane. It watches the Services, EndpointSlices, pods and"
            " nodes of a cluster, and makes the directory of the proxies. In a pod, it uses the"
            " pod's service account to access the API server; elsewhere it needs a kubeconfig. One"
            " of the replicas is the leader. SIGTERM ends the process."
        ),
        epilog=(
            "docs/control-plane.md describes every setting; ISTHMUS_<SECTION>__<FIELD>=value in the"
            " environment overrides the file."
        ),
    )
    environment = os.environ
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="a file with settings, in YAML (default: $ISTHMUS_CONFIG, or no file)",
    )
    _add_access(parser)
    parser.add_argument(
        "--trust-domain",
        default="cluster.local",
        metavar="NAME",
        help="the trust domain of all identities (default: cluster.local)",
    )
    namespace, name = (
        environment.get("POD_NAMESPACE", "isthmus"),
        environment.get("POD_NAME", socket.gethostname()),
    )
    parser.add_argument(
        "--namespace",
        default=namespace,
        metavar="NAME",
        help="the namespace of the Lease (default: $POD_NAMESPACE, or isthmus)",
    )
    parser.add_argument(
        "--name",
        default=name,
        metavar="NAME",
        help="the unique name of this replica (default: $POD_NAME, or the host name)",
    )
    parser.add_argument(
        "--admin",
        default="[::]:4191",
        metavar="ADDRESS",
        help='address of /live, /ready and /metrics (default: [::]:4191; "": no listener)',
    )
    _add_channel(parser)
    _add_issuing(parser)
    parser.add_argument(
        "--log-level",
        default="info",
        choices=["debug", "info", "warning", "error"],
        help="the least severe messages to log (default: info)",
    )
    parser.set_defaults(run=run)


def _add_channel(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "directory for proxies",
        "Proxies connect with mutual TLS. Without --certificate or --issuer there is no listener"
        " for them.",
    )
    group.add_argument(
        "--listen",
        default="[::]:4190",
        metavar="ADDRESS",
        help="address for proxies (default: [::]:4190)",
    )
    for name, text in (
        ("certificate", "PEM file with the certificate of this control plane"),
        ("key", "PEM file with its key"),
    ):
        group.add_argument(f"--{name}", type=Path, metavar="FILE", help=text)
    group.add_argument(
        "--roots",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="PEM files with the trust roots",
    )
    group.add_argument(
        "--cluster-networks",
        nargs="+",
        default=[],
        metavar="CIDR",
        help="networks of pods and services, which proxies receive (default: none)",
    )
    group.add_argument(
        "--cluster-domain",
        default="cluster.local",
        metavar="NAME",
        help="DNS domain of the cluster (default: cluster.local)",
    )


def _add_issuing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "certificates for proxies",
        "Proxies get a certificate for the token of their service account. The control plane makes"
        " its own certificate too, if --certificate does not name one.",
    )
    group.add_argument(
        "--issuer",
        type=Path,
        metavar="DIRECTORY",
        help="a mounted Secret with the issuer's certificate and key: tls.crt and tls.key"
        " (default: no certificates are issued)",
    )
    group.add_argument(
        "--issuing-listen",
        default="[::]:4192",
        metavar="ADDRESS",
        help="address for requests for certificates (default: [::]:4192)",
    )
    group.add_argument(
        "--service-account",
        default=os.environ.get("SERVICE_ACCOUNT", "isthmus-control"),
        metavar="NAME",
        help="the service account of this control plane, for its own certificate (default:"
        " $SERVICE_ACCOUNT, or isthmus-control)",
    )


def _add_access(parser: argparse.ArgumentParser) -> None:
    """The options that say where the API server is."""
    parser.add_argument(
        "--kubeconfig",
        type=Path,
        metavar="FILE",
        help="the kubeconfig (default: none; use the service account of the pod)",
    )
    parser.add_argument(
        "--context",
        default="",
        metavar="NAME",
        help="the context in the kubeconfig (default: its current context)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command. Returns 0 after SIGTERM or SIGINT, 64 if the settings are not usable."""
    logging.basicConfig(
        level=args.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        settings = load(args.config, os.environ)
        interval = settings.api.credentials_interval
        access = (
            kubeconfig_file(args.kubeconfig, args.context, interval)
            if args.kubeconfig is not None
            else in_cluster(os.environ, interval=interval)
        )
        config = ControlConfig(
            args.trust_domain,
            args.namespace,
            args.name,
            _address(args.admin),
            _channel(args) if args.certificate is not None or args.issuer is not None else None,
            _issuing(args) if args.issuer is not None else None,
            settings,
        )
        trio.run(_main, config, access)
    except (
        ConfigError,
        AccessError,
        SpiffeIdError,
        MaterialError,
        BindFailed,
        ValueError,
        OSError,
    ) as error:
        print(f"isthmus: {error}", file=sys.stderr)
        return USAGE
    return 0


def raise_descriptor_limit() -> None:
    """Raise the soft limit of descriptors to the hard one. It is often 1024, and each proxy needs
    one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _main(config: ControlConfig, access: Access) -> None:
    raise_descriptor_limit()
    control = Control(config, Client(access, config.settings.api))
    proxies = _bind(config.channel.listen) if config.channel is not None else []
    issuing = _bind(config.issuing.listen) if config.issuing is not None else []
    listeners = []
    if config.admin is not None:
        host, port = config.admin
        # host None: all addresses of both families.
        listeners = await trio.open_tcp_listeners(port, host=host if host != "::" else None)
    await control.run(listeners, proxies, issuing)


def _channel(args: argparse.Namespace) -> ChannelConfig:
    """Raises ValueError."""
    listen = _address(args.listen)
    files = None
    if args.certificate is not None:
        if args.key is None:
            raise ValueError("--certificate needs --key")
        files = MaterialFiles(args.certificate, args.key, tuple(args.roots))
    if listen is None or not args.roots:
        raise ValueError("--certificate and --issuer need --roots and --listen")
    networks = tuple(str(ipaddress.ip_network(network)) for network in args.cluster_networks)
    return ChannelConfig(
        files,
        listen,
        networks,
        args.cluster_domain,
    )


def _issuing(args: argparse.Namespace) -> IssuingConfig:
    """Raises ValueError."""
    listen = _address(args.issuing_listen)
    if listen is None:
        raise ValueError("--issuer needs --issuing-listen")
    return IssuingConfig(args.issuer, tuple(args.roots), args.service_account, listen)


def _bind(listen: tuple[str, int]) -> list[socket.socket]:
    """Listeners for proxies. "::" means both families. Raises BindFailed."""
    host, port = listen
    bound = [bind(Address(host, port))]
    if host == "::":
        bound.append(bind(Address("0.0.0.0", bound[0].getsockname()[1])))
    return bound


def _address(text: str) -> tuple[str, int] | None:
    """Parse an address such as `[::]:4191` or `127.0.0.1:0`. "" gives None. Raises ValueError."""
    if not text:
        return None
    host, colon, port = text.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError(f"{text!r} is not an address such as [::]:4191")
    return host.removeprefix("[").removesuffix("]"), int(port)
