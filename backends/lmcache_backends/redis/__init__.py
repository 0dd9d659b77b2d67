"""The redis backend."""

from lmcache_backends.redis.backend import RedisBackend, RedisOptions

__all__ = ["RedisBackend", "RedisOptions"]
