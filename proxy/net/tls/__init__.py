"""TLS 1.3 by OpenSSL on the non-blocking socket itself.

handshake.py           as server and as client
tls_stream.py          a stream after the handshake
verify.py              the verdict on a peer's certificates; certificate_rules.py: what a chain has to be
info.py                what both ends agreed on
expiry.py              connections end with the certificates that they rest on
openssl_errors.py      errors of OpenSSL and AWS-LC in words
openssl_config.py      what OpenSSL is told before it begins; binding.py: calls that pyOpenSSL lacks
"""
