"""The disk backend."""

from lmcache_backends.disk.backend import DiskBackend, DiskOptions

__all__ = ["DiskBackend", "DiskOptions"]
