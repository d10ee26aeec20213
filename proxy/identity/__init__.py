"""The proxy's own identity and its peers' identities: SPIFFE IDs in X.509 certificates.

identity.py           the identity at run time: loading, reloading, verifying peers
credentials.py        certificate chain, key and trust roots, checked together
credential_files.py   reading their files together
source.py             the interface of the sources of credentials, and the files as a source
tls_contexts.py       TLS contexts, and the sessions that clients resume
revocation.py         the list of identities and certificates that are refused
spiffe.py             SPIFFE IDs and patterns
key_strength.py       the accepted kinds of private keys
issue.py              creating trust roots and certificates
signing_request.py    certificate signing requests: making and checking them
inspect.py            a certificate described for people
"""
