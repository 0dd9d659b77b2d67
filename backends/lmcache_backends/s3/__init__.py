"""The s3 backend."""

from lmcache_backends.s3.backend import S3Backend
from lmcache_backends.s3.options import S3Options

__all__ = ["S3Backend", "S3Options"]
