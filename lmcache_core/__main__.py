"""python -m lmcache_core: the command line."""

from lmcache_core.cli import main

main()
