"""Ranks that train one model together: one first plan for all, and no step on what one of them found to be wrong.

NOTE [Ranks agree]: nothing here is a collective, so nothing can come between those of the user. Ranks talk through the
store that `init_process_group` was given, with deadlines:

- A model is trained together if its forward runs inside `DistributedDataParallel` or DeepSpeed's engine, or if
  parameters are DTensors (FSDP2, tensor parallel); with the ranks of that process group or mesh. Otherwise (pipeline
  stages, hand-written reductions) every rank is on its own, and nothing is exchanged.
- The first plan, and the one made when the optimizer's state has been born, are decided by the lowest rank from the
  worst rank's numbers: the most of every event's bytes and of every op's seconds, under the smallest budget. These two
  points every rank passes in the same step, since each backward in between was a collective. Where one does not (it
  retries, or met another shape), it says so, or the others wait until the deadline; then every rank decides alone.
- Everything later (another sequence of shapes, a correction after a peak) each rank decides alone: others need not be
  there, and plans may differ without harm. A plan changes when a tensor exists, never its value; and recipes call no
  collective, so no rank waits in its backward for what another does not run (see NOTE [Blocks that gather]).
- Another *model* on one rank stops all of them. Another *program* (a rank that logs, or pads to another length) is
  legitimate, and only means that there is no common plan.
- A canary's error is raised where the optimizer is about to step, on all ranks: whoever finds it says so in the store
  before its gradients can enter any reduction, goes on with the backward, so that no rank is left waiting in a
  collective, and every rank looks before it steps. Steps are numbered, as ranks may be one apart.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from typing import Any, Literal

import torch
import torch.distributed as dist

from memfit.claims import Claim, merge
from memfit.errors import InfeasibleBudgetError, RankError, RecomputeError
from memfit.fingerprints import check_world
from memfit.partitioned import engine_around
from memfit.plans import Plan
from memfit.profiles import StepProfile
from memfit.sharding import mesh_ranks, mesh_shape

Budget = int | Literal["min"] | None
Solve = Callable[[StepProfile, Budget], Plan]

TIMEOUT_SECONDS = 60.0
"""For the others to reach the same point. What a rank may do between two steps, a checkpoint or an evaluation."""
POLL_SECONDS = 0.005
_numbers: Counter[tuple[int, ...]] = Counter()


def ranks_of(model: torch.nn.Module) -> tuple[int, ...]:
    """The ranks that train ``model`` together, as far as it shows while its forward runs; empty where it is alone."""
    if not dist.is_available() or not dist.is_initialized():
        return ()
    replicated = torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    if replicated is not None and any(module is model for module in replicated.modules()):
        return tuple(sorted(dist.get_process_group_ranks(replicated.process_group)))
    engine = engine_around(model)
    if engine is not None:
        return tuple(sorted(dist.get_process_group_ranks(engine.seq_data_parallel_group)))
    return mesh_ranks(model)


class Ranks:
    """What one fitted model on this rank says to the same model on others, and hears from them.

    Attributes:
        ranks: All that train the model, in order; empty where it is alone.
        given: The plan to apply, if there is one: it holds for as many ranks as it was made for.
        story: How the plan came about, for the report; "" where there is only one rank.
        refused: Whether no plan fits, and all ranks know.
    """

    def __init__(self, name: str, fingerprint: str) -> None:
        """Of a model, by its class's name and its fingerprint."""
        self.ranks: tuple[int, ...] = ()
        self.given: Plan | None = None
        self.story = ""
        self._mesh: tuple[int, ...] = ()
        self._name = name
        self._fingerprint = fingerprint
        self._store: Any = None
        self._me = 0
        self._agrees = False  # still takes part in deciding
        self.refused = False
        self._again = ""  # the profile for which the ranks meet again when the optimizer's state is born
        self._ticks = 0  # optimizer steps about to be made so far
        self._attempt = 0
        self._wrong: RecomputeError | None = None
        self._defers = True

    # Who is there

    def begin(self, model: torch.nn.Module) -> None:
        """A forward of ``model`` is running: is it trained together with other ranks?

        Raises:
            PlanError: The plan that was given is for another number of them, or another mesh.
        """
        if self.ranks:
            return
        ranks = ranks_of(model)
        together = len(ranks) > 1 and dist.get_rank() in ranks
        self._mesh = mesh_shape(model)
        if self.given is not None:
            check_world(self.given, len(ranks) if together else 1, self._mesh)
        if not together:
            return
        self._me = dist.get_rank()
        _numbers[ranks] += 1
        which = sha256(repr((ranks, _numbers[ranks])).encode()).hexdigest()[:16]
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"memfit/{which}", store)  # type: ignore[attr-defined]
        self.ranks = ranks
        self._agrees = True
        self._ticks = self._attempt = 0

    @property
    def leads(self) -> bool:
        """Whether this rank decides."""
        return self._me == self.ranks[0]

    # The plan

    def decide(self, profile: StepProfile, solve: Solve, **moment: Any) -> tuple[Plan, bool]:
        """As `_decide`; the plan says for which ranks it is."""
        plan, given = self._decide(profile, solve, **moment)
        return replace(plan, world_size=max(1, len(self.ranks)), mesh=self._mesh), given

    def _decide(
        self,
        profile: StepProfile,
        solve: Solve,
        *,
        which: str,
        step: int,
        budget: Budget,
        born: bool,
        together: bool = True,
    ) -> tuple[Plan, bool]:
        """The plan for ``profile``: all ranks' where they meet, else this rank's own.

        Args:
            profile: What this rank has measured.
            solve: Makes the plan for a profile and a budget.
            which: What was profiled: the sequence of block calls.
            step: Number of the step that begins.
            budget: Of this rank.
            born: Whether the optimizer's state has been born: where not, the ranks meet once more.
            together: Whether the others decide now too; a correction is this rank's own.

        Returns:
            The plan, and whether it is another rank's.

        Raises:
            RankError: A rank trains another model, or the deciding one failed.
            InfeasibleBudgetError: No plan fits the worst rank; on all ranks.
        """
        if not together or not self._agrees or (self.story and self._again != which):
            return solve(profile, budget), False
        self._again = which
        claim = Claim.of(profile, rank=self._me, name=self._name, model=self._fingerprint, budget=budget, born=born)
        try:
            self._store.set(f"{step}/{self._me}", claim.to_json())
            if not self.leads:
                return self._follow(profile, solve, step, claim)
            verdict, plan = self._lead(profile, solve, step, claim)
            self._store.set(f"{step}/verdict", json.dumps(verdict))
        except dist.DistError as error:
            self._leave(f"the store of the process group is out of reach ({error})")
            return solve(profile, budget), False
        self._obey(verdict)
        return (solve(profile, budget) if plan is None else plan), False

    def decide_again(self) -> None:
        """No plan fits, and all ranks run their blocks in another way from here."""
        self.refused, self._agrees = False, bool(self.ranks)

    def absent(self, step: int) -> None:
        """Step ``step`` begins with nothing to decide on: this rank retries, or its first step was broken off."""
        if self._agrees and not self.story:
            self._say(f"{step}/absent", f"rank {self._me} had not completed a step")

    def _lead(self, profile: StepProfile, solve: Solve, step: int, mine: Claim) -> tuple[dict[str, Any], Plan | None]:
        """Decide for all."""
        keys = [f"{step}/{rank}" for rank in self.ranks]
        why = self._wait(keys, step)
        if why:
            return {"verdict": "alone", "why": why}, None
        claims = [Claim.from_json(self._store.get(key).decode()) for key in keys]
        why = mine.other_model(claims)
        if why:
            return {"verdict": "stop", "why": why}, None
        why = mine.other_program(claims)
        if why:
            return {"verdict": "alone", "why": why}, None
        try:
            plan = solve(*merge(profile, claims))
        except InfeasibleBudgetError as error:
            numbers = {"budget": error.budget, "minimum": error.minimum, "event": error.event, "advice": error.advice}
            return {"verdict": "infeasible", **numbers}, None
        except BaseException as error:
            stop = {"verdict": "stop", "why": f"Rank {self._me} could not make the plan: {error}"}
            self._store.set(f"{step}/verdict", json.dumps(stop))
            raise
        text = plan.to_json()
        again = not any(claim.born for claim in claims)
        digest = sha256(text.encode()).hexdigest()
        return {"verdict": "plan", "plan": text, "hash": digest, "again": again}, plan

    def _follow(self, profile: StepProfile, solve: Solve, step: int, claim: Claim) -> tuple[Plan, bool]:
        """Take what the lowest rank has decided."""
        why = self._wait([f"{step}/verdict"], step)
        if why:
            self._leave(why)
            return solve(profile, claim.limit), False
        verdict = json.loads(self._store.get(f"{step}/verdict"))
        self._obey(verdict)
        if verdict["verdict"] != "plan":
            return solve(profile, claim.limit), False
        plan = Plan.from_json(verdict["plan"])
        if sha256(verdict["plan"].encode()).hexdigest() != verdict["hash"]:
            raise RankError(self._me, f"Rank {self._me} received another plan than rank {self.ranks[0]} sent.")
        return plan, True

    def _obey(self, verdict: dict[str, Any]) -> None:
        kind = verdict["verdict"]
        if kind == "stop":
            self._agrees = False
            raise RankError(self._me, verdict["why"])
        if kind == "infeasible":
            self.refused, self._agrees = True, False
            raise InfeasibleBudgetError(verdict["budget"], verdict["minimum"], verdict["event"], verdict["advice"])
        if kind == "alone":
            self._leave(verdict["why"])
        else:
            self._agrees = verdict["again"]
            self.story = (
                f"{len(self.ranks)} ranks run one plan ({verdict['hash'][:8]}), made by rank {self.ranks[0]} from the "
                "worst rank's numbers; what is corrected later each rank corrects alone"
            )

    def _wait(self, keys: list[str], step: int) -> str:
        """Until all keys are there; else why they will not be."""
        end = time.monotonic() + TIMEOUT_SECONDS
        while not self._store.check(keys):
            for excuse in (f"{step}/absent", "left"):
                if self._store.check([excuse]):
                    return str(self._store.get(excuse).decode())
            if time.monotonic() > end:
                missing = [key.rpartition("/")[2] for key in keys if not self._store.check([key])]
                who = f"rank {self.ranks[0]}" if missing == ["verdict"] else f"rank {', '.join(missing)}"
                return f"{who} did not come to this point within {TIMEOUT_SECONDS:g} s"
            time.sleep(POLL_SECONDS)
        return ""

    def _leave(self, why: str) -> None:
        """Every rank on its own from here."""
        self._agrees = False
        self._say("left", why)
        self.story = f"each of {len(self.ranks)} ranks decides alone: {why}"

    def _say(self, key: str, text: str) -> bool:
        try:
            self._store.set(key, text)
        except dist.DistError:
            return False
        return True

    # What one of them found

    def defer(self, error: RecomputeError) -> bool:
        """Whether a wrong value, found in a backward, will be raised on all ranks before the optimizer steps.

        Only where an optimizer of torch's has stepped this model before, outside a backward: then it will be asked.
        """
        if not self.ranks or not self._ticks or not self._defers or torch._C._current_graph_task_id() == -1:
            return False
        if not self._say(self._place(), f"{self._me} {error}"):
            return False
        self._wrong = self._wrong or error
        return True

    def _place(self) -> str:
        return f"wrong/{self._ticks}/{self._attempt}"

    def before_optimizer(self) -> None:
        """The optimizer is about to step.

        Raises:
            RecomputeError: This rank has found a wrong value in the backward before.
            RankError: Another one has.
        """
        if not self.ranks:
            return
        if torch._C._current_graph_task_id() != -1:
            self._defers = False  # it steps within the backward, parameter by parameter: there is no such moment
        mine, self._wrong = self._wrong, None
        if mine is not None:
            self._attempt += 1
            raise mine
        try:
            place = self._place()
            said = self._store.get(place).decode() if self._store.check([place]) else ""
        except dist.DistError:
            self._defers, said = False, ""  # the process that kept the store has ended
        if said:
            self._attempt += 1
            rank, _, message = said.partition(" ")
            raise RankError(
                int(rank),
                f"Rank {rank} recomputed a wrong value, and its gradients have gone into those of all ranks: drop "
                f"this step's gradients and step again, on every rank. It says: {message}",
            )
        self._ticks += 1
        self._attempt = 0
