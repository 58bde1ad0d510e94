"""FlagEmbedding's layerwise reranker under `memfit run`: its vendored MiniCPM calls the checkpoint function itself."""

from __future__ import annotations

import pytest

import tiny
from flagembedding_families import FAMILIES, assert_trains_as_plain, layerwise_minicpm, train
from runs import tail

FAMILY = FAMILIES["reranker-decoder-layerwise"]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.pairs(folder / "pairs.jsonl", scores=True)
    layerwise_minicpm(folder / "minicpm")
    return folder


OPTIONS = {
    "one score": [],
    "teacher's scores": ["--knowledge_distillation", True],
    "no LoRA": ["--use_lora", False, "--head_multi", False],
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_trains_as_without_memfit(runs, models, options):
    """To the last digit, with a plan in place of the checkpointing that the command line asks for."""
    plain = train(runs, FAMILY, models, "plain", *options)
    assert plain.status == 0, tail(plain.output)
    assert_trains_as_plain(runs, FAMILY, models, runs.folder / "plain", *options)


def test_two_ranks(runs, models):
    plain = train(runs, FAMILY, models, "plain", num_ranks=2)
    assert plain.status == 0, tail(plain.output)
    assert_trains_as_plain(runs, FAMILY, models, runs.folder / "plain", num_ranks=2)
