"""What Memfit decided for one model, as data.

A plan is a list of policies and, for every block call of a step, which policy it uses. It reads and writes JSON: a plan
file may come from anyone, so it is checked field by field before it becomes a `Plan`, and nothing in it is ever
evaluated. No torch here.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from memfit.errors import PlanError
from memfit.files import write_whole
from memfit.units import format_bytes

SCHEMA_VERSION = 3
MAX_FILE_BYTES = 64 * 2**20
MAX_DEPTH = 6
MAX_ITEMS = 1_000_000
"""Of any one list in a plan file: calls, policies, nodes of a policy."""
MAX_TEXT = 4096
_MAX_INTEGER = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The actions for one program of a block: what is not named is recomputed.

    Attributes:
        program: Key of the program.
        kept: Nodes of the program saved as they are, ascending. A block input that recipes read is one of them.
        narrowed: Nodes saved in their smaller, lossless form, ascending.
        linked: An input that is dropped, because the block call before brings it back: it is what that call returned. A
            call that turns out not to be linked keeps it.
        returned: An output that the next call's ``linked`` input is; recipes for it are got ready.
    """

    program: str
    kept: tuple[int, ...] = ()
    narrowed: tuple[int, ...] = ()
    linked: int | None = None
    returned: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CallPlan:
    """What one block call does.

    Attributes:
        name: Qualified module name, such as ``model.layers.3``.
        program: Key of the program that it is expected to run.
        policy: Index into `Plan.policies`.
    """

    name: str
    program: str
    policy: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What every block call of a training step saves and recomputes, and what that is predicted to cost.

    Attributes:
        model: Name of the model's class.
        fingerprint: Of the model that the plan is for.
        device: ``cpu`` or ``cuda:0``.
        budget_bytes: Limit on peak memory that the plan was made for; ``None``: there was none.
        predicted_peak_bytes: Peak memory of the step with this plan.
        plain_peak_bytes: Peak memory of the step that saves everything, predicted.
        recompute_seconds: Time that the plan adds to a step, predicted.
        saved_bytes: What the frames of all block calls hold when every forward pass has ended.
        recomputed_bytes: What autograd would have kept in these blocks and the plan does not hold.
        peak_event: The event of the step that owns the peak, such as ``loss``.
        policies: Each used by at least one call.
        calls: Block calls in forward order.
        world_size: Ranks that train the model together; their gradient buckets and shards are in the bytes above.
        mesh: Shape of the device mesh that parameters are sharded over; empty where every rank has them whole.
        schema_version: Of the JSON form.
    """

    model: str
    fingerprint: str
    device: str
    budget_bytes: int | None
    predicted_peak_bytes: int
    plain_peak_bytes: int
    recompute_seconds: float
    saved_bytes: int
    recomputed_bytes: int
    peak_event: str
    policies: tuple[Policy, ...]
    calls: tuple[CallPlan, ...]
    world_size: int = 1
    mesh: tuple[int, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def policy(self, call: int) -> Policy:
        """The policy of block call number ``call``."""
        return self.policies[self.calls[call].policy]

    def to_json(self) -> str:
        """This plan as text that `from_json` reads back to an equal plan."""
        return json.dumps(asdict(self), allow_nan=False, separators=(",", ":")) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a file, whole or not at all.

        Raises:
            PlanError: The file cannot be written.
        """
        target = Path(path)
        try:
            write_whole(target, self.to_json())
        except OSError as error:
            raise PlanError(f"Cannot write the plan to `{target}`: {error.strerror}.") from error

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read a plan.

        Raises:
            PlanError: The text is not JSON, too large, of another schema version, or says something that a plan does
                not say; the message names the place.
        """
        if len(text) > MAX_FILE_BYTES:
            raise PlanError(f"The plan has {len(text)} characters; at most {MAX_FILE_BYTES} are read. {_AGAIN}")
        return _read_plan(_parse(text))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read a plan from a file.

        Raises:
            PlanError: As `from_json`, with the name of the file; or the file cannot be read.
        """
        try:
            with open(path, "rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise PlanError(f"Cannot read the plan `{os.fspath(path)}`: {error.strerror}.") from error
        if len(content) > MAX_FILE_BYTES:
            raise PlanError(
                f"The plan `{os.fspath(path)}` has more than {format_bytes(MAX_FILE_BYTES)}, the limit. {_AGAIN}"
            )
        try:
            return Plan.from_json(content.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise PlanError(
                f"The plan `{os.fspath(path)}` is not JSON: byte {error.start} is not UTF-8. {_AGAIN}"
            ) from None
        except PlanError as error:
            raise PlanError(f"In `{os.fspath(path)}`: {error}") from None


_T = TypeVar("_T")
_AGAIN = "Make the plan again with `memfit plan`."
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def _parse(text: str) -> object:
    """JSON without its surprises: nesting, duplicate keys, NaN."""
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        bracket = match[0]
        if bracket in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise PlanError(f"The plan is nested more than {MAX_DEPTH} levels deep. {_AGAIN}")
        elif bracket in "]}":
            depth -= 1
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise PlanError(f"The plan is not JSON: {error.msg} in line {error.lineno}. {_AGAIN}") from None
    except (ValueError, RecursionError):  # an integer of thousands of digits; deep nesting that the scan missed
        raise PlanError(f"The plan is not JSON that can be read. {_AGAIN}") from None


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise PlanError(f"The plan has the field `{twice[:80]}` twice in one object. {_AGAIN}")
    return entries


def _refuse_constant(name: str) -> float:
    raise PlanError(f"The plan contains `{name}`, which is not a number. {_AGAIN}")


def _read_plan(value: object) -> Plan:
    version = value.get("schema_version") if isinstance(value, dict) else None
    if version is not None and version != SCHEMA_VERSION:
        raise PlanError(
            f"The plan has schema version {str(version)[:20]}; this Memfit reads version {SCHEMA_VERSION}. {_AGAIN}"
        )
    entry = _object(
        value,
        "the plan",
        "schema_version model fingerprint device budget_bytes predicted_peak_bytes plain_peak_bytes recompute_seconds "
        "saved_bytes recomputed_bytes peak_event policies calls world_size mesh",
    )
    budget = entry["budget_bytes"]
    plan = Plan(
        schema_version=_integer(entry["schema_version"], "schema_version"),
        model=_text(entry["model"], "model"),
        fingerprint=_text(entry["fingerprint"], "fingerprint"),
        device=_text(entry["device"], "device"),
        budget_bytes=None if budget is None else _integer(budget, "budget_bytes"),
        predicted_peak_bytes=_integer(entry["predicted_peak_bytes"], "predicted_peak_bytes"),
        plain_peak_bytes=_integer(entry["plain_peak_bytes"], "plain_peak_bytes"),
        recompute_seconds=_seconds(entry["recompute_seconds"], "recompute_seconds"),
        saved_bytes=_integer(entry["saved_bytes"], "saved_bytes"),
        recomputed_bytes=_integer(entry["recomputed_bytes"], "recomputed_bytes"),
        peak_event=_text(entry["peak_event"], "peak_event"),
        policies=_list(entry["policies"], "policies", _read_policy),
        calls=_list(entry["calls"], "calls", _read_call),
        world_size=_count(entry["world_size"], "world_size"),
        mesh=_list(entry["mesh"], "mesh", _count),
    )
    for number, call in enumerate(plan.calls):
        if call.policy >= len(plan.policies):
            raise _wrong(f"calls[{number}].policy", call.policy, f"below {len(plan.policies)}, the number of policies")
        program = plan.policies[call.policy].program
        if program != call.program:
            raise _wrong(f"calls[{number}].program", call.program, f"that of its policy, `{program[:80]}`")
        if plan.policy(number).linked is not None and (number == 0 or plan.policy(number - 1).returned is None):
            raise PlanError(f"In the plan, `calls[{number}]` is linked to a call that brings nothing back. {_AGAIN}")
    return plan


def _read_policy(value: object, where: str) -> Policy:
    entry = _object(value, where, "program kept narrowed linked returned")
    linked, returned = entry["linked"], entry["returned"]
    policy = Policy(
        program=_text(entry["program"], f"{where}.program"),
        kept=_list(entry["kept"], f"{where}.kept", _integer),
        narrowed=_list(entry["narrowed"], f"{where}.narrowed", _integer),
        linked=None if linked is None else _integer(linked, f"{where}.linked"),
        returned=None if returned is None else _integer(returned, f"{where}.returned"),
    )
    for name, nodes in (("kept", policy.kept), ("narrowed", policy.narrowed)):
        if any(a >= b for a, b in pairwise(nodes)):
            raise PlanError(f"In the plan, `{where}.{name}` is not ascending. {_AGAIN}")
    both = set(policy.kept) & set(policy.narrowed)
    if both:
        raise PlanError(f"In the plan, `{where}` keeps node {min(both)} both as it is and narrowed. {_AGAIN}")
    if policy.linked in policy.kept or policy.linked in policy.narrowed:
        raise PlanError(f"In the plan, `{where}` both keeps its linked input {policy.linked} and drops it. {_AGAIN}")
    return policy


def _read_call(value: object, where: str) -> CallPlan:
    entry = _object(value, where, "name program policy")
    return CallPlan(
        name=_text(entry["name"], f"{where}.name"),
        program=_text(entry["program"], f"{where}.program"),
        policy=_integer(entry["policy"], f"{where}.policy"),
    )


def _object(value: object, where: str, fields: str) -> dict[str, object]:
    """``value`` if it is an object with exactly these fields."""
    if not isinstance(value, dict):
        raise _wrong(where, value, "an object")
    known = set(fields.split())
    for name in value:
        if name not in known:
            raise PlanError(f"{_place(where)} has the unknown field `{name[:80]}`. {_AGAIN}")
    for name in fields.split():
        if name not in value:
            raise PlanError(f"{_place(where)} lacks the field `{name}`. {_AGAIN}")
    return value


def _place(where: str) -> str:
    return "The plan" if where == "the plan" else f"In the plan, {where}"


def _list(value: object, where: str, read: Callable[[object, str], _T]) -> tuple[_T, ...]:
    if not isinstance(value, list):
        raise _wrong(where, value, "a list")
    if len(value) > MAX_ITEMS:
        raise PlanError(f"In the plan, `{where}` has {len(value)} items; at most {MAX_ITEMS} are read. {_AGAIN}")
    return tuple(read(item, f"{where}[{number}]") for number, item in enumerate(value))


def _text(value: object, where: str) -> str:
    # Printable: names end up in terminals, and a plan may come from anyone.
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        raise _wrong(where, value, f"printable text of at most {MAX_TEXT} characters")
    return value


def _integer(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_INTEGER:
        raise _wrong(where, value, "an integer from 0 to 2^62")
    return value


def _count(value: object, where: str) -> int:
    if _integer(value, where) == 0:
        raise _wrong(where, value, "at least 1")
    return _integer(value, where)


def _seconds(value: object, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not (0 <= value < math.inf):
        raise _wrong(where, value, "a finite number of seconds, not below 0")
    return float(value)


def _wrong(where: str, value: object, expected: str) -> PlanError:
    shown = json.dumps(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return PlanError(f"In the plan, `{where}` is `{shown}`; it must be {expected}. {_AGAIN}")
