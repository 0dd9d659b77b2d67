"""The shm backend."""

from lmcache_backends.shm.backend import ShmBackend, ShmOptions
from lmcache_backends.shm.pools import main

__all__ = ["ShmBackend", "ShmOptions", "main"]
