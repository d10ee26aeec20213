"""How a program's settings are declared, read and documented. It knows no program's settings. Those
of the proxy are in proxy/config. Those of the control plane are beside the code that obeys them,
and control/config.py lists them. Those of a service are in proxy/directory/policy.py.

    declare.py         a setting: an annotated field with its unit, limits and description
    decode.py          plain values -> frozen structs, with all mistakes
    units.py           parsing durations, sizes, addresses
    document.py        YAML, with the place of each mistake
    sources.py         the file and the environment variables -> plain values
    load.py            file, environment, checks -> the settings, or all mistakes at once
    reference.py       the settings as a JSON schema and as tables
"""
