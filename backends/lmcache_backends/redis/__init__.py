"""The redis backend."""

from lmcache_backends.redis.backend import RedisBackend
from lmcache_backends.redis.options import RedisOptions

__all__ = ["RedisBackend", "RedisOptions"]
