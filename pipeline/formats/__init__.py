"""File formats: read within limits, written bit for bit the same everywhere."""
