"""The proxy: sidecar of a pod, and gateway of a cluster. docs/ARCHITECTURE.md says how it is laid out."""
