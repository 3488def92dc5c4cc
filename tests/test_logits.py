"""Decoders of logits: what a training step applies before it compares them with images is applied to what they return."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from example_models.data import digits
from lightning_gendiag import GenerativeDiagnostics
from lightning_gendiag.model.aims import activation_of_logits
from lightning_gendiag.model.denoising import TrainingStep
from tests.helpers.running import trainer

pytestmark = [pytest.mark.filterwarnings("ignore:GenerativeDiagnostics watches the training data only")]

IMAGES, LABELS = digits(8)
IMAGES, LABELS = (IMAGES[:512] + 1) / 2, LABELS[:512]
"""In 0 to 1."""
BINARY = (IMAGES > 0.5).float()
CLASSES = F.one_hot((IMAGES[:, 0] * 2.99).long(), 3).movedim(-1, 1).float()
"""(N, 3, 8, 8): dark, grey or bright."""
ROWS = torch.cat([F.one_hot(torch.arange(64) % k, k) for k in (3, 4)], 1).float()
"""(N, 7) two columns of categories."""

Compare = Callable[[Tensor, Tensor], Tensor]


class Same(LightningModule):
    """Returns data of the shape of images, and is trained to return what a loss compares with them."""

    def __init__(self, compare: Compare) -> None:
        super().__init__()
        self.compare, self.shift = compare, nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.compare(self(batch[0]), batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-3)


def cross_entropy(y: Tensor, x: Tensor) -> Tensor:
    return F.cross_entropy(y, x.argmax(1))


def of_columns(y: Tensor, x: Tensor) -> Tensor:
    return cross_entropy(y[:, :3], x[:, :3]) + cross_entropy(y[:, 3:], x[:, 3:])


LOGITS: dict[str, Compare] = {
    "cross entropy with logits": F.binary_cross_entropy_with_logits,
    "its sum": lambda y, x: F.binary_cross_entropy_with_logits(y, x, reduction="sum") / len(x),
    "cross entropy of the sigmoid": lambda y, x: F.binary_cross_entropy(torch.sigmoid(y), x),
    "squared error of the sigmoid": lambda y, x: F.mse_loss(torch.sigmoid(y), x),
    "absolute error of the sigmoid": lambda y, x: (y.sigmoid() - x).abs().mean(),
    "likelihood": lambda y, x: -torch.distributions.Bernoulli(logits=y, validate_args=False).log_prob(x).sum(1).mean(),
    "of black and white": lambda y, x: F.binary_cross_entropy_with_logits(y, (x > 0.5).float()),
}
OTHERS: dict[str, Compare] = {
    "squared": F.mse_loss,
    "absolute": F.l1_loss,
    "in another range": lambda y, x: F.mse_loss(y, 2 * x - 1),
    "standardized": lambda y, x: F.mse_loss(y, (x - 0.3) / 0.4),
    "eight bits": lambda y, x: F.mse_loss(y, 255 * x),
    "noise": lambda y, x: F.mse_loss(y, torch.randn_like(x)),
    "critic": lambda y, x: y.mean(),
    "real or not": lambda y, x: F.binary_cross_entropy_with_logits(y, torch.ones_like(y)),
    "negative": lambda y, x: F.binary_cross_entropy_with_logits(y, 1 - x),
}


def activation(compare: Compare, images: Tensor) -> str | None:
    step = TrainingStep(Same(compare), [images[:8]], 8, lambda seed: torch.manual_seed(seed) and None)
    return activation_of_logits(step, images[:8], 0)


@pytest.mark.parametrize("images", [IMAGES, BINARY], ids=["grey", "binary"])
@pytest.mark.parametrize("name", LOGITS)
def test_a_loss_that_is_least_at_the_logits_of_images_is_seen(name: str, images: Tensor) -> None:
    assert activation(LOGITS[name], images) == "sigmoid"


@pytest.mark.parametrize("images", [IMAGES, BINARY], ids=["grey", "binary"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_loss_that_is_least_elsewhere_takes_no_logits(name: str, images: Tensor) -> None:
    assert activation(OTHERS[name], images) is None


def test_what_takes_another_function_for_grey_images_takes_no_logits() -> None:
    # of black and white images, the hyperbolic tangent and the sigmoid have the same limits
    assert activation(lambda y, x: F.mse_loss(y.tanh(), 2 * x - 1), IMAGES) is None


def test_images_in_another_range_have_no_logits() -> None:
    assert activation(lambda y, x: F.binary_cross_entropy_with_logits(y, (x + 1) / 2), 2 * IMAGES - 1) is None


def test_a_cross_entropy_of_channels_takes_a_softmax_and_one_of_several_columns_takes_neither() -> None:
    assert activation(cross_entropy, CLASSES) == "softmax"
    assert activation(F.binary_cross_entropy_with_logits, CLASSES) == "sigmoid"
    assert activation(of_columns, ROWS) is None


class LogitVAE(LightningModule):
    """A VAE that decodes logits."""

    def __init__(self, name: str = "cross entropy with logits") -> None:
        super().__init__()
        self.compare, self.latent_dim = LOGITS[name], 4
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        self.decoder = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.Unflatten(1, (1, 8, 8)))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, 1)
        return mean, log_variance

    def decode(self, z: Tensor) -> Tensor:
        logits: Tensor = self.decoder(z)
        return logits

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encode(x)
        return self.decode(mean + torch.randn_like(mean) * (log_variance / 2).exp()), mean, log_variance

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        y, mean, log_variance = self(batch[0])
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        return self.compare(y, batch[0]) + kl / 64

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


class Sampling(LogitVAE):
    """Its sampler applies the sigmoid itself."""

    def sample(self, n: int) -> Tensor:
        return self.decode(torch.randn(n, 4)).sigmoid()


class Applying(LogitVAE):
    """Decodes images by a layer that returns logits."""

    def decode(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.decoder(z))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mean, _ = self.encode(batch[0])
        return F.binary_cross_entropy(self.decode(mean), batch[0])


class FactorVAE(LogitVAE):
    """Trained by hand beside a discriminator of its latents (https://arxiv.org/abs/1802.05983)."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.discriminator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        of_vae, of_critic = self.optimizers()  # type: ignore[attr-defined]
        loss = super().training_step(batch, batch_idx)
        z = self.encode(batch[0])[0]
        of_vae.zero_grad()
        self.manual_backward(loss + 0.1 * self.discriminator(z).mean())
        of_vae.step()
        of_critic.zero_grad()
        shuffled = torch.stack([column[torch.randperm(len(z))] for column in z.detach().unbind(1)], 1)
        self.manual_backward(
            F.softplus(self.discriminator(shuffled)).mean() + F.softplus(-self.discriminator(z.detach())).mean()
        )
        of_critic.step()

    def configure_optimizers(self) -> Any:
        own = [*self.encoder.parameters(), *self.decoder.parameters()]
        return torch.optim.Adam(own, 1e-2), torch.optim.Adam(self.discriminator.parameters(), 1e-3)


class Autoencoder(LightningModule):
    """Its ``forward`` is known to reconstruct by training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 64), nn.Unflatten(1, (1, 8, 8))
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(batch[0]), batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


def fitted(module: LightningModule, epochs: int = 1, data: Tensor = IMAGES, **options: Any) -> GenerativeDiagnostics:
    torch.manual_seed(0)
    diagnostics = GenerativeDiagnostics("warn", max_overhead=None, num_samples=64, log_images=False, **options)
    trainer(diagnostics, max_epochs=epochs).fit(module, DataLoader(TensorDataset(data, LABELS), 64))
    return diagnostics


def test_what_is_decoded_sampled_and_reconstructed_is_the_sigmoid_of_the_logits(caplog: Any) -> None:
    module = LogitVAE()
    with caplog.at_level("INFO"):
        diagnostics = fitted(module)
    view = diagnostics.monitors["cms"].view
    parts = view.parts
    assert parts.way("decode").name == "sigmoid of self.decode"
    assert parts.way("sample").name == "sigmoid of self.decode from normal noise (n, 4)"
    assert parts.way("reconstruct").name == "sigmoid of self.forward(images)"
    z = torch.randn(8, 4)
    with torch.no_grad():
        assert torch.equal(parts.decode(z), module.decode(z).sigmoid())
        for name in ("sample", "reconstruct"):
            made = parts.way(name).call(8 if name == "sample" else IMAGES[:8])  # type: ignore[arg-type]
            assert made.shape == (8, 1, 8, 8)
            assert 0 <= float(made.amin()) < float(made.amax()) <= 1
    text = "Decoded: sigmoid of self.decode, since training_step takes what it returns for logits. "
    assert caplog.text.count(text) == 1


class OfChannels(Autoencoder):
    """Decodes logits of classes of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 192), nn.Unflatten(1, (3, 8, 8)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[0])


def test_channels_that_are_one_hot_are_reconstructed_by_a_softmax() -> None:
    diagnostics = fitted(module := OfChannels(), data=CLASSES)
    way = diagnostics.monitors["cms"].view.parts.way("reconstruct")
    assert way.name == "softmax of self.forward(images)"
    with torch.no_grad():
        assert torch.allclose(way.call(CLASSES[:4]), module(CLASSES[:4]).softmax(1))


def test_a_sigmoid_is_not_applied_twice() -> None:
    parts = fitted(Sampling()).monitors["cms"].view.parts
    assert parts.way("sample").name == "self.sample(n)"
    assert parts.way("decode").name == "sigmoid of self.decode"
    parts = fitted(Applying()).monitors["cms"].view.parts
    assert not any(parts.way(need).activation for need in ("sample", "decode", "reconstruct"))


def test_what_the_user_gave_is_taken_as_it_is() -> None:
    given = {"sample": lambda module, n: module.decode(torch.randn(n, 4)), "decode": "decode"}
    parts = fitted(LogitVAE(), **given).monitors["cms"].view.parts
    assert not parts.way("sample").activation
    assert not parts.way("decode").activation


def test_forward_reconstructs_by_the_sigmoid_where_nothing_encodes() -> None:
    diagnostics = fitted(Autoencoder())
    assert {"cms", "round_trip"} <= set(diagnostics.attached)
    assert diagnostics.monitors["cms"].view.parts.way("reconstruct").name == "sigmoid of self.forward(images)"


@pytest.mark.parametrize("make", [LogitVAE, FactorVAE, Autoencoder])
def test_a_run_of_a_decoder_of_logits_is_healthy(make: type[LightningModule]) -> None:
    report = fitted(make(), 12).stopping.report()
    assert report["state"] == "healthy", report["summary"]


@pytest.mark.parametrize("make", [LogitVAE, Autoencoder])
def test_a_run_that_is_resumed_or_has_a_reference_of_its_own_takes_the_same_ways(
    make: type[LightningModule], tmp_path: Path
) -> None:
    loader = DataLoader(TensorDataset(IMAGES, LABELS), 64)
    runs = {"first": 1, "resumed": 2, "of a tensor": 1, "of a dataset": 1}
    references = {"of a tensor": IMAGES, "of a dataset": TensorDataset(IMAGES, LABELS)}
    chosen = {}
    for name, epochs in runs.items():
        diagnostics = GenerativeDiagnostics(
            "warn", max_overhead=None, num_samples=64, log_images=False, reference=references.get(name)
        )
        own = trainer(diagnostics, max_epochs=epochs)
        own.fit(make(), loader, ckpt_path=tmp_path / "first.ckpt" if name == "resumed" else None)
        own.save_checkpoint(tmp_path / f"{name}.ckpt")
        chosen[name] = diagnostics.monitors["cms"].view.parts.choices(("sample", "decode", "reconstruct"))
    assert chosen["first"]["reconstruct"] == "sigmoid of self.forward(images)"
    assert all(ways == chosen["first"] for ways in chosen.values()), chosen
