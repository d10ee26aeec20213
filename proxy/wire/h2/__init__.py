"""HTTP/2: one connection in either role.

connection.py     what the peer sends, read into events of single streams
streams.py        the streams: their life, their windows, and what we send on them
frames.py         frames, and the faults that end a stream or a connection
fields.py         header lists <-> heads, checked
hpack.py          header compression by the hpack library, with a memory in front of it
events.py         what a connection tells, and its limits
flood_budget.py   what the peer may spend on frames that only cost time
late_frames.py    frames for a stream that we have reset
"""
