"""`memfit run`: an unmodified script cannot tell the difference, and its model is fitted."""

from __future__ import annotations

import functools
import json
import signal

import pytest

from conftest import SCRIPT, Shell
from memfit import host

TCMALLOC = pytest.mark.skipif(host.find_allocator() is None or host.has_gpu(), reason="no tcmalloc, or a GPU")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What a script prints under plain Python, run once."""

    @functools.cache
    def run(name, text, *arguments):
        shell = Shell(tmp_path_factory.mktemp("plain"))
        shell.write(name, text)
        done = shell.python(name, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


MAIN = """
import __main__, os, pickle, sys

class Thing:
    def __init__(self, number):
        self.number = number

def square(thing):
    return thing.number ** 2

if __name__ == "__main__":
    print(sys.argv, sys.path[0], __name__, __file__, __package__, getattr(__spec__, "name", None), __doc__)
    print(__main__.Thing is Thing, sys.modules["__main__"].__dict__ is globals(), type(__builtins__).__name__)
    print(pickle.loads(pickle.dumps(Thing(3))).number)
    print(sorted(name for name in os.environ if "MEMFIT" in name and name != "MEMFIT_ALLOCATOR"))
"""


@pytest.mark.parametrize(
    "command",
    [
        ["script.py"],
        ["script.py", "--budget", "x", "--", "-m"],
        ["./package/module.py", "a"],
        ["-m", "package.module", "--help"],
        ["-m", "package"],
        ["package"],
    ],
    ids=" ".join,
)
def test_a_script_sees_what_python_shows_it(shell, command):
    shell.write("script.py", MAIN)
    shell.write("package/__init__.py", "")
    shell.write("package/module.py", MAIN)
    shell.write("package/__main__.py", MAIN)
    expected = shell.python(*command)
    assert expected.returncode == 0, expected.stderr
    actual = shell.run("--", *command)
    assert actual.stdout == expected.stdout
    assert actual.stderr == "memfit: nothing was fitted: no model was trained.\n"
    assert actual.returncode == 5


def test_processes_that_the_script_spawns_find_its_names(shell):
    shell.write(
        "script.py",
        MAIN
        + """
    import multiprocessing
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(square, [Thing(4)]))
""",
    )
    done = shell.run("--", "script.py")
    assert done.stdout.endswith("[16]\n"), done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "def f():\n    1 / 0\nf()",
        "x = (",
        "import sys; sys.exit('no')",
        "import sys; sys.exit(7)",
        "import sys; sys.exit(True)",
        "raise KeyboardInterrupt",
        "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        "import os; os._exit(4)",
        "import atexit; atexit.register(print, 'bye'); raise ValueError(3)",
        "import sys; sys.excepthook = lambda *_: print('mine'); raise ValueError(3)",
    ],
)
def test_a_script_fails_as_under_python(shell, text):
    """The same status or signal, the same output, the same traceback."""
    shell.write("script.py", text)
    expected, actual = shell.python("script.py"), shell.run("--", "script.py")
    assert expected.returncode != 0
    assert actual.returncode == expected.returncode
    assert actual.stdout == expected.stdout
    assert actual.stderr == expected.stderr


@pytest.mark.parametrize("code", ["None", "0", "False"])
def test_an_exit_that_means_success_is_success(shell, code):
    shell.write("script.py", f"import sys; sys.exit({code})")
    assert shell.run("--", "script.py").returncode == 5


def test_a_missing_module_fails_as_under_python(shell):
    expected, actual = shell.python("-m", "absent"), shell.run("--", "-m", "absent")
    assert (actual.returncode, actual.stderr) == (expected.returncode, expected.stderr)


def test_ctrl_c_ends_the_process_by_its_signal(shell):
    shell.write("script.py", "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)")
    assert shell.run("--", "script.py").returncode == -signal.SIGINT


def test_torch_is_left_to_the_script(shell):
    shell.write("script.py", "import sys; print([n for n in ('torch', 'numpy', 'transformers') if n in sys.modules])")
    assert shell.run("--", "script.py").stdout == "[]\n"


ALLOCATOR = """
import os, subprocess, sys
from memfit import host
print(host.allocator(), os.environ.get("LD_PRELOAD"))
child = "import os; from memfit import host; print(host.allocator(), os.environ.get('LD_PRELOAD'))"
sys.stdout.flush()
subprocess.run([sys.executable, "-c", child], check=True)
"""


@TCMALLOC
def test_the_script_runs_under_tcmalloc_and_what_it_starts_does_not(shell):
    shell.write("script.py", ALLOCATOR)
    done = shell.run("--", "script.py", MEMFIT_ALLOCATOR="")
    assert done.stdout == "tcmalloc None\nglibc None\n"
    opted_out = shell.run("--", "script.py")
    assert opted_out.stdout == "glibc None\nglibc None\n"


@TCMALLOC
def test_what_the_user_preloads_stays(shell):
    library = "libm.so.6"
    shell.write("script.py", ALLOCATOR)
    done = shell.run("--", "script.py", MEMFIT_ALLOCATOR="", LD_PRELOAD=library)
    assert done.stdout == f"tcmalloc {library}\nglibc {library}\n"
    chosen = host.find_allocator()
    done = shell.run("--", "script.py", MEMFIT_ALLOCATOR="", LD_PRELOAD=chosen)
    assert done.stdout == f"tcmalloc {chosen}\ntcmalloc {chosen}\n"


LOOP = (
    SCRIPT
    + """
import sys

if __name__ == "__main__":
    model, _, _ = build()
    optimizer = torch.optim.AdamW(model.parameters())
    loss_function = nn.MSELoss()
    for step in range(int(sys.argv[1])):
        x = torch.randn(2048, 32)
        loss = loss_function(model(x), x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(step, loss.item().hex())
"""
)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--budget", "min"],
        ["--budget", "90%"],
        ["--policy", "full"],
        ["--policy", "selective"],
        ["--every-n-layers", "2"],
    ],
    ids=" ".join,
)
def test_a_training_loop_is_fitted_and_its_losses_are_the_same(shell, plain, options):
    shell.write("train.py", LOOP)
    expected = plain("train.py", LOOP, "4")
    actual = shell.run(*options, "--report", "report.json", "--", "train.py", "4")
    assert actual.returncode == 0, actual.stderr
    assert actual.stdout == expected
    assert actual.stderr.startswith("peak ")
    summary = json.loads((shell.folder / "report.json").read_text())
    assert summary["steps"] == 4
    assert {block["mode"] for block in summary["blocks"]} == {"replay" if options else "plain"}
    # Where the budget makes no difference, everything may be saved.
    if options and options != ["--budget", "90%"]:
        assert summary["recomputed_bytes"] > 0


def test_the_report_is_text_unless_its_name_says_json(shell):
    shell.write("train.py", LOOP)
    done = shell.run("--budget", "min", "--report", "report.txt", "--", "train.py", "3")
    assert (shell.folder / "report.txt").read_text() == done.stderr


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK"])
def test_other_ranks_write_reports_of_their_own(shell, variable):
    shell.write("train.py", LOOP)
    done = shell.run("--budget", "min", "--report", "report.json", "--", "train.py", "3", **{variable: "2"})
    assert done.returncode == 0
    assert done.stderr == ""
    assert [path.name for path in shell.folder.glob("report*")] == ["report.rank2.json"]


def test_a_report_survives_a_change_of_folder(shell):
    shell.write("train.py", "import os\n" + LOOP + "\nos.chdir('/')\n")
    assert shell.run("--report", "report.json", "--", "train.py", "2").returncode == 0
    assert (shell.folder / "report.json").exists()


def test_an_infeasible_budget_exits_with_3_and_no_traceback(shell):
    shell.write("train.py", LOOP)
    done = shell.run("--budget", "2MiB", "--", "train.py", "3")
    assert done.returncode == 3, done.stderr
    assert "No plan fits 2.00 MiB" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_without_blocks_is_named(shell):
    shell.write("train.py", "import torch\ntorch.nn.Linear(2, 2)(torch.ones(2)).sum().backward()\n")
    done = shell.run("--budget", "min", "--", "train.py")
    assert done.returncode == 5
    assert done.stderr.startswith("memfit: nothing was fitted:\n  Linear: ")


TRAINER = """
import sys, torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

torch.manual_seed(0)
model = BertForSequenceClassification(
    BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
)
rows = [{"input_ids": torch.randint(0, 20, (8,)), "labels": torch.tensor(i % 2)} for i in range(12)]
flag = "gradient_checkpointing"
if hasattr(TrainingArguments, "activation_checkpointing"):
    flag = "activation_checkpointing"
arguments = TrainingArguments(
    "out", max_steps=3, per_device_train_batch_size=4, report_to=[], disable_tqdm=True, use_cpu=True,
    save_strategy="no", logging_steps=1, **{flag: "checkpointed" in sys.argv},
)
trainer = Trainer(model, arguments, train_dataset=rows)
trainer.train()
print([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
"""


@pytest.mark.parametrize("arguments", [[], ["checkpointed"]], ids=["plain", "checkpointed"])
def test_a_trainer_is_fitted(shell, plain, arguments):
    shell.write("train.py", TRAINER)
    expected = plain("train.py", TRAINER)
    actual = shell.run("--budget", "min", "--report", "report.json", "--", "train.py", *arguments)
    assert actual.returncode == 0, actual.stderr
    assert actual.stdout.splitlines()[-1] == expected.splitlines()[-1]
    summary = json.loads((shell.folder / "report.json").read_text())
    assert len(summary["blocks"]) == 3
    assert {block["mode"] for block in summary["blocks"]} == {"replay"}
    assert any("taken over" in note for note in summary["notes"]) == bool(arguments)
    assert "caught by transformers' Trainer" in summary["notes"][0]


CHAT = """
import torch, transformers
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=512, hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, attn_implementation="eager",
))
model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"))
model.gradient_checkpointing_enable()  # as DeepSpeed-Chat's `--gradient_checkpointing`
model.enable_input_require_grads()
model.train()
ids = torch.randint(0, 512, (4, 64))
model.gradient_checkpointing_disable()
with FlopCounterMode(display=False) as counter:
    model(input_ids=ids, labels=ids).loss.backward()
print(counter.get_total_flops())
model.gradient_checkpointing_enable()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
for _ in range(5):
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.mark.parametrize("options", [[], ["--budget", "min"]], ids=["switch", "budget"])
def test_flops_are_those_of_one_device(shell, options):
    """Training as DeepSpeed-Chat's first step: LoRA, a large head; the report's count is the exact one."""
    pytest.importorskip("peft")
    shell.write("train.py", CHAT)
    done = shell.run(*options, "--report", "report.json", "--", "train.py")
    assert done.returncode == 0, done.stderr
    summary = json.loads((shell.folder / "report.json").read_text())
    assert summary["model_flops"] == int(done.stdout.splitlines()[-1])
    assert summary["tflops_per_second"] > 0
    assert "\ncompute " in done.stderr
    assert "\nrate " in done.stderr
    assert summary["hardware_flops"] > summary["model_flops"]  # without a budget the script's own switch decides


def test_a_trainer_with_a_callback_of_its_own_keeps_it(shell):
    script = TRAINER.replace(
        "train_dataset=rows)", "train_dataset=rows, callbacks=[MemfitCallback(policy='selective')])"
    ).replace("import sys, torch", "import sys, torch\nfrom memfit.integrations.transformers import MemfitCallback")
    shell.write("train.py", script)
    done = shell.run("--budget", "min", "--report", "report.json", "--", "train.py")
    assert done.returncode == 0, done.stderr
    summary = json.loads((shell.folder / "report.json").read_text())
    assert summary["budget"] is None
    assert summary["recomputed_bytes"] > 0
    assert "which fitted it itself" in summary["notes"][0]


def test_a_script_that_only_evaluates_is_told_so(shell):
    shell.write("score.py", SCRIPT + "\nbuild()[0].eval()(torch.randn(3, 32))\n")
    done = shell.run("--budget", "min", "--", "score.py")
    assert done.returncode == 5
    assert done.stderr == "memfit: nothing was fitted:\n  Model: called in evaluation mode\n"


def test_a_plan_made_offline_is_applied(shell):
    shell.write("train.py", LOOP)
    made = shell.memfit("plan", "train.py:build", "--budget", "min", "-o", "plan.json")
    assert made.returncode == 0, made.stderr
    expected = shell.python("train.py", "3")
    done = shell.run("--plan", "plan.json", "--report", "report.json", "--", "train.py", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected.stdout
    assert json.loads((shell.folder / "report.json").read_text())["recomputed_bytes"] > 0
