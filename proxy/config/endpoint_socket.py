"""The address of a SPIFFE Workload API: a setting, or the variable that the specification defines.

The specification also allows TCP. The proxy does not: the key would be sent in clear text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from proxy.settings.document import Plain
from proxy.settings.sources import variable

VARIABLE = "SPIFFE_ENDPOINT_SOCKET"
# Also without authority: unix:/path. Percent-encoding has no meaning in these addresses.
_ADDRESS = re.compile(r"unix:(?://)?(/(?!/)[^?#%\0]+)")
# sockaddr_un has 108 bytes with the final zero.
MAX_PATH_BYTES = 107


def use_variable(values: dict[str, Plain], environ: Mapping[str, str]) -> None:
    """Take the address from the variable if `identity.source` needs one and has none."""
    identity, address = values.get("identity"), environ.get(VARIABLE, "")
    if not address or not isinstance(identity, dict | None):
        return
    identity = identity or {}
    given = identity.get("spiffe")
    source = environ.get(variable("identity", "source"), identity.get("source"))
    if source == "spiffe" and isinstance(given, dict | None):
        values["identity"] = {**identity, "spiffe": {"socket": address, **(given or {})}}


def socket_path(address: str) -> str:
    """The path in an address. Raises ValueError, which says what is wrong."""
    if address.startswith("tcp:"):
        raise ValueError(
            f"{address!r} is not a Unix socket: over TCP the key would be sent in clear text"
        )
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise ValueError(f"expected unix:///path, found {address!r}")
    if len(os.fsencode(found[1])) > MAX_PATH_BYTES:
        raise ValueError(f"the path of a socket has at most {MAX_PATH_BYTES} bytes")
    return found[1]
