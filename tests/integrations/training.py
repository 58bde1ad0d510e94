"""Tiny models, real text, and what every stack's test compares: losses, weights, and whether a plan was at work."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

TEXT = [
    "The tide went out before the boats had turned, and the harbour lay open to the wind.",
    "A budget is a promise about memory, made before the first batch is read.",
    "She wrote the letter twice, once for the archive and once for her sister.",
    "Rain had fallen on the northern hills for three days without a pause.",
    "Every tensor that the backward pass asks for must be there, or must be brought back.",
    "The committee met on Thursday and agreed on nothing but the date of the next meeting.",
    "Recomputing is cheap where the operation is cheap, and nowhere else.",
    "He kept the old clock because it was wrong in a way that he could predict.",
    "Two trains leave the same station; only one of them has a driver.",
    "The orchard gave more fruit in the dry year than in the wet one.",
    "Checkpoints on disk and checkpoints in memory share a name and little else.",
    "At night the printing press could be heard from the other side of the river.",
]
VOCABULARY = 260
SHORT_RUN = {
    "max_steps": 5,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 3,
    "learning_rate": 1e-2,
}
"""Of `TrainingArguments`, and of the classes that are made from it."""


def encode(text, length=48):
    """Bytes as tokens: a tokenizer that needs no file."""
    ids = [byte + 4 for byte in text.encode()[: length - 1]]
    return [1, *ids]


def llama(seed=0, *, num_layers=4, dropout=0.1, **changes):
    """A Llama of a few kilobytes, with dropout in its attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "attention_dropout": dropout,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def bert(kind="BertForSequenceClassification", seed=0, *, num_layers=4, **changes):
    """A BERT of a few kilobytes, with dropout."""
    import transformers

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }
    return getattr(transformers, kind)(transformers.BertConfig(**{**sizes, **changes}))


def rows(length=48):
    """Language modelling on `TEXT`, padded to one length."""
    found = []
    for text in TEXT:
        ids = encode(text, length)
        mask = [1] * len(ids) + [0] * (length - len(ids))
        labels = ids + [-100] * (length - len(ids))
        found.append({"input_ids": ids + [0] * (length - len(ids)), "attention_mask": mask, "labels": labels})
    return found


def batch_of_text(number, length=48):
    """Two rows of tokens, all of one length."""
    texts = [" ".join(TEXT[(number + row) % len(TEXT) :] + TEXT) * 9 for row in range(2)]
    return torch.tensor([encode(text, length) for text in texts])


def save_tokenizer(folder):
    """A tokenizer of words with the files that `from_pretrained` reads, made without a network."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_max_length=64,
    )
    fast.save_pretrained(folder)
    return fast


def history(trainer, name="loss"):
    """A metric's values, as the Trainer has logged them."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(model):
    """A copy of the state dict."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_weights(actual, expected):
    """The same names, the same bits."""
    assert actual.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(actual[name], value)]
    assert not different


class LivePeak:
    """Measures the most bytes that tensors held at once, beyond those at its start.

    What allocators and libraries hold beside them, which in a process of tiny models is nearly all, is left out.
    """

    def __init__(self):
        self.bytes = 0
        self._profile = None

    def start(self):
        activities = [torch.profiler.ProfilerActivity.CPU]
        self._profile = torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True)
        self._profile.start()

    def stop(self):
        self._profile.stop()
        events = self._profile.profiler.kineto_results.events()
        found = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        self.bytes = max(itertools.accumulate((size for _, size in found), initial=0))
        self._profile = None


def metered(trainer):
    """The same Trainer, whose last step will be measured: see its `live_peak`."""
    from transformers import TrainerCallback

    class Meter(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == state.max_steps - 1:
                trainer.live_peak.start()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == state.max_steps:
                trainer.live_peak.stop()

    trainer.live_peak = LivePeak()
    trainer.add_callback(Meter())
    return trainer


def assert_less_is_alive(fitted, plain):
    """Measured: of two trainers, what the tensors of the last step held at its peak."""
    assert 0 < fitted.live_peak.bytes < plain.live_peak.bytes, (fitted.live_peak.bytes, plain.live_peak.bytes)


def assert_planned(summary, *, modes=("replay",)):
    """A plan was at work: blocks were replayed, and something was recomputed."""
    assert {block["mode"] for block in summary["blocks"]} <= {*modes, "descent"}, summary["blocks"]
    assert summary["recomputed_bytes"] > 0
    assert summary["predicted_peak_bytes"] is not None


def assert_untouched(model):
    """Nothing of Memfit is left on the model."""
    for name, module in model.named_modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs"):
            left = [hook for hook in getattr(module, kind).values() if type(hook).__module__.startswith("memfit")]
            assert not left, (name, left)
        assert not any(key.startswith("_memfit") for key in vars(module)), name


def written(folder):
    """Every file of a saved model: its name and its bytes."""
    folder = Path(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def trainer_state(folder):
    """What a checkpoint's `trainer_state.json` says."""
    return json.loads((Path(folder) / "trainer_state.json").read_text())


def run_python(folder, *arguments):
    """A Python process in a folder: one thread, no network, no other allocator."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MEMFIT_ALLOCATOR": "system"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def assert_example_runs(folder, name):
    """An example as it stands: it shows a report with replayed blocks, and leaves nothing behind."""
    done = run_python(folder, str(Path(__file__).parents[2] / "examples" / name))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "\npeak " in done.stdout
    assert "  replay  " in done.stdout
    assert list(folder.iterdir()) == []


def assert_script_is_fitted(folder, text):
    """An unmodified script that prints its losses last: as plain Python runs it. Returns the report."""
    (folder / "train.py").write_text(text)
    plain = run_python(folder, "train.py")
    assert plain.returncode == 0, plain.stderr[-3000:]
    options = ["--budget", "min", "--report", "report.json"]
    fitted = run_python(folder, "-m", "memfit", "run", *options, "--", "train.py")
    assert fitted.returncode == 0, fitted.stderr[-3000:]
    assert fitted.stdout.splitlines()[-1] == plain.stdout.splitlines()[-1]
    summary = json.loads((folder / "report.json").read_text())
    assert_planned(summary)
    assert "was caught by transformers' Trainer" in summary["notes"][0]
    return summary
