"""Who we are and who the peers are: SPIFFE identities in X.509 certificates.

identity.py           the living identity: loading, reloading, verifying peers
credentials.py        certificate chain, key and trust roots, checked as a whole
credential_files.py   their files, read together
tls_contexts.py       TLS contexts, and the sessions that clients resume
spiffe.py             SPIFFE IDs and patterns
key_strength.py       the kinds of private keys that are accepted
issue.py              trust roots and certificates for standalone use
inspect.py            a certificate in words
"""
