"""HTTP/2: one connection, as client or server.

connection.py     the connection: reads the peer's frames, returns events, and what we send
stream_state.py   the state of one stream
frames.py         frames, and the errors that end a stream or a connection
fields.py         header lists to heads and back, with checks
hpack.py          header compression by the hpack library, with a cache in front of it
events.py         the events of a connection, and its limits
flood_budget.py   limits frames that cost us work and the peer nothing
late_frames.py    frames for a stream that we have reset
"""
