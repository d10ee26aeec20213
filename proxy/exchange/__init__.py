"""HTTP over net/ by wire/: the trio side of HTTP.

exchange.py    one request and its response, as the layers and flows see them, whatever the wire
layers.py      what happens around every exchange: stack(), measure, rescue, deadline
server.py      one downstream HTTP/1 connection: requests in, responses out
server2.py     one downstream HTTP/2 connection: each stream an exchange
client.py      one exchange carried to an endpoint, and its response brought back
carriers.py    what carries it: an HTTP/1 connection, or a stream of an HTTP/2 one
mux.py         an HTTP/2 connection shared by exchanges; mux_stream.py: one of its streams
pool.py        the HTTP/1 connections kept to endpoints; pool2.py: the HTTP/2 ones; lenders.py: carriers from them
resumed.py     a stream that goes on where HTTP ended
"""
