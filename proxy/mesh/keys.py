"""Keys that are good enough for TLS 1.3, judged where they are read; the peers judge them in the handshake (proxy/net/tls_verdict.py)."""

from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

from proxy.net.tls_errors import AWS_LC

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey

# Below this a key can be broken, and peers refuse it in the handshake.
MIN_RSA_BITS = 2048


def key_weakness(key: object) -> str | None:
    """What is wrong with a public key's type or strength, or None."""
    match key:
        case ec.EllipticCurvePublicKey():
            if not isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1 | ec.SECP521R1):
                return f"the curve {key.curve.name} is not one of P-256, P-384 and P-521, the curves of TLS 1.3"
            return None
        case rsa.RSAPublicKey():
            return None if key.key_size >= MIN_RSA_BITS else f"RSA with {key.key_size} bits, at least {MIN_RSA_BITS} are needed"
        case ed25519.Ed25519PublicKey() | ed448.Ed448PublicKey():
            return None
        case _:
            return f"a key of the kind {type(key).__name__}, which TLS 1.3 does not use"


def not_taken(key: PrivateKey) -> str | None:
    """A key that is good, and that the peers do not take all the same: AWS-LC verifies Ed25519 in certificates, and does not offer it
    for the handshake's own signature unless it is told to, for which its binding has no call. So every handshake would fail."""
    if AWS_LC and isinstance(key, ed25519.Ed25519PrivateKey):
        return "an Ed25519 key, which the TLS library of this proxy (AWS-LC) takes from no peer: use ECDSA on P-256"
    return None
