"""TLS 1.3 by OpenSSL or AWS-LC, directly on the non-blocking socket.

handshake.py           the handshake, as server and as client
tls_stream.py          a stream after the handshake
verify.py              verifies a peer's certificates during the handshake
certificate_rules.py   the rules for certificate chains
info.py                what both ends agreed on
expiry.py              ends connections whose certificates have expired
openssl_errors.py      translates errors of OpenSSL and AWS-LC
openssl_config.py      OpenSSL settings that must be made before its import
binding.py             OpenSSL calls that pyOpenSSL lacks
"""
