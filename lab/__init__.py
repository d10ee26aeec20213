"""The lab: clusters, pods and networks between them, built from network namespaces on one machine;
for demo and tests.
"""
