"""Sans-IO: bytes <-> events. No socket, no trio, no clock, no TLS is reachable from this room (tests/test_imports.py asserts it).

messages.py   what a request and a response are, whatever wire they came by, and the hop-by-hop rules
heads.py      the strict recogniser of common HTTP/1 heads
strict.py     the heads that the recogniser declines: refused where they are ambiguous, otherwise h11's to decide
faults.py     what is wrong with a head that was refused, in words
bodies.py     how an HTTP/1 body is delimited, and its readers and writers
http1.py      one HTTP/1 connection, either role
frames2.py    HTTP/2 frames, and the faults that end a stream or a connection
hpack2.py     header compression by hpack, with a memory in front of it
fields2.py    header lists <-> heads, checked
events2.py    what an HTTP/2 connection tells, and its limits
budget2.py    what the peer may spend on frames that only cost time
late2.py      frames for a stream that we have reset
streams2.py   its streams: their life, their windows, and what we send on them
http2.py      one HTTP/2 connection, either role: what the peer sends
sniff.py      the first bytes of a connection: TLS, HTTP/1, HTTP/2, or something opaque
"""
