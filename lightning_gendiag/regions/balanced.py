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

Matrix = NDArray[np.float64]
Integers = NDArray[np.int64]


def balanced_clusters(
    cka: Matrix, height: int, width: int, num_regions: int | None, connected: bool = True
) -> tuple[Integers, int | None]:
    """Divides the positions of an image into regions.

    Args:
        cka: (P, P) alignments of positions in row-major order; 0 on the diagonal where a position never varies.
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
    kernel, edges = cka[np.ix_(inside, inside)], None
    if connected:
        edges = _edges(~background.reshape(height, width))
        places = np.stack(np.divmod(inside, width), 1) / max(height, width)
        places -= places.mean(0)
        kernel = kernel + POSITION * places @ places.T
    count = None if num_regions is None else num_regions - bool(background.any())
    found = _moved(kernel, edges, *_divided(kernel, edges, count))
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


def _tree(kernel: Matrix, edges: Integers | None) -> list[tuple[int, int, float]]:
    """Merges neighbouring clusters, or any without edges, by Ward's method; returns the nodes and the cost of each merge.

    Nodes 0..P-1 are the positions, and node P + i is the i-th merge.
    """
    if edges is None:
        return _tree_of_all(kernel)
    sums, count = kernel.copy(), len(kernel)
    size, node, version = [1] * count, list(range(count)), [0] * count
    near: list[set[int]] = [set() for _ in range(count)]
    for a, b in edges.tolist():
        near[a].add(b)
        near[b].add(a)

    def entry(a: int, b: int) -> tuple[float, int, int, int, int]:
        a, b = min(a, b), max(a, b)
        own, other = sums[a, a], sums[b, b]
        cost = own / size[a] + other / size[b] - (own + other + 2 * sums[a, b]) / (size[a] + size[b])
        return float(cost), a, b, version[a], version[b]

    heap = [entry(a, b) for a, b in edges.tolist()]
    heapq.heapify(heap)
    tree: list[tuple[int, int, float]] = []
    while heap:
        cost, a, b, *versions = heapq.heappop(heap)
        if versions != [version[a], version[b]]:
            continue
        tree.append((node[a], node[b], cost))
        sums[a] += sums[b]
        sums[:, a] += sums[:, b]
        size[a] += size[b]
        node[a] = count + len(tree) - 1
        version[a], version[b] = version[a] + 1, -1
        for other in near[b]:
            near[other].discard(b)
            near[other].add(a)
        near[a] = (near[a] | near[b]) - {a, b}
        for other in near[a]:
            heapq.heappush(heap, entry(a, other))
    return tree


def _tree_of_all(kernel: Matrix) -> list[tuple[int, int, float]]:
    """Returns the same where all positions are neighbours of each other, for which there is a faster algorithm."""
    from scipy.cluster import hierarchy

    if len(kernel) == 1:
        return []
    norms, (rows, columns) = kernel.diagonal(), np.triu_indices(len(kernel), 1)
    distances = np.sqrt((norms[rows] + norms[columns] - 2 * kernel[rows, columns]).clip(min=0))
    # its height is the square root of twice the cost
    return [(int(a), int(b), height**2 / 2) for a, b, height, _ in hierarchy.linkage(distances, "ward").tolist()]


def _divided(kernel: Matrix, edges: Integers | None, num_regions: int | None) -> tuple[Integers, float]:
    """Cuts the tree into regions, and returns their labels (P,) and the least size that all of them have."""
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
    return _joined(labels, edges, _distances(kernel, labels)), least


def _distances(kernel: Matrix, labels: Integers) -> Matrix:
    """Returns squared distances (P, R) of positions from the means of regions, up to one number for each position."""
    member = np.eye(int(labels.max()) + 1)[labels] * (labels >= 0)[:, None]
    mean = kernel @ member / member.sum(0)
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


def _moved(kernel: Matrix, edges: Integers | None, labels: Integers, least: float) -> Integers:
    """Moves positions to the nearest region, as k-means does, while regions stay connected and large enough."""
    for _ in range(MOVES):
        distances = _distances(kernel, labels)
        moved = distances.argmin(1).astype(np.int64)
        if edges is not None:
            moved = _joined(np.where(_in_largest_part(moved, edges), moved, -1), edges, distances)
        counts = np.bincount(moved, minlength=distances.shape[1])
        if counts.min() < least or (moved == labels).all():
            break
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
