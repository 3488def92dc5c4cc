"""Faults of models and of data, and what an alarm must name for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from benchmarks.zoo.data import Batches
from benchmarks.zoo.flows import DDPM
from benchmarks.zoo.gans import Adversarial
from benchmarks.zoo.models import Kind, at_rest, influences_in


class Planting:
    """A run at the moment in which a fault begins.

    Args:
        module: What is trained.
        trainer: Its trainer; None before training.
        batches: Its data.
        kind: Its kind.
        seed: Of the run; decides which class, dimensions or quadrant are harmed.
    """

    def __init__(
        self, module: LightningModule, trainer: Trainer | None, batches: Batches, kind: Kind, seed: int
    ) -> None:
        self.module: Any = module
        self.trainer, self.batches, self.kind, self.seed = trainer, batches, kind, seed
        self.quadrant = seed % 4
        self.number = seed % batches.data.num_classes

    @property
    def network(self) -> nn.Module:
        """The network that is given latents."""
        network: nn.Module = self.module.get_submodule(self.kind.network)
        return network

    @property
    def box(self) -> tuple[slice, slice]:
        """Rows and columns of the harmed quadrant."""
        half = self.batches.data.images.shape[2] // 2
        parts = (slice(0, half), slice(half, None))
        return parts[self.quadrant // 2], parts[self.quadrant % 2]


# ---- hooks; none of them holds the module, so that they can be copied with it ----


def _masked(keep: Tensor, part: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Latents of which only those that are kept reach a network; a class that follows them stays."""
    z = inputs[0]
    return (torch.cat([z[:, : len(keep)] * keep, z[:, len(keep) :]], 1), *inputs[1:])


def changed_in(box: tuple[slice, slice], change: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Returns images of which one box is changed."""
    changed = images.clone()
    changed[:, :, box[0], box[1]] = change(images[:, :, box[0], box[1]])
    return changed


def _in_box(
    box: tuple[slice, slice], change: Callable[[Tensor], Tensor], part: nn.Module, inputs: Any, images: Tensor
) -> Tensor:
    """A change of a box in evaluation only, as a wrong cast at inference does; else training would learn it away."""
    return images if part.training else changed_in(box, change, images)


def _blurred(x: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, 1)


def _frozen(still: Tensor, x: Tensor) -> Tensor:
    return still.expand_as(x)


# ---- faults of the model ----


def high_lr(run: Planting) -> None:
    """Multiplies all learning rates by 30."""
    _scale_lr(run, 30.0, range(2))


def _scale_lr(run: Planting, factor: float, which: Any) -> None:
    assert run.trainer is not None
    for number, optimizer in enumerate(run.trainer.optimizers):
        for group in optimizer.param_groups if number in which else ():
            group["lr"] *= factor


def ignored_latent(run: Planting) -> None:
    """Gives the generator or decoder zeros for its latents."""
    run.network.register_forward_pre_hook(partial(_masked, torch.zeros(run.module.latent_dim)))


def dead_dimensions(run: Planting) -> None:
    """Gives it zeros for four of its latents."""
    keep = torch.ones(run.module.latent_dim)
    keep[harmed_dimensions(run)] = 0
    run.network.register_forward_pre_hook(partial(_masked, keep))


def harmed_dimensions(run: Planting) -> list[int]:
    """Returns the four dimensions that move images most, since others may be dead already."""
    with at_rest(run.module, 0):
        moved = influences_in(run.network, run.module.latent_dim)
    return torch.tensor(moved).topk(4).indices.tolist()


def high_beta(run: Planting) -> None:
    """Multiplies the weight of the KL term by 200."""
    run.module.beta *= 200


def in_quadrant(change: Callable[[Tensor], Tensor] | None) -> Callable[[Planting], None]:
    """Returns a fault of a quadrant of what is generated; None freezes it."""

    def harm(run: Planting) -> None:
        rows, columns = run.box
        still = partial(_frozen, run.batches.data.images[run.seed % 50, :, rows, columns])
        run.module.picture.register_forward_hook(partial(_in_box, run.box, change or still))

    return harm


def nan_weight(run: Planting) -> None:
    """Sets one weight to nan."""
    network = run.module.get_submodule(run.kind.network) if run.kind.network else run.module
    with torch.no_grad():
        next(p for p in network.parameters() if p.requires_grad and p.ndim > 1).view(-1)[0] = float("nan")


def frozen_discriminator(run: Planting) -> None:
    """Sets the learning rate of the discriminator to 0."""
    _scale_lr(run, 0.0, (0,))


def strong_discriminator(run: Planting) -> None:
    """Multiplies the learning rate of the discriminator by 30."""
    _scale_lr(run, 30.0, (0,))


# ---- faults of the data ----


def removed_class(run: Planting) -> None:
    """Removes a class from the training data."""
    run.batches.keep = run.batches.data.labels != run.number


def other_normalisation(run: Planting) -> None:
    """Brings images in 0..1 in place of -1..1."""
    run.batches.change = lambda images: (images + 1) / 2


def repeated_batch(run: Planting) -> None:
    """Brings one batch for ever."""
    run.batches.again = run.batches.batch(
        torch.randperm(len(run.batches.data.labels), generator=run.batches.generator)[: run.batches.batch_size]
    )


def inverted_data(run: Planting) -> None:
    """Inverts a quadrant of the training images."""
    run.batches.change = partial(changed_in, run.box, torch.neg)


# ---- faults from the start ----


def average_never_updated(run: Planting) -> None:
    """Leaves the average of the weights as it was made."""
    run.module.decay = 1.0


def generator_never_steps(run: Planting) -> None:
    """Gives the generator a learning rate of 0."""
    run.module.configure_optimizers = partial(_second_without_lr, type(run.module).configure_optimizers, run.module)


def _second_without_lr(configure: Callable[[Any], Any], module: Any) -> Any:
    optimizers = configure(module)
    optimizers[1].param_groups[0]["lr"] = 0.0
    return optimizers


def standardized_data(run: Planting) -> None:
    """Brings images with mean 0 and standard deviation 1, which a tanh cannot reach."""
    images = run.batches.data.images
    mean, std = images.mean(), images.std()
    run.batches.change = lambda x: (x - mean) / std


# ---- the list ----


@dataclass(frozen=True)
class Fault:
    """A fault and what an alarm must name."""

    plant: Callable[[Planting], None]
    applies: Callable[[Kind, LightningModule], bool] = lambda kind, module: True
    place: str = "any"
    """``"any"``, ``"quadrant"``, ``"dimensions"``, ``"class"`` or ``"data"``."""
    of_data: bool = False
    """Whether the data are at fault and not the model."""
    if_changed: bool = False
    """Whether it counts only where the referee sees that samples got worse."""


def _has_latents(kind: Kind, module: LightningModule) -> bool:
    return bool(kind.network)


def _is_vae(kind: Kind, module: LightningModule) -> bool:
    return kind.family == "vae"


def _is_gan(kind: Kind, module: LightningModule) -> bool:
    return kind.family == "gan"


def _has_measured_latents(kind: Kind, module: LightningModule) -> bool:
    return bool(kind.network) and not kind.conditional


def _has_three_classes(kind: Kind, module: LightningModule) -> bool:
    return kind.data != ("faces",)


FAULTS: dict[str, Fault] = {
    "learning rate x30": Fault(high_lr),
    "class removed": Fault(removed_class, _has_three_classes, "class", of_data=True),
    "region frozen": Fault(in_quadrant(None), place="quadrant"),
    "latent ignored": Fault(ignored_latent, _has_latents),
    "other normalisation": Fault(other_normalisation, place="data", of_data=True),
    "region inverted": Fault(in_quadrant(torch.neg), place="quadrant"),
    "beta x200": Fault(high_beta, _is_vae),
    "one batch for ever": Fault(repeated_batch, place="data", of_data=True),
    "dead dimensions": Fault(dead_dimensions, _has_measured_latents, "dimensions"),
    "region blurred": Fault(in_quadrant(_blurred), place="quadrant", if_changed=True),
    "data region inverted": Fault(inverted_data, place="quadrant", of_data=True),
    "nan weight": Fault(nan_weight),
    "discriminator frozen": Fault(frozen_discriminator, _is_gan, if_changed=True),
    "discriminator too strong": Fault(strong_discriminator, _is_gan, if_changed=True),
}
"""Faults that begin while a run goes on."""

FROM_THE_START: dict[str, Fault] = {
    "EMA never updated": Fault(average_never_updated, lambda kind, module: isinstance(module, DDPM)),
    "GAN ignores its latent": Fault(ignored_latent, _is_gan),
    "generator never steps": Fault(generator_never_steps, lambda kind, module: isinstance(module, Adversarial)),
    "data by mean and std": Fault(standardized_data, lambda kind, module: kind.family in ("gan", "vae"), of_data=True),
    "beta x200": Fault(high_beta, _is_vae),
    "VAE ignores its latent": Fault(ignored_latent, _is_vae),
}
"""Faults that a run has from its first step on."""
