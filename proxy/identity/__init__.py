"""What a proxy knows of the mesh: who is who, which services there are and where, and how their endpoints fare. No HTTP, no requests."""
