"""Soak: processes that use real stores for a long time, while everything goes wrong that may."""
