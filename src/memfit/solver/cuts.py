"""Closures of least cost, by minimum cut.

To recompute is to choose a set of items that is closed under "needs": running an op needs the ops that make what it
reads. With a price per byte every item has a cost, positive or negative, and the closed set of least total cost is a
minimum cut. Costs are integers, so the answer is exact.

Source:
    Picard 1976, "Maximal closure of a graph and applications to combinatorial problems"; Dinic 1970 for the flow.
"""

from __future__ import annotations

from collections.abc import Sequence


def cheapest_closure(costs: Sequence[int], needs: Sequence[Sequence[int]]) -> frozenset[int]:
    """Find the closed set of items whose costs add up to the least.

    Args:
        costs: Of each item; below zero where taking the item is a gain.
        needs: For each item, the items that have to be taken with it.

    Returns:
        The smallest of the cheapest closed sets; empty if nothing costs less than nothing.
    """
    if all(cost >= 0 for cost in costs):
        return frozenset()
    if not any(needs):
        return frozenset(item for item, cost in enumerate(costs) if cost < 0)
    source, sink = len(costs), len(costs) + 1
    endless = 1 + sum(-cost for cost in costs if cost < 0)
    network = _Network(len(costs) + 2)
    for item, cost in enumerate(costs):
        if cost < 0:
            network.connect(source, item, -cost)
        elif cost > 0:
            network.connect(item, sink, cost)
        for other in needs[item]:
            network.connect(item, other, endless)
    return frozenset(network.source_side(source, sink)) - {source}


class _Network:
    """Edges in pairs: edge ``e`` and its reverse ``e ^ 1``."""

    def __init__(self, size: int) -> None:
        self.edges: list[list[int]] = [[] for _ in range(size)]
        self.target: list[int] = []
        self.room: list[int] = []

    def connect(self, start: int, end: int, room: int) -> None:
        self.edges[start].append(len(self.target))
        self.edges[end].append(len(self.target) + 1)
        self.target += (end, start)
        self.room += (room, 0)

    def source_side(self, source: int, sink: int) -> list[int]:
        """What the source still reaches under a largest flow."""
        while True:
            level = self.levels(source)
            if level[sink] < 0:
                return [vertex for vertex, depth in enumerate(level) if depth >= 0]
            used = [0] * len(self.edges)
            while self.augment(source, sink, level, used):
                pass

    def levels(self, source: int) -> list[int]:
        level = [-1] * len(self.edges)
        level[source] = 0
        queue = [source]
        for vertex in queue:
            for edge in self.edges[vertex]:
                end = self.target[edge]
                if self.room[edge] and level[end] < 0:
                    level[end] = level[vertex] + 1
                    queue.append(end)
        return level

    def augment(self, source: int, sink: int, level: list[int], used: list[int]) -> bool:
        """Send flow along one path of the level graph; ``used`` counts the edges of each vertex that lead nowhere."""
        path: list[int] = []
        vertex = source
        while vertex != sink:
            edges = self.edges[vertex]
            while used[vertex] < len(edges):
                edge = edges[used[vertex]]
                if self.room[edge] and level[self.target[edge]] == level[vertex] + 1:
                    path.append(edge)
                    vertex = self.target[edge]
                    break
                used[vertex] += 1
            else:
                if not path:
                    return False
                vertex = self.target[path.pop() ^ 1]
                used[vertex] += 1
        flow = min(self.room[edge] for edge in path)
        for edge in path:
            self.room[edge] -= flow
            self.room[edge ^ 1] += flow
        return True
