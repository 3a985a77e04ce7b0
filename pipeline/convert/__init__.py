"""Weights that others trained, recognised by their content and converted to this project's names."""
