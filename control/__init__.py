"""The control plane: what discovers and tells. docs/control-plane.md has the flow of data and the
contract."""
