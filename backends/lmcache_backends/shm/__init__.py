"""The shm backend."""

from lmcache_backends.shm.backend import ShmBackend, ShmOptions

__all__ = ["ShmBackend", "ShmOptions"]
