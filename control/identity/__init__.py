"""Issuing: the control plane certifies the keys of proxies. docs/identity.md describes the whole.

issuer.py      the issuer's certificate and key: loading, checking, reloading
authority.py   decides: whose token it is, what its sender may have, and signs
rate_limit.py  token buckets for identities and addresses
service.py     the listener: one HTTP request for each connection
own.py         the control plane's own certificate, by its own issuer
"""
