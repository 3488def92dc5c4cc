"""Models as people write them, none of them with us in mind: what is attached, what is asked for, and what stays as it was."""

from __future__ import annotations

import copy
import math
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
import zuko
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from example_models.data import digits
from lightning_gendiag import CollapseStopping, CosineMeanSimilarityMonitor, GenerativeDiagnostics, Probe
from tests.conftest import trainer

# models that have learned nothing yet
pytestmark = pytest.mark.filterwarnings("ignore:generated images span")


class Generator(nn.Module):
    """Of the GAN of Lightning's tutorial."""

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
    """Of whichever package: see ``TutorialGAN`` and ``OldGAN``."""

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
    """``encoder`` gives features and no latents, and ``sample`` draws from the posterior."""

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
    """What the models below have in common, and none of it matters to a probe."""

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
    """Noise of one pixel, and its length under the name that the paper's code gave it."""

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
    """Lightning's first example: flat images, and nowhere the length of the latent."""

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
    """As in PyTorch-VAE: no LightningModule, ``decoder`` takes what ``decoder_input`` makes, ``sample`` wants a device."""

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
    """The same model written as a LightningModule."""

    loss = VAEXperiment.loss


class Flow(PlainLoss):
    """A flow over flat data, nothing more."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = zuko.flows.NICE(64, transforms=2, hidden_features=(16,))

    def loss(self, images: Tensor, labels: Tensor | None) -> Tensor:
        return -self.flow().log_prob(images.flatten(1)).mean()


class FlowWithForward(Flow):
    """``forward`` gives the distribution."""

    def forward(self) -> torch.distributions.Distribution:
        return self.flow()


class GaussianVAE(PlainLoss):
    """``decode`` gives a distribution over images."""

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
    """``forward`` predicts noise, and drawing an image takes many passes."""

    def __init__(self, timesteps: int = 20, pause: float = 0.0) -> None:
        super().__init__()
        self.timesteps, self.pause, self.calls = timesteps, pause, 0
        self.unet = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1))
        self.register_buffer("betas", torch.linspace(1e-4, 0.2, timesteps))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.unet(torch.cat((x, (t / self.timesteps).view(-1, 1, 1, 1).expand_as(x)), 1))

    def loss(self, images: Tensor, labels: Tensor | None) -> Tensor:
        t = torch.randint(self.timesteps, (len(images),), device=self.device)
        kept = (1 - self.betas).cumprod(0)[t].view(-1, 1, 1, 1)
        noise = torch.randn_like(images)
        return F.mse_loss(self(kept.sqrt() * images + (1 - kept).sqrt() * noise, t), noise)

    @torch.no_grad()
    def p_sample_loop(self, shape: tuple[int, ...]) -> Tensor:
        self.calls += 1
        x, kept = torch.randn(shape, device=self.device), (1 - self.betas).cumprod(0)
        for t in reversed(range(self.timesteps)):
            eps = self(x, torch.full((shape[0],), t, device=self.device))
            x = (x - self.betas[t] / (1 - kept[t]).sqrt() * eps) / (1 - self.betas[t]).sqrt()
            x = x + self.betas[t].sqrt() * torch.randn_like(x) * (t > 0)
            time.sleep(self.pause)
        return x.clamp(-1, 1)


class SlowDDPM(DDPM):
    def sample(self, batch_size: int = 16) -> Tensor:
        return self.p_sample_loop((batch_size, 1, 8, 8))


def batches(kind: str = "pair", n: int = 64) -> DataLoader[Any]:
    """Digits in -1..1 and their labels, a dictionary of them in 0..1, or digits alone."""
    images, labels = (rows[:n] for rows in DIGITS)
    if kind == "dict":
        return DataLoader(
            [{"image": (x + 1) / 2, "label": y} for x, y in zip(images, labels, strict=True)], batch_size=16
        )  # type: ignore[arg-type]
    return DataLoader(images if kind == "images" else TensorDataset(images, labels), batch_size=16)  # type: ignore[arg-type]


DIGITS = digits(8)
small = partial(Probe, num_samples=64, num_reference=64)


def watched(module: Any, probe: Probe | None = None, kind: str = "pair", **options: Any) -> GenerativeDiagnostics:
    """An epoch under everything that applies; each diagnostic that is attached looked when due and gave finite numbers.

    A class of which hardly an image is drawn has no Fréchet distance.
    """
    everything = GenerativeDiagnostics(probe=probe or small(), max_share=None, draw_pictures=False)
    own = trainer(everything, **{"max_epochs": 1, **options})
    own.fit(module, batches(kind))
    for stem in everything.attached:
        monitor = everything.monitors[stem]
        assert monitor.evaluations == own.max_epochs // monitor.every_n_epochs, stem
        if monitor.evaluations:
            tags = [tag for tag in own.callback_metrics if tag.startswith(f"gendiag/{stem}/")]
            values = {tag: float(own.callback_metrics[tag]) for tag in tags if "/fid_class_" not in tag}
            assert values
            assert all(map(math.isfinite, values.values())), values
    return everything


def asked(module: Any, probe: Probe | None = None) -> str:
    """The words with which a single monitor refuses a module before it trains."""
    with pytest.raises(ValueError, match="To fix this") as refused:
        trainer(CosineMeanSimilarityMonitor(probe=probe or small()), CollapseStopping()).fit(module, batches())
    return str(refused.value)


def line_in(words: str, given: Any = None, **options: Any) -> Probe:
    """The probe of the line of code that a message says to write, and nothing else."""
    line = re.search(r"pass (?:Probe\(latent_dim=\.\.\.\) or )?(Probe\(.+\))\.?$", words)
    assert line is not None, words
    return eval(line[1], {"Probe": partial(small, **options), "torch": torch, "given": given})


def weights_after(module: Callable[[], Any], *callbacks: Any, kind: str = "pair", **options: Any) -> dict[str, Tensor]:
    seed_everything(0, verbose=False)
    made = module()
    own = trainer(*callbacks, **options)
    own.fit(made, batches(kind))
    return own.lightning_module.state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


SAMPLER = ["cms", "generation_balance"]
GENERATOR = [*SAMPLER, "manifold_entropy"]
ENCODER = [*SAMPLER, "k_star", "manifold_entropy", "posterior_kl", "latent_regions"]


def test_the_tutorials_gan_needs_no_word() -> None:
    everything = watched(TutorialGAN(1, 8, 8), max_epochs=2)
    assert everything.attached == GENERATOR
    assert everything.probe.sampled_by == "TutorialGAN.forward from normal noise (n, 10)"
    assert {everything.left_out[stem][:20] for stem in ("k_star", "posterior_kl", "latent_regions")} == {
        "encode must be known"
    }
    assert "split must be given" in everything.left_out["regional_primitives"]


def test_noise_of_one_pixel_is_found_by_trying() -> None:
    everything = watched(DCGAN())
    assert everything.attached == [*GENERATOR, "regional_primitives"]
    assert everything.probe.sampled_by == "DCGAN.forward from normal noise (n, 6, 1, 1)"


@pytest.mark.parametrize("enc_out_dim", [16, 3])
def test_features_of_an_encoder_are_not_taken_as_latents(enc_out_dim: int) -> None:
    everything = watched(VAE(enc_out_dim), kind="dict")
    assert everything.attached == [*GENERATOR, "regional_primitives"]
    assert everything.probe.sampled_by == "VAE.decoder from normal noise (n, 3)"
    words = everything.left_out["k_star"]
    assert "VAE.encoder gives features, of which fc_mu and fc_var make a posterior" in words
    assert everything.left_out["posterior_kl"] == everything.left_out["latent_regions"] == words
    module = VAE(enc_out_dim)
    everything = watched(module, line_in(words), kind="dict")
    assert everything.attached == [*ENCODER, "regional_primitives"]
    images = next(iter(batches("dict")))["image"]
    with everything.probe.looking(exact=True):
        codes = everything.probe.codes(images)
        assert torch.equal(codes, module.fc_mu(module.encoder(images)))


def test_an_encoder_of_mean_and_variance_in_one_is_asked_about() -> None:
    class Chunked(GaussianVAE):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 6))

        encode = None

        def loss(self, images: Tensor, labels: Tensor | None) -> Tensor:
            mu, _ = self.encoder(images).chunk(2, 1)
            return -self.decode(mu).log_prob(images).mean()

    words = watched(Chunked()).left_out["k_star"]
    assert "encode must return (2, 3) latents, got (2, 6) of Chunked.encoder" in words
    assert watched(Chunked(), line_in(words)).attached == ENCODER


def test_a_vae_whose_sample_wants_a_device_and_whose_decoder_wants_features_is_read_by_its_methods() -> None:
    everything = watched(LitVanillaVAE())
    assert everything.attached == ENCODER
    assert everything.probe.sampled_by == "LitVanillaVAE.decode from normal noise (n, 5)"


def test_a_sample_that_wants_a_device_is_asked_for_where_nothing_else_makes_images() -> None:
    class Bare(LitVanillaVAE):
        decode = None

        def sample(self, num_samples: int, current_device: Any) -> Tensor:
            return VanillaVAE.decode(self, torch.randn(num_samples, 5).to(current_device))

        def loss(self, images: Tensor, labels: Tensor | None) -> Tensor:
            return self.encode(images)[0].square().mean()

    words = asked(Bare())
    assert "sample must take normal noise (2, 5), but Bare.decoder gave" in words
    assert watched(Bare(), line_in(words)).attached[:2] == SAMPLER


def test_a_model_inside_a_module_is_pointed_at() -> None:
    words = asked(VAEXperiment(VanillaVAE()))
    assert "latent_dim must be known to draw noise for VAEXperiment, which has none of" in words
    assert 'pass Probe(latent_dim=...) or Probe(sample="model.decode").' in words
    everything = watched(VAEXperiment(VanillaVAE()), line_in(words))
    assert everything.attached == GENERATOR
    assert everything.probe.sampled_by == "VAEXperiment.model.decode from normal noise (n, 5)"
    encoder = line_in(everything.left_out["k_star"], sample="model.decode")
    assert watched(VAEXperiment(VanillaVAE()), encoder).attached == ENCODER


def test_flat_images_and_a_latent_without_a_length_are_asked_for() -> None:
    assert "pass Probe(latent_dim=...) or Probe(sample=lambda module, n: ...)" in asked(LitAutoEncoder())
    words = asked(LitAutoEncoder(), small(latent_dim=3))
    assert "got (2, 64)" in words
    everything = watched(LitAutoEncoder(), line_in(words.replace("C, H, W", "1, 8, 8"), latent_dim=3))
    assert everything.attached == GENERATOR
    words = everything.left_out["k_star"]
    assert "encode must take images (2, 1, 8, 8), but encoder gave RuntimeError" in words
    everything = watched(LitAutoEncoder(), line_in(words, latent_dim=3, sample=everything.probe.sample))
    assert everything.attached == [*SAMPLER, "k_star", "manifold_entropy"]


def test_a_conditional_generator_says_that_it_wants_labels() -> None:
    words = asked(ConditionalGAN())
    assert "ConditionalGAN.forward takes (noise: 'Tensor', labels: 'Tensor')" in words
    everything = watched(ConditionalGAN(), line_in(words))
    assert everything.attached == SAMPLER
    drawn = everything.probe.samples(-1)
    assert drawn.labels is not None
    assert len(drawn.labels.unique()) == 10
    decoder = line_in(everything.left_out["manifold_entropy"], conditional=True)
    assert watched(ConditionalGAN(), decoder).attached == GENERATOR


@pytest.mark.parametrize("make", [Flow, FlowWithForward])
def test_a_flow_that_gives_a_distribution_is_asked_for_a_draw(make: type[Flow]) -> None:
    words = asked(make())
    assert "sample must be known" in words
    drawn = line_in(words)
    words = asked(make(), drawn)
    assert "sample must return (2, C, H, W) images when asked for 2, got (2, 64)" in words
    probe = line_in(words.replace("C, H, W", "1, 8, 8"), given=drawn.sample)
    assert watched(make(), probe).attached == SAMPLER


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (ConditionalGAN, r"nothing to look at in ConditionalGAN: .*Probe\(conditional=True\)"),
        (LitAutoEncoder, "nothing to look at in LitAutoEncoder: latent_dim must be known"),
    ],
)
def test_where_nothing_can_be_looked_at_the_run_does_not_begin(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        trainer(GenerativeDiagnostics(action=None), max_epochs=1).fit(make(), batches())


def test_a_decoder_that_gives_a_distribution_is_seen_by_its_mean() -> None:
    everything = watched(GaussianVAE())
    assert everything.attached == ENCODER
    assert everything.probe.sampled_by == "GaussianVAE.decode from normal noise (n, 3)"


def test_a_diffusion_model_is_asked_for_its_sampler() -> None:
    words = asked(DDPM())
    assert "DDPM.forward takes (x: 'Tensor', t: 'Tensor')" in words
    assert words.endswith("or pass Probe(sample=lambda module, n: ...).")
    everything = watched(DDPM(), small(lambda module, n: module.p_sample_loop((n, 1, 8, 8))), kind="images")
    assert everything.attached == ["cms"]


def test_a_slow_sampler_is_asked_as_rarely_as_its_time_demands(caplog: pytest.LogCaptureFixture) -> None:
    module = SlowDDPM(pause=0.005)
    everything = GenerativeDiagnostics(probe=small())
    own = trainer(everything, max_epochs=8)
    with caplog.at_level("INFO"):
        own.fit(module, batches())
    assert everything.attached == SAMPLER
    assert own.current_epoch == 8
    # once to try it, and once to look: what both monitors see is drawn once
    assert module.calls == 2
    assert [everything.monitors[stem].evaluations for stem in SAMPLER] == [1, 1]
    assert "From now on they look less often, so that they take at most 5%" in caplog.text


class Average(WeightAveraging):
    """As Lightning's documentation writes it."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and step_idx >= 2


# Lightning's callback counts steps of its own
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
@pytest.mark.parametrize("make", [lambda: EMAWeightAveraging(decay=0.5), Average], ids=["ema", "swa"])
@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_are_looked_at_and_training_does_not_notice(make: Any, first: bool) -> None:
    seen: list[bool] = []

    class Compare(CosineMeanSimilarityMonitor):
        def feed(self, probe: Probe, step: int) -> None:
            super().feed(probe, step)
            noise = torch.randn(64, 10, generator=torch.Generator().manual_seed(probe.seed))
            with torch.no_grad():
                made = [copy.deepcopy(m.generator).eval()(noise) for m in (average._average_model.module, probe.module)]
            seen.extend(torch.equal(probe.samples(step).images, images) for images in made)

    average, monitor = make(), Compare(probe=small(), on_error="raise")
    both = [monitor, average] if first else [average, monitor]
    with_us = weights_after(lambda: TutorialGAN(1, 8, 8), *both, CollapseStopping())
    assert seen == [True, False] * 2
    assert same(with_us, weights_after(lambda: TutorialGAN(1, 8, 8), make()))


class Graphs:
    """A backend that compiles nothing, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.sizes: list[list[tuple[Any, ...]]] = []

    def __call__(self, graph: Any, inputs: list[Any]) -> Any:
        self.sizes.append([tuple(x.shape) for x in inputs if isinstance(x, Tensor)])
        return graph


# torch's compiler reads the gradient of what comes into a compiled part
reads_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@reads_grad
def test_a_compiled_part_is_looked_at_as_what_it_was_compiled_from() -> None:
    class Compiled(LitVanillaVAE):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = torch.compile(self.decoder, backend="aot_eager")

    assert watched(Compiled()).attached == ENCODER


@reads_grad
@pytest.mark.parametrize("whole", [False, True])
def test_compiled_training_stays_as_it_was_and_is_not_compiled_anew(whole: bool) -> None:
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
    graphs, everything = Graphs(), GenerativeDiagnostics(probe=small(), max_share=None)
    assert same(without, weights_after(make, everything))
    assert everything.attached == ENCODER
    assert everything.monitors["cms"].evaluations == 2
    assert graphs.sizes == alone.sizes


@pytest.mark.parametrize(("make", "expected"), [(lambda: TutorialGAN(1, 8, 8), GENERATOR), (LitVanillaVAE, ENCODER)])
def test_bfloat16_weights_are_looked_at_and_stay(make: Any, expected: list[str]) -> None:
    without = weights_after(make, precision="bf16-true", max_epochs=1)
    seed_everything(0, verbose=False)
    module = make()
    assert watched(module, precision="bf16-true").attached == expected
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert same(module.state_dict(), without)


def test_accumulated_gradients_share_the_step_of_self_log_and_stay_as_they_were(tmp_path: Path) -> None:
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

    by_epoch = CosineMeanSimilarityMonitor(probe=small())
    state, logger = run(by_epoch, CollapseStopping(), name="epochs")
    plain, plain_logger = run(name="plain")
    assert same(state, plain)
    # four batches an epoch: the third steps, and the last
    assert steps(logger, "gendiag/cms/image") == steps(logger, "train_loss_epoch") == [1, 3, 5]
    assert steps(logger, "train_loss_step") == steps(plain_logger, "train_loss_step")
    by_step = CosineMeanSimilarityMonitor(probe=small(num_reference=16), every_n_train_steps=2)
    _, logger = run(by_step, CollapseStopping(), name="steps")
    assert steps(logger, "gendiag/cms/image") == [1, 3, 5]
    assert set(steps(logger, "gendiag/cms/image")) <= set(steps(logger, "train_loss_step"))


def test_modules_of_the_older_package_run_in_its_trainer_and_are_refused_by_the_newer_ones() -> None:
    everything = GenerativeDiagnostics(probe=small(), max_share=None)
    own = pytorch_lightning.Trainer(
        callbacks=[everything, pytorch_lightning.callbacks.EMAWeightAveraging(decay=0.5)],  # type: ignore[list-item]
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    own.fit(OldGAN(1, 8, 8), batches())
    assert everything.attached == GENERATOR
    assert [everything.monitors[stem].evaluations for stem in GENERATOR] == [2, 2, 2]
    assert everything.probe.averaged
    assert math.isfinite(own.callback_metrics["gendiag/cms/image"])
    with pytest.raises(TypeError, match=r"`model` must be a `LightningModule` .*, got `OldGAN`"):
        trainer(GenerativeDiagnostics()).fit(OldGAN(1, 8, 8), batches())


@pytest.mark.parametrize("make", [lambda: TutorialGAN(1, 8, 8), LitVanillaVAE])
def test_the_plugin_may_be_added_to_a_run_that_goes_on(make: Any, tmp_path: Path) -> None:
    own = trainer(max_epochs=2)
    own.fit(make(), batches())
    own.save_checkpoint(tmp_path / "without.ckpt")
    everything = GenerativeDiagnostics(probe=small(), max_share=None)
    goes_on = {"ckpt_path": tmp_path / "without.ckpt", "weights_only": True}
    seed_everything(0, verbose=False)
    added = trainer(everything, max_epochs=5)
    added.fit(make(), batches(), **goes_on)
    assert everything.monitors["cms"].evaluations == 3
    assert everything.monitors["cms"].latest.step == added.fit_loop.epoch_loop._batches_that_stepped - 1
    seed_everything(0, verbose=False)
    alone = trainer(max_epochs=5)
    alone.fit(make(), batches(), **goes_on)
    assert same(added.lightning_module.state_dict(), alone.lightning_module.state_dict())


# Lightning's own words for what we promise to bear
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*")
def test_the_plugin_may_be_removed_from_a_run_that_goes_on(tmp_path: Path) -> None:
    own = trainer(GenerativeDiagnostics(probe=small(), max_share=None), max_epochs=2)
    own.fit(LitVanillaVAE(), batches())
    own.save_checkpoint(tmp_path / "with.ckpt")
    kept = torch.load(tmp_path / "with.ckpt", weights_only=True)
    assert any("CosineMeanSimilarityMonitor" in key for key in kept["callbacks"])
    removed = trainer(max_epochs=4)
    removed.fit(LitVanillaVAE(), batches(), ckpt_path=tmp_path / "with.ckpt", weights_only=True)
    assert removed.current_epoch == 4
    assert removed.global_step == 2 * own.global_step


def test_two_devices_agree_and_train_as_they_would_alone(tmp_path: Path) -> None:
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
    assert one["attached"] == two["attached"] == GENERATOR
    assert one["evaluations"] == two["evaluations"] == [2, 2, 2]
    assert one["values"] == pytest.approx(two["values"], rel=0, abs=0, nan_ok=True)
    assert all(math.isfinite(value) for tag, value in one["values"].items() if "/fid_class_" not in tag)
    assert same(one["with"], one["without"])
    assert same(one["with"], two["with"])


def main(folder: Path) -> None:
    """The tutorial's GAN on two processes, with and without: ``python -m tests.test_any_model FOLDER``."""
    import warnings

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    options = {"devices": 2, "strategy": "ddp_find_unused_parameters_true"}
    # by chunks of 128: all samples are the first process's
    everything = GenerativeDiagnostics(probe=small(), max_share=None)
    seen = {"with": weights_after(lambda: TutorialGAN(1, 8, 8), everything, **options)}
    own: Trainer = everything.probe.trainer
    report = seen | {
        "without": weights_after(lambda: TutorialGAN(1, 8, 8), **options),
        "attached": everything.attached,
        "evaluations": [everything.monitors[stem].evaluations for stem in everything.attached],
        "values": {tag: float(v) for tag, v in own.callback_metrics.items() if tag.startswith("gendiag/")},
    }
    torch.save(report, folder / f"report_{own.global_rank}.pt")
    # gloo sometimes aborts at the interpreter's exit
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
