"""HTTP exchanges: the trio side of HTTP, between net/ (streams) and wire/ (parsers). It does not
decide which peers are allowed or where services are.

    detect.py           the protocol of a connection, by its first bytes
    exchange.py         one request and its response, as layers and flows see them
    layers.py           what happens around every exchange: measure, rescue, admit, deadline
    loop_layer.py       the layer of the loop guard
    trace_layer.py      the layer that records spans
    client.py           sends one exchange to an endpoint and returns its response
    client_settings.py  timeouts of the client
    server_settings.py  settings of the servers, and the state of the shutdown
    upstream.py         carriers of an exchange: an HTTP/1 connection, or a stream of HTTP/2
    leases.py           leases of connections and streams from the pools
    upstream_head.py    the request head for the next hop
    max_forwards.py     the field Max-Forwards
    reports.py          failures that the next proxy reports by Proxy-Status
    timer.py            the deadline of one exchange, which its steps move
    replay.py           a request body that can be sent again
    tunnel.py           CONNECT through a gateway
    upgrade.py          WebSockets over HTTP/2 or HTTP/1.1
    prefixed_stream.py  a stream whose first bytes were already read
    h1/, h2/            servers and pools for each HTTP version
"""
