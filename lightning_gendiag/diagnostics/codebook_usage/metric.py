"""Codebook usage over batches and processes, in constant memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_gendiag.diagnostics.codebook_usage.functional import CodebookUsageResult, codebook_usage
from lightning_gendiag.metric import Diagnostic, ScalarInfo, less_is_better, more_is_better


class CodebookUsage(Diagnostic):
    """How evenly the codes of one or several codebooks are used, which are dead, and how many assignments change.

    Memory: one number for each code, which does not grow with the number of images.

    Args:
        num_codes: K, or the number of codes of each codebook, such as one for each level of a residual quantizer.
        kwargs: arguments of torchmetrics' ``Metric``.

    Raises:
        ValueError: if ``num_codes`` is out of its range.

    Example:
        >>> metric = CodebookUsage(4)
        >>> metric.update(torch.tensor([[0, 1], [1, 0]]))
        >>> metric.compute().dead
        tensor([[False, False,  True,  True]])
    """

    plotted = ("usage", "estimated_usage", "nine_tenths")
    scalar_info: ClassVar[dict[str, ScalarInfo]] = {
        "perplexity": more_is_better(
            "Number of codes in even use that would carry as much, corrected for unseen ones; the geometric mean."
        ),
        "usage": more_is_better("Fraction of the codes that were chosen, the mean over codebooks."),
        "estimated_usage": more_is_better("Fraction of the codes that more images would choose, at least."),
        "nine_tenths": ScalarInfo("Smallest fraction of the codes that carries nine tenths of the assignments."),
        "dead_codes": less_is_better("Number of codes of all codebooks that were not chosen."),
        "died_codes": less_is_better("Number of these that were in use at the evaluations before."),
        "unseen_bound": ScalarInfo("Share below which that of a code that was not chosen lies, with 95 % confidence."),
        "invalid": less_is_better("Fraction of the indices that name no code and are left out."),
        "drift": ScalarInfo("Fraction of the positions whose code changed since the evaluation before.", optional=True),
        "perplexity_{q}": more_is_better("Perplexity of the codebook, for 2 to 20 codebooks.", optional=True),
        "usage_{q}": more_is_better("Usage of the codebook, for 2 to 20 codebooks.", optional=True),
    }
    counts: Tensor
    left_out: Tensor
    compared: Tensor
    changed: Tensor

    def __init__(self, num_codes: int | Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        sizes = [num_codes] if isinstance(num_codes, int) else list(num_codes)
        if not sizes or min(sizes) < 1:
            raise ValueError(
                f"num_codes must be at least 1 for each codebook, got {num_codes}. To fix this, pass the number of codes."
            )
        self.num_codes = sizes
        self.add_sums(
            counts=(len(sizes), max(sizes)), left_out=(), compared=(len(sizes),), changed=(len(sizes),)
        )  # fmt: skip
        self.add_configuration(num_codes=sizes)

    def update(self, indices: Tensor | Sequence[Tensor], before: Tensor | Sequence[Tensor] | None = None) -> None:
        """Adds the codes that were chosen for images.

        Args:
            indices: (N, ...) integers; of several codebooks a sequence of these, or (N, ..., Q) as residual quantizers
                return. Values outside of 0 to K - 1 are left out.
            before: codes of the first M images from before, (M, ...) each, to count how many changed.

        Raises:
            ValueError: if an argument has another shape or type.
        """
        given = self._split(indices, "indices")
        earlier = [None] * len(given) if before is None else self._split(before, "before")
        counts, left_out = [], torch.zeros((), dtype=torch.float64, device=self.device)
        compared, changed = torch.zeros_like(self.compared), torch.zeros_like(self.changed)
        for q, (codes, old, size) in enumerate(zip(given, earlier, self.num_codes, strict=True)):
            codes = codes.detach().to(self.device, torch.long)
            valid = (codes >= 0) & (codes < size)
            # of one more code for those that are left out, since the host would wait for their number
            places = codes.where(valid, self.counts.shape[1]).flatten()
            row = torch.zeros(self.counts.shape[1] + 1, dtype=torch.float64, device=self.device)
            counts.append(row.scatter_add_(0, places, torch.ones_like(places, dtype=torch.float64))[:-1])
            left_out = left_out + (~valid).sum()
            if old is not None:
                if old.shape[1:] != codes.shape[1:] or len(old) > len(codes):
                    raise ValueError(
                        f"before must be (M, {', '.join(map(str, codes.shape[1:]))}) with M up to {len(codes)}, got "
                        f"{tuple(old.shape)}. To fix this, pass codes of the same images."
                    )
                old = old.detach().to(self.device, torch.long)
                compared[q], changed[q] = old.numel(), (old != codes[: len(old)]).sum()
        self.accumulate(counts=torch.stack(counts), left_out=left_out, compared=compared, changed=changed)

    def _split(self, indices: Tensor | Sequence[Tensor], name: str) -> list[Tensor]:
        """Returns the integers of each codebook."""
        q = len(self.num_codes)
        if not isinstance(indices, Tensor):
            parts = list(indices)
        elif q == 1:
            parts = [indices]
        else:
            parts = list(indices.unbind(-1)) if indices.ndim else []
        kinds = {part.dtype for part in parts if part.is_floating_point() or part.is_complex() or not part.ndim}
        if len(parts) != q or kinds or any(part.dtype == torch.bool for part in parts):
            got = ", ".join(f"{part.dtype} {tuple(part.shape)}" for part in parts[:4]) or type(indices).__name__
            raise ValueError(
                f"{name} must be integers (N, ...) for each of {q} codebooks, got {got}. To fix this, pass the indices that "
                "the quantizer returns, a list of them for several codebooks."
            )
        return parts

    def compute(self) -> CodebookUsageResult:
        """Computes the usage over all images; nan where there are none."""
        sizes = torch.tensor(self.num_codes, device=self.counts.device)
        return codebook_usage(self.counts, sizes)._replace(
            invalid=self.left_out / (self.counts.sum() + self.left_out),
            compared=self.compared,
            changed=self.changed,
        )
