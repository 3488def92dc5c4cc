"""The panel of manifold entropies."""

from __future__ import annotations

from torch import Tensor

from lightning_gendiag.detection.alarm import listed
from lightning_gendiag.detection.history import Curve
from lightning_gendiag.diagnostics.manifold_entropy.functional import ManifoldEntropyResult
from lightning_gendiag.plots import canvas, charts, pictures


def panel(
    result: ManifoldEntropyResult,
    dims: Tensor,
    traversal: Tensor | None,
    in_use: Curve,
    occasion: canvas.Occasion,
    has_prior: bool = True,
) -> Tensor:
    """Draws the sorted spectrum, the mutual information, images along the strongest directions, and dimensions in use.

    Args:
        result: Of the evaluation.
        dims: (L,) numbers of the dimensions in the latent space.
        traversal: (d, P, C, H, W) images at P places of the d strongest directions; None where the data are no images.
        in_use: Number of dimensions in use over time.
        occasion: When it is drawn, and what an alarm marks in it.
        has_prior: Whether latents are draws of the prior, and not those of real images.

    Returns:
        (H, W, 3) uint8.
    """
    entropy, shared = result.entropy.cpu(), result.mutual_information.cpu()
    order = entropy.nan_to_num(-1e9).argsort(descending=True, stable=True)
    names = [str(dim) for dim in dims[order].tolist()]
    alarmed = [dim in occasion.marked for dim in dims[order].tolist()]
    tiles = [
        canvas.Tile("entropy of each dimension, sorted", charts.bars(entropy[order].tolist(), names, alarmed)),
        canvas.Tile("mutual information, same order", charts.matrix(shared[order][:, order], most=1.0)),
    ]
    if traversal is not None:
        tiles.append(canvas.Tile("strongest directions, -2 to 2 std", pictures.contact_sheet(traversal)))
    tiles.append(canvas.Tile("dimensions in use", charts.line(in_use.values, in_use.steps, len(dims))))
    i, j = result.strongest_pair
    rows = [
        canvas.Row(canvas.INK, f"total correlation: {float(result.total_correlation):.2f} nats"),
        canvas.Row(canvas.INK, f"largest mutual information: {dims[i]} with {dims[j]}, {float(shared[i, j]):.2f} nats"),
    ]
    if not has_prior:
        rows.append(canvas.Row(canvas.INK, "at latents of real images"))
    dead = [str(dim) for dim in dims[result.dead.cpu()].tolist()]
    if dead:
        rows.insert(0, canvas.Row(canvas.ALARM, f"dead: {listed(dead, 12)}", strong=True))
    used = f"{float(result.effective_dimensions):.1f} of {len(dims)}"
    return canvas.panel(f"{used} latent dimensions are in use (step {occasion.step})", tiles, rows, occasion.note)
