"""python -m lmcache_backends.shm: shared-memory pools that were left."""

import sys

from lmcache_backends.shm.pools import main

sys.exit(main(sys.argv[1:]))
