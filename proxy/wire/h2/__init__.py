"""HTTP/2: one connection, as client or server.

connection.py     reads the peer's frames and returns events of streams
streams.py        the streams: their states, flow control windows, and what we send
frames.py         frames, and the errors that end a stream or a connection
fields.py         header lists to heads and back, with checks
hpack.py          header compression by the hpack library, with a cache in front of it
events.py         the events of a connection, and its limits
flood_budget.py   limits frames that cost us work and the peer nothing
late_frames.py    frames for a stream that we have reset
"""
