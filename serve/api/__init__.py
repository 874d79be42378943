"""HTTP endpoints, one module per wire format."""
