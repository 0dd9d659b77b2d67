"""What network stores have to survive alike: servers that die and hang, networks that cut and stall;
and, where a url says that it is encrypted, certificates that prove nothing."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from lmcache_core.backend import Refused, StorageBackend, Transfer
from lmcache_core.errors import StorageError
from lmcache_core.testing import no_leaks
from tests.backends.frames import (
    LONG,
    SHORT,
    everything,
    get,
    greet,
    here,
    key,
    keys,
    put,
    value,
    works,
)
from tests.certificates import Authority
from tests.servers import Proxy, Server, eventually

MIB = 1 << 20
Opener = Callable[..., Callable[[], StorageBackend]]


class RemoteConformance:
    """Subclass it, name it Test..., and define the fixtures below.

    server: (port, process) of a server to be killed and frozen.
    proxy: before a server that nothing happens to.
    opener: takes a port of this host; what it returns opens a backend there.
    """

    persistent: ClassVar[bool] = False
    """Whether the server has after a restart what it had before."""
    touches: ClassVar[bool] = True
    """Whether the server is told what was used."""
    offsets: ClassVar[int] = 32
    """How many places to cut an answer at."""

    @pytest.fixture
    def opener(self) -> Opener:
        raise NotImplementedError

    def test_a_restart_between_two_calls_is_not_even_noticed(
        self, server: tuple[int, Server], opener: Opener
    ) -> None:
        port, process = server
        backend = opener(port)()
        put(backend, 1)
        process.kill()
        with pytest.raises(StorageError, match=f"127.0.0.1:{port}"):
            here(backend, 1, timeout=SHORT)
        process.start()
        assert here(backend, 1) == [self.persistent]
        process.kill()
        process.start()
        assert put(backend, 1) == 1
        assert everything(backend, 1)
        backend.close()

    def test_a_server_that_is_down_at_first_is_used_when_it_comes(
        self, server: tuple[int, Server], opener: Opener
    ) -> None:
        port, process = server
        process.kill()
        backend = opener(port)()
        assert not works(backend)
        process.start()
        assert works(backend)
        assert put(backend, 1) == 1
        backend.close()

    @pytest.mark.parametrize("nbytes", [900_000, 4 * MIB])
    def test_kill_9_in_the_middle_of_a_load(
        self, server: tuple[int, Server], opener: Opener, nbytes: int
    ) -> None:
        port, process = server
        backend = opener(port)()
        numbers = range(12)
        put(backend, *numbers, nbytes=nbytes)
        arriving = backend.get(keys(*numbers), Transfer(LONG))
        i, parts = next(arriving)
        process.kill()
        whole = {i: b"".join(parts)}
        with pytest.raises((StorageError, OSError)):
            whole.update((i, b"".join(parts)) for i, parts in arriving)
        assert all(got == value(numbers[i], nbytes) for i, got in whole.items())
        process.start()
        assert put(backend, *numbers, nbytes=nbytes) == 12
        assert everything(backend, *numbers, nbytes=nbytes)
        backend.close()

    def test_a_frozen_server_costs_the_patience_and_then_works_again(
        self, server: tuple[int, Server], opener: Opener
    ) -> None:
        port, process = server
        backend = opener(port)()
        put(backend, 1)
        process.freeze()
        calls = [
            lambda: here(backend, 1, timeout=SHORT),
            lambda: get(backend, 1, timeout=SHORT),
            lambda: put(backend, 2, nbytes=32 * MIB, timeout=SHORT),
            lambda: backend.ping(Transfer(SHORT)),
            lambda: backend.delete([key(1)], Transfer(SHORT)),
        ]
        if self.touches:
            calls.append(lambda: backend.touch([key(1)], Transfer(SHORT)))
        for call in calls:
            began = time.monotonic()
            with pytest.raises(TimeoutError):
                call()
            assert time.monotonic() - began < SHORT + 3.0  # 32 MiB may take 2 s more
        process.thaw()
        eventually(lambda: works(backend))
        assert put(backend, 1, 3) == 2
        assert everything(backend, 1, 3)
        backend.close()

    @pytest.mark.parametrize("fault", ["cut", "stall"])
    @pytest.mark.parametrize("nbytes", [3000, 2 * MIB])
    def test_an_answer_that_ends_anywhere(
        self, proxy: Proxy, opener: Opener, fault: str, nbytes: int
    ) -> None:
        """Whatever comes before the fault is right; what comes after it is an error, at once or
        after the patience; and when the network is well again, so are we."""
        backend = opener(proxy.port)()
        put(backend, *range(4), nbytes=nbytes)
        chance = random.Random(1)
        count = self.offsets if fault == "cut" else self.offsets // 4
        near = [chance.randrange(12) for _ in range(count // 3)]
        for offset in near + [
            chance.randrange(4 * nbytes + 2000) for _ in range(count - len(near))
        ]:
            backend.close()
            backend = opener(proxy.port)()  # its first connection is the one
            setattr(proxy, f"{fault}_after", offset)
            got: dict[int, bytes] = {}
            patience = LONG if fault == "cut" else 0.05
            try:
                for i, parts in backend.get(keys(*range(4)), Transfer(patience)):
                    got[i] = b"".join(parts)
                assert len(got) == 4
            except (StorageError, OSError):
                assert len(got) < 4
            assert all(v == value(n, nbytes) for n, v in got.items())
            proxy.heal()
            assert everything(backend, *range(4), nbytes=nbytes)
        backend.close()

    @pytest.mark.parametrize(
        ("nbytes", "rate"), [(900_000, 100_000.0), (24 * MIB, 8_000_000.0)], ids=["small", "large"]
    )
    def test_a_line_that_is_too_slow_is_given_up(
        self, proxy: Proxy, opener: Opener, nbytes: int, rate: float
    ) -> None:
        """However many pieces a value has: not each of them has the patience."""
        backend = opener(proxy.port)()
        put(backend, 1, nbytes=nbytes)
        proxy.rate = rate
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            get(backend, 1, timeout=SHORT)
        assert time.monotonic() - began < 2.0
        proxy.heal()
        assert everything(backend, 1, nbytes=nbytes)
        backend.close()


class TlsConformance:
    """Subclass it beside RemoteConformance, and define the fixtures `opener`, which takes a url,
    too, and

    tls: (port, authority) of a server that wants a client's certificate, as `localhost`.
    """

    encrypted: ClassVar[str]
    """The scheme of urls with TLS."""

    def test_tls_with_a_certificate_on_both_sides(
        self, tls: tuple[int, Authority], opener: Opener
    ) -> None:
        port, authority = tls
        mine = authority.issue("client")
        files = {"ca": authority.ca, "cert": mine.cert, "key": mine.key}
        backend = opener(url=f"{self.encrypted}://localhost:{port}", tls=files)()
        assert put(backend, *range(4), nbytes=3 * MIB) == 4
        assert everything(backend, *range(4), nbytes=3 * MIB)
        assert all(here(backend, *range(4)))
        backend.close()
        loose = {**files, "check_hostname": False}
        backend = opener(url=f"{self.encrypted}://127.0.0.1:{port}", tls=loose)()
        assert everything(backend, 1, nbytes=3 * MIB)
        backend.close()

    @pytest.mark.parametrize("wrong", ["ca", "host"])
    def test_a_server_that_cannot_be_trusted_is_a_config_error(
        self, tls: tuple[int, Authority], opener: Opener, tmp_path: Path, wrong: str
    ) -> None:
        port, authority = tls
        mine = authority.issue("client")
        ca = Authority(tmp_path, "stranger").ca if wrong == "ca" else authority.ca
        host = "127.0.0.1" if wrong == "host" else "localhost"
        files = {"ca": ca, "cert": mine.cert, "key": mine.key}
        with no_leaks(), pytest.raises(Refused, match="CERTIFICATE_VERIFY_FAILED"):
            greet(opener(url=f"{self.encrypted}://{host}:{port}", tls=files))
