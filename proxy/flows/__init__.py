"""The flows: the path of a connection from accept to the relay or the exchange. Used by app.py.

Each flow is the steps of one connection, the plan of its exchanges, and the relay of bytes that are
not HTTP:

outbound.py          from the application to the mesh
outbound_plan.py
outbound_relay.py
inbound.py           from the mesh to the application
inbound_plan.py
inbound_relay.py
gateway.py           from other clusters to exported services
gateway_plan.py

What the flows share:

runtime.py           the objects that every flow needs, and the steps that the flows share
serving.py           the layers around exchanges, for both paths, and the servers of connections
upstreams.py         the connection pools of a flow, one per protocol
tls_termination.py   mutual TLS with peers of the mesh
late_detection.py    relayed connections that may still turn out to be HTTP
confirmation.py      the inbound side confirms to the outbound side that the application accepted
loop_guard.py        the facts that loopguard's verdicts need
forwarded_path.py    the path of a request in the field Forwarded, at a gateway
"""
