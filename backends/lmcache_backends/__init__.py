"""Backends, one file each, found by entry point; what starts with _ is below one or several."""
