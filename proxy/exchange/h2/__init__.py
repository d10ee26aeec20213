"""HTTP/2 connections, each shared by many exchanges.

connection.py       a connection of either role, with its reader and writer
stream.py           one stream
server.py           one downstream connection: each stream is an exchange
body.py             bodies of messages, and the bytes of tunnels
pool.py             the pool of connections to endpoints
settings.py         the settings of a connection
writer.py           sends pending frames in one write
send_scheduler.py   the order in which streams send, if the connection's window is exhausted
read_pacing.py      how fast a client's connection is read
reset_pacing.py     how fast streams are reset
stream_limit.py     how many streams clients may have open in this process
goaway.py           the end of a connection
"""
