"""The accepted kinds of workload private keys. proxy/net/tls/certificate_rules.py has the rules for
public keys.
"""

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey
