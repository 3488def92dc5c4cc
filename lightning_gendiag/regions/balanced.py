"""Regions that are connected, hold a least share of the image each, and follow the dependence of pixels.

The alignments of pixels (CKA) are inner products of unit vectors: the centred, normalised kernel matrices of the pixels.
Ward's method, restricted to neighbouring regions (Murtagh and Legendre, 2014), merges these vectors with the pixels' places
appended. Its cost is what the merge loses of the mean alignment within regions, weighted by their sizes. The tree is cut
from the top and only where both parts are large enough, as in HDBSCAN's condensed tree (Campello, Moulavi and Sander, 2013).
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
from numpy.typing import NDArray

POSITION = 1.0
"""Squared distance of places one side of the image apart, where that of independent pixels is 2. Of 0, 0.5, 1 and 2 it is
the best compromise on digits, MNIST, faces and scenes: less leaves large and small regions, more cuts through known ones."""

LEAST = 0.25
"""Each region holds at least this share of an R-th of the pixels that vary."""

LEAST_FOUND = 0.01
"""Least share of the pixels that vary for a region where the data choose the number of regions."""

MOVES = 20
"""Largest number of rounds in which pixels move to the nearest of the regions that meet."""

ROWS = 512
"""Rows of the kernel that are added up in float64 at a time."""

Kernel = NDArray[Any]
Matrix = NDArray[np.float64]
Integers = NDArray[np.int64]


def balanced_clusters(
    cka: Kernel, height: int, width: int, num_regions: int | None, connected: bool = True
) -> tuple[Integers, int | None]:
    """Divides the positions of an image into regions.

    Args:
        cka: (P, P) alignments of positions in row-major order, in float32 or float64; 0 on the diagonal where a position never
            varies. Their sums are in float64.
        height: H.
        width: W.
        num_regions: R, 1 to P, of which one may be the background. None cuts the tree at half of its largest merging
            distance.
        connected: Whether places count and regions are connected; else all positions are neighbours of each other.

    Returns:
        Labels (P,), the largest region first and the background last, and the number of the background or None.
    """
    background = _background(cka.diagonal() == 0, height, width, num_regions, connected)
    inside = np.flatnonzero(~background)
    kernel, edges = cka if len(inside) == len(cka) else cka[np.ix_(inside, inside)], None
    if connected:
        edges = _edges(~background.reshape(height, width))
        places = np.stack(np.divmod(inside, width), 1) / max(height, width)
        places = ((places - places.mean(0)) * POSITION**0.5).astype(kernel.dtype)
        together = places @ places.T
        together += kernel
        kernel = together
    count = None if num_regions is None else num_regions - bool(background.any())
    found = _settled(kernel, edges, *_divided(kernel, edges, count))
    sizes = np.bincount(found)
    first = np.unique(found, return_index=True)[1]
    labels = np.full(height * width, len(sizes), dtype=np.int64)
    labels[inside] = np.lexsort((first, -sizes)).argsort()[found]
    return labels, len(sizes) if background.any() else None


def _background(
    constant: NDArray[np.bool_], height: int, width: int, num_regions: int | None, connected: bool
) -> NDArray[np.bool_]:
    """Returns which positions (P,) are background: constant areas that are large or reach the edge of the image.

    Where regions need not be connected, all constant positions are one area.
    There is none where these are too few for a region, or where too few other positions are left.
    """
    from scipy import ndimage

    none, least = np.zeros_like(constant), len(constant) * _least_share(num_regions)
    areas, _ = ndimage.label(constant.reshape(height, width))
    at_edge = np.concatenate([areas[0], areas[-1], areas[:, 0], areas[:, -1]])
    kept = np.bincount(areas.ravel()) >= least
    kept[at_edge] = True
    kept[0] = False
    found: NDArray[np.bool_] = kept[areas].ravel() if connected else constant.copy()
    others = len(constant) - int(found.sum())
    if num_regions == 1 or found.sum() < least or others < max(1, (num_regions or 2) - 1):
        return none
    return found


def _least_share(num_regions: int | None) -> float:
    return LEAST_FOUND if num_regions is None else LEAST / num_regions


def _edges(inside: NDArray[np.bool_]) -> Integers:
    """Returns pairs (E, 2) of neighbours among the positions inside, numbered from 0, which connect all of them."""
    from scipy import ndimage

    number = np.cumsum(inside).reshape(inside.shape) - 1
    across = inside[:, :-1] & inside[:, 1:]
    down = inside[:-1] & inside[1:]
    pairs = [
        np.stack([number[:, :-1][across], number[:, 1:][across]], 1),
        np.stack([number[:-1][down], number[1:][down]], 1),
    ]
    # parts that the background separates are connected at their nearest positions
    parts, count = ndimage.label(inside)
    while count > 1:
        other = (parts > 1).nonzero()
        far, nearest = ndimage.distance_transform_edt(parts != 1, return_indices=True)
        at = far[other].argmin()
        here = other[0][at], other[1][at]
        there = nearest[0][here], nearest[1][here]
        pairs.append(np.array([[number[there], number[here]]]))
        parts[parts == parts[here]] = 1
        count -= 1
    return np.concatenate(pairs)


def _tree(kernel: Kernel, edges: Integers | None) -> list[tuple[int, int, float]]:
    """Merges neighbouring clusters, or any without edges, by Ward's method; returns the nodes and the cost of each merge.

    Nodes 0..P-1 are the positions, and node P + i is the i-th merge. The sum over a pair of clusters is that of the columns
    of the smaller one in the row of the larger one, so that a merge adds two rows and no columns.
    """
    if edges is None:
        return _tree_of_all(kernel)
    count = len(kernel)
    rows: list[Kernel] = list(kernel)
    members: list[Integers] = list(np.arange(count)[:, None])
    own: list[float] = kernel.diagonal().tolist()
    size, node = [1] * count, list(range(count))
    # sums over pairs of neighbouring clusters
    both: list[dict[int, float]] = [{} for _ in range(count)]
    for (a, b), value in zip(edges.tolist(), kernel[edges[:, 0], edges[:, 1]].tolist(), strict=True):
        both[a][b] = both[b][a] = value

    def entry(a: int, b: int) -> tuple[float, int, int, int, int]:
        a, b = (a, b) if a < b else (b, a)
        m, n, x, y = size[a], size[b], own[a], own[b]
        # the sizes tell whether a cluster was merged since
        return x / m + y / n - (x + y + 2 * both[a][b]) / (m + n), a, b, m, n

    def between(a: int, b: int) -> float:
        large, small = (a, b) if size[a] > size[b] else (b, a)
        if size[small] == 1:
            return float(rows[large].item(small))
        return float(np.add.reduce(rows[large].take(members[small])))

    heap = [entry(a, b) for a, b in edges.tolist()]
    heapq.heapify(heap)
    tree: list[tuple[int, int, float]] = []
    while heap:
        cost, a, b, m, n = heapq.heappop(heap)
        if size[a] != m or size[b] != n:
            continue
        tree.append((node[a], node[b], cost))
        near_a, near_b = both[a], both[b]
        own[a] += own[b] + 2 * near_b.pop(a)
        del near_a[b]
        for other in near_a.keys() | near_b.keys():
            x, y = near_a.get(other), near_b.get(other)
            near = both[other]
            if y is not None:
                del near[b]
            near_a[other] = near[a] = (between(a, other) if x is None else x) + (between(b, other) if y is None else y)
        rows[a] = np.add(rows[a], rows[b], dtype=np.float64) if m == 1 else np.add(rows[a], rows[b], out=rows[a])
        members[a] = np.concatenate([members[a], members[b]])
        rows[b] = members[b] = members[b][:0]
        size[a], size[b], node[a] = m + n, 0, count + len(tree) - 1
        for other in near_a:
            heapq.heappush(heap, entry(a, other))
    return tree


def _tree_of_all(kernel: Kernel) -> list[tuple[int, int, float]]:
    """Returns the same where all positions are neighbours of each other, for which there is a faster algorithm."""
    from scipy.cluster import hierarchy

    if len(kernel) == 1:
        return []
    norms, (rows, columns) = kernel.diagonal(), np.triu_indices(len(kernel), 1)
    distances = np.sqrt((norms[rows] + norms[columns] - 2 * kernel[rows, columns]).clip(min=0))
    # its height is the square root of twice the cost
    return [(int(a), int(b), height**2 / 2) for a, b, height, _ in hierarchy.linkage(distances, "ward").tolist()]


def _divided(kernel: Kernel, edges: Integers | None, num_regions: int | None) -> tuple[Integers, float]:
    """Cuts the tree into regions, and returns their labels (P,), -1 for specks, and the least size that all others have."""
    count = len(kernel)
    tree = _tree(kernel, edges)
    size = [1] * count
    for a, b, _ in tree:
        size.append(size[a] + size[b])
    least = max(1.0, count * _least_share(num_regions))

    def split(node: int) -> tuple[float, int, int]:
        """Returns the first split of a node into two parts that are large enough, and its cost; -1 where there is none."""
        while node >= count:
            a, b, cost = tree[node - count]
            if min(size[a], size[b]) >= least:
                return max(cost, 0.0), a, b
            node = a if size[a] >= size[b] else b
        return -1.0, -1, -1

    while True:
        nodes = {len(tree) + count - 1: split(len(tree) + count - 1)}
        # half of the largest merging distance is a quarter of the cost
        enough = max(cost for cost, _, _ in nodes.values()) / 4
        while len(nodes) != num_regions:
            best = max(nodes, key=lambda node: nodes[node][0])
            cost, a, b = nodes[best]
            if cost < 0 or (num_regions is None and cost <= enough):
                break
            del nodes[best]
            nodes |= {a: split(a), b: split(b)}
        if num_regions in (None, len(nodes)):
            break
        # single positions can always be split off
        least = max(1.0, least / 2)
    labels = np.full(count, -1, dtype=np.int64)
    for region, top in enumerate(sorted(nodes)):
        below = [top]
        while below:
            node = below.pop()
            if node < count:
                labels[node] = region
            else:
                below.extend(tree[node - count][:2])
    return labels, least


def _member(labels: Integers, num_regions: int) -> Matrix:
    """Returns 1 where a position is in a region and 0 elsewhere, (P, R)."""
    member: Matrix = (labels[:, None] == np.arange(num_regions)).astype(np.float64)
    return member


def _move(sums: Matrix, kernel: Kernel, labels: Integers, moved: Integers) -> None:
    """Updates in place the sums (P, R) of the kernel over regions, where some positions have other labels than before."""
    changed, num_regions = np.flatnonzero(moved != labels), sums.shape[1]
    for some in np.split(changed, range(ROWS, len(changed), ROWS)):
        sums += kernel[some].T @ (_member(moved[some], num_regions) - _member(labels[some], num_regions))


def _distances(sums: Matrix, labels: Integers) -> Matrix:
    """Returns squared distances (P, R) of positions from the means of regions, up to one number for each position."""
    member = _member(labels, sums.shape[1])
    mean = sums / member.sum(0)
    distances: Matrix = (member * mean).sum(0) / member.sum(0) - 2 * mean
    return distances


def _joined(labels: Integers, edges: Integers | None, distances: Matrix) -> Integers:
    """Adds positions without a region (-1) to the nearest of the regions that meet there, until all have one."""
    if edges is None:
        return np.where(labels < 0, distances.argmin(1), labels).astype(np.int64)
    labels = labels.copy()
    while (labels < 0).any():
        meets = np.zeros(distances.shape, dtype=bool)
        for a, b in (edges.T, edges[:, ::-1].T):
            known = labels[b] >= 0
            meets[a[known], labels[b[known]]] = True
        added = (labels < 0) & meets.any(1)
        labels[added] = np.where(meets, distances, np.inf)[added].argmin(1)
    return labels


def _settled(kernel: Kernel, edges: Integers | None, labels: Integers, least: float) -> Integers:
    """Moves positions to the nearest region, as k-means does, while regions stay connected and large enough.

    Positions without a region (-1) are first added to the nearest one.
    """
    sums = np.zeros((len(labels), int(labels.max()) + 1))
    _move(sums, kernel, np.full_like(labels, -1), labels)
    joined = _joined(labels, edges, _distances(sums, labels))
    _move(sums, kernel, labels, joined)
    labels = joined
    for _ in range(MOVES):
        distances = _distances(sums, labels)
        moved = distances.argmin(1).astype(np.int64)
        if edges is not None:
            moved = _joined(np.where(_in_largest_part(moved, edges), moved, -1), edges, distances)
        counts = np.bincount(moved, minlength=distances.shape[1])
        if counts.min() < least or (moved == labels).all():
            break
        _move(sums, kernel, labels, moved)
        labels = moved
    return labels


def _in_largest_part(labels: Integers, edges: Integers) -> NDArray[np.bool_]:
    """Returns which positions (P,) are in the largest connected part of their region."""
    from scipy.sparse import csgraph, csr_matrix

    same = edges[labels[edges[:, 0]] == labels[edges[:, 1]]]
    graph: Any = csr_matrix((np.ones(len(same)), same.T), shape=(len(labels), len(labels)))
    _, parts = csgraph.connected_components(graph, directed=False)
    order = np.bincount(parts)[parts].argsort(kind="stable")
    largest = np.full(int(labels.max()) + 1, -1)
    largest[labels[order]] = parts[order]
    found: NDArray[np.bool_] = parts == largest[labels]
    return found
