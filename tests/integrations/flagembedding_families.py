"""The families that FlagEmbedding trains, each with options of its own, and how one is trained."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
from runs import Done, Runs, assert_planned, assert_same_training, report, tail

STEPS = 4
CHECKPOINTING = ["--gradient_checkpointing", True]

_SHARED = f"""
--train_group_size 4 --query_max_len 32 --passage_max_len 64 --pad_to_multiple_of 8 --learning_rate 1e-3
--max_steps {STEPS} --per_device_train_batch_size 4 --dataloader_drop_last True --logging_steps 1
--save_steps {STEPS} --report_to none --use_cpu True --disable_tqdm True --seed 7
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One entry point of FlagEmbedding.

    Attributes:
        module: Behind ``FlagEmbedding.finetune``.
        model: Name of the model to train.
        caught: Class of the model that is told to checkpoint, which the report must name.
        options: Of its command line, in words.
        ranks_options: More of them when several ranks train.
    """

    module: str
    model: str
    caught: str
    options: str
    ranks_options: str = ""


FAMILIES = {
    "embedder-encoder-base": Family(
        module="embedder.encoder_only.base",
        model="bert",
        caught="BertModel",
        options="--temperature 0.02 --knowledge_distillation True --sub_batch_size 3",
        ranks_options="--negatives_cross_device True",
    ),
    "embedder-encoder-m3": Family(
        module="embedder.encoder_only.m3",
        model="xlm-roberta",
        caught="XLMRobertaModel",
        options="--temperature 0.02 --unified_finetuning True --use_self_distill True --knowledge_distillation True "
        "--kd_loss_type m3_kd_loss --fix_position_embedding True",
        ranks_options="--negatives_cross_device True",
    ),
    "embedder-decoder-base": Family(
        module="embedder.decoder_only.base",
        model="mistral",
        caught="MistralModel",
        options="--temperature 0.02 --sentence_pooling_method last_token --lora_rank 8 --knowledge_distillation True "
        "--additional_special_tokens <instruct> <query> --query_instruction_format <instruct>{}<query>{} "
        "--query_instruction_for_retrieval Continue.",
        ranks_options="--negatives_cross_device True",
    ),
    "embedder-decoder-icl": Family(
        module="embedder.decoder_only.icl",
        model="mistral",
        caught="MistralModel",
        # 512 tokens are reserved for the query itself: more leave room for examples.
        options="--temperature 0.02 --sentence_pooling_method last_token --lora_rank 8 --query_max_len 640 "
        "--same_dataset_within_batch True --example_query_max_len 24 --example_passage_max_len 32 "
        "--query_instruction_for_retrieval Continue. --query_instruction_format <instruct>{}\n<query>{}",
        ranks_options="--negatives_cross_device True",
    ),
    "reranker-encoder-base": Family(
        module="reranker.encoder_only.base",
        model="bert-classifier",
        caught="BertForSequenceClassification",
        options="--knowledge_distillation True",
    ),
    "reranker-decoder-base": Family(
        module="reranker.decoder_only.base",
        model="gemma",
        caught="GemmaForCausalLM",
        options="--lora_rank 8 --knowledge_distillation True --gradient_accumulation_steps 2",
    ),
    "reranker-decoder-layerwise": Family(
        module="reranker.decoder_only.layerwise",
        model="minicpm",
        caught="LayerWiseMiniCPMForCausalLM",
        options="--lora_rank 8 --model_type from_raw_model --start_layer 2 --head_multi True --trust_remote_code True",
    ),
}


def layerwise_minicpm(folder: Path) -> Path:
    """The model of the layerwise reranker, with weights as Llama names them: MiniCPM's are the same.

    Its folder brings the code of its configuration, as on the hub.
    """
    tiny.decoder(folder, "Llama", "ForCausalLM", num_hidden_layers=4)
    spec = importlib.util.find_spec("FlagEmbedding")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package = Path(spec.submodule_search_locations[0], "finetune", "reranker", "decoder_only", "layerwise")
    shutil.copy(package / "configuration_minicpm_reranker.py", folder)
    kept = json.loads((folder / "config.json").read_text())
    names = "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size "
    names += "hidden_act rms_norm_eps max_position_embeddings bos_token_id eos_token_id pad_token_id"
    config = {name: kept[name] for name in names.split()} | {
        "model_type": "minicpm",
        "auto_map": {"AutoConfig": "configuration_minicpm_reranker.LayerWiseMiniCPMConfig"},
        "architectures": ["MiniCPMForCausalLM"],
        "tie_word_embeddings": False,
        "scale_emb": 12,
        "dim_model_base": 16,
        "scale_depth": 1.4,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def train(
    runs: Runs,
    family: Family,
    models: Path,
    output: str,
    *more: object,
    memfit: list[object] | None = None,
    num_ranks: int = 1,
) -> Done:
    """Run a family's own entry point.

    Args:
        models: Folder with the models by name, and the training data.
        output: Folder in that of the runs, for checkpoints.
        more: Options behind those of the family.
        memfit: Options of `memfit run`, under which the same command then runs.
    """
    options: list[Any] = [*_SHARED.split(), *family.options.split(" ")]
    if num_ranks > 1:
        options += ["--ddp_backend", "gloo", *family.ranks_options.split()]
    options += ["--model_name_or_path", models / family.model, "--train_data", models / "pairs.jsonl"]
    options += ["--cache_path", runs.folder / "data", "--output_dir", output]
    # The last of two counts.
    command = ["-m", f"FlagEmbedding.finetune.{family.module}", *options, *more]
    if memfit is not None:
        command = ["-m", "memfit", "run", *memfit, "--", *command]
    return runs.python(*command) if num_ranks == 1 else runs.torchrun(num_ranks, *command)


def assert_trains_as_plain(
    runs: Runs, family: Family, models: Path, expected: Path, *more: object, num_ranks: int = 1
) -> None:
    """With checkpointing asked for and Memfit under it: the numbers of ``expected``, and a plan on every rank."""
    options = ["--budget", "min", "--report", "report.json"]
    done = train(runs, family, models, "fitted", *CHECKPOINTING, *more, memfit=options, num_ranks=num_ranks)
    assert done.status == 0, tail(done.output)
    assert_same_training(runs.folder / "fitted", expected)
    for rank in range(num_ranks):
        summary = report(runs.folder / ("report.json" if rank == 0 else f"report.rank{rank}.json"))
        assert_planned(summary, steps=STEPS)
        note = f"`{family.caught}` was told to checkpoint its activations: taken over by the plan."
        assert note in summary["notes"]
