"""The memcached backend."""

from lmcache_backends.memcached.backend import MemcachedBackend, MemcachedOptions

__all__ = ["MemcachedBackend", "MemcachedOptions"]
