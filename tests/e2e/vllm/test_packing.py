"""Blocks of vLLM's memory, to and from the engine-neutral form: against vLLM's own ops, its
attention, its engine, and the cache of transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from vllm import SamplingParams
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa

from lmcache_connectors.vllm.packing import (
    COLUMNS,
    SPLIT,
    TILES,
    Packing,
    Write,
    cpu_write,
    layer_write,
    packing,
    prove,
)
from lmcache_core import LayoutError
from tests.e2e.vllm.conftest import BLOCK, engine

LAYERS, BLOCKS, HEADS = 3, 4, 2
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [16, 32, 48, 64, 128]
DIMS = CPUAttentionBackend.get_supported_head_sizes()
ISAS = {"vec": (COLUMNS, 32, 16), "vec16": (COLUMNS, 16, 16), "amx": (TILES, 32, 32)}
"""How the writing op of each packs, and of what block sizes and head dims are multiples. vLLM asks
the last for bfloat16 only."""
needs_amx = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(),
    reason="the ops that vLLM has for this CPU do not write as AMX does",
)


def bits(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    raw = torch.empty(shape, dtype=dtype).view(torch.uint8)
    return torch.randint(256, raw.shape, dtype=torch.uint8).view(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def pages(blocks: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
    """Key and value cache, as the CPU backend takes them from a layer's blocks."""
    return blocks.view(*blocks.shape[:2], -1, dim).chunk(2, dim=2)


ASKED = [
    pytest.param(
        isa, dtype, dim, id=f"{isa}-{dtype}-{dim}", marks=needs_amx if isa == "amx" else ()
    )
    for isa, (_, _, dim_unit) in ISAS.items()
    for dtype in DTYPES
    for dim in DIMS
    if dim % dim_unit == 0 and (isa != "amx" or dtype == torch.bfloat16)
]
"""What vLLM asks of each."""


@pytest.mark.parametrize(("isa", "dtype", "dim"), ASKED)
def test_what_vllm_writes_is_found_and_written_alike(isa: str, dtype: torch.dtype, dim: int):
    known, block_unit, _ = ISAS[isa]
    for tokens in (size for size in SIZES if size % block_unit == 0):
        memory = bits(LAYERS, BLOCKS, HEADS, tokens, 2 * dim, dtype=dtype)
        k, v = (bits(LAYERS, HEADS, tokens, dim, dtype=dtype) for _ in range(2))
        expected = memory.clone()
        slots = torch.arange(tokens) + 2 * tokens
        for layer, key, value in zip(expected, k.transpose(1, 2), v.transpose(1, 2), strict=True):
            ops.cpu_attn_reshape_and_cache(key, value, *pages(layer, dim), slots, isa)

        known.pack(k, v, memory[:, 2])
        assert same(memory, expected)
        found = torch.zeros_like(k), torch.zeros_like(v)
        known.unpack(expected[:, 2], *found)
        assert same(found[0], k)
        assert same(found[1], v)
        # and no other takes it for its own
        like = torch.empty(3, HEADS, tokens, 2 * dim, dtype=dtype)
        proven = [p for p in (SPLIT, COLUMNS, TILES) if prove(p, cpu_write(isa), like)]
        assert proven == [known]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_packing_is_known_for_all_that_the_cpu_backend_supports(dtype: torch.dtype):
    for dim in DIMS:
        for tokens in SIZES:
            isa = _get_attn_isa(dtype, tokens, dim)
            assert packing("CPU_ATTN", dtype, HEADS, tokens, dim) is ISAS[isa][0]


@pytest.mark.parametrize("dim", [32, 80, 128])
@pytest.mark.parametrize("isa", ["vec", "vec16"])
def test_vllms_attention_reads_it_so(isa: str, dim: int):
    """Two requests of other lengths, their blocks out of order."""
    torch.manual_seed(0)
    tokens, groups, tables, lengths = 32, 3, [[2, 0], [1, 3]], [64, 41]
    memory = torch.full((1, BLOCKS, HEADS, tokens, 2 * dim), torch.nan)
    k, v = torch.randn(2, 2, 1, HEADS, 2 * tokens, dim)
    for request, table in enumerate(tables):
        for n, block in enumerate(table):
            part = slice(n * tokens, (n + 1) * tokens)
            COLUMNS.pack(k[request, :, :, part], v[request, :, :, part], memory[:, block])
    query = torch.randn(sum(lengths), groups * HEADS, dim)
    out = torch.zeros_like(query)
    starts = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=2, num_heads=groups * HEADS, num_kv_heads=HEADS, head_dim=dim,
        seq_lens=seq_lens, dtype=torch.float32, query_start_loc=starts, causal=True,
        sliding_window_size=-1, isa=isa, enable_kv_split=True,
    )  # fmt: skip
    key_cache, value_cache = pages(memory[0], dim)
    ops.cpu_attention_with_kv_cache(
        query=query, key_cache=key_cache, value_cache=value_cache, output=out,
        query_start_loc=starts, seq_lens=seq_lens, scale=dim**-0.5, causal=True,
        alibi_slopes=None, sliding_window=-1,
        block_table=torch.tensor(tables, dtype=torch.int32), softcap=0,
        scheduler_metadata=plan, s_aux=None,
    )  # fmt: skip
    for n, length in enumerate(lengths):
        mine = slice(int(starts[n]), int(starts[n + 1]))
        expected = scaled_dot_product_attention(
            query[None, mine].transpose(1, 2), k[n, :, :, :length], v[n, :, :, :length],
            is_causal=True, enable_gqa=True,
        )  # fmt: skip
        torch.testing.assert_close(out[mine], expected[0].transpose(0, 1), atol=1e-5, rtol=1e-4)


def shape(known: Packing) -> st.SearchStrategy[tuple[int, ...]]:
    """Layers, heads, tokens, dim."""
    few, unit = st.integers(1, 4), st.integers(1, 4).map(lambda n: 16 * n)
    return st.tuples(few, few, *([unit] * 2 if known is TILES else [st.integers(1, 70)] * 2))


@pytest.mark.parametrize("known", [SPLIT, COLUMNS, TILES], ids=lambda p: p.name)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_there_and_back(known: Packing, data: st.DataObject):
    layers, heads, tokens, dim = data.draw(shape(known))
    dtype = data.draw(st.sampled_from(DTYPES[1:] if known is TILES else DTYPES))
    if known is SPLIT and data.draw(st.booleans()):  # heads within tokens
        memory = bits(layers, BLOCKS, tokens, heads, 2 * dim, dtype=dtype).transpose(2, 3)
    else:
        memory = bits(layers, BLOCKS, heads, tokens, 2 * dim, dtype=dtype)
    block = data.draw(st.integers(0, BLOCKS - 1))
    before = memory.clone()

    k, v = torch.zeros(2, layers, heads, tokens, dim, dtype=dtype)
    known.unpack(memory[:, block], k, v)
    assert same(memory, before)
    memory[:, block] = 0
    known.pack(k, v, memory[:, block])
    assert same(memory, before)

    k, v = (bits(layers, heads, tokens, dim, dtype=dtype) for _ in range(2))
    known.pack(k, v, memory[:, block])
    found = torch.zeros_like(k), torch.zeros_like(v)
    known.unpack(memory[:, block], *found)
    assert same(found[0], k)
    assert same(found[1], v)


def test_split_is_key_then_value_of_each_token():
    x = bits(LAYERS, HEADS, 8, 10)
    k, v = torch.zeros(LAYERS, HEADS, 8, 6).bfloat16(), torch.zeros(LAYERS, HEADS, 8, 4).bfloat16()
    SPLIT.unpack(x, k, v)
    assert same(k, x[..., :6])
    assert same(v, x[..., 6:])


def mla_write(latent: torch.Tensor, rope: torch.Tensor, x: torch.Tensor, slots: torch.Tensor):
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl

    CPUMLAImpl.do_kv_cache_update(None, latent, rope.unsqueeze(1), x, slots, "auto", torch.ones(1))


@pytest.mark.parametrize(
    ("backend", "write"),
    [
        ("CPU_MLA", mla_write),
        pytest.param("AMX_MLA", ops.amx_mla_concat_and_cache, marks=needs_amx),
    ],
)
def test_mla_is_one_vector_per_token(backend: str, write: Any):
    """DeepSeek's 512 + 64, as vLLM's two CPU backends write them."""
    x, back = torch.zeros(2, 1, 1, 32, 576, dtype=torch.bfloat16)
    latent, rope = torch.randn(32, 512).bfloat16(), torch.randn(32, 64).bfloat16()
    slots = torch.randperm(32)
    write(latent, rope, x[0], slots)
    known = packing(backend, torch.bfloat16, 1, 32, 576)
    assert known is SPLIT
    k = torch.zeros(1, 1, 32, 576, dtype=torch.bfloat16)
    known.unpack(x, k, None)
    assert same(k[0, 0, slots], torch.cat([latent, rope], dim=-1))
    known.pack(k, None, back)
    assert same(back, x)


@pytest.mark.parametrize("backend", ["CPU_ATTN", "FLASH_ATTN"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_quantized_is_unknown(backend: str, dtype: torch.dtype):
    assert packing(backend, dtype, HEADS, 32, 64) is None


def test_another_backend_is_unknown():
    assert packing("FLASH_ATTN", torch.bfloat16, HEADS, 16, 64) is SPLIT
    assert packing("ROCM_ATTN", torch.bfloat16, HEADS, 16, 64) is None


def test_an_instruction_set_that_is_not_here_is_unknown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vllm.v1.attention.backends.cpu_attn._get_attn_isa", lambda *_: "neon")
    assert packing("CPU_ATTN", torch.bfloat16, HEADS, 32, 64) is None


def swapped_tokens(write: Write) -> Write:
    def other(k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, slots: torch.Tensor) -> None:
        write(k, v, blocks, slots ^ 1)

    return other


def swapped_tensors(write: Write) -> Write:
    return lambda k, v, blocks, slots: write(v, k, blocks, slots)


def one_bit(write: Write) -> Write:
    def other(k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, slots: torch.Tensor) -> None:
        write(k, v, blocks, slots)
        blocks.view(torch.uint8)[1, -1, -1, -1] ^= 1

    return other


def another_block(write: Write) -> Write:
    def other(k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, slots: torch.Tensor) -> None:
        write(k, v, blocks, slots)
        write(k, v, blocks, slots % 32)

    return other


def nothing(_: Write) -> Write:
    return lambda *_: None


@pytest.mark.parametrize(
    "changed", [swapped_tokens, swapped_tensors, one_bit, another_block, nothing]
)
def test_a_vllm_that_writes_otherwise_is_noticed(changed: Any):
    like = torch.zeros(3, HEADS, 32, 128, dtype=torch.bfloat16)
    assert prove(COLUMNS, cpu_write("vec"), like)
    assert not any(prove(known, changed(cpu_write("vec")), like) for known in (COLUMNS, TILES))


def test_the_proof_leaves_all_as_it_was():
    like = bits(8, HEADS, 32, 128)
    before, state = like.clone(), torch.get_rng_state()
    assert prove(COLUMNS, cpu_write("vec"), like)
    assert same(like, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("known", [SPLIT, COLUMNS, TILES], ids=lambda p: p.name)
def test_nothing_is_converted_or_broadcast(known: Packing):
    x = bits(LAYERS, HEADS, 32, 64)
    k = torch.zeros(LAYERS, HEADS, 32, 32, dtype=torch.bfloat16)
    for wrong in (k.half(), k[:1]):
        with pytest.raises(LayoutError):
            known.unpack(x, k, wrong)
        with pytest.raises(LayoutError):
            known.pack(k, wrong, x)


@pytest.mark.parametrize("known", [COLUMNS, TILES], ids=lambda p: p.name)
def test_pages_that_do_not_lie_in_one_piece_are_refused(known: Packing):
    """Heads within tokens, as GPUs have it: a copy of the block would be written, not the block."""
    x = bits(LAYERS, 32, HEADS, 64).transpose(1, 2)
    k = torch.zeros(LAYERS, HEADS, 32, 32, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError):
        known.pack(k, k, x)


@contextlib.contextmanager
def attention_layers(model: Path, **options: Any) -> Iterator[tuple[Any, list[Any]]]:
    with engine(model, **options) as llm:
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        yield llm, list(runner.compilation_config.static_forward_context.values())


def test_a_running_vllm_keeps_what_transformers_keeps(llama: Path):
    """The same tokens, the same keys and values: another engine could go on with them."""
    from transformers import AutoModelForCausalLM

    ids = torch.randint(3, 512, (2 * BLOCK,)).tolist()
    with attention_layers(llama) as (llm, layers):
        memory = [layer.kv_cache for layer in layers]
        heads, tokens, width = memory[0].shape[1:]
        known = packing("CPU_ATTN", memory[0].dtype, heads, tokens, width // 2)
        assert known is not None
        assert all(prove(known, layer_write(layer), layer.kv_cache) for layer in layers)
        llm.generate([{"prompt_token_ids": ids}], SamplingParams(max_tokens=1, detokenize=False))
        k, v = torch.zeros(2, len(layers), heads, 2 * tokens, width // 2)
        for n, block in enumerate((1, 2)):  # the first that vLLM gives out
            parts = torch.zeros(2, len(layers), heads, tokens, width // 2)
            known.unpack(torch.stack([layer[block] for layer in memory]), *parts)
            k[:, :, n * tokens : (n + 1) * tokens], v[:, :, n * tokens : (n + 1) * tokens] = parts
    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        cache = model(torch.tensor([ids])).past_key_values
    for n, layer in enumerate(cache.layers):
        torch.testing.assert_close(k[n], layer.keys[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(v[n], layer.values[0], atol=1e-5, rtol=1e-4)
