"""The rows of a report: one for each block call of the last step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from memfit.blocks import Block
from memfit.calls import Call
from memfit.compiled import compiled_notes
from memfit.entries import ProgramState
from memfit.patches import patch_notes
from memfit.runtime import Runtime


def block_rows(
    calls: Iterable[dict[str, Any]], blocks: Iterable[Block], states: Mapping[str, ProgramState]
) -> list[dict[str, Any]]:
    """What happened to each block: in ``calls``, as `describe` has it, and to those that are not called themselves."""
    rows: list[dict[str, Any]] = []
    for call in calls:
        row = {key: call[key] for key in ("name", "mode", "reason", "parent")}
        row.update(bytes_of(call, states))
        rows.append(row)
    called = {row["name"] for row in rows}
    for block in blocks:
        if block.name not in called and block.mode in ("descent", "plain"):
            rows.append(
                {"name": block.name, "mode": block.mode, "reason": block.reason, "parent": block.parent}
                # A descended block's bytes are its children's; what a plain one saves nobody looks at.
                | {"saved_bytes": 0 if block.mode == "descent" else None, "recomputed_bytes": 0, "offloaded_bytes": 0}
            )
    return rows


def notes_of(runtime: Runtime, others: Iterable[str], steps: int) -> list[str]:
    """What the report says in sentences: of the model, of its blocks, and of what was not seen in ``steps`` steps."""
    compiled = compiled_notes(runtime.blocks, steps=steps, begun=runtime.begun)
    return [*filter(None, others), *runtime.notes.values(), *compiled, *patch_notes(runtime.model())]


def unplanned_row(name: str) -> dict[str, Any]:
    """A block of a model that is only measured."""
    return {"name": name, "mode": "plain", "reason": "no budget", "parent": ""} | {
        "saved_bytes": None,
        "recomputed_bytes": 0,
        "offloaded_bytes": 0,
    }


def describe(call: Call) -> dict[str, Any]:
    """What a report needs of a block call, without its tensors."""
    return {
        "name": call.block.name,
        "mode": {"kept": "plain", "": "plain"}.get(call.mode, call.mode),
        "reason": call.block.reason or ("kept this time" if call.mode == "kept" else ""),
        "parent": call.block.parent,
        "program": call.program_key,
        "policy": call.policy,
    }


def bytes_of(call: dict[str, Any], states: Mapping[str, ProgramState]) -> dict[str, int | None]:
    """What became of the saved bytes of a described call; ``None`` where unknown."""
    known = states.get(call["program"])
    policy = call["policy"]
    if known is None or policy is None:
        return {"saved_bytes": None, "recomputed_bytes": None, "offloaded_bytes": 0}
    nodes = known.nodes
    kept = set(policy.kept) | set(policy.narrowed)
    saved = {saved.value.node for saved in known.program.saved}
    here = sum((nodes[n].narrow_bytes if n in policy.narrowed else nodes[n].keep_bytes) or 0 for n in kept)
    gone = sum(nodes[n].keep_bytes or 0 for n in saved - kept)
    gone += sum((nodes[n].keep_bytes or 0) - (nodes[n].narrow_bytes or 0) for n in policy.narrowed)
    return {"saved_bytes": here, "recomputed_bytes": gone, "offloaded_bytes": 0}
