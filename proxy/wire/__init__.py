"""Sans-IO: bytes <-> events. No socket, no trio, no clock, no TLS is reachable from this room (tests/test_imports.py asserts it).

messages.py   what a request and a response are, whatever wire they came by, and the hop-by-hop rules
h1/fast_head.py      the strict recogniser of common HTTP/1 heads
h1/strict_head.py     the heads that the recogniser declines: refused where they are ambiguous, otherwise h11's to decide
h1/head_faults.py     what is wrong with a head that was refused, in words
h1/body.py     how an HTTP/1 body is delimited, and its readers and writers
h1/connection.py      one HTTP/1 connection, either role
h2/frames.py    HTTP/2 frames, and the faults that end a stream or a connection
h2/hpack.py     header compression by hpack, with a memory in front of it
h2/fields.py    header lists <-> heads, checked
h2/events.py    what an HTTP/2 connection tells, and its limits
h2/flood_budget.py    what the peer may spend on frames that only cost time
h2/late_frames.py      frames for a stream that we have reset
h2/streams.py   its streams: their life, their windows, and what we send on them
h2/connection.py      one HTTP/2 connection, either role: what the peer sends
sniff.py      the first bytes of a connection: TLS, HTTP/1, HTTP/2, or something opaque
"""
