"""Sans-IO: bytes <-> events. No socket, no trio, no clock, no TLS is reachable from this room (tests/test_imports.py asserts it).

messages.py   what a request and a response are, whatever wire they came by, and the hop-by-hop rules
heads.py      the strict recogniser of common HTTP/1 heads
strict.py     the heads that the recogniser declines: refused where they are ambiguous, otherwise h11's to decide
bodies.py     how an HTTP/1 body is delimited, and its readers and writers
http1.py      one HTTP/1 connection, either role
sniff.py      the first bytes of a connection: TLS, HTTP/1, HTTP/2, or something opaque
"""
