"""Real programs for the pods: servers and clients that know nothing of any mesh.  Each runs as `python -m lab.apps.NAME`."""
