"""What may be set (schema), where it is written (profiles), and what it resolves to (resolve)."""
