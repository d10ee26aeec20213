"""The laboratory: clusters, pods and what lies between them, as network namespaces on one machine; for the demonstration and the tests."""
