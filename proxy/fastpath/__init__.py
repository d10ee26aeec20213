"""The fast path: the commonest work, as plain synchronous steps.

Theory
======

The ordinary path is a trio task for each connection. It can do everything, and each of its waits costs a pass of trio's scheduler: two
waits in an exchange, besides a dozen coroutines, scopes and objects. Most exchanges need none of that. Their heads are in the canonical
form that wire/h1/fast_head.py recognises, a connection to their endpoint lies ready in the pool, it is known how their bodies are
delimited, and nothing goes wrong. For them there is this path (`fast_path.py`): one epoll set for all connections, and for each socket that
is ready what there is to do, in plain functions: no task, no scope, no await. Its loop is no task either; it runs where trio would wait
(`event_loop.py`).

*One owner.* A connection belongs to its task. Between two exchanges the task may lend it: it calls `FastPath.carry`, and while it is
suspended there, the fast path owns the connection (`h1_connection.py` is one lent connection). The fast path reads from it, writes to it
and takes connections to endpoints from the pool, which the ordinary path also does; but never both at once. The task wakes when the fast
path gives the connection back, and when the task is cancelled the fast path lets go at once.

*Streams.* A connection of HTTP/2 is never lent, because it is many exchanges' at a time: its reader and writer are tasks of its own on
either path (exchange/h2/connection.py). What the ordinary path adds to them is a task for each exchange. Here an exchange is a
`FastExchange`: it ties a stream of the client's to one of the endpoint's, and the readers call it when they have filed what one read
brought. It keeps nothing for itself. What it cannot pass on at once (a window is closed, a writer is behind, others wait for their turn) it
leaves where it lies, and gives the exchange back.

*Relays.* Two connections that are joined byte for byte are lent together, by the task that waits for the relay's end. A `FastRelay` passes
their bytes on, and tells the relay's `Joint` how they end, as two tasks would. Connections that were HTTP before stay
with those tasks: what was read ahead of them comes first.

*The fast path gives back what is not plain.* That is no failure but its principle: everything unusual has one implementation, the ordinary
one. Between two exchanges it gives the connection back with the bytes read so far, as if they had just been read: a head that is declined
or not whole, a body that is not here yet, no ready connection, anything the flow wants to decide by itself, a proxy that is going down.
Within an exchange it gives the exchange back as far as it has got (`exchange/handoff.py`): a response whose head is declined (interim,
without a length, ...), a server that closes without an answer, a client that has gone. The ends and errors of connections are not judged
here: a stream repeats them to whoever asks next, so the ordinary path meets them as if it had been there.

*Nothing waits here.* There are no deadlines on this path but one: what has not moved for `PATIENCE` seconds goes back to the ordinary
path, where all the others are; and so does a call of gRPC whose own deadline is that near. So a slow server's exchange costs one
hand-over more than it would have, and neither path has to know the other's clocks.

*Same books.* An exchange here is the same `Http1Exchange` or `Http2Exchange`, with the same account (opened here, closed here, or there
after a hand-over), the same layers' decisions by the same functions, and the same bytes on the wire. tests/exchange runs its tests on
both paths, and compares them.

*What is known is not asked.* A connection that rests in the pool stays in the fast path's epoll set. So it need not be asked whether its
server has closed it, before it is used, if the poll of this very turn was silent about it (`ready_socket.py`). What others took meanwhile,
or what came back in this turn, is asked.

*Fairness.* A ready connection gets one step per turn: one read, what follows from it, one write. Requests that lie in the same read
behind the first wait for the next turn. (The requests that one read of an HTTP/2 connection has brought do not wait: they are no more
than it may have streams open.) A turn serves each ready connection once; when trio has something to do, it has it behind this turn. A
side that takes no more stops the other: what it did not take is kept (one read at most), and nothing is read until it is gone.
"""
