"""Real programs for the pods: servers and clients that know nothing of a mesh. Run as `python -m
lab.apps.NAME`.
"""
