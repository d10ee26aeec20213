"""Sockets: the only package that touches file descriptors. It knows streams, TLS and relays, and nothing of HTTP.

accept.py             connections in, and the boundary at which their errors end; connection_slots.py: which end when there is no room
dial.py               connections out
socket_stream.py      a stream on a non-blocking socket; byte_stream.py: what others need of a stream; nonblocking.py: asked without waiting
relay.py              two streams joined; splice.py: within the kernel
memory_budget.py      how many bytes connections may buffer; pacing.py: how much begins and ends in one pass of the scheduler
liveness.py           dead peers; disconnects.py: clients that leave; linger.py: ends whose peer is still sending
datagrams.py, address.py, interfaces.py, readiness.py
exceptions.py         what can go wrong with a connection
tls/                  TLS 1.3 on the socket
"""
