"""OpenSSL calls that pyOpenSSL lacks, made through its underlying binding.

Only this module uses pyOpenSSL's private names. They are the ones that pyOpenSSL's own verification
callback uses. requirements/*.txt pin the version, and the import of this module fails if one of
them is missing.

The reason: with pyOpenSSL's callback, the alert of a refusal is always `internal_error`, it sees
one certificate at a time, and it creates two objects for each. This callback is created once, lives
as long as the process, and serves all contexts.
"""

# ruff: noqa: SLF001  # see above

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from OpenSSL import SSL, crypto

_log = logging.getLogger("isthmus.net")
_lib: Any = SSL._lib  # type: ignore[attr-defined]
_ffi: Any = SSL._ffi  # type: ignore[attr-defined]
_CONNECTIONS: Any = SSL.Connection._reverse_mapping
_STORE_INDEX: int = _lib.SSL_get_ex_data_X509_STORE_CTX_idx()
_PARTS = (
    _lib.X509_STORE_CTX_get1_chain,
    _lib.X509_verify_cert_error_string,
    _lib.SSL_session_reused,
    _lib.SSL_CTX_set1_sigalgs_list,
)
_FALLBACK: int = SSL.X509VerificationCodes.ERR_CERT_REJECTED


class Verification:
    """A verification in progress; valid during one callback. `code`: the library's error code."""

    __slots__ = ("_store", "code", "connection", "depth")

    def __init__(self, store: Any, depth: int) -> None:
        self._store = store
        self.depth = depth
        self.code: int = _lib.X509_STORE_CTX_get_error(store)
        self.connection: SSL.Connection = _CONNECTIONS[
            _lib.X509_STORE_CTX_get_ex_data(store, _STORE_INDEX)
        ]

    def certificate(self) -> crypto.X509 | None:
        """The certificate at `depth`."""
        pointer = _lib.X509_STORE_CTX_get_current_cert(self._store)
        if pointer == _ffi.NULL:
            return None
        _lib.X509_up_ref(pointer)
        certificate: crypto.X509 = crypto.X509._from_raw_x509_ptr(pointer)
        return certificate

    def chain(self) -> bytes:
        """The chain built so far: concatenated DER certificates, the leaf first."""
        stack = _lib.X509_STORE_CTX_get1_chain(self._store)
        if stack == _ffi.NULL:
            return b""
        memory = _lib.BIO_new(_lib.BIO_s_mem())
        if memory == _ffi.NULL:
            raise MemoryError
        for number in range(_lib.sk_X509_num(stack)):
            certificate = _lib.sk_X509_value(stack, number)
            _lib.i2d_X509_bio(memory, certificate)
            _lib.X509_free(certificate)  # get1: we must free each certificate, and the stack
        _lib.sk_X509_free(stack)
        start = _ffi.new("char **")
        size = _lib.BIO_get_mem_data(memory, start)
        found = bytes(_ffi.buffer(start[0], size))
        _lib.BIO_free(memory)
        return found


# Called with a verification, and whether the library accepts. None: continue. Otherwise the
# returned verification code selects the alert.
OnCertificate = Callable[[Verification, bool], int | None]


def verification_callback(judge: OnCertificate) -> Any:
    """Create a callback for `set_verification`. Keep it as long as any context uses it.

    The library decides first. `judge` is called for the leaf once it and all its authorities have
    passed, and for each certificate that has not.
    """

    def on_certificate(accepted: int, store: Any) -> int:
        depth: int = _lib.X509_STORE_CTX_get_error_depth(store)
        if accepted and depth:
            return 1
        try:
            code = judge(Verification(store, depth), bool(accepted))
        except Exception as error:  # an internal error must not look like acceptance
            _log.error("internal error while verifying a peer's certificate", exc_info=error)
            code = _FALLBACK
        if code is None:
            return 1
        _lib.X509_STORE_CTX_set_error(store, code)
        return 0

    return _ffi.callback("int (*)(int, X509_STORE_CTX *)", on_certificate)


def set_verification(context: SSL.Context, mode: int, callback: Any) -> None:
    """Like Context.set_verify, with a callback of `verification_callback`."""
    _lib.SSL_CTX_set_verify(context._context, mode, callback)


def set_signature_algorithms(context: SSL.Context, names: bytes) -> None:
    """Set the algorithms that are offered and accepted (RFC 8446, section 4.2.3).

    Raises ValueError if the library does not know them.
    """
    if not _lib.SSL_CTX_set1_sigalgs_list(context._context, names):
        raise ValueError("the TLS library does not know these signature algorithms")


def was_resumed(connection: SSL.Connection) -> bool:
    """Whether the completed handshake resumed a session."""
    return bool(_lib.SSL_session_reused(connection._ssl))


def code_in_words(code: int) -> str:
    """The library's text for a verification code."""
    text = _lib.X509_verify_cert_error_string(code)
    return (
        str(_ffi.string(text).decode("ascii", "replace"))
        if text != _ffi.NULL
        else f"X.509 verification error {code}"
    )
