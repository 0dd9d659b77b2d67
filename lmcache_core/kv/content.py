"""The content of tensors: digests of all their bytes, so that no change of a weight goes unseen.

XXH3-128 on a few threads where a CPU reads the bytes, and `checksum` on other devices. Equal
tensors have equal digests in every process, on the same kind of device. Neither is a defence
against who crafts weights; a change that nobody made for it goes unseen with 2**-126 at most.
"""

from __future__ import annotations

import enum
import hashlib
import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import xxhash

from lmcache_core.errors import NoContent
from lmcache_core.kv.checksum import checksums

PIECE = 4 << 20
"""Bytes that a thread hashes at once, and the most that is copied where a tensor has gaps."""
MOST_THREADS = 8
"""More do not read memory faster."""
_PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size)


def tensor_digests(tensors: Iterable[torch.Tensor]) -> list[bytes]:
    """16 bytes for each tensor, of its dtype, shape, order in memory and all its bytes.

    Any strides, dtype and device; a subclass made of other tensors is what these are. Waits once
    for each accelerator. Raises NoContent where there are no bytes to read.
    """
    with torch._C.DisableTorchFunction(), torch.no_grad():
        apart = [_apart(tensor) for tensor in tensors]
        digests = _digests([part for _, parts in apart for part in parts])
    following = iter(digests)
    return [
        xxhash.xxh3_128_digest(b"".join([head.encode(), *itertools.islice(following, len(parts))]))
        for head, parts in apart
    ]


def combined_digest(digests: Mapping[str, bytes]) -> bytes:
    """16 bytes for tensors by name, whatever their order."""
    whole = hashlib.blake2b(digest_size=16)
    for name, digest in sorted(digests.items()):
        whole.update(f"{len(name)} {name} {len(digest)} ".encode() + digest)
    return whole.digest()


def _apart(tensor: torch.Tensor) -> tuple[str, list[torch.Tensor]]:
    """What a tensor is made of: a description, and tensors that lie in memory in their order."""
    kind = type(tensor).__qualname__
    if tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor):
        raise NoContent(f"a tensor without bytes ({kind} {list(tensor.shape)} on {tensor.device})")
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        return _made_of([getattr(tensor, name) for name in names], f"{kind} {_text(context)}")
    if tensor.layout == torch.sparse_coo:
        return _made_of([tensor._indices(), tensor._values()], f"{tensor.layout} {tensor.shape}")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise NoContent(f"a tensor whose bytes nobody reads ({kind} {tensor.layout})")
    tensor = tensor.detach().resolve_conj().resolve_neg()
    head = f"{tensor.dtype} {list(tensor.shape)}"
    if tensor.is_contiguous():
        return head, [tensor]
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
    repeated = [dim for dim in order if not strides[dim]]
    for dim in repeated:
        tensor = tensor.narrow(dim, 0, min(1, tensor.shape[dim]))
    return f"{head} {order} {repeated}", [tensor.permute(order)]


def _made_of(inner: Sequence[torch.Tensor], what: str) -> tuple[str, list[torch.Tensor]]:
    apart = [_apart(tensor) for tensor in inner]
    heads = " ".join(f"({len(parts)} {head})" for head, parts in apart)
    return f"{what} {heads}", [part for _, parts in apart for part in parts]


def _text(context: Any) -> str:
    """What a subclass says of itself besides its tensors."""
    if isinstance(context, enum.Enum):
        return str(context)
    if type(context) in _PLAIN:
        return repr(context)
    if isinstance(context, Mapping):
        return _text(sorted((str(key), _text(value)) for key, value in context.items()))
    if isinstance(context, (list, tuple)):
        return f"[{', '.join(map(_text, context))}]"
    raise NoContent(f"a tensor that is made with a {type(context).__qualname__}")


def _digests(parts: Sequence[torch.Tensor]) -> list[bytes]:
    """Of the bytes of tensors, each by the means of its device."""
    digests = [b""] * len(parts)
    for device in {part.device for part in parts}:
        here = [n for n, part in enumerate(parts) if part.device == device]
        means = _hashes if device.type == "cpu" else _checksums
        try:
            found = means([parts[n] for n in here])
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise NoContent(f"tensors on {device} that cannot be read ({error})") from error
        for n, digest in zip(here, found, strict=True):
            digests[n] = digest
    return digests


def _checksums(parts: Sequence[torch.Tensor]) -> list[bytes]:
    left = checksums([part.contiguous().view(-1).view(torch.uint8) for part in parts])
    return [xxhash.xxh3_128_digest(each) for each in left]


def _hashes(parts: Sequence[torch.Tensor]) -> list[bytes]:
    """Of tensors in memory: XXH3-128 of each one's pieces' XXH3-128."""
    pieces = [list(_pieces(part)) for part in parts]
    work = [piece for some in pieces for piece in some]
    hashed = iter(_on_threads(work))
    return [
        xxhash.xxh3_128_digest(b"".join(itertools.islice(hashed, len(some)))) for some in pieces
    ]


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Its values in their order, at most PIECE bytes each."""
    nbytes = tensor.numel() * tensor.element_size()
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        yield from flat.split(PIECE // tensor.element_size()) if nbytes > PIECE else (flat,)
    elif nbytes <= PIECE:
        yield tensor
    else:
        rows = max(1, PIECE * tensor.shape[0] // nbytes)
        for some in tensor.split(rows) if tensor.shape[0] > 1 else tensor.unbind():
            yield from _pieces(some)


def _on_threads(pieces: Sequence[torch.Tensor]) -> list[bytes]:
    """Hash pieces on this thread and some beside it, as many as torch computes on."""
    hashed = [b""] * len(pieces)
    following = itertools.count()  # next() of it is atomic
    errors: list[Exception] = []

    def work() -> None:
        try:
            with torch._C.DisableTorchFunction():  # a thread's own
                while (n := next(following)) < len(pieces):
                    hashed[n] = _hash(pieces[n])
        except Exception as error:
            errors.append(error)

    large = sum(piece.numel() * piece.element_size() for piece in pieces) > PIECE
    count = min(torch.get_num_threads(), MOST_THREADS) if large else 1
    beside = [threading.Thread(target=work, daemon=True) for _ in range(count - 1)]
    for thread in beside:
        thread.start()
    work()
    for thread in beside:
        thread.join()
    if errors:
        raise errors[0]
    return hashed


def _hash(piece: torch.Tensor) -> bytes:
    flat = piece.contiguous().view(-1)
    return xxhash.xxh3_128_digest(flat.view(torch.uint8).numpy().data)
