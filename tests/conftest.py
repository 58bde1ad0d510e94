"""What every test needs: one thread, so that sums come out in one order, and a quiet, offline Hugging Face."""

from __future__ import annotations

import os

# Nothing here may reach for the network, and a fork in a test must not warn about tokenizers.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_random_numbers() -> Iterator[None]:
    """Every test starts from the same random state, and none leaves a global switch behind."""
    torch.manual_seed(0)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
