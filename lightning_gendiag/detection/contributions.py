"""Which components explain a drop of the aggregate."""

from __future__ import annotations

import math
from collections.abc import Mapping


def explaining(contributions: Mapping[str, float], share: float = 0.8) -> list[str]:
    """Returns the fewest components that together account for at least a share of a drop.

    Contributions add to one and may be negative, for components that rose. Where all that dropped together do not reach the
    share, they are all returned.

    Args:
        contributions: Each component's contribution to the drop, by name; nan counts as none.
        share: Share of the drop to account for, in (0, 1].

    Returns:
        Names, the largest contribution first and equal ones in the order in which they were given; empty where nothing
        dropped.

    Raises:
        ValueError: If ``share`` is not in (0, 1].

    Example:
        >>> explaining({"left": 0.55, "right": 0.05, "top": 0.4})
        ['left', 'top']
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}. To fix this, pass 0.8 for four fifths of the drop.")
    fell = {name: part for name, part in contributions.items() if part > 0}
    names: list[str] = []
    # sums of shares such as 0.1 + 0.7 fall short of 0.8 by rounding
    while fell and math.fsum(contributions[name] for name in names) < share - 1e-9:
        largest = max(fell, key=fell.__getitem__)
        names.append(largest)
        del fell[largest]
    return names
