"""What a model computes has one name in every process, whatever its environment."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import sys
import torch
from transformers import BigBirdConfig, BigBirdForCausalLM, LlamaConfig, LlamaForCausalLM
for name in sys.argv[1:]:
    __import__(name)
if sys.argv[1:]:
    BigBirdForCausalLM(BigBirdConfig(hidden_size=24, num_hidden_layers=1, vocab_size=64))
from lmcache_connectors.transformers.identity import Observer
torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=512,
)
print(Observer(LlamaForCausalLM(config).eval()).identity().whole.hex())
"""


def identity(*modules: str, **variables: str) -> str:
    command = [sys.executable, "-c", PROGRAM, *modules]
    env = {**os.environ, **variables}
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout


def test_neither_hash_seed_nor_environment_nor_imports_nor_other_models_are_in_it() -> None:
    one = identity(PYTHONHASHSEED="1", HOSTNAME="here", LANG="C.UTF-8")
    two = identity("pytest", "psutil", PYTHONHASHSEED="2", HOSTNAME="there", OWN="else")
    assert one == two
