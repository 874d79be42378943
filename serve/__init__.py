"""Ray Serve: HTTP API, router deployment, traces."""
