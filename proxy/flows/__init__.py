"""The flows: the path of a connection from accept to the relay or the exchange. Used by app.py.

inbound.py           traffic from the mesh to the application
outbound.py          traffic from the application to the mesh
gateway.py           traffic from other clusters to exported services
runtime.py           the objects that every flow needs, and the steps that the flows share
upstreams.py         the connection pools of a flow, one per protocol
tls_termination.py   mutual TLS with peers of the mesh
late_detection.py    relayed connections that may still turn out to be HTTP
confirmation.py      the inbound side confirms to the outbound side that the application accepted
loop_guard.py        the facts that loopguard's verdicts need
"""
