"""Policies: what leaves when a store is full."""
