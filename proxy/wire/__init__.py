"""Sans-IO protocol code: bytes in, events out, and back.

No module here uses a socket, trio, a clock or TLS (tests/test_imports.py asserts it).

messages.py    requests and responses, independent of the HTTP version; the hop-by-hop rules
grammar.py     the grammar that HTTP/1 and HTTP/2 share
sniff.py       detects the protocol by the first bytes of a connection: TLS, HTTP/1, HTTP/2, opaque
forwarded.py   the Forwarded field
grpc.py        gRPC deadlines and statuses
websocket.py   the WebSocket opening handshake in both HTTP versions
h1/, h2/       the two HTTP versions
"""
