"""The table of known models: every entry is built, without memory, and has as many parameters as were published.

And where configurations come from: files, the table, the Hub.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

from memfit import configurations, known
from memfit.errors import ModelError, UnknownNameError, UsageError
from memfit.names import plain
from memfit.simulation.tasks import task_of

MODELS = {model.id: model for model in known.models()}
# Fields that a class takes without naming them among its own, and those that only the original code reads.
UNNAMED = set(
    "rope_theta rope_scaling rope_local_base_freq global_rope_theta local_rope_theta rotary_emb_base rotary_pct "
    "partial_rotary_factor sliding_window_pattern global_attn_every_n_layers max_window_layers num_experts head_dim "
    "attention_bias position_buckets share_att_key norm_rel_ebd num_labels num_hidden_layers decoder_start_token_id "
    "n_ctx n_positions moe_layer_freq scoring_func aux_loss_alpha seq_aux".split()
)
TINY = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}

# The vision tower that the models of Gemma 3 share, from their configurations.
GEMMA_3_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}
GEMMA_3 = {"4b": 4_300_079_472, "12b": 12_187_325_040, "27b": 27_432_406_640}


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_a_known_model_has_the_published_number_of_parameters(name):
    """Built whole, on the meta device: a wrong field would count another number."""
    model = MODELS[name]
    with torch.device("meta"):
        built = getattr(transformers, known.AUTO_CLASSES[model.task]).from_config(configurations.load(name))
    assert num_parameters(built) == model.num_parameters


@pytest.mark.parametrize("size", GEMMA_3)
def test_the_text_of_gemma_3_is_what_its_vision_tower_leaves(size):
    text = MODELS[f"google/gemma-3-{size}-pt"]
    assert str(GEMMA_3[size]) in text.note
    config = transformers.Gemma3Config.from_dict(
        {"text_config": dict(text.config), "vision_config": GEMMA_3_VISION, "mm_tokens_per_image": 256}
    )
    with torch.device("meta"):
        whole = transformers.Gemma3ForConditionalGeneration(config)
    assert num_parameters(whole) == GEMMA_3[size]


@pytest.mark.parametrize("name", MODELS)
def test_the_fields_reach_the_configuration(name):
    """Numbers that the count of parameters does not see: positions, dropout, epsilons, windows."""
    model = MODELS[name]
    loaded = configurations.load(name)
    assert set(model.config) <= set(type(loaded)().to_dict()) | UNNAMED
    config = loaded.to_dict()
    for field, value in model.config.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and field in config:
            assert config[field] == value, field
    rope = config.get("rope_parameters")
    if "rope_theta" in model.config:
        full = rope.get("full_attention", rope)
        assert full["rope_theta"] == model.config["rope_theta"]
        scaling = model.config.get("rope_scaling") or {}
        assert all(full[field] == value for field, value in scaling.items())
    if "rope_local_base_freq" in model.config:
        assert rope["sliding_attention"]["rope_theta"] == model.config["rope_local_base_freq"]


def test_the_families_of_the_issue_are_there():
    kinds = {model.config["model_type"] for model in MODELS.values()}
    assert len(MODELS) >= 40
    assert kinds >= set(
        "llama qwen2 qwen3 qwen3_moe mistral mixtral gemma2 gemma3_text phi phi3 deepseek_v2 gpt2 bert xlm-roberta "
        "modernbert t5 vit whisper".split()
    )


def test_every_name_means_one_model():
    owners = {}
    for model in MODELS.values():
        for name in model.names():
            assert owners.setdefault(plain(name), model.id) == model.id


def test_every_entry_is_whole():
    for model in MODELS.values():
        assert model.task in known.AUTO_CLASSES
        assert model.config["model_type"] in CONFIG_MAPPING
        assert all(hasattr(transformers, name) for name in model.config.get("architectures", []))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B"),
        ("llama-3-8b", "meta-llama/Meta-Llama-3-8B"),
        ("Llama 3.1 405B", "meta-llama/Llama-3.1-405B"),
        ("qwen2.5-7b", "Qwen/Qwen2.5-7B"),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
        ("bge-m3", "BAAI/bge-m3"),
        ("bert-base-uncased", "google-bert/bert-base-uncased"),
        ("gpt2", "openai-community/gpt2"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-8B"),
    ],
)
def test_models_are_found_however_they_are_written(name, found):
    assert known.find(name).id == found


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("llama-3-9b", "llama-3-8b"),
        ("acme/Qwen2.5-8B", "Qwen2.5-7B"),
        ("bge-m4", "bge-m3"),
        ("mixtral-8x8b", "mixtral-8x7b"),
    ],
)
def test_an_unknown_model_names_the_nearest(name, near):
    with pytest.raises(UnknownNameError, match=f"no model `{name}`") as caught:
        known.find(name)
    assert near in caught.value.nearest
    assert f"`{near}`" in str(caught.value)


def test_an_organisation_is_not_ignored():
    with pytest.raises(UnknownNameError):
        known.find("acme/bge-m3")


def test_the_table_is_read_without_torch():
    code = (
        "import sys; from memfit import known; known.find('bge-m3'); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_a_known_configuration_is_the_callers_own():
    first = configurations.load("llama-3.1-8b")
    first.hidden_size = 1
    first.rope_parameters["factor"] = 1.0
    second = configurations.load("llama-3.1-8b")
    assert (second.hidden_size, second.rope_parameters["factor"]) == (4096, 8.0)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("Qwen/Qwen3-Embedding-0.6B", "embedder"),
        ("bge-reranker-v2-m3", "reranker"),
        ("bge-m3", "embedder"),
        ("Qwen/Qwen3-0.6B", "causal-lm"),
        ("t5-small", "seq2seq"),
        ("vit-base-patch16-224", "image"),
        ("whisper-small", "seq2seq"),
    ],
)
def test_a_known_model_is_trained_for_its_own_task(name, task):
    """The architectures of an embedder and of a reranker may be those of other tasks."""
    assert task_of(configurations.load(name)) == task


def test_a_copy_of_a_known_configuration_is_trained_for_what_it_says(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(known.find("bge-reranker-v2-m3").config))
    assert task_of(configurations.load(tmp_path)) == "classification"


@pytest.mark.parametrize("form", ["folder", "file", "other.json"])
def test_a_local_configuration_is_read(tmp_path, form):
    file = tmp_path / ("other.json" if form == "other.json" else "config.json")
    file.write_text(json.dumps(TINY))
    config = configurations.load(tmp_path if form == "folder" else file)
    assert isinstance(config, transformers.LlamaConfig)
    assert config.hidden_size == 32


def test_a_file_comes_before_the_table_and_the_table_before_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert configurations.load("gpt2").model_type == "gpt2"
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(TINY))
    assert configurations.load("gpt2").model_type == "llama"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "holds a list: a configuration is an object"),
        ("{}", "has no `model_type`"),
        ('{"model_type": 3}', "has no `model_type`"),
        ('{"model_type": "lama"}', "does not know. Nearest: `llama`"),
        (json.dumps({**TINY, "auto_map": {}}), "brings its own code (`auto_map`)"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError) as caught:
        configurations.load(tmp_path)
    assert message in str(caught.value)


def test_what_transformers_refuses_is_said(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "hidden_size": "many"}))
    with pytest.raises(ModelError, match="transformers refuses the configuration"):
        configurations.load(tmp_path)


@pytest.mark.parametrize("name", ["/absent/model", "./absent", "absent/config.json", "a/b/c"])
def test_an_absent_path_is_no_name(name):
    with pytest.raises(UsageError, match="no file or folder") as caught:
        configurations.load(name)
    assert not isinstance(caught.value, UnknownNameError)


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no `config\.json`"):
        configurations.load(tmp_path)


def test_what_the_hub_does_not_give_names_the_nearest_known_model():
    """Tests have no network."""
    with pytest.raises(UnknownNameError, match="the Hub did not give it") as caught:
        configurations.load("acme/llama-3-9b")
    assert "llama-3-8b" in caught.value.nearest


def test_code_of_a_configuration_runs_only_when_that_is_agreed(tmp_path, monkeypatch):
    # transformers copies code to its cache before it imports it.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "configuration_acme.py").write_text(
        "from pathlib import Path\n"
        "from transformers import PreTrainedConfig\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class AcmeConfig(PreTrainedConfig):\n"
        "    model_type = 'acme'\n"
        "    acme_size: int = 3\n"
    )
    auto_map = {"AutoConfig": "configuration_acme.AcmeConfig"}
    (folder / "config.json").write_text(json.dumps({"model_type": "acme", "auto_map": auto_map, "acme_size": 7}))
    with pytest.raises(UsageError, match="brings its own code"):
        configurations.load(folder)
    assert not (tmp_path / "ran").exists()
    config = configurations.load(folder, trust_remote_code=True)
    assert (tmp_path / "ran").exists()
    assert (type(config).__name__, config.acme_size) == ("AcmeConfig", 7)


def test_code_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    auto_map = {"AutoConfig": "configuration_absent.AcmeConfig"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "acme", "auto_map": auto_map}))
    with pytest.raises(ModelError, match="The code of the configuration"):
        configurations.load(tmp_path, trust_remote_code=True)


def test_the_hub_is_asked_and_its_code_refused(tmp_path):
    """From the Hub's cache on disk, since tests have no network; where it lies is read when transformers starts."""
    for name, more in (("plain", {}), ("coded", {"auto_map": {"AutoConfig": "configuration_acme.AcmeConfig"}})):
        model = tmp_path / "hub" / f"models--acme--{name}"
        (model / "refs").mkdir(parents=True)
        (model / "refs" / "main").write_text("0" * 40)
        (model / "snapshots" / ("0" * 40)).mkdir(parents=True)
        (model / "snapshots" / ("0" * 40) / "config.json").write_text(json.dumps({**TINY, **more}))
    code = (
        "from memfit import configurations, errors\n"
        "config = configurations.load('acme/plain')\n"
        "print(type(config).__name__, config.hidden_size)\n"
        "try:\n"
        "    configurations.load('acme/coded')\n"
        "except errors.UsageError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    first, second = done.stdout.splitlines()
    assert first == "LlamaConfig 32", done.stderr
    assert second.startswith("The configuration `acme/coded` brings its own code (`auto_map`).")
