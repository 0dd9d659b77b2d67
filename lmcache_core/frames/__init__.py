"""Frames: the bytes of a chunk, and the pipeline of serdes that makes them."""
