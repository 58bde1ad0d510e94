"""The README's commands and code, run as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import SCRIPT

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    command
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if (command := line.split("#")[0].strip()).startswith("memfit ")
]
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

TRAIN = """
if __name__ == "__main__":
    model, batch, loss = build()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        loss(model(batch), batch).backward()
        optimizer.step()
        optimizer.zero_grad()
"""


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))


def train(model):
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        model(torch.randn(64, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_first_result_is_within_thirty_lines():
    first = next(i for i, line in enumerate(README.splitlines(), start=1) if "handle.report()" in line)
    assert first <= 30


def test_commands_run_in_order(shell):
    shell.write("train.py", SCRIPT + TRAIN)
    assert len(COMMANDS) >= 5
    for command in COMMANDS:
        done = shell.python("-m", *shlex.split(command))
        assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.parametrize("snippet", [text for text in SNIPPETS if "Trainer" not in text])
def test_code_runs(snippet, capsys):
    model = nn.Sequential(*[Block() for _ in range(3)])
    exec(snippet, {"model": model, "train": train})
    assert capsys.readouterr().out.startswith("peak ")


@pytest.mark.parametrize("snippet", [text for text in SNIPPETS if "Trainer" in text])
def test_code_with_a_trainer_runs(snippet, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    model = BertForSequenceClassification(
        BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    )
    data = [{"input_ids": torch.randint(0, 20, (8,)), "labels": torch.tensor(i % 2)} for i in range(8)]
    args = TrainingArguments(
        tmp_path, max_steps=3, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", logging_steps=1
    )
    names = {"Trainer": Trainer, "model": model, "args": args, "data": data}
    exec(snippet, names)
    callback = names["trainer"].callback_handler.callbacks[0]
    assert callback.report().startswith("peak ")
    assert callback.summary()["steps"] == 3
