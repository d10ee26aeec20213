"""Traffic splits, right and wrong."""

from __future__ import annotations

GATEWAY = "spiffe://cluster.local/ns/isthmus/sa/gateway"


TEXT = f"""
cluster: west
services:
  - name: c
    addresses: [10.96.0.1, "fd00:96::1"]
    ports: [{{port: 80, protocol: http1}}, {{port: 5432, protocol: opaque}}]
    endpoints: [{{address: 10.1.0.1}}, {{address: 10.1.0.2}}, {{address: "fd00::3"}}]
    export: true
    split:
      - {{service: c, weight: 90}}
      - {{service: c, cluster: east, weight: 10}}
      - {{service: new, weight: 0}}
    failover: {{clusters: [east, north], below: 2}}
  - {{name: new, ports: [{{port: 80}}, {{port: 5432}}], endpoints: [{{address: 10.1.0.9}}]}}
clusters:
  - name: east
    domain: east.example
    gateways:
      - {{address: 203.0.113.7, identity: {GATEWAY}}}
      - {{host: gw.east.example, port: 14143, identity: {GATEWAY}}}
    services:
      - {{name: c, ports: [{{port: 80, protocol: http2}}, {{port: 5432, protocol: opaque}}]}}
      - {{name: db, namespace: data, ports: [{{port: 5432, protocol: opaque}}]}}
  - name: north
    gateways: [{{address: "2001:db8::7", identity: {GATEWAY}}}]
    services: [{{name: c, ports: [{{port: 80}}, {{port: 5432}}]}}]
"""


WRONG = f"""
cluster: west
domain: Cluster.Local
services:
  - name: c
    ports: [{{port: 80}}, {{port: 81}}]
    export: 1
    policy: {{unheard: of}}
    split: [{{service: c, weight: -1}}, {{service: d, weight: 1}}, {{service: c, cluster: eats, weight: 1}}, {{weight: 1}}, 3,
            {{service: c, weight: 2}}, {{service: c, cluster: east, weight: 3}}]
    failover: {{clusters: [east, east, west, nowhere], below: 0, abvoe: 1}}
  - {{name: e, ports: [{{port: 80}}], split: [{{service: e, weight: 0}}]}}
  - {{name: f, ports: [{{port: 80}}], failover: {{}}}}
clusters:
  - {{name: west}}
  - {{name: svc}}
  - name: east
    gateways:
      - {{address: 203.0.113.7}}
      - {{address: 203.0.113.8, host: gw.example, identity: {GATEWAY}}}
      - {{identity: {GATEWAY}}}
      - {{host: 203.0.113.9, identity: {GATEWAY}}}
      - {{host: "-", identity: {GATEWAY}}}
      - {{address: 203.0.113.9, identity: me}}
      - {{address: 203.0.113.10, identity: {GATEWAY}}}
      - {{address: 203.0.113.10, identity: {GATEWAY}}}
    services:
      - {{name: c, ports: [{{port: 80, target_port: 8080}}]}}
      - {{name: c, ports: [{{port: 80}}]}}
      - {{name: x, endpoints: []}}
  - {{name: east}}
"""


SPLITS = """
services:
  - {name: a, ports: [{port: 80}], split: [{service: b, weight: 1}]}
  - {name: b, ports: [{port: 80}], split: [{service: a, weight: 1}]}
"""
