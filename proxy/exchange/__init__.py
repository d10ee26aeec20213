"""HTTP over net/ by wire/: the trio side of HTTP.

exchange.py   one request and its response, as the layers and flows see them, whatever the wire
layers.py     what happens around every exchange: stack(), measure, rescue, deadline
server.py     one downstream HTTP/1 connection: requests in, responses out
client.py     one exchange carried to an endpoint over a pooled connection
pool.py       the connections kept to endpoints; its decisions are synchronous
"""
