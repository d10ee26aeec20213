"""The kinds of private keys that a workload may have (proxy/net/tls/certificate_rules.py has the rules for their public halves)."""

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey
