"""The configuration of the proxy: its settings, and where they come from. It knows nothing about
traffic. proxy/settings has the mechanism.

    schema.py              all sections, and the settings that are in none
    schema_traffic.py      `outbound`, `inbound`, `gateway`, `intercept`
    schema_http.py         `http`, `http2`, `loops`
    schema_connections.py  `tcp`, `pool`, `memory`
    schema_clusters.py     `clusters`, `dns`
    schema_files.py        `identity`, `directory`
    schema_process.py      `pod`, `admin`, `log`, `shutdown`
    schema_tracing.py      `tracing`
    contradictions.py      the mistakes that only a comparison of settings shows
    load.py                file and environment -> Config, or all mistakes at once
    otel_env.py            OpenTelemetry's standard environment variables
    endpoint_socket.py     the address of a SPIFFE Workload API
    resolv_conf.py         the resolvers of the pod
"""
