"""A sample of Transformers' causal language models is served and refused as the page says."""

from __future__ import annotations

import pytest
import transformers

from tests.connectors.transformers.families import label, labels, outcomes, written

SAMPLE = (
    "bert", "bloom", "deepseek_v3", "falcon", "gemma3_text", "gpt2", "mamba", "mixtral", "mllama",
    "opt", "prophetnet", "qwen3_next",
)  # fmt: skip


def test_the_page_is_of_this_transformers() -> None:
    """Else `make families` writes it anew."""
    assert written().startswith(f"Transformers {transformers.__version__}: ")


@pytest.mark.parametrize("family", SAMPLE)
def test_a_family_is_what_the_page_says(family: str) -> None:
    on_the_page = labels(written())
    for one in outcomes([family]):
        assert one.kind in ("served", "refused"), one
        assert label(one) == on_the_page[one.name]


def test_no_family_differs_on_the_page() -> None:
    found = labels(written())
    assert len(found) > 150
    assert not [name for name, row in found.items() if row.startswith("differs")]
