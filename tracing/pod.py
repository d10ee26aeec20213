"""The pod's metadata as OpenTelemetry resource attributes.

The names are those of OpenTelemetry's semantic conventions for Kubernetes. Names and addresses come
from environment variables. Labels and annotations, which can have any text, come from files of a
downward-API volume. Each line is `key="value"`, and the value is quoted as a Go string
(strconv.Quote), so it is unescaped here by Go's rules.

Metadata is optional: missing or unreadable data gives a warning for the log, never an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

# environment variable -> attribute
VARIABLES: Mapping[str, str] = {
    "POD_NAME": "k8s.pod.name",
    "POD_NAMESPACE": "k8s.namespace.name",
    "POD_UID": "k8s.pod.uid",
    "POD_IP": "k8s.pod.ip",
    "NODE_NAME": "k8s.node.name",
    "CONTAINER_NAME": "k8s.container.name",
    "SERVICE_ACCOUNT": "k8s.service_account.name",
    "HOSTNAME": "host.name",
}
# file of the volume -> prefix of the attributes
FILES: Mapping[str, str] = {"labels": "k8s.pod.label.", "annotations": "k8s.pod.annotation."}
# Kubernetes allows 256 KiB of annotations. Tools store whole manifests there; spans omit these.
MOST_FILE_BYTES = 512 * 1024
MOST_VALUE = 1024
# Annotations that repeat the pod's manifest, or that only tools need.
SKIPPED = (
    "kubectl.kubernetes.io/last-applied-configuration",
    "kubernetes.io/config.seen",
    "kubernetes.io/config.source",
)

_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{3}|.)", re.DOTALL)
_SIMPLE: Mapping[str, bytes] = {
    "a": b"\a", "b": b"\b", "f": b"\f", "n": b"\n", "r": b"\r", "t": b"\t", "v": b"\v", "\\": b"\\",
    '"': b'"', "'": b"'",
}  # fmt: skip


def pod_attributes(
    environ: Mapping[str, str], directory: Path | None = None
) -> tuple[dict[str, str], str | None]:
    """Return the attributes, and a warning if something could not be read.

    `directory`: the mount point of the downward-API volume.
    """
    found = {
        attribute: environ[name][:MOST_VALUE]
        for name, attribute in VARIABLES.items()
        if environ.get(name)
    }
    troubles = []
    for name, prefix in FILES.items() if directory is not None else ():
        try:
            pairs = parse_downward(_read(Path(directory or ".", name)))
        except (OSError, ValueError) as error:
            words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            troubles.append(f"{name}: {words}")
            continue
        found |= {
            prefix + key: value[:MOST_VALUE] for key, value in pairs.items() if key not in SKIPPED
        }
    warning = (
        f"pod metadata in {directory} is incomplete: {'; '.join(troubles)}" if troubles else None
    )
    return found, warning


def _read(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(MOST_FILE_BYTES + 1)
    if len(content) > MOST_FILE_BYTES:
        raise ValueError(f"larger than {MOST_FILE_BYTES >> 10} KiB")
    return content.decode("utf-8", "replace")


def parse_downward(text: str) -> dict[str, str]:
    """Parse a downward-API file. Raises ValueError with the number of the invalid line."""
    found = {}
    # Split only at "\n": a value may have other line separators.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        key, equals, quoted = line.partition("=")
        if not equals or not key:
            raise ValueError(f'line {number} is not key="value"')
        try:
            found[key] = unquote(quoted.rstrip("\r"))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return found


def unquote(quoted: str) -> str:
    """Unquote a Go string literal in double quotes. Raises ValueError.

    Bytes that are not UTF-8 become the replacement character.
    """
    if len(quoted) < 2 or quoted[0] != '"' or quoted[-1] != '"':
        raise ValueError("the value is not in double quotes")
    parts, position, inner = [], 0, quoted[1:-1]
    for match in _ESCAPE.finditer(inner):
        parts.append(_plain(inner[position : match.start()]))
        parts.append(_escaped(match[1]))
        position = match.end()
    parts.append(_plain(inner[position:]))
    return b"".join(parts).decode("utf-8", "replace")


def _plain(text: str) -> bytes:
    if '"' in text or "\\" in text:
        raise ValueError("a quote or backslash inside the value is not escaped")
    return text.encode("utf-8", "replace")


def _escaped(escape: str) -> bytes:
    if escape[0] == "x" and len(escape) > 1:
        return bytes.fromhex(escape[1:])
    if escape[0] in "uU" and len(escape) > 1:
        code = int(escape[1:], 16)
        return chr(code).encode("utf-8", "replace") if code < 0x110000 else b"\xef\xbf\xbd"
    if len(escape) == 3 and int(escape, 8) < 256:
        return bytes([int(escape, 8)])
    if escape not in _SIMPLE:
        raise ValueError(f"unknown escape \\{escape}")
    return _SIMPLE[escape]
