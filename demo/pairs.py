"""Pairs of (what a function is for, how it does it), taken from the Python standard library.

Every Python has this corpus on its disk: nothing is downloaded, and no licence question arises. The query is the first
paragraph of a docstring; the document is the function's body without its name, its signature and its docstring, since
the name alone would give the answer away.
"""

from __future__ import annotations

import ast
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

# Code that is there for other reasons than to be read: tests, vendored tools, tables.
SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "turtledemo"}
)
QUERY_CHARS = (20, 160)
BODY_CHARS = (800, 8000)


def functions() -> Iterator[tuple[str, str]]:
    """Yield (docstring's first paragraph, body) of each documented function of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if SKIPPED.intersection(path.relative_to(root).parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in old modules
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue  # templates and files in other encodings
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (doc := ast.get_docstring(node)):
                query = " ".join(doc.split("\n\n")[0].split())
                body = "\n".join(ast.unparse(statement) for statement in node.body[1:])
                yield query, body


def collect(*, num_train: int, num_held_out: int, seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Split the corpus into pairs to train on and pairs to search in.

    Queries and bodies are unique: a wrapper that repeats another's docstring would make a right answer count as wrong.

    Args:
        num_train: Pairs to train on.
        num_held_out: Pairs to measure recall on.
        seed: Equal seeds give equal splits on equal Pythons.

    Returns:
        The two lists of (query, body).

    Raises:
        ValueError: This Python's standard library has fewer pairs (some distributions leave its sources out).
    """
    by_query: dict[str, str] = {}
    bodies: set[str] = set()
    for query, body in functions():
        long_enough = QUERY_CHARS[0] <= len(query) <= QUERY_CHARS[1] and BODY_CHARS[0] <= len(body) <= BODY_CHARS[1]
        if long_enough and query not in by_query and body not in bodies:
            by_query[query] = body
            bodies.add(body)
    pairs = list(by_query.items())
    if len(pairs) < num_train + num_held_out:
        raise ValueError(
            f"The standard library at {sysconfig.get_path('stdlib')} gives {len(pairs)} pairs, the demo needs "
            f"{num_train + num_held_out}. Use a Python that ships its sources."
        )
    random.Random(seed).shuffle(pairs)
    return pairs[:num_train], pairs[num_train : num_train + num_held_out]
