"""How the proxy gets its credentials from another program, instead of from files. The sources
follow the contract of proxy/identity/source.py.

messages.py        the exchange with the control plane, which the control plane uses too
token.py           the service account token that Kubernetes projects into the pod
client.py          one exchange with the control plane
control_source.py  the source: asks at the start and renews in time

workload_api.py    the source that follows a SPIFFE Workload API
grpc_stream.py     gRPC calls with a stream of answers, over HTTP/2
svid_messages.py   the messages of the Workload API
protobuf.py        their encoding
"""
