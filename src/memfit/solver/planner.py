"""From the profile of a step to a plan: the fastest that fits, the smallest there is, or one of today's switches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from memfit.errors import InfeasibleBudgetError, UsageError
from memfit.plans import CallPlan, Plan, Policy
from memfit.profiles import StepEvent, StepProfile
from memfit.solver.chain import CELLS, fastest, smallest_budget
from memfit.solver.crossed import Crossed
from memfit.solver.frontier import Option, block_options
from memfit.solver.lifetimes import Chain, Nested, nested, own_call
from memfit.solver.linked import LinkedSearch, has_links
from memfit.solver.peak import Simulation, event_bytes, simulate_policies
from memfit.solver.special import full_policy, plain_policy, selective_policy
from memfit.solver.working_set import kept_bytes

TIE = 1e-3
"""Plans whose recompute times differ by less than this part are equally fast: times are known no better."""
TIGHT = 1 / 16
"""Up to this part of the way from the smallest peak without links to the plain peak, links are tried too. Further up,
other values cost less time per byte than a block's input does."""
_COARSE_CELLS = 512
_SWITCHES = {"plain": plain_policy, "full": full_policy, "selective": selective_policy}


def solve(
    profile: StepProfile,
    *,
    budget: int | Literal["min"],
    margin_bytes: int = 0,
    model: str = "",
    fingerprint: str = "",
    max_options: int = 24,
) -> Plan:
    """Find the fastest plan whose peak memory fits the budget.

    Ties go to the lower peak, then to fewer policies: equal inputs give equal plans.

    Args:
        profile: What a training step costs.
        budget: Upper limit on peak memory, in bytes; or ``min``: the smallest peak, and the fastest plan at it.
        margin_bytes: Part of the budget that the plan leaves free, for what the profile does not know.
        model: Name of the model's class, for the plan.
        fingerprint: Of the model, for the plan.
        max_options: Points on the frontier of each program.

    Returns:
        A plan with ``simulate(profile, plan).peak_bytes <= budget - margin_bytes``.

    Raises:
        InfeasibleBudgetError: No plan fits; carries the smallest peak and the event that owns it.

    Source:
        Beaumont et al. 2019, hal-02352969, for the chain. Differs: the options of a block come from its own frontier.
    """
    by_program = {key: block_options(program, max_options=max_options) for key, program in profile.programs.items()}
    options = [by_program[call.program] for call in profile.calls]
    step = nested(profile, options)
    search = _search(profile, options, step)
    smallest = search.smallest_peak()
    limit = smallest if budget == "min" else budget - margin_bytes
    policies: list[Policy] | None = None
    event = ""
    if limit >= smallest:
        picked = search.within(limit, CELLS)
        assert picked is not None, "a budget that leaves room has a plan"
        policies = search.policies(_settle(search, picked, smallest))
    if step is not None and has_links(profile) and (budget == "min" or limit < _tight(profile, smallest)):
        linked = LinkedSearch(profile, options, step, smallest)
        found = linked.within(limit) if budget != "min" else None
        if found is None:
            found = linked.smallest()
            smallest = min(smallest, simulate_policies(profile, found).peak_bytes)
            limit = smallest if budget == "min" else limit
        else:
            smallest = min(smallest, limit)
        if limit >= smallest:
            policies = _better(profile, policies, found, any_seconds=budget == "min")
        else:
            event = simulate_policies(profile, found).event
    elif policies is None:
        picked = search.within(smallest, CELLS)
        assert picked is not None
        event = simulate_policies(profile, search.policies(picked)).event
    if policies is None:
        assert budget != "min"
        raise InfeasibleBudgetError(budget, smallest + margin_bytes, event, _advice(profile, event))
    plan = make_plan(
        profile,
        policies,
        budget_bytes=None if budget == "min" else budget,
        model=model,
        fingerprint=fingerprint,
    )
    return replace(plan, budget_bytes=plan.predicted_peak_bytes) if budget == "min" else plan


def _tight(profile: StepProfile, smallest: int) -> float:
    """The budget under which links are tried."""
    plain = {key: plain_policy(program) for key, program in profile.programs.items()}
    peak = simulate_policies(profile, [plain[call.program] for call in profile.calls]).peak_bytes
    return smallest + TIGHT * (peak - smallest)


def _better(
    profile: StepProfile, policies: list[Policy] | None, linked: list[Policy] | None, *, any_seconds: bool
) -> list[Policy] | None:
    """The policies with links where they have a lower peak that is asked for, or take less time; else the others."""
    if policies is None or linked is None:
        return linked if policies is None else policies
    ours, theirs = simulate_policies(profile, policies), simulate_policies(profile, linked)
    if any_seconds and theirs.peak_bytes < ours.peak_bytes:
        return linked
    faster = theirs.recompute_seconds < ours.recompute_seconds * (1 - TIE)
    return linked if faster and (not any_seconds or theirs.peak_bytes <= ours.peak_bytes) else policies


def switched(
    profile: StepProfile,
    *,
    policy: str = "full",
    every_n_layers: int = 1,
    model: str = "",
    fingerprint: str = "",
) -> Plan:
    """The plan of today's switches, without a budget.

    Args:
        profile: What a training step costs.
        policy: ``full``, ``selective`` or ``plain`` (save everything).
        every_n_layers: The policy holds for the first block and every n-th after it; the others save everything.
        model: Name of the model's class, for the plan.
        fingerprint: Of the model, for the plan.

    Raises:
        UsageError: No such policy, or ``every_n_layers`` is not a positive integer.
    """
    if policy not in _SWITCHES:
        raise UsageError(f"There is no policy `{policy}`. Write `full`, `selective` or `plain`.")
    if isinstance(every_n_layers, bool) or not isinstance(every_n_layers, int) or every_n_layers < 1:
        raise UsageError(f"`every_n_layers={every_n_layers}` is not a positive integer. Write 1 for every block.")
    blocks: dict[str, int] = {}
    for call in profile.calls:
        blocks.setdefault(call.name, len(blocks))
    made = {
        (key, name): make(program)
        for key, program in profile.programs.items()
        for name, make in _SWITCHES.items()
        if name in (policy, "plain")
    }
    policies = [
        made[call.program, policy if blocks[call.name] % every_n_layers == 0 else "plain"] for call in profile.calls
    ]
    return make_plan(profile, policies, budget_bytes=None, model=model, fingerprint=fingerprint)


def make_plan(
    profile: StepProfile,
    policies: Sequence[Policy],
    *,
    budget_bytes: int | None,
    model: str = "",
    fingerprint: str = "",
) -> Plan:
    """The plan in which each block call has this policy, with its predicted costs."""
    plain = {key: plain_policy(program) for key, program in profile.programs.items()}
    plain_peak = simulate_policies(profile, [plain[call.program] for call in profile.calls]).peak_bytes
    found: Simulation = simulate_policies(profile, policies)
    unique = list(dict.fromkeys(policies))
    number = {policy: place for place, policy in enumerate(unique)}
    gone = {policy: _recomputed_bytes(profile, policy, plain[policy.program]) for policy in unique}
    return Plan(
        model=model,
        fingerprint=fingerprint,
        device=profile.device,
        budget_bytes=budget_bytes,
        predicted_peak_bytes=found.peak_bytes,
        plain_peak_bytes=plain_peak,
        recompute_seconds=found.recompute_seconds,
        saved_bytes=sum(found.kept_bytes),
        recomputed_bytes=sum(gone[policy] for policy in policies),
        peak_event=found.event,
        policies=tuple(unique),
        calls=tuple(
            CallPlan(name=call.name, program=call.program, policy=number[policy])
            for call, policy in zip(profile.calls, policies, strict=True)
        ),
    )


def _recomputed_bytes(profile: StepProfile, policy: Policy, plain: Policy) -> int:
    """What autograd would hold and the policy does not; inputs that only recipes read do not count against it."""
    program = profile.programs[policy.program]
    saved = set(plain.kept)
    shared = Policy(
        program=policy.program,
        kept=tuple(node for node in policy.kept if node in saved),
        narrowed=tuple(node for node in policy.narrowed if node in saved),
    )
    return kept_bytes(program, plain) - kept_bytes(program, shared)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """A step with the options of each call, and a way to choose between them."""

    profile: StepProfile
    options: Sequence[Sequence[Option]]
    smallest_peak: Callable[[], int]
    within: Callable[[int, int], list[int] | None]

    def policies(self, picked: Sequence[int]) -> list[Policy]:
        return [self.options[call][number].policy for call, number in enumerate(picked)]

    def seconds(self, picked: Sequence[int]) -> float:
        return sum(self.options[call][number].recompute_seconds for call, number in enumerate(picked))

    def peak(self, picked: Sequence[int]) -> int:
        chosen = [self.options[call][number] for call, number in enumerate(picked)]
        kept, working = [each.kept_bytes for each in chosen], [each.working_bytes for each in chosen]
        return max((event_bytes(self.profile, event, kept, working) for event in self.profile.events), default=0)


def _search(profile: StepProfile, options: Sequence[Sequence[Option]], step: Nested | None) -> _Search:
    """By dynamic programming where lifetimes are nested, by integer programming where they cross."""
    if step is None:
        crossed = Crossed(profile, options)

        def any_within(limit: int, cells: int) -> list[int] | None:
            # Too slow to look for ties with.
            return crossed.fastest(limit) if cells == CELLS else None

        return _Search(
            profile=profile,
            options=options,
            smallest_peak=lambda: crossed.peak(crossed.smallest()),
            within=any_within,
        )

    def of(chain: Chain) -> list[Sequence[Option]]:
        return [options[call] for call in chain.calls]

    def smallest() -> int:
        return max([step.static_bytes, *(smallest_budget(chain, of(chain)) for chain in step.chains)])

    def within(limit: int, cells: int) -> list[int] | None:
        picked = [0] * len(options)
        for chain in step.chains:
            found = fastest(chain, of(chain), limit, cells=cells)
            if found is None:
                return None
            for call, number in zip(chain.calls, found, strict=True):
                picked[call] = number
        return picked

    return _Search(profile=profile, options=options, smallest_peak=smallest, within=within)


def _settle(search: _Search, picked: list[int], smallest: int) -> list[int]:
    """Among plans as fast as this one, to 0.1%: a lower peak, then fewer policies."""
    allowed = search.seconds(picked) * (1 + TIE)
    peak = search.peak(picked)
    step = max(1, (peak - smallest) // 512)
    while peak > smallest:
        lower = search.within(max(smallest, peak - step), _COARSE_CELLS)
        if lower is None or search.seconds(lower) > allowed:
            break
        picked, peak, step = lower, search.peak(lower), 2 * step
    return _merge(search, picked, peak=peak, seconds=allowed)


def _merge(search: _Search, picked: list[int], *, peak: int, seconds: float) -> list[int]:
    """Give the calls of the rarest policies another policy in use, where that costs neither peak nor time."""
    while True:
        uses: dict[tuple[str, int], list[int]] = {}
        for call, number in enumerate(picked):
            uses.setdefault((search.profile.calls[call].program, number), []).append(call)
        for (program, number), calls in sorted(uses.items(), key=lambda use: (len(use[1]), use[0])):
            for other in sorted(n for key, n in uses if key == program and n != number):
                merged = [other if call in calls else n for call, n in enumerate(picked)]
                if search.seconds(merged) <= seconds and search.peak(merged) <= peak:
                    break
            else:
                continue
            picked = merged
            break
        else:
            return picked


def _advice(profile: StepProfile, name: str) -> str:
    """What would lower the event that owns the smallest peak."""
    event: StepEvent = next(event for event in profile.events if event.name == name)
    if event.name == "loss" and event.kind == "outside":
        return (
            "Lower the batch size or the length of its sequences, compute a language model's loss in chunks "
            "(`chunked_loss=True`), or raise `budget`."
        )
    if event.live_calls or own_call(event) is not None or event.kind == "forward":
        return "Lower the batch size or the length of its sequences, or raise `budget`."
    return "No activation is alive there: use a smaller model or optimizer state, or raise `budget`."
