"""What the control plane shares with the proxies. Only this module imports from `proxy`.

The names of identities, the protocol hints of a directory and the format of its document are the
contract between the two. The control plane uses nothing else of `proxy`, and `proxy` uses nothing
of `control`.
"""

from __future__ import annotations

from proxy.directory import Hint, normalised
from proxy.directory.reader import NOT_SERVED
from proxy.directory.snapshot import ADMIN_PORT
from proxy.directory.values import MOST_PORTS
from proxy.identity.spiffe import SpiffeId, SpiffeIdError, check_trust_domain

__all__ = [
    "ADMIN_PORT",
    "MOST_PORTS",
    "NOT_SERVED",
    "Hint",
    "SpiffeId",
    "SpiffeIdError",
    "check_trust_domain",
    "normalised",
]
