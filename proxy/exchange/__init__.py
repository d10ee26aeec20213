"""HTTP over net/ by wire/: the trio side of HTTP. It knows neither who a peer should be nor where services are.

detect.py            the protocol of a connection, by its first bytes
exchange.py          one request and its response, as the layers and flows see them, whatever the wire
layers.py            what happens around every exchange: stack(), measure, rescue, deadline; loop_layer.py, trace_layer.py: two more
client.py            one exchange carried to an endpoint, and its response brought back
upstream.py          what carries it: an HTTP/1 connection, or a stream of an HTTP/2 one; leases.py: carriers from the pools
upstream_head.py     the head of a request as it goes on; max_forwards.py, reports.py: fields of it
handoff.py           exchanges that begin on the fast path
replay.py            a body that can be sent again
tunnel.py            CONNECT through a gateway; upgrade.py: WebSockets; prefixed_stream.py: a stream that goes on where HTTP ended
h1/, h2/             servers and pools of the two versions
"""
