"""The configuration: the settings, their sources and their notation. It knows nothing about
traffic.

    schema.py          every setting, typed; two sections are in schema_files.py, schema_tracing.py
    load.py            file and environment -> Config, or all mistakes at once
    sources.py         the file and the environment variables of any settings
    decode.py          plain values -> frozen structs, with all mistakes
    units.py           parsing durations, sizes, addresses
    document.py        YAML, with the place of each mistake
    otel_env.py        OpenTelemetry's standard environment variables
    reference.py       the settings as a JSON schema and as tables
    resolv_conf.py     the resolvers of the pod
"""
