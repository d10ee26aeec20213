"""SPIFFE IDs: the names of workloads in the mesh.

A SPIFFE ID is a URI, `spiffe://<trust-domain>/<path>`. The trust domain selects the trust roots;
the path identifies the workload. The mesh uses one form of path, the common one of Kubernetes
meshes:

    spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>

The name appears in three forms. It is the one URI SAN of a certificate. It is text in the directory
and in allow-lists. And it is a DNS name in the SNI of a TLS handshake
(`<service-account>.<namespace>.sa.<trust-domain>`). By the SNI the inbound side distinguishes a
handshake for the proxy from one of the application. A name that does not fit all three forms would
fail late and without a clear reason, so it is rejected when it is read.

Parsing is strict, because two spellings of one name would be a hole in an allow-list. These are
refused: percent-encoding, upper case in the trust domain, empty or dot segments, a port, a user, a
query or a fragment (SPIFFE-ID specification, sections 2.1 to 2.4).
"""

import functools
import re
from dataclasses import dataclass
from typing import Self

SCHEME = "spiffe://"

# SPIFFE-ID specification, section 2.3: implementations must support 2048 bytes and may reject more.
MAX_ID_BYTES = 2048
# Section 2.1 limits the trust domain to the maximum length of a URI's host.
MAX_TRUST_DOMAIN_BYTES = 255
# RFC 1035, section 2.3.4: a label has at most 63 bytes, a name at most 253 in text form.
MAX_DNS_LABEL = 63
MAX_DNS_NAME = 253

_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]+", re.ASCII)
_SEGMENT = re.compile(r"[A-Za-z0-9._-]+", re.ASCII)
# Kubernetes names: a namespace is one DNS label, a service account is a DNS subdomain (RFC 1123).
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?", re.ASCII)
# SNI labels also come from the trust domain, which may contain underscores; DNS allows them, host
# names do not.
_SNI_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?", re.ASCII)


class SpiffeIdError(ValueError):
    """A text is not a SPIFFE ID (or pattern) of this mesh. The message quotes it and names the
    wrong part.
    """


@dataclass(frozen=True, slots=True)
class SpiffeId:
    """A workload's name. Hashable and comparable; every instance is valid.

    Raises SpiffeIdError if a part is invalid, or if the parts together do not form a legal DNS name
    for the SNI.
    """

    trust_domain: str
    namespace: str
    service_account: str

    def __post_init__(self) -> None:
        check_trust_domain(self.trust_domain)
        _check_label("namespace", self.namespace)
        if len(self.service_account) > MAX_DNS_NAME:
            raise SpiffeIdError(
                f"service account is longer than {MAX_DNS_NAME} characters:"
                f" {_quote(self.service_account)}"
            )
        for label in self.service_account.split("."):
            _check_label("service account", label, self.service_account)
        _check_sni(self.sni)

    def __str__(self) -> str:
        return f"{SCHEME}{self.trust_domain}/ns/{self.namespace}/sa/{self.service_account}"

    @property
    def sni(self) -> str:
        """The name in DNS form, for the SNI of a handshake with this workload."""
        return f"{self.service_account}.{self.namespace}.sa.{self.trust_domain}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a SPIFFE ID of the form
        spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>.

        Raises SpiffeIdError, which quotes the text and names the wrong part.
        """
        try:
            trust_domain, path = split_uri(text)
            segments = path.split("/")
            if len(segments) != 4 or segments[0] != "ns" or segments[2] != "sa":
                raise SpiffeIdError("the path must be /ns/<namespace>/sa/<service-account>")
            return cls(trust_domain, segments[1], segments[3])
        except SpiffeIdError as error:
            raise SpiffeIdError(
                f"{_quote(text)} is not a SPIFFE ID of this mesh: {error}"
            ) from None


@functools.lru_cache(maxsize=1024)
def is_identity(text: bytes) -> bool:
    """Whether a field's value is a SPIFFE ID of the mesh's form. Cached: a pod has few callers,
    each with many requests.
    """
    try:
        SpiffeId.parse(text.decode("ascii"))
    except (SpiffeIdError, UnicodeDecodeError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class IdentityPattern:
    """An entry of an allow-list: an exact SPIFFE ID, a prefix of one that ends with `/*`, or a bare
    `*`.

    A bare `*` matches every identity. Identities are matched only after `Identity.verify_peer`, so
    this means every identity of the accepted trust domains. A `*` stands for whole path segments,
    so it must follow a `/`: `ns/prod*` would also match `ns/production-evil`, and
    `spiffe://mesh.example*` another trust domain.
    """

    prefix: str
    exact: bool

    def __str__(self) -> str:
        return self.prefix if self.exact else f"{self.prefix}*"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a pattern. Raises SpiffeIdError, which quotes the text and gives the reason."""
        if "*" not in text:
            return cls(str(SpiffeId.parse(text)), exact=True)
        prefix = text[:-1]
        if not text.endswith("*") or "*" in prefix:
            raise SpiffeIdError(
                f"{_quote(text)} is not an identity pattern: one '*' is allowed, as the last"
                " character"
            )
        if prefix:
            try:
                _check_prefix(prefix)
            except SpiffeIdError as error:
                raise SpiffeIdError(f"{_quote(text)} is not an identity pattern: {error}") from None
        return cls(prefix, exact=False)

    def matches(self, identity: SpiffeId) -> bool:
        text = str(identity)
        return text == self.prefix if self.exact else text.startswith(self.prefix)


def check_trust_domain(name: str) -> None:
    """Raise SpiffeIdError if the name is not a legal trust domain."""
    if not name:
        raise SpiffeIdError("the trust domain is empty")
    if "@" in name:
        raise SpiffeIdError(f"the trust domain {_quote(name)} contains user information ('@')")
    if ":" in name:
        raise SpiffeIdError(f"the trust domain {_quote(name)} contains a port (':')")
    if not _TRUST_DOMAIN.fullmatch(name):
        raise SpiffeIdError(
            f"the trust domain {_quote(name)} may contain lower-case letters, digits, '.', '-' and"
            " '_' only"
        )
    if len(name) > MAX_TRUST_DOMAIN_BYTES:
        raise SpiffeIdError(
            f"the trust domain is longer than {MAX_TRUST_DOMAIN_BYTES} bytes ({len(name)})"
        )


def split_uri(text: str) -> tuple[str, str]:
    """Split a SPIFFE URI into trust domain and path, without the leading slash ("" for a bare trust
    domain).

    A bare URI names the trust domain itself; root certificates contain it. Raises SpiffeIdError.
    """
    if not text.startswith(SCHEME):
        raise SpiffeIdError(f"it does not start with {SCHEME!r}")
    if len(text.encode("utf-8", "surrogatepass")) > MAX_ID_BYTES:
        raise SpiffeIdError(f"it is longer than {MAX_ID_BYTES} bytes")
    for mark, part in (("?", "a query"), ("#", "a fragment"), ("%", "percent-encoding")):
        if mark in text:
            raise SpiffeIdError(f"it contains {part} ({mark!r})")
    trust_domain, slash, path = text[len(SCHEME) :].partition("/")
    check_trust_domain(trust_domain)
    if slash:
        _check_path(path.split("/"))
    return trust_domain, path


def _check_path(segments: list[str]) -> None:
    for segment in segments:
        if not segment:
            raise SpiffeIdError("the path has an empty segment (a doubled or trailing '/')")
        if segment in {".", ".."}:
            raise SpiffeIdError(f"the path has a {segment!r} segment")
        if not _SEGMENT.fullmatch(segment):
            raise SpiffeIdError(
                f"the path segment {_quote(segment)} may contain letters, digits, '.', '-' and '_'"
                " only"
            )


def _check_prefix(prefix: str) -> None:
    """Reject a prefix that no identity can have: an entry that never matches is a mistake that goes
    unnoticed.
    """
    if not prefix.startswith(SCHEME):
        raise SpiffeIdError(f"it does not start with {SCHEME!r}")
    trust_domain, slash, path = prefix[len(SCHEME) :].partition("/")
    check_trust_domain(trust_domain)
    if not slash:
        raise SpiffeIdError(
            f"the '*' may not be inside the trust domain: write {SCHEME}{trust_domain}/*"
        )
    if not path.endswith("/") and path:
        raise SpiffeIdError(_instead(prefix, path.split("/")))
    given = path.split("/")
    for position, (wanted, segment) in enumerate(
        zip(("ns", None, "sa", None), given, strict=False)
    ):
        complete = position < len(given) - 1
        if wanted is not None:
            fits = segment == wanted if complete else wanted.startswith(segment)
        else:
            fits = (
                bool(_LABEL.fullmatch(segment))
                if complete
                else re.fullmatch(r"([a-z0-9][a-z0-9.-]*)?", segment) is not None
            )
        if not fits:
            raise SpiffeIdError(
                f"no identity starts like this: {_quote(segment)} does not fit"
                " /ns/<namespace>/sa/<service-account>"
            )
    if len(given) > 4:
        raise SpiffeIdError("no identity has so many path segments")


def _instead(prefix: str, given: list[str]) -> str:
    """The suggested replacement for a prefix that ends inside a path segment."""
    why = "the '*' may only follow a '/', otherwise it would match every name with this beginning"
    if len(given) == 2:
        return f"{why}: write {prefix}/* for the namespace {given[1]}"
    if len(given) == 4:
        return (
            f"{why}: write {prefix} for the one service account, or"
            f" {prefix.removesuffix(given[3])}* for all of the namespace"
        )
    return f"{why}: write {prefix.removesuffix(given[-1])}*"


def _check_label(part: str, label: str, whole: str | None = None) -> None:
    where = part if whole is None or whole == label else f"{part} {_quote(whole)}, label"
    if len(label) > MAX_DNS_LABEL:
        raise SpiffeIdError(
            f"the {where} is longer than {MAX_DNS_LABEL} characters: {_quote(label)}"
        )
    if not _LABEL.fullmatch(label):
        raise SpiffeIdError(
            f"the {where} {_quote(label)} is not a Kubernetes name (lower-case letters, digits and"
            " '-', a letter or digit at both ends)"
        )


def _check_sni(name: str) -> None:
    if len(name) > MAX_DNS_NAME:
        raise SpiffeIdError(
            f"its DNS form for the SNI is longer than {MAX_DNS_NAME} characters: {_quote(name)}"
        )
    for label in name.split("."):
        if len(label) > MAX_DNS_LABEL or not _SNI_LABEL.fullmatch(label):
            raise SpiffeIdError(
                f"its DNS form for the SNI has the label {_quote(label)}, which is not legal:"
                f" {_quote(name)}"
            )


def _quote(text: str) -> str:
    """The text for a message: printable, and limited to one line."""
    return repr(text if len(text) <= 120 else text[:117] + "...")
