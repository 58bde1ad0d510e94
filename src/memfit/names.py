"""Names as people type them: `RTX 4090`, `rtx4090`, `Qwen2.5-7B`. Case, spaces, dashes and dots do not count."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_IGNORED = re.compile(r"[\s._-]+")


def plain(name: str) -> str:
    """What two spellings of one name share. A `/` stays: it separates an organisation from its model."""
    return _IGNORED.sub("", name.strip().lower())


def nearest(name: str, names: Iterable[str], *, count: int = 3) -> tuple[str, ...]:
    """Those of ``names`` that look most like ``name``, the closest first; none where nothing does.

    Compared without an organisation, so that `meta/llama-3-8b` finds `llama-3-8b`.
    """
    by_plain: dict[str, str] = {}
    for candidate in names:
        by_plain.setdefault(plain(candidate).rpartition("/")[2], candidate)
    found = difflib.get_close_matches(plain(name).rpartition("/")[2], by_plain, n=count, cutoff=0.5)
    return tuple(by_plain[match] for match in found)
