"""`isthmus intercept`: installs, shows or removes the rules that redirect the pod's traffic to the
proxy.

The init container runs it. It changes the network namespace it runs in, and nothing else.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from proxy.config import load as config
from proxy.config.resolv_conf import Resolvers
from proxy.config.schema_clusters import DnsConfig
from proxy.intercept import nftables
from proxy.intercept.nftables import Captured, InterceptError, InterceptSettings, SettingsInvalid
from proxy.net.address import Address
from proxy.settings.document import DocumentError
from proxy.settings.sources import PREFIX

DESCRIPTION = """\
Redirects the TCP traffic of this network namespace (a pod) to the proxy, with one nftables table
`inet isthmus`: connections of the pod's programs go to the outbound port (4140), and connections
from outside go to the inbound port (4143).
Not redirected: the proxy's own connections (by user id or packet mark), the loopback interface,
UDP, the admin port (4191), connections that are already open, link-local IPv6 destinations, and the
skipped ports and subnets.
If the configuration has a section `dns`, queries to the pod's resolvers (/etc/resolv.conf) also go
to the proxy, over UDP and TCP, even if their ports or subnets are skipped.
A new TCP connection that evades the redirection, in either direction, is rejected.

Running it again replaces the rules in one step. It needs the capability NET_ADMIN and the program
nft."""

EPILOG = """\
examples:
  isthmus intercept --dry-run               show the rules, change nothing (any user may)
  isthmus intercept --skip-outbound-ports 5432,6000-6010
  isthmus intercept --skip-outbound-subnets 10.0.0.0/8,fd00::/8
  isthmus intercept --no-uid --mark 0x2102  where the proxy cannot have a user id of its own
  isthmus intercept --remove                remove the rules; succeeds also if there are none"""

# flag, field of InterceptSettings, help text
_LISTS = (
    (
        "--skip-inbound-ports",
        "skip_inbound_ports",
        "connections to these ports go directly to the application",
    ),
    (
        "--skip-outbound-ports",
        "skip_outbound_ports",
        "connections to these ports go directly to their destination",
    ),
    (
        "--skip-inbound-subnets",
        "skip_inbound_subnets",
        "connections from these subnets go directly to the application",
    ),
    (
        "--skip-outbound-subnets",
        "skip_outbound_subnets",
        "connections to these subnets go directly to their destination",
    ),
    (
        "--redirect-inbound-ports",
        "redirect_inbound_ports",
        "redirect only connections to these ports (default: all)",
    ),
    (
        "--redirect-outbound-ports",
        "redirect_outbound_ports",
        "redirect only connections to these ports (default: all)",
    ),
)
_PORTS = (
    ("--outbound-port", "the proxy's outbound port"),
    ("--inbound-port", "its inbound port"),
    ("--admin-port", "its admin port, never redirected"),
)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand `intercept`."""
    parser = subparsers.add_parser(
        "intercept",
        help="install, show or remove the rules that redirect the pod's traffic to the proxy",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="print the rules and change nothing")
    mode.add_argument("--remove", action="store_true", help="remove the rules")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="the proxy's configuration file; flags override it",
    )
    settings = parser.add_argument_group(
        "settings", "separate list items by commas; a flag replaces the configured value"
    )
    for flag, meaning in _PORTS:
        settings.add_argument(flag, type=int, metavar="PORT", help=meaning)
    exempt = settings.add_mutually_exclusive_group()
    exempt.add_argument("--uid", type=int, metavar="UID", help="the proxy's user id (2102)")
    exempt.add_argument(
        "--no-uid", action="store_true", help="no exemption by user id (then --mark is required)"
    )
    settings.add_argument(
        "--no-dns", action="store_true", help="do not redirect DNS, even if it is configured"
    )
    settings.add_argument(
        "--mark",
        type=_number,
        metavar="MARK",
        help="the mark of the proxy's own packets, e.g. 0x2102",
    )
    for flag, field, meaning in _LISTS:
        settings.add_argument(flag, dest=field, type=_list, metavar="LIST", help=meaning)


def run(args: argparse.Namespace) -> int:
    """0 on success, 1 if the kernel rejected the rules, 64 if the settings are invalid."""
    try:
        if args.remove:
            nftables.remove()
            return 0
        settings = _override(_from_config(args.config), args)
        text = nftables.render(settings)
        if args.dry_run:
            sys.stdout.write(text)
            return 0
        nftables.apply(settings)
    except (SettingsInvalid, DocumentError) as error:
        print(f"isthmus intercept: {error}", file=sys.stderr)
        return 64
    except InterceptError as error:
        print(f"isthmus intercept: {error}", file=sys.stderr)
        return 1
    return 0


def _from_config(path: Path | None) -> InterceptSettings:
    """The settings before any flags: from the proxy's configuration, so that both agree on ports,
    uid and mark.

    Raises ConfigError, or SettingsInvalid if the listeners of one direction are on several ports.
    """
    if path is None and not any(name.startswith(PREFIX) for name in os.environ):
        return InterceptSettings()
    loaded = config.load(path, os.environ)
    mistakes: list[str] = []
    dns, resolvers = loaded.dns, Resolvers.of(loaded.dns) if loaded.dns is not None else None
    admin, *more_admin = sorted(loaded.admin_ports) or [InterceptSettings().admin_port]
    settings = InterceptSettings(
        outbound_port=_one_port("outbound", loaded.outbound.listen, mistakes),
        inbound_port=_one_port("inbound", loaded.inbound.listen, mistakes),
        admin_port=admin,
        dns_port=_one_port("dns", dns.listen, mistakes) if dns is not None else None,
        resolvers=_captured(dns, resolvers) if dns is not None and resolvers is not None else (),
        uid=loaded.intercept.uid,
        mark=loaded.mark,
        skip_inbound_ports=(*loaded.intercept.skip_inbound_ports, *more_admin),
        skip_outbound_ports=loaded.intercept.skip_outbound_ports,
        skip_inbound_subnets=tuple(map(str, loaded.intercept.skip_inbound_subnets)),
        skip_outbound_subnets=tuple(map(str, loaded.intercept.skip_outbound_subnets)),
    )
    if mistakes:
        raise SettingsInvalid(mistakes)
    return settings


def _captured(dns: DnsConfig, resolvers: Resolvers) -> tuple[Captured, ...]:
    return tuple(
        Captured(upstream.host, upstream.port, ours.port)
        for ours, upstream in resolvers.listen_addresses(dns)
    )


def _one_port(direction: str, addresses: Sequence[Address], mistakes: list[str]) -> int | None:
    """The port that connections are redirected to, for IPv4 and IPv6. None if the direction is
    off."""
    ports = sorted({address.port for address in addresses})
    if len(ports) > 1:
        mistakes.append(
            f"{direction}.listen: the addresses are on several ports"
            f" ({', '.join(map(str, ports))}), but a redirection has one"
        )
    return ports[0] if ports else None


def _override(settings: InterceptSettings, args: argparse.Namespace) -> InterceptSettings:
    """The settings, overridden by the given flags."""
    names = (
        "outbound_port",
        "inbound_port",
        "admin_port",
        "uid",
        "mark",
        *(field for _, field, _ in _LISTS),
    )
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.no_uid:
        changes["uid"] = None
    if args.no_dns:
        changes["dns_port"] = None
    return dataclasses.replace(settings, **changes)


def _list(text: str) -> tuple[str, ...]:
    return tuple(item for item in (part.strip() for part in text.split(",")) if item)


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
