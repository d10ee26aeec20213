"""The fast path: ordinary exchanges, carried by plain synchronous functions.

Overview
========

The ordinary path runs one trio task for each connection. It can do everything, but each wait costs
a pass of trio's scheduler. One exchange needs two waits, a dozen coroutines, and several scopes and
objects. Most exchanges do not need them: wire/h1/fast_head.py recognises their heads, the pool has
an idle connection to the endpoint, it is known how each body is delimited, and nothing fails. The
fast path (`fast_path.py`) serves these exchanges. It has one epoll set for all connections. When a
socket is ready, it calls a plain function: no task, no cancel scope, no await. Its loop is not a
task either. It runs where trio would wait (`event_loop.py`).

*One owner.* A connection belongs to its task. Between two exchanges, the task may lend it: it calls
`FastConnection.carry` and is suspended there. Until that call returns, the fast path owns the
connection (`h1_connection.py` is one lent connection), reads from it and writes to it. The fast
path also takes connections to endpoints from the pool that the ordinary path uses, but a pooled
connection is used by one of the two at a time. The task wakes when the fast path returns the
connection. When the task is cancelled, the fast path releases the connection immediately.

*Streams.* An HTTP/2 connection is never lent, because many exchanges share it. Its reader and its
writer are tasks on both paths (exchange/h2/connection.py). The ordinary path adds one task for each
exchange. The fast path adds a `FastExchange` instead: it joins a stream of the client to a stream
of the endpoint, and the readers call it after each read. It has no buffer. It cannot always pass
data on immediately: a window is closed, a writer is behind, or other senders wait for their turn.
Then it leaves the data in the stream's buffer and hands the exchange over to the ordinary path.

*Relays.* The task that waits for the end of a byte relay lends both of its connections together. A
`FastRelay` passes the bytes on and reports the ends to the relay's `RelayState`, as the two tasks
of the ordinary path do. Connections that were HTTP before (tunnels) stay on the ordinary path,
because bytes that were read ahead have to be sent first.

*Unusual work goes to the ordinary path.* This is by design: each unusual case has one
implementation, on the ordinary path. Between two exchanges, the fast path returns the connection
with the bytes that it has read. It does so for a head that is not recognised or not complete, and
for a body that is not complete. It also does so for an endpoint without an idle connection, for a
decision that the flow reserves for the ordinary path, and for a shutdown of the proxy. Within an
exchange, it hands the exchange over in its current state (`exchange/exchange.py`). It does so for a
response head that is not recognised (interim, without a length, ...), a server that closes without
an answer, and a client that has disconnected. The fast path does not interpret ends and errors of
connections. A stream reports them again on the next call, so the ordinary path sees them as if it
had made the first call.

*No waiting, one deadline.* The fast path has one deadline: it hands an exchange over if it has not
moved for `PATIENCE` seconds. It also does so if the exchange's own deadline (that of a gRPC call,
for example) is that near. The ordinary path has all other timeouts. So an exchange with a slow
server costs one extra handoff, and neither path needs to know the timers of the other.

*Same records.* An exchange on the fast path is the same `Http1Exchange` or `Http2Exchange`. It has
the same account, which is opened here and closed here, or closed by the ordinary path after a
handoff. The same functions make the decisions of the layers, and the bytes on the wire are the
same. tests/exchange runs its tests on both paths and compares them.

*Fewer system calls.* An idle connection in the pool stays in the fast path's epoll set. If this
turn's poll reported no event for it, its server has not closed it, so no peek is needed before it
is used (`ready_socket.py`). The fast path does peek if the ordinary path has used the connection in
between, or if the connection came back in this turn.

*Fairness.* In each turn, each ready connection gets one step: one read, the resulting work, one
write. Pipelined requests in the same read wait for the next turn. (Requests from one read of an
HTTP/2 connection do not wait; the limit on open streams bounds their number.) After each turn, trio
runs if it has work. If one side does not accept all data, the rest is kept (at most one read). The
proxy reads nothing more from the other side until that rest is sent.

Modules
=======

event_loop.py      the event loop, which runs inside trio's idle wait
fast_path.py       the entry: which connections, exchanges and relays are on the fast path
eligibility.py     whether a connection may be lent to the fast path
plan.py            the interface to the flows: planners, and leases of connections and streams
host.py            the interfaces between fast_path.py and what is on the fast path
h1_connection.py   one lent HTTP/1.1 connection and its current exchange
h1_handoff.py      the handoff of an HTTP/1.1 exchange to the ordinary path
h2_exchange.py     one HTTP/2 exchange: two streams, joined
chunked_body.py    a chunked response body
fast_relay.py      a relay of bytes
ready_socket.py    one socket: an end of a connection or of a relay
"""
