"""One step of a language model as one of several devices that are not there, piece by piece, as predictions have it."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from memfit import hardware
from memfit.blocks import find_blocks
from memfit.parallelism import Parallelism
from memfit.simulation.fakes import fake_tensors, twin
from memfit.simulation.ledger import Ledger
from memfit.simulation.optimizers import make_optimizer
from memfit.simulation.parallel import Team, process_group
from memfit.simulation.rehearsal import Rehearsal
from memfit.simulation.results import Rehearsed
from memfit.simulation.teams import make_team


def rehearse(config: Any, chosen: Parallelism, *, doubles: bool = True) -> tuple[Rehearsed, Rehearsal, Team]:
    """What the step costs, and who saw it; ``doubles``: whether blocks that are as others are passed over."""
    with process_group(chosen) as mesh, fake_tensors():
        model = make_model(config)
        team = make_team(chosen, hardware.find("h100"), "fp32", mesh)
        team.split(model)
        return (*rehearse_team(team, model, doubles=doubles), team)


def make_model(config: Any) -> torch.nn.Module:
    """To be called where tensors are fake."""
    return twin(transformers.AutoModelForCausalLM.from_config(config)).train()


def rehearse_team(team: Team, model: torch.nn.Module, *, doubles: bool = True) -> tuple[Rehearsed, Rehearsal]:
    """Of devices that are made already."""
    ids = torch.zeros(2, 64, dtype=torch.long)
    team.shard(model, find_blocks(model))
    ledger = Ledger(lambda name, flops, moved, dtype: flops / 1e12 + moved / 1e11 + 1e-6, traffic=team.traffic)
    with (
        team.around(ledger),
        Rehearsal(model, find_blocks(model), ledger, doubles=doubles, team=team) as rehearsal,
        ledger,
    ):
        found = rehearsal.run(
            {"ids": ids}, lambda: model(input_ids=ids, labels=ids).loss, make_optimizer("adamw", cuda=False)
        )
    return found, rehearsal


def num_passed_over(rehearsal: Rehearsal) -> int:
    """Calls of blocks."""
    return len([call for call in rehearsal._calls if call.template is not None])
