"""Public test suites: subclass one, give it a fixture or two, and pytest checks your component.

    from lmcache_core.testing import BackendConformance

    class TestMine(BackendConformance):
        persistent = shared = True

        @pytest.fixture
        def open_backend(self, tmp_path):
            return functools.partial(MyBackend, MyOptions(path=tmp_path))

        @pytest.fixture
        def raw(self, tmp_path):
            return MyRawAccess(tmp_path)      # reaches around the backend

Needs pytest and hypothesis, which lmcache_core itself does not.
"""

from lmcache_core.testing.backend import SMALL, BackendConformance, RawAccess
from lmcache_core.testing.chunks import layouts, make_chunk, random_tensors, tiny_layout
from lmcache_core.testing.connector import Answer, ConnectorConformance, Engine, Serve
from lmcache_core.testing.eviction import EvictionConformance
from lmcache_core.testing.leaks import no_leaks
from lmcache_core.testing.serde import SerdeConformance

__all__ = [
    "SMALL",
    "Answer",
    "BackendConformance",
    "ConnectorConformance",
    "Engine",
    "EvictionConformance",
    "RawAccess",
    "SerdeConformance",
    "Serve",
    "layouts",
    "make_chunk",
    "no_leaks",
    "random_tensors",
    "tiny_layout",
]
