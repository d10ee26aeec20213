"""Several processes as one proxy: what supervisor.py and worker.py (one level up) share.

protocol.py           the messages between the supervisor and a worker
connection_table.py   the open connections of all workers, in shared memory, for the loop guard
merged_metrics.py     the metrics of all workers as those of one proxy
"""
