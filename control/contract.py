"""What discovery shares with the proxies: names of identities, protocol hints, and the format of a
directory's document.

Of `proxy`, discovery uses only this and the declaration of settings. The channel to proxies also
uses the proxies' TLS, listeners and messages. `proxy` uses nothing of `control`.
"""

from __future__ import annotations

from proxy.directory import Hint, normalised
from proxy.directory.reader import NOT_SERVED
from proxy.directory.service_names import LABEL
from proxy.directory.snapshot import ADMIN_PORT
from proxy.directory.values import MOST_PORTS
from proxy.identity.spiffe import SpiffeId, SpiffeIdError, check_trust_domain

__all__ = [
    "ADMIN_PORT",
    "LABEL",
    "MOST_PORTS",
    "NOT_SERVED",
    "Hint",
    "SpiffeId",
    "SpiffeIdError",
    "check_trust_domain",
    "normalised",
]
