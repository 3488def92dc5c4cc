"""Models as users write them, without this package in mind: what is attached, what the errors suggest, what stays."""

from __future__ import annotations

import copy
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
import tqdm.auto
import zuko
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from example_models.data import digits
from lightning_gendiag import (
    CollapseStopping,
    CosineMeanSimilarityMonitor,
    DiagnosticWarning,
    GenerativeDiagnostics,
    ModelAdapter,
)
from tests.helpers.running import loading, trainer
from tests.helpers.versions import EMAWeightAveraging, WeightAveraging, needs_bfloat16

# untrained models generate images in another range of values
pytestmark = pytest.mark.filterwarnings("ignore:generated images span")


@pytest.fixture(autouse=True)
def other_seed() -> None:
    """Some seeds, such as 0, give a tiny encoder whose features are all zero."""
    torch.manual_seed(1)


class Generator(nn.Module):
    """The generator of the GAN in Lightning's tutorial."""

    def __init__(self, latent_dim: int, img_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.img_shape = img_shape

        def block(in_feat: int, out_feat: int, normalize: bool = True) -> list[nn.Module]:
            layers: list[nn.Module] = [nn.Linear(in_feat, out_feat)]
            if normalize:
                layers.append(nn.BatchNorm1d(out_feat, 0.8))
            return [*layers, nn.LeakyReLU(0.2)]

        self.model = nn.Sequential(
            *block(latent_dim, 16, normalize=False), *block(16, 32), nn.Linear(32, int(np.prod(img_shape))), nn.Tanh()
        )

    def forward(self, z: Tensor) -> Tensor:
        img = self.model(z)
        return img.view(img.size(0), *self.img_shape)


class Discriminator(nn.Module):
    def __init__(self, img_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(int(np.prod(img_shape)), 16), nn.LeakyReLU(0.2), nn.Linear(16, 1), nn.Sigmoid()
        )

    def forward(self, img: Tensor) -> Tensor:
        return self.model(img.view(img.size(0), -1))


class GAN:
    """The GAN of Lightning's tutorial, for ``lightning`` (``TutorialGAN``) and ``pytorch_lightning`` (``OldGAN``)."""

    def __init__(self, channels: int, width: int, height: int, latent_dim: int = 10, lr: float = 0.0002) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        data_shape = (channels, width, height)
        self.generator = Generator(latent_dim=self.hparams.latent_dim, img_shape=data_shape)
        self.discriminator = Discriminator(img_shape=data_shape)
        self.validation_z = torch.randn(8, self.hparams.latent_dim)
        self.example_input_array = torch.zeros(2, self.hparams.latent_dim)

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def adversarial_loss(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy(y_hat, y)

    def training_step(self, batch: Any) -> None:
        imgs, _ = batch
        optimizer_g, optimizer_d = self.optimizers()
        z = torch.randn(imgs.shape[0], self.hparams.latent_dim)
        z = z.type_as(imgs)

        self.toggle_optimizer(optimizer_g)
        self.generated_imgs = self(z)
        valid = torch.ones(imgs.size(0), 1)
        valid = valid.type_as(imgs)
        g_loss = self.adversarial_loss(self.discriminator(self(z)), valid)
        self.log("g_loss", g_loss, prog_bar=True)
        self.manual_backward(g_loss)
        optimizer_g.step()
        optimizer_g.zero_grad()
        self.untoggle_optimizer(optimizer_g)

        self.toggle_optimizer(optimizer_d)
        real_loss = self.adversarial_loss(self.discriminator(imgs), valid)
        fake = torch.zeros(imgs.size(0), 1)
        fake = fake.type_as(imgs)
        fake_loss = self.adversarial_loss(self.discriminator(self(z).detach()), fake)
        d_loss = (real_loss + fake_loss) / 2
        self.log("d_loss", d_loss, prog_bar=True)
        self.manual_backward(d_loss)
        optimizer_d.step()
        optimizer_d.zero_grad()
        self.untoggle_optimizer(optimizer_d)

    def configure_optimizers(self) -> Any:
        opt_g = torch.optim.Adam(self.generator.parameters(), lr=self.hparams.lr, betas=(0.5, 0.999))
        opt_d = torch.optim.Adam(self.discriminator.parameters(), lr=self.hparams.lr, betas=(0.5, 0.999))
        return [opt_g, opt_d], []


class TutorialGAN(GAN, LightningModule):
    pass


class OldGAN(GAN, pytorch_lightning.LightningModule):
    pass


class VAE(LightningModule):
    """A VAE whose ``encoder`` returns features, not latents, and whose ``sample`` samples from the posterior."""

    def __init__(self, enc_out_dim: int = 16, latent_dim: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, enc_out_dim), nn.ReLU()
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, 64), nn.ReLU(), nn.Unflatten(1, (4, 4, 4)),
            nn.ConvTranspose2d(4, 1, 4, 2, 1), nn.Sigmoid(),
        )  # fmt: skip
        self.fc_mu = nn.Linear(enc_out_dim, latent_dim)
        self.fc_var = nn.Linear(enc_out_dim, latent_dim)
        self.log_scale = nn.Parameter(torch.Tensor([0.0]))

    def sample(self, mu: Tensor, log_var: Tensor) -> Tensor:
        std = torch.exp(log_var / 2)
        return torch.distributions.Normal(mu, std).rsample()

    def forward(self, x: Tensor) -> Tensor:
        x_encoded = self.encoder(x)
        return self.decoder(self.sample(self.fc_mu(x_encoded), self.fc_var(x_encoded)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch["image"]
        x_encoded = self.encoder(x)
        mu, log_var = self.fc_mu(x_encoded), self.fc_var(x_encoded)
        x_hat = self.decoder(self.sample(mu, log_var))
        kl = (0.5 * (mu**2 + log_var.exp() - 1 - log_var)).sum(-1)
        loss = (kl + F.mse_loss(x_hat, x, reduction="none").sum((1, 2, 3)) * torch.exp(-self.log_scale)).mean()
        self.log("elbo", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class PlainLoss(LightningModule):
    """The training step and the optimizer that the models below share."""

    def loss(self, images: Tensor, labels: Tensor | None) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = (batch, None) if isinstance(batch, Tensor) else batch
        loss = self.loss(images, labels)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class DCGAN(PlainLoss):
    """A GAN that takes spatial noise (n, nz, 1, 1), with the names of the paper's code."""

    def __init__(self, nz: int = 6, ngf: int = 4) -> None:
        super().__init__()
        self.nz = nz
        self.netG = nn.Sequential(
            nn.ConvTranspose2d(nz, ngf * 2, 4, 1, 0, bias=False), nn.BatchNorm2d(ngf * 2), nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 2, 1, 4, 2, 1, bias=False), nn.Tanh(),
        )  # fmt: skip

    def forward(self, noise: Tensor) -> Tensor:
        return self.netG(noise)

    def loss(self, images: Tensor, labels: Tensor | None) -> Tensor:
        return (self(torch.randn(len(images), self.nz, 1, 1, device=self.device)) - images).square().mean()


class ConditionalGAN(PlainLoss):
    def __init__(self, latent_dim: int = 6, n_classes: int = 10) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.label_emb = nn.Embedding(n_classes, n_classes)
        self.model = nn.Sequential(
            nn.Linear(latent_dim + n_classes, 32), nn.LeakyReLU(0.2), nn.Linear(32, 64), nn.Tanh()
        )

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        return self.model(torch.cat((self.label_emb(labels), noise), -1)).view(-1, 1, 8, 8)

    def loss(self, images: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        return (self(torch.randn(len(images), 6, device=self.device), labels) - images).square().mean()


class LitAutoEncoder(PlainLoss):
    """Lightning's first example: it has flat images, and no attribute for the length of the latent."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def loss(self, images: Tensor, labels: Tensor | None) -> Tensor:
        x = images.view(images.size(0), -1)
        return F.mse_loss(self.decoder(self.encoder(x)), x)


class VanillaVAE(nn.Module):
    """A model as in PyTorch-VAE: ``decoder`` takes the output of ``decoder_input``, and ``sample`` needs a device."""

    def __init__(self, in_channels: int = 1, latent_dim: int = 5) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = nn.Sequential(nn.Conv2d(in_channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.LeakyReLU())
        self.fc_mu = nn.Linear(8 * 16, latent_dim)
        self.fc_var = nn.Linear(8 * 16, latent_dim)
        self.decoder_input = nn.Linear(latent_dim, 8 * 16)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(8, 4, 3, 2, 1, output_padding=1), nn.BatchNorm2d(4), nn.LeakyReLU()
        )
        self.final_layer = nn.Sequential(nn.Conv2d(4, in_channels, 3, padding=1), nn.Tanh())

    def encode(self, input: Tensor) -> list[Tensor]:
        result = torch.flatten(self.encoder(input), start_dim=1)
        return [self.fc_mu(result), self.fc_var(result)]

    def decode(self, z: Tensor) -> Tensor:
        return self.final_layer(self.decoder(self.decoder_input(z).view(-1, 8, 4, 4)))

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> Tensor:
        return torch.randn_like(logvar) * torch.exp(0.5 * logvar) + mu

    def forward(self, input: Tensor, **kwargs: Any) -> list[Tensor]:
        mu, log_var = self.encode(input)
        return [self.decode(self.reparameterize(mu, log_var)), input, mu, log_var]

    def sample(self, num_samples: int, current_device: int, **kwargs: Any) -> Tensor:
        return self.decode(torch.randn(num_samples, self.latent_dim).to(current_device))


class VAEXperiment(PlainLoss):
    def __init__(self, vae_model: nn.Module) -> None:
        super().__init__()
        self.model = vae_model

    def forward(self, input: Tensor, **kwargs: Any) -> Any:
        return self.model(input, **kwargs)

    def loss(self, images: Tensor, labels: Tensor | None) -> Tensor:
        recons, x, mu, log_var = self(images, labels=labels)
        return F.mse_loss(recons, x) + 0.01 * (0.5 * (mu**2 + log_var.exp() - 1 - log_var)).sum(1).mean()


class LitVanillaVAE(VanillaVAE, PlainLoss):
    """The same model, written as a LightningModule."""

    loss = VAEXperiment.loss


class Flow(PlainLoss):
    """A flow of flat data without any method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = zuko.flows.NICE(64, transforms=2, hidden_features=(16,))

    def loss(self, images: Tensor, labels: Tensor | None) -> Tensor:
        return -self.flow().log_prob(images.flatten(1)).mean()


class FlowWithForward(Flow):
    """A flow whose ``forward`` returns the distribution."""

    def forward(self) -> torch.distributions.Distribution:
        return self.flow()


class GaussianVAE(PlainLoss):
    """A VAE whose ``decode`` returns a distribution over images."""

    def __init__(self, latent_dim: int = 3) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.enc, self.dec = nn.Linear(64, 2 * latent_dim), nn.Linear(latent_dim, 64)

    def encode(self, x: Tensor) -> torch.distributions.Normal:
        mu, rho = self.enc(x.flatten(1)).chunk(2, -1)
        return torch.distributions.Normal(mu, F.softplus(rho) + 1e-4)

    def decode(self, z: Tensor) -> torch.distributions.Distribution:
        return torch.distributions.Independent(torch.distributions.Normal(self.dec(z).view(-1, 1, 8, 8), 1.0), 3)

    def loss(self, images: Tensor, labels: Tensor | None) -> Tensor:
        q = self.encode(images)
        prior = torch.distributions.Normal(0.0, 1.0)
        return (torch.distributions.kl_divergence(q, prior).sum(1) - self.decode(q.rsample()).log_prob(images)).mean()


class DDPM(PlainLoss):
    """A diffusion model: ``forward`` predicts noise, and one sample takes many passes."""

    sampled: ClassVar[list[Any]] = []

    def __init__(self, timesteps: int = 20, pause: float = 0.0) -> None:
        super().__init__()
        self.timesteps, self.pause = timesteps, pause
        self.unet = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1))
        self.register_buffer("betas", torch.linspace(1e-4, 0.2, timesteps))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.unet(torch.cat((x, (t / self.timesteps).view(-1, 1, 1, 1).expand_as(x)), 1))

    def loss(self, images: Tensor, labels: Tensor | None) -> Tensor:
        t = torch.randint(self.timesteps, (len(images),), device=self.device)
        alpha_bar = (1 - self.betas).cumprod(0)[t].view(-1, 1, 1, 1)
        noise = torch.randn_like(images)
        return F.mse_loss(self(alpha_bar.sqrt() * images + (1 - alpha_bar).sqrt() * noise, t), noise)

    @torch.no_grad()
    def p_sample_loop(self, shape: tuple[int, ...]) -> Tensor:
        self.sampled.append(shape)
        x, alpha_bar = torch.randn(shape, device=self.device), (1 - self.betas).cumprod(0)
        for t in reversed(range(self.timesteps)):
            eps = self(x, torch.full((shape[0],), t, device=self.device))
            x = (x - self.betas[t] / (1 - alpha_bar[t]).sqrt() * eps) / (1 - self.betas[t]).sqrt()
            x = x + self.betas[t].sqrt() * torch.randn_like(x) * (t > 0)
            time.sleep(self.pause)
        return x.clamp(-1, 1)


class DDPMWithoutSampler(DDPM):
    p_sample_loop = None


class SlowDDPM(DDPM):
    def sample(self, batch_size: int = 16) -> Tensor:
        return self.p_sample_loop((batch_size, 1, 8, 8))


def batches(kind: str = "pair", n: int = 64) -> DataLoader[Any]:
    """Returns a loader of digits in -1..1 with their labels, of dictionaries of both in 0..1, or of digits alone."""
    images, labels = (rows[:n] for rows in DIGITS)
    if kind == "dict":
        return DataLoader(
            [{"image": (x + 1) / 2, "label": y} for x, y in zip(images, labels, strict=True)], batch_size=16
        )  # type: ignore[arg-type]
    return DataLoader(images if kind == "images" else TensorDataset(images, labels), batch_size=16)  # type: ignore[arg-type]


DIGITS = digits(8)
small = partial(ModelAdapter, num_samples=64, num_reference=64)


def diagnosed(
    module: Any, adapter: ModelAdapter | None = None, kind: str = "pair", **options: Any
) -> GenerativeDiagnostics:
    """Fits with all applicable diagnostics, and checks that each one was evaluated when due and logged finite values.

    The Fréchet distances of classes are excepted, since a class may have too few samples.
    """
    diagnostics = GenerativeDiagnostics(adapter=adapter or small(), max_overhead=None, log_images=False)
    own = trainer(diagnostics, **{"max_epochs": 1, **options})
    own.fit(module, batches(kind))
    for name in diagnostics.attached:
        monitor = diagnostics.monitors[name]
        assert monitor.evaluations == own.max_epochs // monitor.every_n_epochs, name
        if monitor.evaluations:
            tags = [tag for tag in own.callback_metrics if tag.startswith(f"gendiag/{name}/")]
            values = {tag: float(own.callback_metrics[tag]) for tag in tags if "/fid_class_" not in tag}
            assert values
            assert all(map(math.isfinite, values.values())), values
    return diagnostics


def sampled_by(diagnostics: GenerativeDiagnostics) -> str:
    """Returns the description of the sampler."""
    return diagnostics.monitors["cms"].view.parts.way("sample").name


def error_of(module: Any, adapter: ModelAdapter | None = None) -> str:
    """Returns the message of the error that a single monitor raises before training."""
    with pytest.raises(ValueError, match="To fix this") as error:
        trainer(CosineMeanSimilarityMonitor(adapter=adapter or small()), CollapseStopping()).fit(module, batches())
    return str(error.value)


def weights_after(module: Callable[[], Any], *callbacks: Any, kind: str = "pair", **options: Any) -> dict[str, Tensor]:
    seed_everything(0, verbose=False)
    made = module()
    own = trainer(*callbacks, **options)
    own.fit(made, batches(kind))
    return own.lightning_module.state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


DATA = ("memorization", "training_data")
"""What applies to all models that sample."""
JUDGED = ("memorization", "adversary", "training_data")
"""The same of those with a discriminator."""
SAMPLER = ["cms", "generation_balance"]
GENERATOR = [*SAMPLER, "manifold_entropy"]
ENCODER = [*SAMPLER, "k_star", "manifold_entropy", "posterior_kl", "latent_regions", "round_trip"]


def test_the_gan_of_lightnings_tutorial_needs_no_arguments() -> None:
    diagnostics = diagnosed(TutorialGAN(1, 8, 8), max_epochs=2)
    assert diagnostics.attached == [*GENERATOR, *JUDGED]
    assert sampled_by(diagnostics) == "self.forward from normal noise (n, 10)"
    assert {diagnostics.left_out[name][:20] for name in ("k_star", "posterior_kl", "latent_regions")} == {
        "encode must be known"
    }
    assert "split must be given" in diagnostics.left_out["regional_primitives"]


def test_a_generator_of_spatial_noise_is_recognized() -> None:
    diagnostics = diagnosed(DCGAN())
    assert diagnostics.attached == [*GENERATOR, "regional_primitives", *DATA]
    assert sampled_by(diagnostics) == "self.forward from normal noise (n, 6, 1, 1)"


@pytest.mark.parametrize("enc_out_dim", [16, 3])
def test_layers_that_make_a_posterior_of_features_are_used(enc_out_dim: int) -> None:
    module = VAE(enc_out_dim)
    diagnostics = diagnosed(module, kind="dict")
    assert diagnostics.attached == [*ENCODER, "regional_primitives", *DATA]
    assert sampled_by(diagnostics) == "self.decoder from normal noise (n, 3)"
    images = next(iter(batches("dict")))["image"]
    view = diagnostics.monitors["cms"].view
    view.refresh()
    module.eval()
    with view.isolated(exact=True):
        latents = view.latents_of(images)
    assert torch.equal(latents, module.fc_mu(module.encoder(images)))


def test_mean_and_variance_in_one_tensor_are_told_apart() -> None:
    class Chunked(GaussianVAE):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 6))

        encode = None

        def loss(self, images: Tensor, labels: Tensor | None) -> Tensor:
            mu, _ = self.encoder(images).chunk(2, 1)
            return -self.decode(mu).log_prob(images).mean()

    module = Chunked()
    diagnostics = diagnosed(module)
    assert diagnostics.attached == [*ENCODER, *DATA]
    images = diagnostics.monitors["k_star"].view.reference.images
    with torch.no_grad():
        mean, log_variance = module.encoder(images).double().chunk(2, 1)
    truth = (0.5 * (mean**2 + log_variance.exp() - 1 - log_variance)).sum(1).mean()
    assert float(diagnostics.monitors["posterior_kl"].result.total) == pytest.approx(float(truth), rel=1e-5)


def test_a_sample_method_that_needs_a_device_is_called_with_it() -> None:
    diagnostics = diagnosed(LitVanillaVAE())
    assert diagnostics.attached == [*ENCODER, *DATA]
    assert sampled_by(diagnostics) == "self.sample(n, device)"


def test_a_model_inside_the_module_is_found() -> None:
    diagnostics = diagnosed(VAEXperiment(VanillaVAE()))
    assert diagnostics.attached == [*ENCODER, *DATA]
    assert sampled_by(diagnostics) == "self.model.sample(n, device)"


def test_an_autoencoder_of_flat_images_is_judged_by_its_reconstructions() -> None:
    module = LitAutoEncoder()
    diagnostics = diagnosed(module)
    assert diagnostics.attached == [
        *SAMPLER,
        "k_star",
        "manifold_entropy",
        "latent_regions",
        "round_trip",
        "training_data",
    ]
    view = diagnostics.monitors["cms"].view
    assert view.source() == "reconstructions"
    assert view.parts.way("encode").name == "self.encoder(images.flatten(1))"
    module.eval()
    view.refresh()
    view.expire()
    originals = view.reference.images[1::2]
    with torch.no_grad():
        truth = module.decoder(module.encoder(originals.flatten(1))).view(-1, 1, 8, 8)
    assert torch.allclose(view.reconstructions().images, truth, atol=1e-6)
    first = diagnostics.monitors["cms"].latest.observations[0]
    assert first.series.quantity == "cosine mean similarity of reconstructions"
    # a stated length states that the noise is normal
    diagnostics = diagnosed(LitAutoEncoder(), small(latent_dim=3))
    assert diagnostics.monitors["cms"].view.source() == "samples"


def test_a_conditional_generator_gets_the_labels_of_the_batches() -> None:
    diagnostics = diagnosed(ConditionalGAN())
    assert diagnostics.attached == [*GENERATOR, *DATA]
    assert sampled_by(diagnostics) == "self.forward from normal noise (n, 6) and labels"
    sampled = diagnostics.monitors["cms"].view.samples()
    assert sampled.labels is not None
    assert len(sampled.labels.unique()) == 10


@pytest.mark.parametrize("make", [Flow, FlowWithForward])
def test_a_flow_is_sampled_from_its_distribution(make: type[Flow]) -> None:
    module = make()
    diagnostics = diagnosed(module)
    assert diagnostics.attached[:2] == SAMPLER
    assert ".sample((n,))" in sampled_by(diagnostics)
    view = diagnostics.monitors["cms"].view
    view.refresh()
    view.expire()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(view.adapter.seed)
        truth = module.flow().sample((64,)).view(-1, 1, 8, 8)
    assert torch.equal(view.samples().images, truth)


def test_a_sampler_that_takes_labels_is_left_out_where_the_batches_have_none() -> None:
    module = ConditionalGAN()
    module.loss = lambda images, labels: module.label_emb.weight.square().mean()
    diagnostics = diagnosed(module, kind="images")
    assert diagnostics.attached == ["manifold_entropy", "training_data"]
    assert "normal noise (n, 6) and labels fails (the batches hold no labels" in diagnostics.left_out["cms"]


def test_where_nothing_applies_a_warning_says_why_and_training_continues() -> None:
    own = trainer(GenerativeDiagnostics(adapter=small(), skip=("timestep_loss",)), max_epochs=2)
    message = (
        r"(?s)since no diagnostic of DDPMWithoutSampler itself applies.*self.forward takes .x: .*define DDPM\w*.sample"
    )
    with pytest.warns(DiagnosticWarning, match=message):
        own.fit(DDPMWithoutSampler(), batches())
    assert own.current_epoch == 2


def test_what_is_suggested_in_place_of_a_wrong_name_works() -> None:
    message = error_of(VAEXperiment(VanillaVAE()), small("model.final_layer"))
    assert "sample must be what makes images, but" in message
    assert message.endswith("To fix this, pass sample=None, with which self.model.sample(n, device) is used.")
    assert diagnosed(VAEXperiment(VanillaVAE()), small()).attached == [*ENCODER, *DATA]


def test_a_decoder_that_returns_a_distribution_is_evaluated_by_its_mean() -> None:
    diagnostics = diagnosed(GaussianVAE())
    assert diagnostics.attached == [*ENCODER, *DATA]
    assert sampled_by(diagnostics) == "self.decode from normal noise (n, 3)"


def test_the_error_about_a_diffusion_model_asks_for_its_sampler() -> None:
    message = error_of(DDPMWithoutSampler())
    assert "self.forward takes (x: 'Tensor', t: 'Tensor')" in message
    assert message.endswith("or pass ModelAdapter(sample=lambda module, n: ...).")


@pytest.mark.parametrize("sample", [None, lambda module, n: module.p_sample_loop((n, 1, 8, 8))])
def test_the_loop_of_a_diffusion_model_samples(sample: Any) -> None:
    DDPM.sampled.clear()
    diagnostics = diagnosed(DDPM(), small(sample), kind="images")
    assert diagnostics.attached == ["cms", "timestep_loss", *DATA]
    assert DDPM.sampled[-1][1:] == (1, 8, 8)


def test_a_slow_sampler_is_evaluated_rarely(caplog: pytest.LogCaptureFixture) -> None:
    module = SlowDDPM(pause=0.005)
    SlowDDPM.sampled.clear()
    diagnostics = GenerativeDiagnostics(adapter=small())
    own = trainer(diagnostics, max_epochs=8)
    with caplog.at_level("INFO"):
        own.fit(module, batches())
    assert diagnostics.attached == [*SAMPLER, "timestep_loss", *DATA]
    assert own.current_epoch == 8
    # one call tries the sampler, one sets the monitors up, and one makes the samples that both share
    assert diagnostics.monitors["cms"].view.subject.trained is module
    assert len(SlowDDPM.sampled) == 3
    assert [diagnostics.monitors[name].evaluations for name in SAMPLER] == [1, 1]
    assert "no alarm is possible" in caplog.text


class DDPMWithBars(DDPM):
    """Shows a progress bar while it samples, as most do."""

    def sample(self, n: int) -> Tensor:
        for _ in tqdm.tqdm(range(2), desc="sampling loop"):
            pass
        for _ in tqdm.auto.tqdm(range(2), "sampling loop", 2, False):
            pass
        return self.p_sample_loop((n, 1, 8, 8))


def test_progress_bars_of_a_sampler_are_silent_in_evaluations_and_nowhere_else(
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = DDPMWithBars()
    diagnostics = GenerativeDiagnostics(adapter=small())
    trainer(diagnostics, max_epochs=2).fit(module, batches())
    assert diagnostics.monitors["cms"].evaluations
    assert "sampling loop" not in capsys.readouterr().err
    module.sample(2)
    assert capsys.readouterr().err.count("sampling loop") >= 2


class Average(WeightAveraging):
    """Weight averaging as in Lightning's documentation."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and step_idx >= 2


# Lightning's callback counts its own steps
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
@pytest.mark.parametrize("make", [lambda: EMAWeightAveraging(decay=0.5), Average], ids=["ema", "swa"])
@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_are_evaluated_and_training_stays_the_same(make: Any, first: bool) -> None:
    seen: list[bool] = []

    class Compare(CosineMeanSimilarityMonitor):
        def update(self, view: Any) -> None:
            super().update(view)
            noise = torch.randn(64, 10, generator=torch.Generator().manual_seed(view.adapter.seed))
            with torch.no_grad():
                made = [
                    copy.deepcopy(m.generator).eval()(noise)
                    for m in (average._average_model.module, view.subject.trained)
                ]
            seen.extend(torch.equal(view.samples().images, images) for images in made)

    average, monitor = make(), Compare(adapter=small(), on_error="raise")
    both = [monitor, average] if first else [average, monitor]
    averaged = weights_after(lambda: TutorialGAN(1, 8, 8), *both, CollapseStopping())
    assert seen == [True, False] * 2
    assert same(averaged, weights_after(lambda: TutorialGAN(1, 8, 8), make()))


class Graphs:
    """A backend that compiles nothing and records the shapes of its inputs."""

    def __init__(self) -> None:
        self.sizes: list[list[tuple[Any, ...]]] = []

    def __call__(self, graph: Any, inputs: list[Any]) -> Any:
        self.sizes.append([tuple(x.shape) for x in inputs if isinstance(x, Tensor)])
        return graph


# torch's compiler reads the gradient of the inputs of a compiled part
reads_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@reads_grad
def test_a_compiled_part_is_evaluated_without_compilation() -> None:
    class Compiled(LitVanillaVAE):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = torch.compile(self.decoder, backend="aot_eager")

    assert diagnosed(Compiled()).attached == [*ENCODER, *DATA]


@reads_grad
@pytest.mark.parametrize("whole", [False, True])
def test_compiled_training_stays_the_same_and_is_not_compiled_again(whole: bool) -> None:
    class Quiet(LitVanillaVAE):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            # dynamo cannot read self.log of every version of Lightning
            return self.loss(*batch)

    def make() -> Any:
        torch._dynamo.reset()
        module = Quiet()
        if whole:
            return torch.compile(module, backend=graphs)
        module.encoder = torch.compile(module.encoder, backend=graphs)
        module.decoder = torch.compile(module.decoder, backend=graphs)
        return module

    graphs = alone = Graphs()
    without = weights_after(make)
    assert alone.sizes
    graphs, diagnostics = Graphs(), GenerativeDiagnostics(adapter=small(), max_overhead=None)
    assert same(without, weights_after(make, diagnostics))
    assert diagnostics.attached == [*ENCODER, *DATA]
    assert diagnostics.monitors["cms"].evaluations == 2
    assert graphs.sizes == alone.sizes


@needs_bfloat16
@pytest.mark.parametrize(
    ("make", "expected"), [(lambda: TutorialGAN(1, 8, 8), [*GENERATOR, *JUDGED]), (LitVanillaVAE, [*ENCODER, *DATA])]
)
def test_bfloat16_weights_are_evaluated_and_stay_the_same(make: Any, expected: list[str]) -> None:
    without = weights_after(make, precision="bf16-true", max_epochs=1)
    seed_everything(0, verbose=False)
    module = make()
    assert diagnosed(module, precision="bf16-true").attached == expected
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert same(module.state_dict(), without)


def test_with_accumulated_gradients_steps_match_self_log_and_training_stays_the_same(tmp_path: Path) -> None:
    def run(*callbacks: Any, name: str) -> tuple[dict[str, Tensor], list[dict[str, str]]]:
        logger = CSVLogger(tmp_path, name=name, version="")
        state = weights_after(
            LitVanillaVAE, *callbacks, accumulate_grad_batches=3, logger=logger, log_every_n_steps=1, max_epochs=3
        )
        return state, logger

    def steps(logger: CSVLogger, column: str) -> list[int]:
        import csv

        with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
            return [int(row["step"]) for row in csv.DictReader(file) if row.get(column)]

    by_epoch = CosineMeanSimilarityMonitor(adapter=small())
    state, logger = run(by_epoch, CollapseStopping(), name="epochs")
    plain, plain_logger = run(name="plain")
    assert same(state, plain)
    # an epoch has four batches; the optimizer steps after the third and after the last
    assert steps(logger, "gendiag/cms/image") == steps(logger, "train_loss_epoch") == [1, 3, 5]
    assert steps(logger, "train_loss_step") == steps(plain_logger, "train_loss_step")
    by_step = CosineMeanSimilarityMonitor(adapter=small(num_reference=16), every_n_train_steps=2)
    _, logger = run(by_step, CollapseStopping(), name="steps")
    assert steps(logger, "gendiag/cms/image") == [1, 3, 5]
    assert set(steps(logger, "gendiag/cms/image")) <= set(steps(logger, "train_loss_step"))


def test_modules_of_pytorch_lightning_run_in_its_trainer_and_not_in_that_of_lightning() -> None:
    diagnostics = GenerativeDiagnostics(adapter=small(), max_overhead=None)
    own = pytorch_lightning.Trainer(
        callbacks=[diagnostics, pytorch_lightning.callbacks.EMAWeightAveraging(decay=0.5)],  # type: ignore[list-item]
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    own.fit(OldGAN(1, 8, 8), batches())
    assert diagnostics.attached == [*GENERATOR, *JUDGED]
    assert [diagnostics.monitors[name].evaluations for name in GENERATOR] == [2, 2, 2]
    assert diagnostics.monitors["cms"].latest.averaged
    assert math.isfinite(own.callback_metrics["gendiag/cms/image"])
    with pytest.raises(TypeError, match=r"`model` must be a `LightningModule` .*, got `OldGAN`"):
        trainer(GenerativeDiagnostics()).fit(OldGAN(1, 8, 8), batches())


@pytest.mark.parametrize("make", [lambda: TutorialGAN(1, 8, 8), LitVanillaVAE])
def test_the_callback_may_be_added_to_a_resumed_run(make: Any, tmp_path: Path) -> None:
    own = trainer(max_epochs=2)
    own.fit(make(), batches())
    own.save_checkpoint(tmp_path / "without.ckpt")
    diagnostics = GenerativeDiagnostics(adapter=small(), max_overhead=None)
    resumed = {"ckpt_path": tmp_path / "without.ckpt", **loading()}
    seed_everything(0, verbose=False)
    added = trainer(diagnostics, max_epochs=5)
    added.fit(make(), batches(), **resumed)
    assert diagnostics.monitors["cms"].evaluations == 3
    assert diagnostics.monitors["cms"].latest.step == added.fit_loop.epoch_loop._batches_that_stepped - 1
    seed_everything(0, verbose=False)
    alone = trainer(max_epochs=5)
    alone.fit(make(), batches(), **resumed)
    assert same(added.lightning_module.state_dict(), alone.lightning_module.state_dict())


# Lightning warns about callbacks that are missing
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*")
def test_the_callback_may_be_removed_from_a_resumed_run(tmp_path: Path) -> None:
    own = trainer(GenerativeDiagnostics(adapter=small(), max_overhead=None), max_epochs=2)
    own.fit(LitVanillaVAE(), batches())
    own.save_checkpoint(tmp_path / "with.ckpt")
    state = torch.load(tmp_path / "with.ckpt", weights_only=True)
    assert "cms" in state["callbacks"]["GenerativeDiagnostics"]["monitors"]
    removed = trainer(max_epochs=4)
    removed.fit(LitVanillaVAE(), batches(), ckpt_path=tmp_path / "with.ckpt", **loading())
    assert removed.current_epoch == 4
    assert removed.global_step == 2 * own.global_step


def test_two_processes_agree_and_training_stays_the_same(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_PORT": str(port), "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_any_model", str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    paths = [tmp_path / f"report_{rank}.pt" for rank in range(2)]
    assert all(path.exists() for path in paths), done.stderr[-3000:]
    one, two = (torch.load(path, weights_only=True) for path in paths)
    assert one["attached"] == two["attached"] == [*GENERATOR, *JUDGED]
    # memorization is evaluated a fifth as often, and the adversary a quarter
    assert one["evaluations"] == two["evaluations"] == [5, 5, 5, 1, 1, 5]
    assert one["values"] == pytest.approx(two["values"], rel=0, abs=0, nan_ok=True)
    assert all(
        math.isfinite(value)
        for tag, value in one["values"].items()
        if "/fid_class_" not in tag and "/memorization/" not in tag
    )
    assert same(one["with"], one["without"])
    assert same(one["with"], two["with"])


def main(folder: Path) -> None:
    """Trains the GAN on two processes, with and without diagnostics: ``python -m tests.test_any_model FOLDER``."""
    import warnings

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    options = {"devices": 2, "strategy": "ddp_find_unused_parameters_true", "max_epochs": 5}
    # a chunk has 128 samples, so the first process has all of them
    diagnostics = GenerativeDiagnostics(adapter=small(), max_overhead=None)
    seen = {"with": weights_after(lambda: TutorialGAN(1, 8, 8), diagnostics, **options)}
    own: Trainer = diagnostics.monitors["cms"].session.trainer
    report = seen | {
        "without": weights_after(lambda: TutorialGAN(1, 8, 8), **options),
        "attached": diagnostics.attached,
        "evaluations": [diagnostics.monitors[name].evaluations for name in diagnostics.attached],
        "values": {tag: float(v) for tag, v in own.callback_metrics.items() if tag.startswith("gendiag/")},
    }
    torch.save(report, folder / f"report_{own.global_rank}.pt")
    # gloo sometimes aborts at the interpreter's exit
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
