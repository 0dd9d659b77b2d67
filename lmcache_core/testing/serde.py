"""SerdeConformance: everything that a Serde promises."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache_core.errors import FrameError
from lmcache_core.frames import frame
from lmcache_core.frames.pipeline import Pipeline
from lmcache_core.kv.chunk import Chunk
from lmcache_core.kv.layout import DTYPES, KVLayout, Tensors
from lmcache_core.serde import BytesToBytes, Serde
from lmcache_core.testing.chunks import layouts, make_chunk, random_tensors, tiny_layout
from lmcache_core.testing.frames import forged, mutants, read_head, read_header

_RELAXED = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)
_ALL = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


class SerdeConformance:
    """Subclass it, name it Test..., and define the fixture `serde`: an instance of yours.

    A lossy serde overrides `assert_close` with the bound that it promises.
    """

    dtypes: ClassVar[tuple[str, ...]] = _ALL
    """Dtypes of KV that it takes."""
    checks_itself: ClassVar[bool] = False
    """Decoding refuses any changed payload, not only one of another length."""

    forgeries: ClassVar[int] = 400
    """Forged frames to try."""

    deterministic: ClassVar[bool] = True
    """The same chunk gives the same bytes."""

    @pytest.fixture
    def serde(self) -> Serde:
        raise NotImplementedError("define the fixture serde")

    def assert_close(self, decoded: torch.Tensor, original: torch.Tensor) -> None:
        """Exact, bit for bit, unless overridden."""
        same = decoded.view(torch.uint8), original.contiguous().view(torch.uint8)
        assert torch.equal(*same)

    def check(self, serde: Serde, chunk: Chunk) -> None:
        """A frame of this serde decodes to what it was made from."""
        data = encoded(serde, chunk)
        again = decoded(serde, data, chunk)
        chunk.namespace.layout.check(again.tensors, chunk.tokens)
        for name, original in chunk.tensors.items():
            self.assert_close(again.tensors[name], original)

    @_RELAXED
    @given(data=st.data(), tokens=st.sampled_from([1, 2, 7, 33]))
    def test_any_layout_comes_back(self, serde: Serde, data: st.DataObject, tokens: int) -> None:
        layout = data.draw(layouts(self.dtypes))
        self.check(serde, make_chunk(layout, tokens, seed=tokens))

    def test_special_values_come_back(self, serde: Serde) -> None:
        for dtype in self.dtypes:
            layout = tiny_layout(dtype)
            most = torch.finfo(DTYPES[dtype]).max
            for value in (
                *(0.0, -0.0, 1.0, 1e-40, float("nan"), float("inf"), float("-inf")),
                *(most, -most, 0.99 * most),
            ):
                tensors = random_tensors(layout, 5)
                special = torch.tensor(value).to(tensors["g0.k"].dtype)
                constant = {name: special.expand(t.shape) for name, t in tensors.items()}
                self.check(serde, _with(layout, constant))
                mixed = {name: t.clone() for name, t in tensors.items()}
                for tensor in mixed.values():
                    tensor[0, 0, 2] = special
                self.check(serde, _with(layout, mixed))

    def test_encoding_is_deterministic(self, serde: Serde) -> None:
        chunk = make_chunk(tiny_layout(self.dtypes[0]), 9)
        assert (encoded(serde, chunk) == encoded(serde, chunk)) == self.deterministic

    def test_the_size_is_known_before_as_declared(self, serde: Serde) -> None:
        layout = tiny_layout(self.dtypes[0])
        sizes = set()
        for magnitude in (0.0, 1.0, 2.0**60):  # of every second token
            tensors = {n: t.float() for n, t in random_tensors(layout, 40).items()}
            for tensor in tensors.values():
                tensor[:, :, ::2] *= magnitude
            chunk = _with(layout, {n: t.to(DTYPES[self.dtypes[0]]) for n, t in tensors.items()})
            sizes.add(len(encoded(serde, chunk)))
        assert (len(sizes) == 1) == serde.known_size

    def test_encoding_leaves_its_input_alone(self, serde: Serde) -> None:
        """Its own, where it says `keeps_input`; else it has copies."""
        chunk = make_chunk(tiny_layout(self.dtypes[0]), 9)
        before = {name: tensor.clone() for name, tensor in chunk.tensors.items()}
        encoded(serde, chunk)
        for name, tensor in chunk.tensors.items():
            assert torch.equal(tensor, before[name])

    def test_decoding_leaves_the_payload_alone(self, serde: Serde) -> None:
        """It may lie in a memory tier and be decoded again."""
        chunk = make_chunk(tiny_layout(self.dtypes[0]), 40)
        data = bytearray(encoded(serde, chunk))
        before = bytes(data)
        for _ in range(2):
            decoded(serde, data, chunk)
        assert bytes(data) == before

    @_RELAXED
    @given(cuts=st.lists(st.integers(0, 1 << 12), max_size=5))
    def test_a_payload_may_come_in_any_parts(self, serde: Serde, cuts: list[int]) -> None:
        chunk = make_chunk(tiny_layout(self.dtypes[0]), 40)
        data = memoryview(encoded(serde, chunk))
        start = read_head(data).payload
        offsets = sorted({start + cut for cut in cuts if start + cut <= data.nbytes})
        ends = zip([0, *offsets], [*offsets, data.nbytes], strict=True)
        parts = [data[begin:end] for begin, end in ends]
        again = frame.decode(parts, chunk.key, Pipeline([serde]), chunk.tokens)
        for name, original in chunk.tensors.items():
            self.assert_close(again.tensors[name], original)

    def test_tensors_of_any_strides_are_taken(self, serde: Serde) -> None:
        layout = tiny_layout(self.dtypes[0])
        tensors = {n: t.transpose(0, 2).contiguous().transpose(0, 2)
                   for n, t in random_tensors(layout, 6).items()}  # fmt: skip
        self.check(serde, _with(layout, tensors))

    def test_threads_share_one_instance(self, serde: Serde) -> None:
        chunks = [make_chunk(tiny_layout(self.dtypes[0]), 40, seed=n) for n in range(8)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda chunk: self.check(serde, chunk), chunks * 4))

    def test_a_frame_says_how_it_is_read(self, serde: Serde) -> None:
        """A tier with another pipeline reads it; where it is sealed, none without the key."""
        chunk = make_chunk(tiny_layout(self.dtypes[0]), 40)
        data = memoryview(encoded(serde, chunk))
        if isinstance(serde, BytesToBytes) and serde.seals:
            with pytest.raises(FrameError) as raised:
                frame.decode([data], chunk.key, Pipeline([]), chunk.tokens)
            assert raised.value.reason == "unreadable"
            return
        again = frame.decode([data], chunk.key, Pipeline([]), chunk.tokens)
        for name, original in chunk.tensors.items():
            self.assert_close(again.tensors[name], original)

    def test_a_tier_that_seals_takes_nothing_else(self, serde: Serde) -> None:
        if not (isinstance(serde, BytesToBytes) and serde.seals):
            return
        chunk = make_chunk(tiny_layout(self.dtypes[0]), 40)
        plain = b"".join(frame.encode(chunk, Pipeline([])))
        sealed = encoded(serde, chunk)
        header = read_header(sealed)
        shapes = [[name, dtype, [*shape[:2], 1, 1]] for name, dtype, shape in header["tensors"]]
        for data in (
            plain,
            forged(sealed, header={**header, "tensors": shapes}),
            forged(sealed, header={**header, "pipeline": header["pipeline"][:-1]}),
            forged(sealed, index=1),
        ):
            _refuse(serde, data, chunk)

    def test_a_frame_records_no_more_than_it_declares(self, serde: Serde) -> None:
        data = encoded(serde, make_chunk(tiny_layout(self.dtypes[0]), 9))
        options = dict(read_header(data)["pipeline"])[serde.name]
        assert options.keys() <= serde.Recorded.model_fields.keys()

    def test_forged_frames_are_refused_or_keep_the_shapes(self, serde: Serde) -> None:
        """Whatever field of a frame a stranger chooses: a miss, or tensors of the layout."""
        chunk = make_chunk(tiny_layout(self.dtypes[0]), 9)
        for mutant in mutants(encoded(serde, chunk), self.forgeries):
            try:
                again = decoded(serde, mutant, chunk)
            except FrameError:
                continue
            chunk.namespace.layout.check(again.tensors, again.tokens)

    def test_a_payload_of_another_length_is_refused(self, serde: Serde) -> None:
        chunk = make_chunk(tiny_layout(self.dtypes[0]), 9)
        data = bytearray(encoded(serde, chunk))
        for wrong in (data[:-1], data[: len(data) // 2], data + b"\0"):
            start = read_head(bytes(data)).payload
            _refuse(serde, forged(bytes(data), payload=bytes(wrong[start:])), chunk)

    def test_a_changed_payload_is_refused_or_keeps_its_shapes(self, serde: Serde) -> None:
        chunk = make_chunk(tiny_layout(self.dtypes[0]), 9)
        data = encoded(serde, chunk)
        start = read_head(data).payload
        for offset in range(start, len(data), max(1, (len(data) - start) // 200)):
            payload = bytearray(data[start:])
            payload[offset - start] ^= 0x5A
            changed = forged(data, payload=bytes(payload))
            if self.checks_itself:
                _refuse(serde, changed, chunk)
                continue
            try:
                again = decoded(serde, changed, chunk)
            except FrameError:
                continue
            chunk.namespace.layout.check(again.tensors, chunk.tokens)


def encoded(serde: Serde, chunk: Chunk) -> bytes:
    """The frame of a chunk, by a pipeline of this one serde (completed with raw where needed)."""
    return b"".join(frame.encode(chunk, Pipeline([serde])))


def decoded(serde: Serde, data: bytes | bytearray, chunk: Chunk) -> Chunk:
    """What a tier of this one serde reads from the frame of a chunk."""
    return frame.decode([memoryview(data)], chunk.key, Pipeline([serde]), chunk.tokens)


def _with(layout: KVLayout, tensors: Tensors) -> Chunk:
    chunk = make_chunk(layout, next(iter(tensors.values())).shape[2])
    return Chunk(chunk.key, chunk.namespace, chunk.index, chunk.tokens, tensors)


def _refuse(serde: Serde, data: bytes, chunk: Chunk) -> None:
    with pytest.raises(FrameError):
        decoded(serde, data, chunk)
