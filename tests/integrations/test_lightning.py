"""Lightning's Trainer with `MemfitCallback`, under both names of the package: as without it, in less memory."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import textwrap
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("lightning")
pytest.importorskip("pytorch_lightning")

from memfit.errors import UsageError
from training import (
    LivePeak,
    assert_less_is_alive,
    assert_planned,
    assert_same_weights,
    assert_untouched,
    bert,
    llama,
    rows,
    run_python,
    weights,
)

NAMES = ["lightning.pytorch", "pytorch_lightning"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode.*"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed.*"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
]


@pytest.fixture(params=NAMES)
def pl(request):
    """The package, and the callback as a script sees it that imports this name first."""
    return import_module(request.param)


@pytest.fixture
def callback_class():
    for name in NAMES:
        import_module(name)
    from memfit.integrations.lightning import MemfitCallback

    return MemfitCallback


class Text(torch.utils.data.Dataset):
    def __len__(self):
        return len(rows())

    def __getitem__(self, index):
        return {name: torch.tensor(value) for name, value in rows()[index].items()}


def module_class(pl):
    class Module(pl.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, batch, index):
            loss = self.model(**batch).loss
            self.log("loss", loss)
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch, index):
            self.evaluated.append(self.model(**batch).loss.item())

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

        def on_fit_start(self):
            self.losses, self.evaluated = [], []

    return Module


def trained(pl, folder, callback=None, module=None, max_steps=5, **changes):
    """A trainer and its module after training."""
    options = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    module = module or module_class(pl)(llama())

    class Meter(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if trainer.global_step == max_steps - 1:
                trainer.live_peak.start()

        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            if trainer.global_step == max_steps:
                trainer.live_peak.stop()

    callbacks = [Meter(), *([callback] if callback is not None else [])]
    trainer = pl.Trainer(max_steps=max_steps, callbacks=callbacks, **{**options, **changes})
    trainer.live_peak = LivePeak()
    torch.manual_seed(5)
    trainer.fit(
        module,
        torch.utils.data.DataLoader(Text(), batch_size=4, shuffle=True),
        torch.utils.data.DataLoader(Text(), batch_size=4),
    )
    return trainer, module


def test_losses_and_weights_are_the_same(pl, callback_class, tmp_path):
    usual, plain = trained(pl, tmp_path)
    callback = callback_class(budget="min")
    trainer, fitted = trained(pl, tmp_path, callback)
    assert_less_is_alive(trainer, usual)
    assert len(plain.losses) == 5
    assert fitted.losses == plain.losses
    assert fitted.evaluated == plain.evaluated
    assert plain.evaluated
    assert_same_weights(weights(fitted), weights(plain))
    assert_planned(callback.summary())
    assert callback.handle is None
    assert callback.plan is not None
    assert_untouched(fitted)


def test_accumulation_and_clipping(pl, callback_class, tmp_path):
    changes = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "max_steps": 3}
    _, plain = trained(pl, tmp_path, **changes)
    callback = callback_class(budget="min")
    _, fitted = trained(pl, tmp_path, callback, **changes)
    assert len(plain.losses) > 3
    assert fitted.losses == plain.losses
    assert_same_weights(weights(fitted), weights(plain))
    assert_planned(callback.summary())


def test_the_forward_of_the_module_itself(pl, callback_class, tmp_path):
    """Several children, and losses by the module's own forward."""

    class Own(module_class(pl)):
        def __init__(self):
            super().__init__(bert("BertModel"))
            self.head = nn.Linear(32, 260)

        def forward(self, input_ids, attention_mask):
            return self.head(self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state)

        def training_step(self, batch, index):
            scores = self(batch["input_ids"], batch["attention_mask"])
            loss = nn.functional.cross_entropy(scores.flatten(0, 1), batch["labels"].flatten())
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch, index):
            self.evaluated.append(self(batch["input_ids"], batch["attention_mask"]).sum().item())

    callback = callback_class(budget="min")
    _, plain = trained(pl, tmp_path, module=Own())
    _, fitted = trained(pl, tmp_path, callback, module=Own())
    assert fitted.losses == plain.losses
    assert_same_weights(weights(fitted), weights(plain))
    assert_planned(callback.summary())
    assert callback.summary()["model"] == "Own"


def test_checkpointing_of_the_model_is_taken_over(pl, callback_class, tmp_path):
    _, plain = trained(pl, tmp_path)
    model = llama()
    model.activation_checkpointing_enable()
    callback = callback_class(budget="min")
    _, fitted = trained(pl, tmp_path, callback, module=module_class(pl)(model))
    assert fitted.losses == plain.losses
    assert model.is_activation_checkpointing
    assert any("was taken over" in note for note in callback.summary()["notes"])
    assert_planned(callback.summary())


def test_checkpoints_are_the_same_and_resume(pl, callback_class, tmp_path):
    def run(name, callback, **changes):
        folder = tmp_path / name
        saving = import_module(f"{pl.__name__}.callbacks").ModelCheckpoint(
            folder, filename="{step}", every_n_train_steps=3, save_top_k=-1
        )
        module = module_class(pl)(llama())
        trainer = pl.Trainer(
            max_steps=6,
            callbacks=[saving, *([callback] if callback is not None else [])],
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        torch.manual_seed(5)
        loader = torch.utils.data.DataLoader(Text(), batch_size=4)
        trainer.fit(module, loader, loader, **changes)
        return module, {path.name: torch.load(path, weights_only=False) for path in folder.glob("*.ckpt")}

    _, before = run("plain", None)
    _, after = run("fitted", callback_class(budget="min"))
    assert before.keys() == after.keys()
    assert len(before) == 2
    for name, checkpoint in before.items():
        assert_same_weights(after[name]["state_dict"], checkpoint["state_dict"])
        assert after[name]["callbacks"].keys() == checkpoint["callbacks"].keys()
    states = []
    for name, callback in (("plain", None), ("fitted", callback_class(budget="min"))):
        torch.manual_seed(9)
        module, _ = run(f"{name}-again", callback, ckpt_path=tmp_path / "plain" / "step=3.ckpt", weights_only=False)
        states.append((module.losses, weights(module)))
    assert len(states[0][0]) == 3
    assert states[0][0] == states[1][0]
    assert_same_weights(states[1][1], states[0][1])
    assert_planned(callback.summary())


def test_tensorboard_shows_the_metrics(pl, callback_class, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = import_module(f"{pl.__name__}.loggers").TensorBoardLogger(tmp_path, name="board", version="0")
    callback = callback_class(budget="min")
    trained(pl, tmp_path, callback, logger=logger, log_every_n_steps=1)
    board = EventAccumulator(str(tmp_path / "board" / "0"))
    board.Reload()
    assert "loss" in board.Tags()["scalars"]
    for name in ("measured_peak_bytes", "predicted_peak_bytes", "overhead"):
        values = [event.value for event in board.Scalars(f"memfit/{name}")]
        assert len(values) >= 3
        assert all(value > 0 for value in values)
    expected = callback.summary()["predicted_peak_bytes"]
    assert board.Scalars("memfit/predicted_peak_bytes")[-1].value == pytest.approx(expected, rel=1e-6)  # single


def test_an_error_in_training_leaves_the_model_unfitted(pl, callback_class, tmp_path):
    class Failing(module_class(pl)):
        def on_train_batch_end(self, *args):
            raise ZeroDivisionError

    callback = callback_class(budget="min")
    module = Failing(llama())
    with pytest.raises(ZeroDivisionError):
        trained(pl, tmp_path, callback, module=module)
    assert_untouched(module)
    assert callback.handle is None
    assert callback.summary()["steps"] == 1


def test_a_strategy_that_shards_is_refused(callback_class):
    """Lightning's own needs a GPU to begin at all: its name is what is looked at."""

    class FSDPStrategy:
        optimizers = ()

    class Trainer:
        strategy = FSDPStrategy()

    with pytest.raises(UsageError, match="FSDPStrategy"):
        callback_class(budget="min").on_fit_start(Trainer(), llama())


def test_callbacks_copy_and_pickle_as_their_options(callback_class):
    callback = callback_class(budget="min", blocks=["LlamaDecoderLayer"])
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert type(other) is callback_class
        assert other.options == callback.options


@pytest.mark.parametrize("name", NAMES)
def test_only_the_name_that_the_script_uses_is_imported(name):
    other = NAMES[1 - NAMES.index(name)]
    code = f"""
        import sys, {name} as pl
        from memfit.integrations.lightning import MemfitCallback
        assert issubclass(MemfitCallback, pl.Callback)
        sys.exit({other!r} in sys.modules)
    """
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], check=False, timeout=120)
    assert done.returncode == 0


DDP = """
import sys, torch
import lightning.pytorch as pl
sys.path.insert(0, {folder!r})
from test_lightning import Text, module_class
from training import llama, assert_planned
from memfit.integrations.lightning import MemfitCallback

def run(callback):
    module = module_class(pl)(llama())
    trainer = pl.Trainer(max_steps=3, accelerator="cpu", devices=2, strategy="ddp", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[callback] if callback else [])
    torch.manual_seed(5)
    trainer.fit(module, torch.utils.data.DataLoader(Text(), batch_size=3))
    return module

plain = run(None)
callback = MemfitCallback(budget="min")
fitted = run(callback)
assert len(plain.losses) == 2 or len(plain.losses) == 3, plain.losses
assert fitted.losses == plain.losses, (fitted.losses, plain.losses)
for key, value in plain.state_dict().items():
    assert torch.equal(fitted.state_dict()[key], value), key
assert_planned(callback.summary())
print("the same")
"""


def test_two_processes_with_ddp(tmp_path):
    (tmp_path / "train.py").write_text(DDP.format(folder=os.path.dirname(__file__)))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "train.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same") == 2


SCRIPT = """
import sys
import {name} as pl
sys.path.insert(0, {folder!r})
from test_lightning import trained

options = {{"devices": 2, "strategy": "ddp", "use_distributed_sampler": True}} if "ddp" in sys.argv else {{}}
trainer, module = trained(pl, "out", **options)
if trainer.is_global_zero:
    print([loss.hex() for loss in module.losses], [loss.hex() for loss in module.evaluated])
"""


@pytest.mark.parametrize(("name", "devices"), [(NAMES[0], 1), (NAMES[0], 2), (NAMES[1], 2)])
def test_an_unmodified_script(tmp_path, name, devices):
    """By `memfit run`. With several devices Lightning starts the script again: each process has a plan and a report."""
    (tmp_path / "train.py").write_text(SCRIPT.format(name=name, folder=os.path.dirname(__file__)))
    words = ["train.py", *(["ddp"] if devices == 2 else [])]
    plain = run_python(tmp_path, *words)
    assert plain.returncode == 0, plain.stderr[-3000:]
    options = ["--budget", "min", "--report", "report.json"]
    fitted = run_python(tmp_path, "-m", "memfit", "run", *options, "--", *words)
    assert fitted.returncode == 0, fitted.stderr[-3000:]
    assert fitted.stdout.splitlines()[-1] == plain.stdout.splitlines()[-1]
    for rank in range(devices):
        summary = json.loads(Path(tmp_path, f"report.rank{rank}.json" if rank else "report.json").read_text())
        assert_planned(summary)
        assert summary["steps"] == 5
        assert "was caught by its first training forward" in summary["notes"][0]
        assert any("2 ranks run one plan" in note for note in summary["notes"]) == (devices == 2)
