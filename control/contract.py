"""What the control plane has in common with the proxies: the one place that imports from them.

The names of identities, the hints of a directory, and the form of its document are a contract
between both sides. Nothing else of `proxy` is used here, and nothing of `control` there.
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
