"""Which model `memfit run` catches, and when. The fit itself is recorded, not done: `test_run.py` does it."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch
from torch import nn

from memfit.errors import InfeasibleBudgetError, ModelError
from memfit.integrations import processes
from memfit.integrations.imports import ImportWatcher
from memfit.integrations.launcher import Launcher


class Stack(nn.Module):
    def __init__(self, num_layers=2):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(num_layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Recorder:
    """Takes the place of `memfit.fit`: notes the models, and refuses those without blocks as it does."""

    def __init__(self):
        self.models = []
        self.options = []

    def __call__(self, model, **options):
        if not any(isinstance(module, nn.ModuleList) for module in model.modules()):
            raise ModelError(f"`{type(model).__name__}` has no blocks.")
        self.models.append(model)
        self.options.append(options)
        return object()


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def launcher(recorder):
    original = nn.Module.__call__
    launcher = Launcher(recorder, {"budget": "6GiB"})
    launcher.install()
    yield launcher
    launcher.remove()
    assert nn.Module.__call__ is original
    assert not any(isinstance(finder, ImportWatcher) for finder in sys.meta_path)


@pytest.fixture
def x():
    return torch.randn(3, 4)


def test_the_first_training_forward_is_caught_once(launcher, recorder, x):
    model = Stack()
    unseen = nn.Module.__call__
    model(x)
    assert recorder.models == [model]
    assert recorder.options == [{"budget": "6GiB"}]
    assert nn.Module.__call__ is not unseen
    model(x)
    Stack()(x)
    assert recorder.models == [model]


def test_hooks_that_fit_adds_to_the_model_see_the_very_first_call(x):
    calls = []

    def fit(model, **options):
        model.register_forward_pre_hook(lambda *_: calls.append("before"))
        model.register_forward_hook(lambda *_: calls.append("after"))

    launcher = Launcher(fit, {})
    launcher.install()
    Stack()(x)
    launcher.remove()
    assert calls == ["before", "after"]


def test_evaluation_and_frozen_models_are_not_caught(launcher, recorder, x):
    frozen = Stack().requires_grad_(False)
    frozen(x)
    model = Stack()
    model.eval()(x)
    with torch.no_grad():
        model.train()(x)
    assert recorder.models == []
    model(x)
    assert recorder.models == [model]


def test_losses_and_heads_are_passed_over_with_their_reason(launcher, recorder, x):
    loss, head, model = nn.MSELoss(), nn.Linear(4, 4), Stack()
    loss(head(x), x)
    head(x)
    assert recorder.models == []
    assert launcher.refused == {"Linear": "`Linear` has no blocks."}
    loss(head(model(x)), x)
    assert recorder.models == [model]


def test_a_loss_that_holds_the_model_is_the_root(launcher, recorder, x):
    class Loss(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).sum()

    loss = Loss(Stack())
    loss(x)
    loss.model(x)
    assert recorder.models == [loss]


def test_distributed_data_parallel_is_looked_into(launcher, recorder, x):
    class DistributedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    model = Stack()
    wrapped = DistributedDataParallel(model).eval()
    model.train()  # as Lightning does after it has evaluated: of what trains, the wrapper is no part
    wrapped(x)
    assert recorder.models == [model]


def test_errors_of_the_model_leave_the_catch_in_place(launcher, recorder, x):
    with pytest.raises(RuntimeError):
        nn.Linear(4, 4)(torch.randn(3, 5))
    model = Stack()
    model(x)
    assert recorder.models == [model]


def test_infeasible_reaches_the_script(x):
    def fit(model, **options):
        raise InfeasibleBudgetError(1, 2, "loss")

    launcher = Launcher(fit, {})
    launcher.install()
    try:
        with pytest.raises(InfeasibleBudgetError):
            Stack()(x)
    finally:
        launcher.remove()


def test_models_are_not_kept_alive(recorder, x):
    import gc
    import weakref

    launcher = Launcher(recorder, {})
    launcher.install()
    head = nn.Linear(4, 4)
    head(x)
    gone = weakref.ref(head)
    del head
    gc.collect()
    launcher.remove()
    assert gone() is None


@pytest.fixture
def bert():
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, num_labels=2
        )
    )


@pytest.fixture
def batch():
    return {"input_ids": torch.randint(0, 20, (2, 5)), "labels": torch.tensor([0, 1])}


@pytest.mark.parametrize("name", ["gradient_checkpointing_enable", "activation_checkpointing_enable"])
def test_checkpointing_is_taken_over(launcher, recorder, bert, batch, x, name):
    if not hasattr(bert, name):
        pytest.skip(f"this transformers has no {name}")
    Stack()(x)
    getattr(bert, name)()
    assert not any(getattr(module, "gradient_checkpointing", False) for module in bert.modules())
    assert len(recorder.models) == 1
    bert(**batch)
    assert recorder.models[1:] == [bert]
    # A second time, on a fitted model: still not stacked, still fitted once.
    getattr(bert, name)()
    bert(**batch)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in bert.modules())
    assert recorder.models[1:] == [bert]


def enable(model, *arguments, **options):
    """Under the name that this transformers has for it."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(*arguments, **options)


def test_enabling_before_lora_fits_the_whole(launcher, recorder, bert, batch):
    peft = pytest.importorskip("peft")
    enable(bert)
    model = peft.get_peft_model(bert, peft.LoraConfig(target_modules=["query"]))
    model(**batch)
    assert recorder.models == [model]


def test_the_methods_are_the_original_ones_afterwards(recorder):
    from transformers import PreTrainedModel, Trainer

    before = [PreTrainedModel.gradient_checkpointing_enable, Trainer.train, Trainer._inner_training_loop]
    launcher = Launcher(recorder, {})
    launcher.install()
    assert Trainer.train is not before[1]
    launcher.remove()
    assert [PreTrainedModel.gradient_checkpointing_enable, Trainer.train, Trainer._inner_training_loop] == before


def test_trainer_is_caught_before_its_model_is_wrapped(launcher, recorder, bert, batch, tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": batch["input_ids"][0], "labels": batch["labels"][0]} for _ in range(4)]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no"
    )
    trainer = Trainer(bert, arguments, train_dataset=rows)
    trainer.evaluate(rows)
    assert recorder.models == []
    trainer.train()
    assert recorder.models == [bert]
    assert type(recorder.models[0]) is type(bert)


def test_an_import_is_reported_once_and_leaves_no_trace(tmp_path, monkeypatch):
    (tmp_path / "memfit_test_target.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    watcher = ImportWatcher({"memfit_test_target": seen.append, "memfit_test_absent": seen.append})
    watcher.install()
    try:
        import memfit_test_target

        assert seen == [memfit_test_target]
        assert memfit_test_target.value == 1
        assert isinstance(memfit_test_target, types.ModuleType)
        assert type(memfit_test_target.__loader__).__name__ == "SourceFileLoader"
        assert memfit_test_target.__spec__.loader is memfit_test_target.__loader__
        with pytest.raises(ModuleNotFoundError):
            import memfit_test_absent  # noqa: F401
    finally:
        watcher.remove()
        sys.modules.pop("memfit_test_target", None)
    assert len(seen) == 1


def test_the_trainer_wins_over_the_first_forward(launcher, recorder, bert, batch, tmp_path, x):
    """What is called while the Trainer sets up is not what it trains."""
    from transformers import Trainer, TrainingArguments

    class Probing(Trainer):
        def get_train_dataloader(self):
            Stack()(x)
            return super().get_train_dataloader()

        def _inner_training_loop(self, *args, **kwargs):
            Stack()(x)
            return super()._inner_training_loop(*args, **kwargs)

    rows = [{"input_ids": batch["input_ids"][0], "labels": batch["labels"][0]} for _ in range(4)]
    arguments = TrainingArguments(
        tmp_path, max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no"
    )
    Probing(bert, arguments, train_dataset=rows).train()
    assert recorder.models == [bert]


def test_what_was_taken_over_is_noted(launcher, recorder, bert, batch):
    enable(bert)
    bert(**batch)
    enable(bert)
    note = "`BertForSequenceClassification` was told to checkpoint its activations: taken over by the plan."
    assert [catch.notes for catch in launcher.catches] == [[note]], "once, however often it was told"


def test_each_switch_is_explained_by_one_line(recorder, bert, batch):
    launcher = Launcher(recorder, {"budget": "6GiB"})
    launcher.install()
    try:
        kwargs = {"use_reentrant": True}
        enable(bert, kwargs, every_n_layers=2, offload=True)
        bert(**batch)
    finally:
        launcher.remove()
    assert recorder.options == [{"budget": "6GiB"}]
    notes = launcher.catches[0].notes
    assert [note.partition("`")[2].partition("`")[0] for note in notes] == [
        "BertForSequenceClassification",
        "use_reentrant=True",
        "every_n_layers=2",
        "offload=True",
    ]
    assert all("taken over" in note for note in notes)


def test_without_a_budget_the_switches_decide(recorder, bert, batch):
    launcher = Launcher(recorder, {})
    launcher.install()
    try:
        enable(bert, every_n_layers=2)
        bert(**batch)
    finally:
        launcher.remove()
    assert recorder.options == [{"policy": "full", "every_n_layers": 2}]


def test_the_hook_that_caught_is_named(launcher, recorder, bert, batch, tmp_path, x):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": batch["input_ids"][0], "labels": batch["labels"][0]} for _ in range(4)]
    arguments = TrainingArguments(
        tmp_path, max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no"
    )
    Stack()(x)
    Trainer(bert, arguments, train_dataset=rows).train()
    assert [catch.caught for catch in launcher.catches] == [
        "`Stack` was caught by its first training forward",
        "`BertForSequenceClassification` was caught by transformers' Trainer, when its training loop began",
    ]


def test_what_did_not_train_is_named_with_its_reason(launcher, recorder, x):
    class Scored(Stack):
        pass

    class Frozen(Stack):
        pass

    Scored().eval()(x)
    with torch.no_grad():
        Stack()(x)
    Frozen().requires_grad_(False)(x)
    assert launcher.catches == []
    assert launcher.idle == {
        "Scored": "called in evaluation mode",
        "Stack": "called without gradients",
        "Frozen": "none of its parameters trains",
    }


def test_what_the_script_fits_itself_is_reported_and_left_alone(x):
    import memfit

    model = Stack()
    handle = memfit.fit(model, blocks=["layers.0", "layers.1"])
    launcher = Launcher(memfit.fit, {"budget": "min"})
    launcher.install()
    try:
        model(x)
    finally:
        launcher.remove()
        handle.remove()
    assert [catch.handle for catch in launcher.catches] == [handle]
    assert "its options hold" in launcher.catches[0].caught
    assert launcher.catches[0].summary()["budget"] is None


# LLaMA-Factory, Lightning: the real ones are in tests/integrations/ -------------------------------------------------


def test_a_torchrun_that_the_script_starts_runs_under_memfit():
    command = "torchrun --nnodes 1 --nproc_per_node 2 --master_port 29500 /x/llamafactory/launcher.py sft.yaml lr=1"
    words = ["run", "--budget", "6 GiB", "--report", "/y/report.json"]
    assert processes.torchrun_under_memfit(command.split(), words) == [
        *[sys.executable, "-m", "torch.distributed.run"],
        *["--nnodes", "1", "--nproc_per_node", "2", "--master_port", "29500"],
        *["-m", "memfit", "run", "--budget", "6 GiB", "--report", "/y/report.json", "--"],
        *["/x/llamafactory/launcher.py", "sft.yaml", "lr=1"],
    ]


@pytest.mark.parametrize("command", [[], "torchrun x.py", ["nvidia-smi", "x.py"], ["torchrun", "--help"]])
def test_other_commands_are_left_alone(command):
    assert processes.torchrun_under_memfit(command, ["run"]) is None


def test_what_started_processes_is_not_blamed(monkeypatch):
    """Its `subprocess` is replaced in that one module, and is back afterwards."""
    starter = types.ModuleType("llamafactory.launcher")
    starter.subprocess = subprocess
    monkeypatch.setitem(sys.modules, "llamafactory.launcher", starter)
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda command, **options: ran.append(command))
    launcher = Launcher(Recorder(), {}, ["run", "--budget", "min"])
    launcher.install()
    starter.subprocess.run(["nvidia-smi"], check=True)
    assert not launcher.handed_over
    starter.subprocess.run(["torchrun", "launcher.py"], check=True)
    assert launcher.handed_over
    launcher.remove()
    assert starter.subprocess is subprocess
    assert ran[0] == ["nvidia-smi"]
    assert ran[1][-6:] == ["memfit", "run", "--budget", "min", "--", "launcher.py"]


def test_a_script_that_is_started_again_runs_under_memfit():
    """As Lightning starts it, once for every further device; a process observer and the like are left alone."""
    words = ["run", "--budget", "min"]
    under = [sys.executable, "-m", "memfit", *words, "--"]
    assert processes.python_under_memfit([sys.executable, "/x/train.py", "--lr", 1], words) == [
        *[*under, "/x/train.py", "--lr", "1"]
    ]
    assert processes.python_under_memfit((sys.executable, "-m", "train"), words) == [*under, "-m", "train"]
    for other in (["nvidia-smi", "x.py"], [sys.executable], "python train.py", []):
        assert processes.python_under_memfit(other, words) is None


@pytest.mark.parametrize("name", processes.LIGHTNING)
def test_what_lightning_starts(monkeypatch, name):
    """Its own process trains too, and answers for itself."""
    starter = types.ModuleType(name)
    starter.subprocess = subprocess
    monkeypatch.setitem(sys.modules, name, starter)
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: started.append((command, options)))
    launcher = Launcher(Recorder(), {}, ["run", "--budget", "min"])
    launcher.install()
    starter.subprocess.Popen([sys.executable, "train.py"], env={"LOCAL_RANK": "1"}, cwd=None)
    launcher.remove()
    assert starter.subprocess is subprocess
    command = [sys.executable, "-m", "memfit", "run", "--budget", "min", "--", "train.py"]
    assert started == [(command, {"env": {"LOCAL_RANK": "1"}, "cwd": None})]
    assert not launcher.handed_over
