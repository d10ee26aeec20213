"""HTTP/2 connections, each shared by many exchanges.

connection.py       a connection of either role, with its reader and writer; stream.py: one of its streams
server.py           one downstream connection: each stream an exchange
pool.py             the connections kept to endpoints
settings.py         how a connection is set up
writer.py           what is to be sent goes out in one write; send_scheduler.py: whose turn it is
read_pacing.py      how fast a client's connection is read; reset_pacing.py: how fast streams are reset
stream_limit.py     how many streams clients may have open in this process
goaway.py           the end of a connection
"""
