"""Sockets: streams, TLS and relays. Only this package uses file descriptors; it knows no HTTP.

accept.py             accepts connections; the error boundary of a connection
connection_slots.py   selects which connection ends when a listener is full
dial.py               opens connections
socket_stream.py      a stream on a non-blocking socket
byte_stream.py        the protocol of a stream
nonblocking.py        the protocol of a stream that also has calls that never wait
relay.py              joins two streams
splice.py             moves bytes between sockets within the kernel
memory_budget.py      limits how many bytes connections may buffer
pacing.py             limits how many streams and connections start in one scheduler pass
fairness.py           what busy streams do so that other tasks can run
liveness.py           detects dead peers
disconnects.py        detects clients that disconnect
linger.py             closes connections whose peer is still sending
datagrams.py          UDP
address.py            network addresses as values
resolve.py            addresses of a name, in random order
interfaces.py         the addresses of this network namespace
readiness.py          waits for a socket, for several tasks
exceptions.py         the errors of this package
tls/                  TLS 1.3 on the socket
"""
