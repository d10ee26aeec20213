"""The flows: what happens to a connection, from the accept to the relay or the exchange. Imported by app.

inbound.py           traffic from the mesh to the application
outbound.py          traffic from the application to the mesh
gateway.py           traffic from other clusters to exported services
runtime.py           what every flow is given, and the steps that they share
upstreams.py         the connections that a flow keeps to endpoints, by protocol
tls_termination.py   mutual TLS with peers of the mesh
late_detection.py    relayed connections that may still turn out to be HTTP
confirmation.py      the inbound side tells the outbound side whether the application has accepted
loop_guard.py        the facts that loopguard's verdicts need
"""
