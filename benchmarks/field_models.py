"""Models of public packages, each in a module as the package's users write it, and how its samples are really made.

What is true of a model is written by hand from the package's documentation, and not found by the code that is judged.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from sklearn.datasets import make_moons
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.utils.data import DataLoader, Dataset

from example_models import data

COUNT = 512
TIMES = 100
SHORT, LONG = 5, 20
"""Times as many epochs: for most, and for what is sampled alike with some mistakes while it is hardly trained."""

DRAWS = 16
"""Number of draws whose mean and standard deviation say what a similarity should be."""

STAGE_STEPS = 300
"""Number of steps of a first stage."""


@dataclass(frozen=True)
class Case:
    """A module, its data, and what is true of it, as functions of the module that is trained."""

    module: LightningModule
    loader: DataLoader[Any]
    sample: Callable[..., Any] | None = None
    """``(n)`` or ``(n, labels)``: how the package's users sample; images in the range of the real ones. None where nothing
    samples."""
    reconstruct: Callable[[Tensor], Any] | None = None
    same: bool = True
    """Whether the same seed must give the same samples; else their distribution is compared."""
    numbers: dict[str, Callable[[int], tuple[float, float]]] = field(default_factory=dict)
    """Scalars such as ``"posterior_kl/total"``: value and largest error, from the number of samples of an evaluation."""
    has_images: bool = True
    longer: int = 1
    """Times as many epochs, for a network whose samplers agree with each other only once it is trained."""
    averaged: tuple[str, Callable[[], Iterable[Tensor]]] | None = None
    """Name of the network that must have averaged weights in evaluations, and these, where distributions hardly differ."""
    wrong: dict[str, Callable[..., Any]] = field(default_factory=dict)
    """Samplers as ``sample`` with a mistake each, by which the comparison of distributions is calibrated."""


@dataclass(frozen=True)
class Entry:
    """A model of the table."""

    name: str
    packages: tuple[str, ...]
    parts: frozenset[str]
    """What the model has; keys of ``PARTS``."""
    make: Callable[[], Case]

    @property
    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [package for package in self.packages if version_of(package) is None]

    @property
    def expected(self) -> list[str]:
        """Names of the diagnostics that belong to the model."""
        return [name for name, needs in NEEDS.items() if any(self.parts.issuperset(some) for some in needs)]


MODELS: list[Entry] = []

PARTS = {
    "images": "data are images, and no rows",
    "labels": "batches hold classes",
    "samples": "it samples",
    "reconstructs": "it reconstructs data",
    "encoder": "it maps data to latents, not given their class, which would take the classes from the latents",
    "decoder": "it maps latents to data, not given a class",
    "posterior": "its encoder returns the mean and the variance of a normal posterior",
    "layers of maps": "its decoder makes images out of smaller maps of features",
    "codebook": "it quantizes latents",
    "inverse": "it is a flow that encodes and decodes",
    "noise levels": "it is trained to predict from data with noise",
    "discriminator": "one is trained with it",
}
"""What models have, and what that means."""

NEEDS: dict[str, tuple[set[str], ...]] = {
    "cms": ({"samples"}, {"reconstructs"}),
    "generation_balance": ({"images", "labels", "samples"}, {"images", "labels", "reconstructs"}),
    "k_star": ({"labels", "encoder"},),
    "manifold_entropy": ({"decoder"},),
    "posterior_kl": ({"posterior"},),
    "codebook": ({"codebook"},),
    "latent_regions": ({"encoder", "decoder"},),
    "round_trip": ({"inverse"}, {"reconstructs"}),
    "regional_primitives": ({"images", "layers of maps"},),
    "timestep_loss": ({"noise levels"},),
    "memorization": ({"samples"},),
    "adversary": ({"discriminator"},),
    "training_data": (set(),),
}
"""What each diagnostic needs of a model by its guide, one of these sets; in the order of the callback."""

DIFFUSION = ("images", "samples", "noise levels")
AUTOENCODER = ("images", "encoder", "decoder", "reconstructs")
FLOW = ("samples", "encoder", "decoder", "inverse")
GENERATOR = ("images", "labels", "samples", "decoder")


def version_of(package: str) -> str | None:
    """Returns the version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def of(*packages: str, parts: tuple[str, ...]) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Adds a function that makes a case to the table, with what its model has."""

    def add(make: Callable[[], Case]) -> Callable[[], Case]:
        assert PARTS.keys() >= set(parts), f"{make.__name__} has parts that are not described"
        MODELS.append(Entry(make.__name__, packages, frozenset(parts), make))
        return make

    return add


# ---- data ----


class Items(Dataset[Any]):
    """Rows of columns, in the form that a function gives them."""

    def __init__(self, form: Callable[..., Any], *columns: Tensor) -> None:
        self.form, self.columns = form, columns

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, index: int) -> Any:
        return self.form(*(column[index] for column in self.columns))


def batches(form: Callable[..., Any], *columns: Tensor, collate: Any = None) -> DataLoader[Any]:
    """Returns a loader of shuffled batches of 64."""
    return DataLoader(Items(form, *columns), batch_size=64, shuffle=True, collate_fn=collate)


def grey(size: int = 16) -> tuple[Tensor, Tensor]:
    """Returns digits (N, 1, size, size) in -1..1 and their labels."""
    images, labels = data.digits(size)
    return images[:COUNT], labels[:COUNT]


def colour(size: int = 16) -> tuple[Tensor, Tensor]:
    """Returns digits (N, 3, size, size) in -1..1, each in a colour of its own, and their labels."""
    images, labels = grey(size)
    tints = torch.rand(COUNT, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    return (images + 1) * tints - 1, labels


def moons() -> tuple[Tensor, Tensor]:
    """Returns rows (N, 2) of two moons, and which moon each belongs to."""
    rows, labels = make_moons(COUNT, noise=0.1, random_state=0)
    return torch.from_numpy(rows).float(), torch.from_numpy(labels)


def similarity_to_moons(sample: Callable[[int], Tensor], n: int) -> tuple[float, float]:
    """Returns the cosine mean similarity of rows (n, 2) and the moons, and four standard deviations of it.

    The kernel is a product over both numbers, each with the median of its squared distances as its bandwidth.
    """
    real = moons()[0].double()
    scales = (real.T[:, :, None] - real.T[:, None]).square().flatten(1).median(1).values.sqrt()

    def mean(a: Tensor, b: Tensor) -> Tensor:
        kernel = (-torch.cdist(a / scales, b / scales).square()).exp()
        return kernel.mean() if a is not b else (kernel.sum() - len(a)) / (len(a) * (len(a) - 1))

    def similarity(made: Tensor) -> Tensor:
        return mean(made, real) / (mean(made, made) * mean(real, real)).sqrt()

    values = torch.stack([similarity(sample(n).double()) for _ in range(DRAWS)])
    return float(values.mean()), 4 * float(values.std())


def pair(x: Tensor, y: Tensor) -> Any:
    """An item of an image data set."""
    return x, y


def named(x: Tensor, y: Tensor) -> Any:
    """An item of a data set of Hugging Face."""
    return {"images": x, "labels": y}


def alone(x: Tensor, y: Tensor) -> Any:
    """An item of a data set without labels."""
    return x


def unit(images: Tensor) -> Tensor:
    """Returns images of -1..1 in 0..1."""
    return (images + 1) / 2


def learned(
    make: Callable[[], Any], images: Tensor, reconstruct: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
) -> Any:
    """Returns a frozen first stage, trained as those are that latent diffusion works on; an untrained one shows nothing.

    Args:
        make: Makes the stage.
        images: Images (N, C, H, W).
        reconstruct: ``(stage, images)`` to reconstructions and KL divergences (n,).
    """
    # random numbers afterwards are the same, however often it is trained
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stage = make()
        optimizer = torch.optim.Adam(stage.parameters(), 2e-3)
        for _ in range(STAGE_STEPS):
            x = images[torch.randint(len(images), (64,))]
            output, kl = reconstruct(stage, x)
            loss = F.mse_loss(output, x) + 1e-3 * kl.mean() / x[0].numel()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return stage.requires_grad_(False)


class Adam(LightningModule):
    """A module that is trained by Adam."""

    def configure_optimizers(self) -> Any:
        """Returns the optimizer."""
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), 1e-3)


# ---- what is wrong ----

Network = Callable[..., Tensor]
"""``(x, t)`` or ``(x, t, labels)``, to what a network predicts."""


def by_hand(
    network: Network, alphas: Tensor, shape: tuple[int, ...], steps: int = TIMES, kind: str = "noise",
    clip: bool = False, noise: float = 1.0, eta: float = 0.0, classes: bool = True,
) -> Callable[..., Tensor]:  # fmt: skip
    """Returns a sampler by DDIM with evenly spaced times.

    Args:
        network: The network.
        alphas: The cumulative products of the forward process.
        shape: Of one sample.
        steps: Number of steps.
        kind: What the network's output is taken for: ``"noise"`` or ``"velocity"``.
        clip: Whether predicted samples are clipped to -1..1.
        noise: Standard deviation of all noise.
        eta: 1 for as much noise in each step as DDPM adds, 0 for none.
        classes: Whether labels are passed on; else all are 0.
    """
    times = torch.linspace(len(alphas) - 1, 0, steps).round().long().tolist()

    def sample(n: int, *labels: Tensor) -> Tensor:
        given = labels if classes else tuple(torch.zeros_like(y) for y in labels)
        x = noise * torch.randn(n, *shape)
        for now, after in pairwise([*times, None]):
            a, b = alphas[now], torch.ones(()) if after is None else alphas[after]
            output = network(x, torch.full((n,), now), *given)
            clean = (
                (x - (1 - a).sqrt() * output) / a.sqrt() if kind == "noise" else a.sqrt() * x - (1 - a).sqrt() * output
            )
            clean = clean.clamp(-1, 1) if clip else clean
            added = eta * ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
            direction = (x - a.sqrt() * clean) / (1 - a).sqrt()
            x = b.sqrt() * clean + (1 - b - added**2).clamp(min=0).sqrt() * direction
            x = x + noise * added * torch.randn_like(x)
        return x

    return sample


def wrong_diffusions(
    network: Network, alphas: Tensor, shape: tuple[int, ...], kind: str = "noise", clip: bool = False,
    eta: float = 1.0, decode: Callable[[Tensor], Tensor] | None = None, classes: bool = False,
) -> dict[str, Callable[..., Tensor]]:  # fmt: skip
    """Returns samplers of a diffusion model with a mistake each, followed by a decoder; ``eta`` as it is right."""
    right: dict[str, Any] = {"kind": kind, "clip": clip, "eta": eta}
    mistakes: dict[str, dict[str, Any]] = {
        "5 steps": {"steps": 5},
        "a tenth of the noise": {"noise": 0.1},
        "the other prediction": {"kind": "velocity" if kind == "noise" else "noise"},
        "no noise in steps" if eta else "noise in steps": {"eta": 1 - eta},
    }
    mistakes |= {"class 0 only": {"classes": False}} if classes else {}
    samplers = {name: by_hand(network, alphas, shape, **(right | wrong)) for name, wrong in mistakes.items()}
    return {name: then(sampler, decode) for name, sampler in samplers.items()}


def then(sample: Callable[..., Tensor], decode: Callable[[Tensor], Tensor] | None) -> Callable[..., Tensor]:
    """Returns a sampler followed by a decoder."""
    return sample if decode is None else lambda *given: decode(sample(*given))


def wrong_flows(network: Network, shape: tuple[int, ...], classes: bool = False) -> dict[str, Callable[..., Tensor]]:
    """Returns samplers of a vector field ``(t, x)`` or ``(t, x, labels)`` with a mistake each."""

    def flow(steps: int, noise: float = 1.0, backwards: bool = False, zeros: bool = False) -> Callable[..., Tensor]:
        def sample(n: int, *labels: Tensor) -> Tensor:
            given = tuple(torch.zeros_like(y) for y in labels) if zeros else labels
            x = noise * torch.randn(n, *shape)
            for step in range(steps):
                t = torch.full((n,), (1 - step / steps) if backwards else step / steps)
                x = x + network(t, x, *given) / steps
            return x

        return sample

    return {
        "5 steps": flow(5), "a tenth of the noise": flow(100, 0.1), "time backwards": flow(100, backwards=True),
    } | ({"class 0 only": flow(100, zeros=True)} if classes else {})  # fmt: skip


# ---- diffusers ----


def unet2d(channels: int = 1, size: int = 16, classes: int | None = None) -> Any:
    from diffusers import UNet2DModel

    return UNet2DModel(
        size, channels, channels, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, num_class_embeds=classes,
    )  # fmt: skip


def cosine(kind: str = "DDPMScheduler", **options: Any) -> Any:
    import diffusers

    return getattr(diffusers, kind)(TIMES, beta_schedule="squaredcos_cap_v2", **options)


def pipeline_images(pipeline: Any, n: int) -> Tensor:
    """Returns images (n, C, H, W) in -1..1 of a pipeline with all steps."""
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=n, num_inference_steps=TIMES, output_type="np").images
    return torch.from_numpy(images).movedim(-1, 1) * 2 - 1


def scaled(kind: str = "DDPMScheduler") -> Any:
    """Returns a schedule that does not clip, as for latents; a cosine schedule needs clipping."""
    import diffusers

    return getattr(diffusers, kind)(TIMES, beta_start=1e-3, beta_end=0.2, clip_sample=False)


def noised_loss(network: Any, scheduler: Any, x: Tensor, *given: Any) -> Tensor:
    """Returns the loss of a network that predicts noise."""
    noise, t = torch.randn_like(x), torch.randint(0, TIMES, (len(x),))
    predicted = network(scheduler.add_noise(x, noise, t), t, *given)
    return F.mse_loss(getattr(predicted, "sample", predicted), noise)


@of("diffusers", parts=(*DIFFUSION, "labels"))
def unet_ddpm() -> Case:
    from diffusers import DDPMPipeline

    class Diffusion(Adam):
        def __init__(self) -> None:
            super().__init__()
            self.unet, self.noise_scheduler = unet2d(1, 8), cosine()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return noised_loss(self.unet, self.noise_scheduler, batch["images"])

    module = Diffusion()

    def sample(n: int) -> Tensor:
        return pipeline_images(DDPMPipeline(module.unet, cosine()), n)

    wrong = wrong_diffusions(of_diffusers(module.unet), cosine().alphas_cumprod, (1, 8, 8), clip=True)
    return Case(module, batches(named, *grey(8)), sample, same=False, longer=SHORT, wrong=wrong)


def of_diffusers(network: Any) -> Network:
    """Returns what a network of diffusers predicts, as a function of tensors."""

    def predict(x: Tensor, t: Tensor, *labels: Tensor) -> Tensor:
        output: Tensor = network(x, t, *labels).sample
        return output

    return predict


@of("diffusers", parts=(*DIFFUSION, "labels"))
def unet_ddim_velocity_of_classes() -> Case:
    class Diffusion(Adam):
        def __init__(self) -> None:
            super().__init__()
            self.model = unet2d(3, 8, classes=10)
            self.scheduler = cosine("DDIMScheduler", prediction_type="v_prediction", clip_sample=False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            noise, t = torch.randn_like(x), torch.randint(0, TIMES, (len(x),))
            output = self.model(self.scheduler.add_noise(x, noise, t), t, class_labels=y).sample
            return F.mse_loss(output, self.scheduler.get_velocity(x, noise, t))

    module = Diffusion()

    def sample(n: int, labels: Tensor) -> Tensor:
        x, scheduler = torch.randn(n, 3, 8, 8), copy.deepcopy(module.scheduler)
        scheduler.set_timesteps(TIMES)
        for t in scheduler.timesteps:
            x = scheduler.step(module.model(x, t, class_labels=labels).sample, t, x).prev_sample
        return x

    wrong = wrong_diffusions(
        of_diffusers(module.model), module.scheduler.alphas_cumprod, (3, 8, 8), "velocity", eta=0.0, classes=True
    )
    return Case(module, batches(pair, *colour(8)), sample, same=False, longer=SHORT, wrong=wrong)


@of("diffusers", parts=(*DIFFUSION, "labels"))
def unet_with_ema_model() -> Case:
    from diffusers import DDPMPipeline
    from diffusers.training_utils import EMAModel

    class Diffusion(Adam):
        def __init__(self) -> None:
            super().__init__()
            self.unet, self.noise_scheduler = unet2d(1, 8), cosine()
            self.ema_unet = EMAModel(self.unet.parameters(), decay=0.9)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return noised_loss(self.unet, self.noise_scheduler, batch["images"])

        def on_train_batch_end(self, *args: Any) -> None:
            self.ema_unet.step(self.unet.parameters())

    module = Diffusion()

    def sample(n: int) -> Tensor:
        unet = copy.deepcopy(module.unet)
        module.ema_unet.copy_to(unet.parameters())
        return pipeline_images(DDPMPipeline(unet, cosine()), n)

    wrong = {"raw weights": lambda n: pipeline_images(DDPMPipeline(module.unet, cosine()), n)}
    return Case(
        module, batches(named, *grey(8)), sample, same=False,
        longer=SHORT, wrong=wrong, averaged=("unet", lambda: module.ema_unet.shadow_params),
    )  # fmt: skip


def kl_stage(channels: int = 3) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        channels, channels, ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3, (8, 16, 16), norm_num_groups=4,
        sample_size=32, scaling_factor=0.5,
    )  # fmt: skip


@of("diffusers", parts=(*AUTOENCODER, "posterior", "layers of maps"))
def autoencoder_kl() -> Case:
    class Stage(Adam):
        def __init__(self) -> None:
            super().__init__()
            self.vae = kl_stage()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch["image"].permute(0, 3, 1, 2)
            posterior = self.vae.encode(x).latent_dist
            return F.mse_loss(self.vae.decode(posterior.sample()).sample, x) + 1e-6 * posterior.kl().mean()

    module = Stage()
    images, _ = colour(32)
    # channels last, as in the repositories of latent diffusion
    loader = batches(lambda x: {"image": x}, images.permute(0, 2, 3, 1).contiguous())
    return Case(module, loader, reconstruct=lambda x: module.vae(x).sample)


@cache
def learned_kl_stage() -> Any:
    def both(stage: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        posterior = stage.encode(x).latent_dist
        return stage.decode(posterior.sample()).sample, posterior.kl()

    return learned(kl_stage, colour(32)[0], both)


@of("diffusers", parts=(*AUTOENCODER, "labels", "codebook", "layers of maps"))
def vq_model() -> Case:
    from diffusers import VQModel

    class Stage(Adam):
        def __init__(self) -> None:
            super().__init__()
            self.vqvae = VQModel(
                1, 1, ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2, (8, 16), norm_num_groups=4,
                num_vq_embeddings=32,
            )  # fmt: skip

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            output, loss = self.vqvae(batch[0], return_dict=False)
            return F.mse_loss(output, batch[0]) + loss.mean()

    module = Stage()
    return Case(module, batches(pair, *grey()), reconstruct=lambda x: module.vqvae(x).sample)


@of("diffusers", parts=(*DIFFUSION, "labels", *AUTOENCODER, "posterior", "layers of maps"))
def latent_diffusion() -> Case:
    class Latent(Adam):
        def __init__(self) -> None:
            super().__init__()
            self.vae, self.unet, self.noise_scheduler = copy.deepcopy(learned_kl_stage()), unet2d(4, 8), scaled()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            z = self.vae.encode(batch["images"]).latent_dist.sample() * self.vae.config.scaling_factor
            return noised_loss(self.unet, self.noise_scheduler, z)

    module = Latent()

    def latents(n: int) -> Tensor:
        z, scheduler = torch.randn(n, 4, 8, 8), scaled()
        scheduler.set_timesteps(TIMES)
        for t in scheduler.timesteps:
            z = scheduler.step(module.unet(z, t).sample, t, z).prev_sample
        return z

    def decode(z: Tensor) -> Tensor:
        return module.vae.decode(z / module.vae.config.scaling_factor).sample

    wrong = wrong_diffusions(of_diffusers(module.unet), scaled().alphas_cumprod, (4, 8, 8), decode=decode)
    wrong["without the scale"] = then(latents, lambda z: module.vae.decode(z).sample)
    return Case(module, batches(named, *colour(32)), then(latents, decode), same=False, longer=LONG, wrong=wrong)


# ---- MONAI ----


def monai_unet(channels: int = 1) -> Any:
    from monai.networks.nets import DiffusionModelUNet

    return DiffusionModelUNet(
        2, channels, channels, num_res_blocks=1, channels=(16, 32), attention_levels=(False, False), norm_num_groups=8,
    )  # fmt: skip


def monai_images(size: int = 16) -> DataLoader[Any]:
    """Returns batches of MONAI: dictionaries of tensors with metadata, in 0..1."""
    from monai.data import MetaTensor

    return batches(lambda x: {"image": MetaTensor(x)}, unit(grey(size)[0]), collate=_monai_collate)


def _monai_collate(items: list[Any]) -> Any:
    from monai.data.utils import list_data_collate

    return list_data_collate(items)


@of("monai", parts=DIFFUSION)
def monai_diffusion() -> Case:
    from monai.inferers import DiffusionInferer
    from monai.networks.schedulers import DDPMScheduler

    class Diffusion(Adam):
        def __init__(self) -> None:
            super().__init__()
            self.unet, self.scheduler = monai_unet(), DDPMScheduler(TIMES, schedule="cosine")
            self.inferer = DiffusionInferer(self.scheduler)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch["image"]
            noise, t = torch.randn_like(x), torch.randint(0, TIMES, (len(x),))
            return F.mse_loss(self.inferer(x, self.unet, noise, t), noise)

    module = Diffusion()

    def sample(n: int) -> Tensor:
        module.scheduler.set_timesteps(TIMES)
        return module.inferer.sample(torch.randn(n, 1, 8, 8), module.unet, module.scheduler, verbose=False)

    wrong = wrong_diffusions(module.unet, module.scheduler.alphas_cumprod, (1, 8, 8), clip=True)
    return Case(module, monai_images(8), sample, same=False, longer=SHORT, wrong=wrong)


def monai_stage() -> Any:
    from monai.networks.nets import AutoencoderKL

    return AutoencoderKL(
        2, 1, 1, num_res_blocks=1, channels=(8, 16), attention_levels=(False, False), norm_num_groups=4,
        with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False,
    )  # fmt: skip


@cache
def learned_monai_stage() -> Any:
    def both(stage: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        output, mean, std = stage(x)
        return output, 0.5 * (mean**2 + std**2 - 2 * std.log() - 1).sum((1, 2, 3))

    return learned(monai_stage, unit(grey(16)[0]), both)


@of("monai", parts=(*AUTOENCODER, "posterior", "layers of maps"))
def monai_autoencoder_kl() -> Case:
    class Stage(Adam):
        def __init__(self) -> None:
            super().__init__()
            self.autoencoderkl = monai_stage()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            output, mean, std = self.autoencoderkl(batch["image"])
            kl = 0.5 * (mean**2 + std**2 - 2 * std.log() - 1).sum((1, 2, 3)).mean()
            return F.l1_loss(output, batch["image"]) + 1e-6 * kl

    module = Stage()
    return Case(module, monai_images(), reconstruct=lambda x: module.autoencoderkl.reconstruct(x))


@of("monai", parts=(*DIFFUSION, *AUTOENCODER, "posterior", "layers of maps"))
def monai_latent_diffusion() -> Case:
    from monai.inferers import LatentDiffusionInferer
    from monai.networks.schedulers import DDPMScheduler

    class Latent(Adam):
        def __init__(self) -> None:
            super().__init__()
            self.autoencoder, self.unet = copy.deepcopy(learned_monai_stage()), monai_unet(3)
            self.scheduler = DDPMScheduler(TIMES, beta_start=1e-3, beta_end=0.2, clip_sample=False)
            self.inferer = LatentDiffusionInferer(self.scheduler, scale_factor=0.7)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch["image"]
            noise, t = torch.randn(len(x), 3, 8, 8), torch.randint(0, TIMES, (len(x),))
            return F.mse_loss(self.inferer(x, self.autoencoder, self.unet, noise, t), noise)

    module = Latent()

    def sample(n: int) -> Tensor:
        noise = torch.randn(n, 3, 8, 8)
        module.scheduler.set_timesteps(TIMES)
        return module.inferer.sample(noise, module.autoencoder, module.unet, module.scheduler, verbose=False)

    def decode(z: Tensor) -> Tensor:
        return module.autoencoder.decode_stage_2_outputs(z / module.inferer.scale_factor)

    alphas = module.scheduler.alphas_cumprod
    wrong = wrong_diffusions(module.unet, alphas, (3, 8, 8), decode=decode)
    wrong["without the scale"] = then(
        by_hand(module.unet, alphas, (3, 8, 8)), module.autoencoder.decode_stage_2_outputs
    )
    return Case(module, monai_images(), sample, same=False, longer=LONG, wrong=wrong)


@of("monai", parts=(*AUTOENCODER, "samples", "posterior", "layers of maps"))
def monai_var_autoencoder() -> Case:
    from monai.networks.nets import VarAutoEncoder

    class Stage(Adam):
        def __init__(self) -> None:
            super().__init__()
            self.model = VarAutoEncoder(2, (1, 16, 16), 1, 4, (8, 16), (2, 2))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch["image"]
            output, mean, log_variance, _ = self.model(x)
            kl = 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).sum(1).mean()
            return F.mse_loss(output, x) + 1e-3 * kl

    module = Stage()
    return Case(
        module, monai_images(), lambda n: module.model.decode_forward(torch.randn(n, 4)),
        lambda x: module.model(x)[0],
    )  # fmt: skip


@of("monai", parts=(*AUTOENCODER, "codebook", "layers of maps"))
def monai_vqvae() -> Case:
    from monai.networks.nets import VQVAE

    class Stage(Adam):
        def __init__(self) -> None:
            super().__init__()
            self.vqvae = VQVAE(
                2, 1, 1, (8, 16), 1, (8, 16), ((2, 4, 1, 1),) * 2, ((2, 4, 1, 1, 0),) * 2, 32, 8, ddp_sync=False
            )

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            output, loss = self.vqvae(batch["image"])
            return F.l1_loss(output, batch["image"]) + loss

    module = Stage()
    return Case(module, monai_images(), reconstruct=lambda x: module.vqvae(x)[0])


# ---- denoising-diffusion-pytorch and ema-pytorch ----


def gaussian_diffusion(**options: Any) -> Any:
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    unet = Unet(16, dim_mults=(1, 2), channels=1, flash_attn=False, full_attn=(False, False), attn_heads=1)
    return GaussianDiffusion(unet, image_size=8, timesteps=TIMES, **options)


def wrong_gaussians(model: Any, network: Network, classes: bool = False) -> dict[str, Callable[..., Tensor]]:
    """Returns samplers of a model of denoising-diffusion-pytorch with a mistake each."""
    kind = {"pred_noise": "noise", "pred_v": "velocity"}[model.objective]
    alphas = model.alphas_cumprod
    return wrong_diffusions(network, alphas, (1, 8, 8), kind, clip=True, decode=unit, classes=classes)


@of("denoising-diffusion-pytorch", parts=DIFFUSION)
def gaussian() -> Case:
    class Diffusion(Adam):
        def __init__(self) -> None:
            super().__init__()
            self.model = gaussian_diffusion()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model(batch)

    module = Diffusion()
    return Case(
        module, batches(alone, *_units(8)), lambda n: module.model.sample(batch_size=n), same=False,
        longer=SHORT, wrong=wrong_gaussians(module.model, module.model.model),
    )  # fmt: skip


def _units(size: int = 16) -> tuple[Tensor, Tensor]:
    images, labels = grey(size)
    return unit(images), labels


@of("denoising-diffusion-pytorch", "ema-pytorch", parts=(*DIFFUSION, "labels"))
def gaussian_with_ema() -> Case:
    from ema_pytorch import EMA

    class Diffusion(Adam):
        def __init__(self) -> None:
            super().__init__()
            self.diffusion = gaussian_diffusion(objective="pred_v")
            self.ema = EMA(self.diffusion, beta=0.9, update_after_step=0, update_every=1)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.diffusion.parameters(), 1e-3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.diffusion(batch[0])

        def on_train_batch_end(self, *args: Any) -> None:
            self.ema.update()

    module = Diffusion()
    return Case(
        module, batches(pair, *_units(8)), lambda n: module.ema.ema_model.sample(batch_size=n), same=False,
        longer=SHORT, wrong={"raw weights": lambda n: module.diffusion.sample(batch_size=n)},
        averaged=("diffusion", lambda: module.ema.ema_model.parameters()),
    )  # fmt: skip


@of("denoising-diffusion-pytorch", parts=(*DIFFUSION, "labels"))
def guided_by_classes() -> Case:
    from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion, Unet

    class Diffusion(Adam):
        def __init__(self) -> None:
            super().__init__()
            unet = Unet(16, 10, dim_mults=(1, 2), channels=1, attn_dim_head=8, attn_heads=1)
            # with guidance and clipping, the package's DDIM differs from its DDPM with 99 steps as much as with 20
            self.diffusion = GaussianDiffusion(unet, image_size=8, timesteps=TIMES, sampling_timesteps=TIMES // 2)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return self.diffusion(x, classes=y)

    module = Diffusion()

    def guided(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return module.diffusion.model.forward_with_cond_scale(x, t, labels, cond_scale=6.0, rescaled_phi=0.7)[0]

    return Case(
        module, batches(pair, *_units(8)), lambda n, labels: module.diffusion.sample(labels), same=False,
        longer=SHORT, wrong=wrong_gaussians(module.diffusion, guided, classes=True),
    )  # fmt: skip


@of("ema-pytorch", parts=(*GENERATOR, "discriminator"))
def generator_with_ema() -> Case:
    from ema_pytorch import EMA

    class GAN(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.latent_dim = 16
            self.generator = nn.Sequential(
                nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 256), nn.Tanh(), nn.Unflatten(1, (1, 16, 16))
            )
            self.discriminator = nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.LeakyReLU(), nn.Linear(64, 1))
            self.ema = EMA(self.generator, beta=0.9, update_after_step=0, update_every=1)

        def configure_optimizers(self) -> Any:
            networks = (self.generator, self.discriminator)
            return [torch.optim.Adam(network.parameters(), 1e-3) for network in networks]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            x, _ = batch
            of_generator, of_discriminator = self.optimizers()
            fake = self.generator(torch.randn(len(x), 16))
            for optimizer, loss in (
                (
                    of_discriminator,
                    lambda: F.softplus(self.discriminator(fake.detach())) + F.softplus(-self.discriminator(x)),
                ),
                (of_generator, lambda: F.softplus(-self.discriminator(fake))),
            ):
                optimizer.zero_grad()
                self.manual_backward(loss().mean())
                optimizer.step()
            self.ema.update()

    module = GAN()
    return Case(module, batches(pair, *grey()), lambda n: module.ema(torch.randn(n, 16)))


# ---- torchcfm ----


def field_of(image: tuple[int, int, int], **options: Any) -> Any:
    from torchcfm.models.unet import UNetModel

    return UNetModel(image, num_channels=32, num_res_blocks=1, channel_mult=(1, 2), **options)


def flowed(network: Callable[[Tensor, Tensor], Tensor], *shape: int) -> Tensor:
    """Returns what a fine Euler method makes of noise."""
    x, steps = torch.randn(*shape), 100
    for step in range(steps):
        x = x + network(torch.full((len(x),), step / steps), x) / steps
    return x


@of("torchcfm", parts=(*DIFFUSION, "labels"))
def flow_matching() -> Case:
    from torchcfm import ConditionalFlowMatcher

    class Matching(Adam):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.FM = field_of((1, 8, 8)), ConditionalFlowMatcher(sigma=0.0)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x1 = batch[0]
            t, xt, ut = self.FM.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
            return F.mse_loss(self.net(t, xt), ut)

    module = Matching()
    return Case(
        module, batches(pair, *grey(8)), lambda n: flowed(module.net, n, 1, 8, 8), same=False,
        longer=LONG, wrong=wrong_flows(module.net, (1, 8, 8)),
    )  # fmt: skip


@of("torchcfm", parts=(*DIFFUSION, "labels"))
def flow_matching_of_classes() -> Case:
    from torchcfm import TargetConditionalFlowMatcher

    class Matching(Adam):
        def __init__(self) -> None:
            super().__init__()
            self.vf = field_of((3, 8, 8), class_cond=True, num_classes=10)
            self.matcher = TargetConditionalFlowMatcher(sigma=0.0)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x1, y = batch
            t, xt, ut = self.matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
            return F.mse_loss(self.vf(t, xt, y), ut)

    module = Matching()

    def sample(n: int, labels: Tensor) -> Tensor:
        return flowed(lambda t, x: module.vf(t, x, labels), n, 3, 8, 8)

    wrong = wrong_flows(module.vf, (3, 8, 8), classes=True)
    return Case(module, batches(pair, *colour(8)), sample, same=False, longer=LONG, wrong=wrong)


@of("torchcfm", parts=("labels", "samples", "noise levels"))
def flow_matching_of_rows() -> Case:
    from torchcfm import ExactOptimalTransportConditionalFlowMatcher
    from torchcfm.models.models import MLP

    class Matching(Adam):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.FM = MLP(2, time_varying=True), ExactOptimalTransportConditionalFlowMatcher(sigma=0.0)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x1 = batch[0]
            t, xt, ut = self.FM.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
            return F.mse_loss(self.net(torch.cat([xt, t[:, None]], 1)), ut)

    module = Matching()

    def network(t: Tensor, x: Tensor) -> Tensor:
        return module.net(torch.cat([x, t[:, None]], 1))

    return Case(
        module, batches(pair, *moons()), lambda n: flowed(network, n, 2), same=False, has_images=False,
        longer=LONG, wrong=wrong_flows(network, (2,)),
        numbers={"cms/image": partial(similarity_to_moons, lambda n: flowed(network, n, 2))},
    )  # fmt: skip


# ---- pythae ----


def of_pythae(config: Any, kind: Any, images: Tensor) -> tuple[LightningModule, DataLoader[Any]]:
    """Returns a wrapper of a model of pythae and its batches."""

    class Wrapper(Adam):
        def __init__(self) -> None:
            super().__init__()
            self.model = kind(config)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model(batch, epoch=self.current_epoch + 1, dataset_size=COUNT).loss

    return Wrapper(), batches(lambda x: {"data": x}, images)


@of("pythae", parts=(*AUTOENCODER, "samples", "posterior"))
def pythae_vae() -> Case:
    from pythae.models import VAE, VAEConfig
    from pythae.samplers import NormalSampler

    module, loader = of_pythae(VAEConfig((1, 16, 16), 8), VAE, _units()[0])
    model: Any = module.model
    return Case(module, loader, lambda n: NormalSampler(model).sample(n), lambda x: model.reconstruct(x))


@of("pythae", parts=(*AUTOENCODER, "samples"))
def pythae_wae() -> Case:
    from pythae.models import WAE_MMD, WAE_MMD_Config
    from pythae.samplers import NormalSampler

    module, loader = of_pythae(WAE_MMD_Config((1, 16, 16), 8), WAE_MMD, _units()[0])
    model: Any = module.model
    return Case(module, loader, lambda n: NormalSampler(model).sample(n), lambda x: model.reconstruct(x))


@of("pythae", parts=(*AUTOENCODER, "codebook"))
def pythae_vqvae() -> Case:
    from pythae.models import VQVAE, VQVAEConfig

    module, loader = of_pythae(VQVAEConfig((1, 16, 16), 8, num_embeddings=32), VQVAE, _units()[0])
    model: Any = module.model
    return Case(module, loader, reconstruct=lambda x: model.reconstruct(x))


@of("pythae", parts=AUTOENCODER)
def pythae_autoencoder() -> Case:
    from pythae.models import AE, AEConfig

    module, loader = of_pythae(AEConfig((1, 16, 16), 8), AE, _units()[0])
    model: Any = module.model
    return Case(module, loader, reconstruct=lambda x: model.reconstruct(x))


@of("pythae", parts=(*AUTOENCODER, "samples", "posterior"))
def pythae_vamp() -> Case:
    from pythae.models import VAMP, VAMPConfig
    from pythae.samplers import NormalSampler, VAMPSampler

    module, loader = of_pythae(VAMPConfig((1, 16, 16), 8), VAMP, _units()[0])
    model: Any = module.model
    return Case(
        module, loader, lambda n: VAMPSampler(model).sample(n), lambda x: model.reconstruct(x),
        same=False, longer=SHORT, wrong={"normal noise": lambda n: NormalSampler(model).sample(n)},
    )  # fmt: skip


# ---- normalizing flows ----


@of("normflows", parts=(*FLOW, "images", "labels"))
def glow() -> Case:
    import normflows as nf

    def flow() -> Any:
        blocks = [[nf.flows.GlowBlock(c, 16) for _ in range(2)] + [nf.flows.Squeeze()] for c in (8, 4)]
        merges = [nf.flows.Merge()]
        bases = [nf.distributions.DiagGaussian((8, 4, 4)), nf.distributions.DiagGaussian((2, 8, 8))]
        return nf.MultiscaleFlow(bases, blocks, merges, class_cond=False)

    class Glow(Adam):
        def __init__(self) -> None:
            super().__init__()
            self.model = flow()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, _ = batch
            return self.model.forward_kld(x + torch.rand_like(x) / 8) / 256

    module = Glow()
    return Case(module, batches(pair, *grey()), lambda n: module.model.sample(n)[0])


@of("normflows", parts=(*FLOW, "labels"))
def real_nvp_of_rows() -> Case:
    import normflows as nf

    class RealNVP(Adam):
        def __init__(self) -> None:
            super().__init__()
            layers: list[Any] = []
            for _ in range(4):
                layers += [nf.flows.AffineCouplingBlock(nf.nets.MLP([1, 32, 2])), nf.flows.Permute(2)]
            self.flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(2, trainable=False), layers)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.flow.forward_kld(batch[0])

    module = RealNVP()

    def entropy(n: int) -> tuple[float, float]:
        return of_log_density(-module.flow.log_prob(module.flow.sample(8192)[0]))

    return Case(
        module, batches(pair, *moons()), lambda n: module.flow.sample(n)[0], has_images=False,
        numbers={"manifold_entropy/total": entropy},
    )  # fmt: skip


def of_log_density(surprise: Tensor) -> tuple[float, float]:
    """Returns the entropy of a flow's samples, and five standard errors of a mean over 64 of them."""
    return float(surprise.mean()), 5 * float(surprise.std()) / 8


@of("nflows", parts=(*FLOW, "images", "labels"))
def masked_autoregressive() -> Case:
    from nflows.distributions.normal import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import CompositeTransform, MaskedAffineAutoregressiveTransform, RandomPermutation

    class MAF(Adam):
        def __init__(self) -> None:
            super().__init__()
            layers: list[Any] = []
            for _ in range(2):
                layers += [RandomPermutation(64), MaskedAffineAutoregressiveTransform(64, 64)]
            self.flow = Flow(CompositeTransform(layers), StandardNormal([64]))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch[0].flatten(1)
            return -self.flow.log_prob(x + torch.rand_like(x) / 8).mean() / 64

    module = MAF()
    return Case(module, batches(pair, *grey(8)), lambda n: module.flow.sample(n).view(n, 1, 8, 8))


@of("zuko", parts=(*FLOW, "images", "labels"))
def spline_flow() -> Case:
    import zuko

    class Spline(Adam):
        def __init__(self) -> None:
            super().__init__()
            self.flow = zuko.flows.MAF(64, transforms=2, hidden_features=(64,))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            # whole numbers, as a data set of pictures gives them
            x = (batch[0].float() / 127.5 - 1).flatten(1)
            return -self.flow().log_prob(x + torch.rand_like(x) / 8).mean() / 64

        def sample(self, n: int) -> Tensor:
            x = self.flow().sample((n,)).view(n, 1, 8, 8)
            return ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8)

    module = Spline()
    images, labels = grey(8)
    whole = (unit(images) * 255).round().to(torch.uint8)
    return Case(module, batches(pair, whole, labels), lambda n: module.sample(n))


@of("zuko", parts=(*FLOW, "labels"))
def spline_flow_of_rows() -> Case:
    import zuko

    class Spline(Adam):
        def __init__(self) -> None:
            super().__init__()
            self.flow = zuko.flows.NSF(2, transforms=2, hidden_features=(32,))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return -self.flow().log_prob(batch[0]).mean()

    module = Spline()

    def entropy(n: int) -> tuple[float, float]:
        return of_log_density(-module.flow().log_prob(module.flow().sample((8192,))))

    return Case(
        module, batches(pair, *moons()), lambda n: module.flow().sample((n,)), has_images=False,
        numbers={"manifold_entropy/total": entropy},
    )  # fmt: skip


@of("zuko", parts=("images", "labels", "samples"))
def flow_of_classes() -> Case:
    import zuko

    class Conditional(Adam):
        def __init__(self) -> None:
            super().__init__()
            self.flow = zuko.flows.MAF(64, 10, transforms=2, hidden_features=(64,))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            x = x.flatten(1)
            return -self.flow(F.one_hot(y, 10).float()).log_prob(x + torch.rand_like(x) / 8).mean() / 64

    module = Conditional()

    def sample(n: int, labels: Tensor) -> Tensor:
        return module.flow(F.one_hot(labels, 10).float()).sample().view(n, 1, 8, 8)

    return Case(module, batches(pair, *grey(8)), sample)


@of("FrEIA", parts=(*FLOW, "images", "labels"))
def invertible_network() -> Case:
    import FrEIA.framework as Ff
    import FrEIA.modules as Fm

    def subnet(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, outputs))

    class INN(Adam):
        def __init__(self) -> None:
            super().__init__()
            self.inn = Ff.SequenceINN(64)
            for _ in range(4):
                self.inn.append(Fm.AllInOneBlock, subnet_constructor=subnet)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch[0].flatten(1)
            z, log_det = self.inn(x + torch.rand_like(x) / 8)
            return (0.5 * z.square().sum(1) - log_det).mean() / 64

    module = INN()
    return Case(module, batches(pair, *grey(8)), lambda n: module.inn(torch.randn(n, 64), rev=True)[0].view(n, 1, 8, 8))


# ---- vector-quantize-pytorch ----


def chain(*widths: int, transposed: bool = False) -> list[nn.Module]:
    """Returns convolutions that halve or double the size of images."""
    layer = nn.ConvTranspose2d if transposed else nn.Conv2d
    return [part for a, b in pairwise(widths) for part in (layer(a, b, 4, 2, 1), nn.GELU())][:-1]


@of("vector-quantize-pytorch", parts=(*AUTOENCODER, "labels", "codebook", "layers of maps"))
def quantized_layers() -> Case:
    from vector_quantize_pytorch import VectorQuantize

    class Autoencoder(nn.Module):
        """As in the package's examples."""

        def __init__(self) -> None:
            super().__init__()
            quantizer = VectorQuantize(dim=16, codebook_size=32, accept_image_fmap=True)
            self.layers = nn.ModuleList([*chain(1, 8, 16), quantizer, *chain(16, 8, 1, transposed=True)])

        def forward(self, x: Tensor) -> Any:
            for layer in self.layers:
                if isinstance(layer, VectorQuantize):
                    x, indices, loss = layer(x)
                else:
                    x = layer(x)
            return x.clamp(-1, 1), indices, loss

    class Wrapper(Adam):
        def __init__(self) -> None:
            super().__init__()
            self.model = Autoencoder()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            output, _, loss = self.model(batch[0])
            return F.l1_loss(output, batch[0]) + loss

    module = Wrapper()
    return Case(module, batches(pair, *grey()), reconstruct=lambda x: module.model(x)[0])


@of("vector-quantize-pytorch", parts=(*AUTOENCODER, "labels", "codebook", "layers of maps"))
def finite_scalar_quantization() -> Case:
    from vector_quantize_pytorch import FSQ

    class Tokenizer(Adam):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Sequential(*chain(1, 8, 3)), nn.Sequential(*chain(3, 8, 1, transposed=True))
            self.quantizer = FSQ([8, 5, 5])

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(self.quantizer(self.encoder(x))[0])

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.mse_loss(self(batch[0]), batch[0])

    module = Tokenizer()
    return Case(module, batches(pair, *grey()), reconstruct=lambda x: module(x))


# ---- torch ----


@of("torch", parts=("labels", "samples"))
def mixture_of_rows() -> Case:
    class Mixture(Adam):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(4))
            self.means, self.log_stds = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.zeros(4, 2))

        def forward(self) -> Any:
            parts = Independent(Normal(self.means, self.log_stds.exp()), 1)
            return MixtureSameFamily(Categorical(logits=self.logits), parts)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return -self().log_prob(batch[0]).mean()

    module = Mixture()
    return Case(
        module, batches(pair, *moons()), lambda n: module().sample((n,)), has_images=False, longer=LONG,
        numbers={"cms/image": partial(similarity_to_moons, lambda n: module().sample((n,)))},
    )  # fmt: skip


@of("torch", parts=(*AUTOENCODER, "labels", "samples", "posterior"))
def vae_of_distributions() -> Case:
    class VAE(Adam):
        def __init__(self) -> None:
            super().__init__()
            self.latent_dim = 4
            self.features = nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 8))
            self.logits = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 256), nn.Unflatten(1, (1, 16, 16)))

        def encode(self, x: Tensor) -> Any:
            mean, log_std = self.features(x).chunk(2, 1)
            return Independent(Normal(mean, log_std.exp()), 1)

        def decode(self, z: Tensor) -> Any:
            return Independent(torch.distributions.ContinuousBernoulli(logits=self.logits(z)), 3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            posterior = self.encode(batch[0])
            prior = Independent(Normal(torch.zeros(4), torch.ones(4)), 1)
            kl = torch.distributions.kl_divergence(posterior, prior)
            return (kl - self.decode(posterior.rsample()).log_prob(batch[0])).mean() / 256

    module, loader = VAE(), batches(pair, *_units())

    def divergence(n: int) -> tuple[float, float]:
        posterior = module.encode(_units()[0]).base_dist
        return float(0.5 * (posterior.mean**2 + posterior.variance - posterior.variance.log() - 1).sum(1).mean()), 1e-3

    return Case(
        module, loader, lambda n: module.decode(torch.randn(n, 4)).mean, lambda x: module.decode(module.encode(x).mean).mean,
        numbers={"posterior_kl/total": divergence},
    )  # fmt: skip


@of("torch", parts=GENERATOR)
def averaged_generator() -> Case:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    class Decoder(Adam):
        """Latents that belong to images, as in generative latent optimization, with an average of the weights."""

        def __init__(self) -> None:
            super().__init__()
            self.hparams["latent_dim"] = 8
            self.generator = nn.Sequential(
                nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 256), nn.Unflatten(1, (1, 16, 16))
            )
            self.ema_generator = AveragedModel(self.generator, multi_avg_fn=get_ema_multi_avg_fn(0.9))

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.generator.parameters(), 1e-3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch[0]
            generated = self.generator(torch.randn(len(x), 8))
            # the energy distance of both
            cross, own = torch.cdist(generated.flatten(1), x.flatten(1)), torch.cdist(*[generated.flatten(1)] * 2)
            return 2 * cross.mean() - own.mean()

        def on_train_batch_end(self, *args: Any) -> None:
            self.ema_generator.update_parameters(self.generator)

    module = Decoder()
    return Case(module, batches(pair, *grey()), lambda n: module.ema_generator(torch.randn(n, 8)))


@of("torch", parts=(*GENERATOR, "discriminator"))
def coupled_generators() -> Case:
    class Coupled(nn.Module):
        """Two domains that share their first layers, as in CoGAN (https://arxiv.org/abs/1606.07536)."""

        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Sequential(nn.Linear(16, 64), nn.ReLU())
            self.heads = nn.ModuleList(
                nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Unflatten(1, (1, 16, 16))) for _ in range(2)
            )

        def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
            features = self.shared(z)
            return self.heads[0](features), self.heads[1](features)

    class CoGAN(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"latent_dim": 16})
            self.automatic_optimization = False
            self.generator = Coupled()
            self.discriminators = nn.ModuleList(
                nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.LeakyReLU(), nn.Linear(64, 1)) for _ in range(2)
            )

        def configure_optimizers(self) -> Any:
            return [torch.optim.Adam(part.parameters(), 1e-3) for part in (self.generator, self.discriminators)]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            of_generator, of_discriminators = self.optimizers()
            real = [images for images, _ in batch]
            fake = self.generator(torch.randn(len(real[0]), 16))

            def judged(images: Any, sign: int) -> Tensor:
                pairs = zip(self.discriminators, images, strict=True)
                return sum(F.softplus(sign * judge(x)).mean() for judge, x in pairs)

            loss = judged(real, -1) + judged([x.detach() for x in fake], 1)
            of_discriminators.zero_grad()
            self.manual_backward(loss)
            of_discriminators.step()
            of_generator.zero_grad()
            self.manual_backward(judged(fake, -1))
            of_generator.step()

    module, (images, labels) = CoGAN(), grey()
    loader = batches(lambda x, y, negative: ((x, y), (negative, y)), images, labels, -images)
    return Case(module, loader, lambda n: module.generator(torch.randn(n, 16))[0])
