"""Dealing the clips of a step to ranks by what they cost, so that no rank waits long for another.

A pure function of costs and widths: every rank deals for itself and all come to the same end.
"""

from __future__ import annotations

import numpy as np


def deal(costs: np.ndarray, widths: np.ndarray, ranks: int) -> list[list[int]]:
    """Which clips each rank gets: longest processing time first.

    The costliest clip goes to the rank with the least to do, then the next one (Graham 1969,
    "Bounds on multiprocessing timing anomalies": at most 4/3 of the best there is). A clip that
    several ranks share goes to that many neighbours, and shared clips come first. So the ranks
    of any group have met the same shared clips in the same order when they meet the next one,
    and exchanges between them cannot cross.

    Args:
        costs: float (N,), above 0, of whole clips in any unit.
        widths: int (N,), by how many ranks each is shared; each divides the next larger one and
            `ranks`.
        ranks: to deal to.

    Returns:
        For each rank the indices of its clips, in the order in which it works on them. A rank is
        empty only where the widths do not add up to `ranks`.
    """
    loads = np.zeros(ranks)
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for clip in np.lexsort((np.arange(len(costs)), -costs, -widths)).tolist():
        width = int(widths[clip])
        # So far only clips of this width or a wider one were dealt: a group's ranks are even.
        first = int(loads[::width].argmin()) * width
        loads[first : first + width] += costs[clip] / width
        for rank in range(first, first + width):
            shares[rank].append(clip)
    return shares
