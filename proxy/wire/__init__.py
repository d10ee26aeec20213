"""Sans-IO: bytes <-> events. No socket, no trio, no clock, no TLS is reachable from this package (tests/test_imports.py asserts it).

messages.py    what a request and a response are, whatever wire they came by, and the hop-by-hop rules
grammar.py     the grammar that HTTP/1 and HTTP/2 share
sniff.py       the first bytes of a connection: TLS, HTTP/1, HTTP/2, or something opaque
forwarded.py   the Forwarded field; grpc.py: deadlines and statuses; websocket.py: the opening handshake in both versions
h1/, h2/       the two versions of HTTP
"""
