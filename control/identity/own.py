"""The control plane's own certificate, by its own issuer: it needs no other Secret.

The key is made here and stays in memory. A new certificate is made at half of the lifetime, and
when the issuer or the trust roots have changed.
"""

from __future__ import annotations

import trio
from cryptography.hazmat.primitives import serialization

from control.contract import SpiffeId
from control.identity.issuer import Issuer, NoIssuer
from proxy.identity.credential_files import Contents, MaterialError, MaterialNames
from proxy.identity.identity import Identity
from proxy.identity.issue import Validity
from proxy.identity.signing_request import make_key
from proxy.identity.source import Changed, Failed

_NAMES = "the own certificate by the issuer", "the own key"
_PAUSE = 5.0


class OwnCredentials:
    """See CredentialSource."""

    def __init__(self, issuer: Issuer, name: SpiffeId, validity: Validity) -> None:
        self._issuer = issuer
        self._name = name
        self._validity = validity

    async def run(self, identity: Identity, changed: Changed, failed: Failed) -> None:
        """See CredentialSource."""
        while True:
            issuer_changed = self._issuer.changed
            pause = _PAUSE
            try:
                self._renew(identity)
                changed(identity)
                pause = max(_PAUSE, identity.time_left.total_seconds() / 2)
            except (NoIssuer, MaterialError) as error:
                failed(error)
            with trio.move_on_after(pause):
                await issuer_changed.wait()

    def _renew(self, identity: Identity) -> None:
        key = make_key()
        made = self._issuer.sign(self._name, key.public_key(), self._validity)
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        roots = tuple(f"trust roots {number}" for number, _ in enumerate(made.roots, 1))
        identity.use(Contents(MaterialNames(*_NAMES, roots), (made.chain, pem, *made.roots)))
