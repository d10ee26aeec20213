"""HTTP over net/ by wire/: the trio side of HTTP.

exchange.py    one request and its response, as the layers and flows see them, whatever the wire
layers.py      what happens around every exchange: stack(), measure, rescue, deadline
h1/server.py      one downstream HTTP/1 connection: requests in, responses out
h2/server.py     one downstream HTTP/2 connection: each stream an exchange
client.py      one exchange carried to an endpoint, and its response brought back
upstream.py    what carries it: an HTTP/1 connection, or a stream of an HTTP/2 one
h2/connection.py         an HTTP/2 connection shared by exchanges; h2/stream.py: one of its streams
h1/pool.py        the HTTP/1 connections kept to endpoints; h2/pool.py: the HTTP/2 ones; leases.py: carriers from them
prefixed_stream.py     a stream that goes on where HTTP ended
"""
