"""`isthmus intercept`: install, show or remove the rules that bring the pod's traffic to the proxy.

It is what the init container runs.  It changes the network namespace it is started in, and nothing else.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from proxy.config import load as config
from proxy.config.document import DocumentError
from proxy.config.resolv_conf import Resolvers
from proxy.config.schema import DnsConfig
from proxy.intercept import nftables
from proxy.intercept.nftables import Captured, InterceptError, InterceptSettings, SettingsInvalid
from proxy.net.address import Address

DESCRIPTION = """\
Redirects the TCP traffic of this network namespace (a pod) to the proxy, by one nftables table `inet isthmus`:
what the pod's programs send goes to the outbound port (4140), what arrives from outside to the inbound port (4143).
Untouched: the proxy's own connections (known by user id or packet mark), the loopback interface, UDP, the admin port
(4191), connections that are already open, link-local IPv6 destinations, and the ports and subnets you skip.
If the configuration has a section `dns`, questions to the pod's resolvers (/etc/resolv.conf) go to the proxy as well,
over UDP and TCP, whatever you skip.
A new TCP connection that gets around the redirection by a trick, in either direction, is refused.

Running it again replaces the rules in one step. It needs the capability NET_ADMIN and the program nft."""

EPILOG = """\
examples:
  isthmus intercept --dry-run                          show the rules, change nothing (any user may)
  isthmus intercept --skip-outbound-ports 5432,6000-6010
  isthmus intercept --skip-outbound-subnets 10.0.0.0/8,fd00::/8
  isthmus intercept --no-uid --mark 0x2102             where the proxy cannot have a user id of its own
  isthmus intercept --remove                           take the rules away; good too when there are none"""

# flag, field of InterceptSettings, what it says in the help
_LISTS = (
    ("--skip-inbound-ports", "skip_inbound_ports", "arriving at these ports goes straight to the application"),
    ("--skip-outbound-ports", "skip_outbound_ports", "sent to these ports goes straight to its destination"),
    ("--skip-inbound-subnets", "skip_inbound_subnets", "arriving from these subnets goes straight to the application"),
    ("--skip-outbound-subnets", "skip_outbound_subnets", "sent to these subnets goes straight to its destination"),
    ("--redirect-inbound-ports", "redirect_inbound_ports", "only what arrives at these ports is redirected (default: all)"),
    ("--redirect-outbound-ports", "redirect_outbound_ports", "only what is sent to these ports is redirected (default: all)"),
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
        help="install (or show, or remove) the rules that bring the pod's traffic to the proxy",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="print the rules and change nothing")
    mode.add_argument("--remove", action="store_true", help="remove the rules")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the proxy's configuration file; flags override what it says")
    settings = parser.add_argument_group("settings", "lists are separated by commas; a flag replaces what the configuration says")
    for flag, meaning in _PORTS:
        settings.add_argument(flag, type=int, metavar="PORT", help=meaning)
    exempt = settings.add_mutually_exclusive_group()
    exempt.add_argument("--uid", type=int, metavar="UID", help="the user id the proxy runs as (2102)")
    exempt.add_argument("--no-uid", action="store_true", help="no exemption by user id (then --mark is needed)")
    settings.add_argument("--no-dns", action="store_true", help="leave DNS alone, whatever the configuration says")
    settings.add_argument("--mark", type=_number, metavar="MARK", help="the mark on the proxy's own packets, e.g. 0x2102")
    for flag, field, meaning in _LISTS:
        settings.add_argument(flag, dest=field, type=_list, metavar="LIST", help=meaning)


def run(args: argparse.Namespace) -> int:
    """0 when done, 1 when the kernel did not take it, 64 when the settings are wrong."""
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
    """The settings before any flag: those of the proxy's configuration, so that both agree on ports, uid and mark.

    Raises ConfigError, or SettingsInvalid when the listeners of one direction are on several ports.
    """
    if path is None and not any(name.startswith(config.PREFIX) for name in os.environ):
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
    return tuple(Captured(upstream.host, upstream.port, ours.port) for ours, upstream in resolvers.ways_in(dns))


def _one_port(direction: str, addresses: Sequence[Address], mistakes: list[str]) -> int | None:
    """The port that connections are redirected to: one for IPv4 and IPv6.  None when the direction is off."""
    ports = sorted({address.port for address in addresses})
    if len(ports) > 1:
        mistakes.append(f"{direction}.listen: the addresses are on several ports ({', '.join(map(str, ports))}), but a redirection has one")
    return ports[0] if ports else None


def _override(settings: InterceptSettings, args: argparse.Namespace) -> InterceptSettings:
    """The settings with the flags that were given."""
    names = ("outbound_port", "inbound_port", "admin_port", "uid", "mark", *(field for _, field, _ in _LISTS))
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
