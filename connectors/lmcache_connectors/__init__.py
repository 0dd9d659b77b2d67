"""Connectors: the inference engines' side. One file an engine."""
