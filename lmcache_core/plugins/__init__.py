"""Plugins: components by name, hooks, events, counters, the log."""
