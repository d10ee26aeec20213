"""`isthmus identity root|issue|show`: creates trust roots and workload certificates, and describes
certificates.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509

from proxy import files
from proxy.commands.terminal import verdict
from proxy.identity import credential_files, credentials
from proxy.identity import issue as certificates
from proxy.identity.credential_files import MaterialError
from proxy.identity.credentials import utc_now
from proxy.identity.identity import WARN_AT
from proxy.identity.inspect import describe, expiry_in_words, life_left, write_everything
from proxy.identity.issue import Issued, IssueError
from proxy.identity.spiffe import SpiffeId, SpiffeIdError

EXIT_FAILED = 1
EXIT_USAGE = 64

ROOT_CERTIFICATE = "root.pem"
ROOT_KEY = "root.key"
# The file names in a directory that `issue` wrote; the documentation and the lab use them too.
CERTIFICATE = "certificate.pem"
KEY = "key.pem"
ROOTS = "roots.pem"

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

_ROOT_HELP = f"""\
Create a new trust root: the key pair that signs the certificates of the mesh's members.

Writes into the directory:
  {ROOT_CERTIFICATE}   the root certificate: give it to every proxy
  {ROOT_KEY}   its private key (mode 0600): only `isthmus identity issue` needs it. Keep it off
             the machines of the mesh

example:
  isthmus identity root --trust-domain mesh.example --out ./trust
"""

_ISSUE_HELP = f"""\
Create a key and a certificate for one workload, signed by a trust root.

Writes into the directory:
  {CERTIFICATE}   the workload's certificate
  {KEY}           its private key (mode 0600)
  {ROOTS}         the trust root; to replace a root, append the new one with `cat`

A running proxy loads the new files by itself, so repeating the command renews a certificate.

examples:
  isthmus identity issue --root ./trust --namespace shop --service-account checkout --out ./checkout
  isthmus identity issue --root ./trust --id spiffe://mesh.example/ns/shop/sa/checkout \\
      --lifetime 12h --out ./checkout
"""

_SHOW_HELP = """\
Describe every certificate in PEM files. Private keys in the same file are ignored and never shown.

The exit code is 1 if a certificate is malformed, expired or not yet valid; with --roots also if a
workload's certificate is not signed by one of these trust roots.

examples:
  isthmus identity show ./checkout/certificate.pem --roots ./checkout/roots.pem
  isthmus identity show ./trust/root.pem
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand `identity`."""
    parser = subparsers.add_parser(
        "identity",
        help="create trust roots and certificates, describe a certificate",
        description=(
            "Certificates of the mesh: create a trust root, issue certificates for workloads,"
            " describe any certificate."
        ),
    )
    parser.set_defaults(run=lambda _args: _usage(parser))
    actions = parser.add_subparsers(title="actions", metavar="ACTION")
    _add_root(actions)
    _add_issue(actions)
    _add_show(actions)


def _add_root(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    root = _action(actions, "root", "create a trust root", _ROOT_HELP)
    root.add_argument(
        "--trust-domain",
        required=True,
        metavar="DOMAIN",
        help="the name of the mesh, such as mesh.example",
    )
    root.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="output directory (created with mode 0700 if missing)",
    )
    root.add_argument(
        "--lifetime",
        type=_lifetime,
        default=certificates.ROOT_LIFETIME,
        metavar="TIME",
        help=(
            "such as 365d or 48h (default 3650d: an expired root stops the whole mesh, so plan its"
            " replacement)"
        ),
    )
    root.add_argument(
        "--no-name-constraints",
        action="store_true",
        help="allow the root to sign names of any trust domain",
    )
    root.add_argument(
        "--force",
        action="store_true",
        help="replace an existing root: all certificates that it signed become invalid",
    )
    root.set_defaults(run=_guarded(_run_root))


def _add_issue(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    issue = _action(actions, "issue", "issue a workload's certificate", _ISSUE_HELP)
    issue.add_argument(
        "--root",
        required=True,
        type=Path,
        metavar="DIR",
        help="the directory written by `isthmus identity root`",
    )
    issue.add_argument(
        "--id",
        metavar="SPIFFE-ID",
        help="spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>",
    )
    issue.add_argument(
        "--namespace", metavar="NAME", help="instead of --id, together with --service-account"
    )
    issue.add_argument(
        "--service-account", metavar="NAME", help="instead of --id, together with --namespace"
    )
    issue.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="output directory (created with mode 0700 if missing)",
    )
    issue.add_argument(
        "--lifetime",
        type=_lifetime,
        default=certificates.WORKLOAD_LIFETIME,
        metavar="TIME",
        help="such as 24h, 90m or 2d (default 24h)",
    )
    issue.set_defaults(run=_guarded(_run_issue))


def _add_show(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    show = _action(actions, "show", "describe certificates", _SHOW_HELP)
    show.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="PEM files: a certificate, a chain, a bundle of roots",
    )
    show.add_argument(
        "--roots",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="trust roots to verify against; may be repeated",
    )
    show.set_defaults(run=_guarded(_run_show))


def _action(
    actions: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    summary: str,
    text: str,
) -> argparse.ArgumentParser:
    return actions.add_parser(
        name, help=summary, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def _usage(parser: argparse.ArgumentParser) -> int:
    parser.print_help(sys.stderr)
    return EXIT_USAGE


def _guarded(action: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Reports errors of the input as one line."""

    def run(args: argparse.Namespace) -> int:
        write_everything()
        try:
            return action(args)
        except OSError as error:
            message = (
                f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
            )
        except (MaterialError, SpiffeIdError, IssueError) as error:
            message = str(error)
        print(f"isthmus identity: {message}", file=sys.stderr)
        return EXIT_USAGE

    return run


def _lifetime(text: str) -> timedelta:
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a duration: write a number and one of s, m, h, d, such as 24h"
        )
    return timedelta(seconds=int(match[1]) * _UNITS[match[2]])


def _run_root(args: argparse.Namespace) -> int:
    out: Path = args.out
    taken = [path for path in (out / ROOT_CERTIFICATE, out / ROOT_KEY) if path.exists()]
    if taken and not args.force:
        raise IssueError(
            f"{taken[0]} exists: a new root would invalidate all certificates that the old one"
            " signed (use --force to replace it)"
        )
    root = certificates.make_root(
        args.trust_domain, args.lifetime, name_constraints=not args.no_name_constraints
    )
    _write_pair(out, (ROOT_CERTIFICATE, ROOT_KEY), root)
    print(
        f"{out / ROOT_CERTIFICATE}: the trust root of {args.trust_domain}; it"
        f" {expiry_in_words(root.certificate, utc_now())}"
    )
    print(
        f"{out / ROOT_KEY}: its private key. Its holder can create any identity in the mesh: keep"
        " it elsewhere."
    )
    return 0


def _run_issue(args: argparse.Namespace) -> int:
    root = load_root(args.root)
    issued = certificates.issue(root, _wanted_identity(args, root), args.lifetime)
    out: Path = args.out
    _write_pair(out, (CERTIFICATE, KEY), issued)
    files.write_public(out / ROOTS, root.certificate_pem)
    print(
        f"{out}: {credentials.spiffe_uri(issued.certificate)}; the certificate"
        f" {expiry_in_words(issued.certificate, utc_now())}"
    )
    if issued.note:
        print(issued.note)
    return 0


def load_root(directory: Path) -> Issued:
    """The root that `isthmus identity root` wrote into the directory. Raises MaterialError."""
    certificate_path, key_path = directory / ROOT_CERTIFICATE, directory / ROOT_KEY
    certificate = credentials.parse_certificates(
        certificate_path, credential_files.read_file(certificate_path)
    )[0]
    key = credentials.parse_key(key_path, credential_files.read_file(key_path))
    if key.public_key() != credentials.public_key(certificate_path, certificate):
        raise MaterialError(key_path, f"does not belong to the certificate in {certificate_path}")
    return Issued(certificate, key)


def _wanted_identity(args: argparse.Namespace, root: Issued) -> SpiffeId:
    if args.id is not None:
        if args.namespace is not None or args.service_account is not None:
            raise IssueError(
                "--id already contains namespace and service account: give either --id or these two"
            )
        return SpiffeId.parse(args.id)
    if args.namespace is None or args.service_account is None:
        raise IssueError("no identity given: use --id, or --namespace and --service-account")
    domain = certificates.root_trust_domain(root.certificate)
    if domain is None:
        raise IssueError("the root does not name its trust domain: give the full name with --id")
    return SpiffeId(domain, args.namespace, args.service_account)


def _write_pair(out: Path, names: tuple[str, str], made: Issued) -> None:
    """Write the key first: a proxy that reads between the two writes rejects the pair, keeps the
    old one, and reads again.
    """
    files.make_private_directory(out)
    files.write_private(out / names[1], made.key_pem)
    files.write_public(out / names[0], made.certificate_pem)


def _run_show(args: argparse.Namespace) -> int:
    now = utc_now()
    roots = [
        root
        for path in args.roots
        for root in credentials.parse_certificates(path, credential_files.read_file(path))
    ]
    good = True
    for path in args.files:
        data = credential_files.read_file(path)
        try:
            chain = credentials.parse_certificates(path, data)
        except MaterialError as error:
            print(f"{path}\n  {verdict('FAILED', 12)} {error.reason}\n")
            good = False
            continue
        for number, certificate in enumerate(chain, start=1):
            title = (
                str(path) if len(chain) == 1 else f"{path}, certificate {number} of {len(chain)}"
            )
            print(title)
            for label, words in describe(certificate, now):
                print(f"  {label:<12} {words}")
            good &= _verdict(certificate, chain[1:], roots, now)
            print()
    return 0 if good else EXIT_FAILED


def _verdict(
    certificate: x509.Certificate,
    chain: Sequence[x509.Certificate],
    roots: Sequence[x509.Certificate],
    now: datetime,
) -> bool:
    problem = credentials.validity_problem(certificate, now)
    if problem is not None:
        print(f"  {verdict('FAILED', 12)} the certificate {problem}")
        return False
    if roots:
        try:
            credentials.verify_chain(certificate, chain, roots, now)
        except ValueError as error:
            print(f"  {verdict('FAILED', 12)} not signed by these trust roots: {error}")
            return False
        print(f"  {'verified':<12} by these trust roots")
    if life_left(certificate, now) <= WARN_AT[0]:
        print(f"  {verdict('WARNING', 12)} it {expiry_in_words(certificate, now)}: renew it")
    return True
