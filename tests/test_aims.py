"""Whether what returns data of the shape of images is trained to return them, and flows without names of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from example_models.data import digits
from lightning_gendiag import GenerativeDiagnostics
from lightning_gendiag.model.adapters.own import inverse_of
from lightning_gendiag.model.aims import reconstructs
from lightning_gendiag.model.denoising import TrainingStep
from tests.helpers.running import trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:generated images span"),
    pytest.mark.filterwarnings("ignore:GenerativeDiagnostics watches the training data only"),
]

IMAGES, LABELS = digits(8)
IMAGES, LABELS = IMAGES[:256], LABELS[:256]
"""In -1 to 1."""

Loss = Callable[["Same", Tensor], Tensor]


class Same(LightningModule):
    """Returns data of the shape of images, and is trained in a given way."""

    def __init__(self, loss: Loss, squash: bool = False) -> None:
        super().__init__()
        self.loss = loss
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))
        self.squash = squash

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.net(x)) if self.squash else self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self, batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-3)


def noised(x: Tensor) -> Tensor:
    return x + 0.3 * torch.randn_like(x)


def score(m: Same, x: Tensor) -> Tensor:
    noise = torch.randn_like(x)
    return (m(x + 0.3 * noise) + noise / 0.3).square().mean()


def normal_nll(m: Same, x: Tensor) -> Tensor:
    return -torch.distributions.Normal(m(x), 0.5).log_prob(x).mean()


RECONSTRUCT: dict[str, tuple[Loss, bool]] = {
    "squared": (lambda m, x: F.mse_loss(m(x), x), False),
    "absolute": (lambda m, x: (m(x) - x).abs().mean(), False),
    "smooth": (lambda m, x: F.smooth_l1_loss(m(x), x, beta=0.1), False),
    "likelihood": (normal_nll, False),
    "cross entropy": (lambda m, x: F.binary_cross_entropy(m(x), (x + 1) / 2), True),
    "of noised images": (lambda m, x: F.mse_loss(m(noised(x)), x), False),
    "masked": (lambda m, x: ((m(x) - x) * (torch.rand_like(x) < 0.5)).square().mean(), False),
    "normalized in the step": (lambda m, x: F.mse_loss(m(3 * x + 1), 3 * x + 1), False),
    "by a part": (lambda m, x: F.mse_loss(m.net(x), x), False),
    "with a penalty": (lambda m, x: F.mse_loss(m(x), x) + 1e-3 * m(x).abs().mean(), False),
}
OTHERS: dict[str, tuple[Loss, bool]] = {
    "score": (score, False),
    "noise": (lambda m, x: F.mse_loss(m(x), torch.randn_like(x)), False),
    "latents": (lambda m, x: 0.5 * m(x).square().mean(), False),
    "logits": (lambda m, x: F.binary_cross_entropy_with_logits(m(x), (x > 0).float()), False),
    "another domain": (lambda m, x: F.mse_loss(m(x), -x), False),
}


def answer(loss: Loss, squash: bool) -> bool | None:
    torch.manual_seed(0)
    module, images = Same(loss, squash), (IMAGES[:8] + 1) / 2 if squash else IMAGES[:8]
    if squash:
        module.loss = lambda m, x: F.binary_cross_entropy(m(x), x)
    step = TrainingStep(module, [images], len(images), lambda seed: torch.manual_seed(seed) and None)
    return reconstructs(step, images, 0)


@pytest.mark.parametrize("name", RECONSTRUCT)
def test_a_loss_that_compares_with_the_images_is_one_of_reconstructions(name: str) -> None:
    assert answer(*RECONSTRUCT[name]) is True


@pytest.mark.parametrize("name", OTHERS)
def test_a_loss_that_is_least_elsewhere_is_none(name: str) -> None:
    assert answer(*OTHERS[name]) is False


def test_nothing_is_known_where_the_step_cannot_run_or_no_part_returns_images() -> None:
    def failing(m: Same, x: Tensor) -> Tensor:
        raise RuntimeError("no")

    assert answer(failing, False) is None
    assert answer(lambda m, x: m.net[0](x).square().mean(), False) is None
    # the gradient does not depend on what is returned
    assert answer(lambda m, x: m(x).mean() - m(noised(x)).mean(), False) is None


def fitted(module: LightningModule, *data: Tensor) -> GenerativeDiagnostics:
    diagnostics = GenerativeDiagnostics("warn", max_overhead=None, num_samples=32, log_images=False)
    trainer(diagnostics, max_epochs=1).fit(module, DataLoader(TensorDataset(*data), 64))
    return diagnostics


@pytest.mark.parametrize(
    ("name", "is_attached"), [("squared", True), ("score", False), ("latents", False), ("logits", False)]
)
def test_forward_reconstructs_only_where_training_says_so(name: str, is_attached: bool) -> None:
    loss, squash = {**RECONSTRUCT, **OTHERS}[name]
    diagnostics = fitted(Same(loss, squash), IMAGES, LABELS)
    assert ({"cms", "round_trip"} <= set(diagnostics.attached)) is is_attached
    if not is_attached:
        assert "training does not compare what it returns with the images" in diagnostics.left_out["round_trip"]


class Masked(LightningModule):
    """A masked autoencoder (https://arxiv.org/abs/2111.06377), whose 16 patches of 16 numbers have the shape of an image."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 24)
        self.encoder = nn.Sequential(nn.Linear(24, 32), nn.ReLU())
        self.decoder = nn.Linear(32, 16)
        self.inside = inside

    def patches(self, x: Tensor) -> Tensor:
        return F.unfold(x, 4, stride=4).movedim(1, 2)

    def forward(self, x: Tensor) -> Any:
        patches = self.patches(x)
        mask = (torch.rand(patches.shape[:2], device=x.device) < 0.75).float()[..., None]
        predicted = self.decoder(self.encoder(self.embed(patches * (1 - mask))))
        loss = ((predicted - patches).square() * mask).mean()
        return (loss, predicted, mask) if self.inside else (predicted, mask)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self(batch[0])
        if self.inside:
            loss: Tensor = output[0]
            return loss
        return ((output[0] - self.patches(batch[0])).square() * output[1]).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-3)


@pytest.mark.parametrize("inside", [False, True])
def test_patches_that_have_the_shape_of_an_image_are_no_reconstruction(inside: bool) -> None:
    diagnostics = fitted(Masked(inside), digits(16)[0][:256], LABELS)
    assert diagnostics.attached == ["training_data"]
    assert "training does not compare what it returns with the images" in diagnostics.left_out["round_trip"]


class Squeezing(Same):
    """Returns images without the axis of their channel."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 0]


@pytest.mark.parametrize("name", ["squared", "logits"])
def test_an_image_without_the_axis_of_its_channel_is_a_reconstruction(name: str) -> None:
    compare = F.mse_loss if name == "squared" else F.binary_cross_entropy_with_logits
    module, images = Squeezing(lambda m, x: compare(m(x), x[:, 0])), (digits(16)[0][:256] + 1) / 2
    diagnostics = fitted(module, images, LABELS)
    assert {"cms", "round_trip"} <= set(diagnostics.attached)
    expected = "self.forward(images)" if name == "squared" else "sigmoid of self.forward(images)"
    assert diagnostics.monitors["cms"].view.parts.way("reconstruct").name == expected


class Coupling(nn.Module):
    def __init__(self, size: int, parity: int) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.arange(size) % 2 == parity).float())
        self.net = nn.Sequential(nn.Linear(size, 32), nn.ReLU(), nn.Linear(32, 2 * size))

    def parameters_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.net(x * self.mask).chunk(2, 1)
        return torch.tanh(scale) * (1 - self.mask), shift * (1 - self.mask)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.parameters_of(x)
        return x * scale.exp() + shift, scale.sum(1)

    def inverse(self, z: Tensor) -> Tensor:
        scale, shift = self.parameters_of(z)
        return (z - shift) * (-scale).exp()


class Chain(nn.Module):
    """Maps data to noise by ``forward``."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Coupling(size, number % 2) for number in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total: Any = 0.0
        for layer in self.layers:
            x, volume = layer(x)
            total = total + volume
        return x, total

    def inverse(self, z: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            z = layer.inverse(z)  # type: ignore[operator]
        return z


class Likelihood(LightningModule):
    """A flow that is trained by maximum likelihood; a subclass says how it is called."""

    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.chain = Chain(size)

    def latents(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.chain(x.flatten(1))
        return found

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z, volume = self.latents(batch[0])
        return (0.5 * z.flatten(1).square().sum(1) - volume).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-3)


class OfPart(Likelihood):
    """Only the part has both directions."""


class Both(Likelihood):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, volume = self.latents(x)
        return z.view_as(x), volume

    def inverse(self, z: Tensor) -> Tensor:
        return self.chain.inverse(z.flatten(1)).view_as(z)


class Reversed(Likelihood):
    """Its ``forward`` makes data of noise."""

    def forward(self, z: Tensor) -> Tensor:
        return self.chain.inverse(z)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.latents(x)


class ByArgument(Likelihood):
    def forward(self, x: Tensor, reverse: bool = False) -> Any:
        return self.chain.inverse(x) if reverse else self.latents(x)


class ByWord(Likelihood):
    def forward(self, x: Tensor, mode: str = "direct") -> Any:
        if mode not in ["direct", "inverse"]:
            raise ValueError(mode)
        return self.chain.inverse(x) if mode == "inverse" else self.latents(x)


class OfOneDirection(Likelihood):
    """A module whose mode is no direction."""

    def forward(self, x: Tensor, mode: str = "train") -> Any:
        return self.latents(x) if mode == "train" else x


def test_a_word_for_another_mode_is_no_direction() -> None:
    assert inverse_of(OfOneDirection(6)) is None
    assert inverse_of(ByWord(6)) is not None


@pytest.mark.parametrize(
    ("make", "encoder", "decoder"),
    [
        (OfPart, "self.chain.forward(images.flatten(1))", "self.chain.inverse"),
        (Both, "self.forward(images)", "self.inverse"),
        (Reversed, "self.inverse(images)", "self.forward"),
        (ByArgument, "self.forward(images)", "self.forward(reverse=True)"),
        (ByWord, "self.forward(images)", "self.forward(mode='inverse')"),
    ],
)
@pytest.mark.parametrize("rows", [False, True])
def test_a_flow_is_found_by_what_inverts_it(make: type[Likelihood], encoder: str, decoder: str, rows: bool) -> None:
    torch.manual_seed(1)
    data = (torch.randn(256, 6),) if rows else (IMAGES, LABELS)
    module = make(6 if rows else 64)
    diagnostics = fitted(module, *data)
    assert {"cms", "manifold_entropy", "round_trip", "memorization", "latent_regions"} <= set(diagnostics.attached)
    parts = diagnostics.monitors["cms"].view.parts
    expected = encoder.replace("(images.flatten(1))", "(images)") if rows else encoder
    assert (parts.way("encode").name, parts.way("decode").name) == (expected, decoder)
    assert parts.way("sample").name.startswith(f"{decoder} from normal noise (n, ")
    # what is sampled is the inverse of noise: the same noise comes back
    with torch.no_grad():
        assert parts.has_prior
        z = torch.randn(4, *(parts._latent or ()))
        again, _ = module.latents(parts.decode(z.flatten(1)))
    assert torch.allclose(again.flatten(1), z.flatten(1), atol=1e-4)


class Drawing(Same):
    """Samples under another name; ``sample_latents`` takes data."""

    def draw_images(self, n: int) -> Tensor:
        return torch.rand(n, 1, 8, 8)

    def sample_latents(self, x: Tensor) -> Tensor:
        raise AssertionError("it is no sampler")


class OfSize(Same):
    """Takes the size of one image beside the number of samples, as https://github.com/cloneofsimo/minDiffusion does."""

    def sample(self, n_sample: int, size: tuple[int, ...], device: Any) -> Tensor:
        return torch.rand(n_sample, *size, device=device)


@pytest.mark.parametrize(("make", "name"), [(Drawing, "self.draw_images(n)"), (OfSize, "self.sample(n, size, device)")])
def test_samplers_are_found_by_what_they_take(make: type[Same], name: str) -> None:
    diagnostics = fitted(make(score), IMAGES, LABELS)
    assert diagnostics.monitors["cms"].view.parts.way("sample").name == name
    assert {"cms", "memorization"} <= set(diagnostics.attached)


class Packed(LightningModule):
    """A VAE whose encoder returns mean and log variance in one tensor, and that states no length anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 12))
        self.decoder = nn.Sequential(
            nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8))
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, 1)
        z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return {"reconstruction": self.decoder(z), "mean": mean, "log_variance": log_variance}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self(batch[0])
        mean, log_variance = out["mean"], out["log_variance"]
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        return F.mse_loss(out["reconstruction"], batch[0]) + kl / 64

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-3)


def test_a_mean_and_a_variance_in_one_tensor_are_told_by_what_the_decoder_takes() -> None:
    module = Packed()
    diagnostics = fitted(module, IMAGES, LABELS)
    assert {"cms", "posterior_kl", "manifold_entropy", "memorization", "round_trip"} <= set(diagnostics.attached)
    parts = diagnostics.monitors["cms"].view.parts
    assert parts.way("sample").name == "self.decoder from normal noise (n, 6)"
    with torch.no_grad():
        assert torch.equal(parts.latents_of(IMAGES[:4]), module.encoder(IMAGES[:4])[:, :6])
        mean, log_variance = module.encoder(IMAGES).chunk(2, 1)
    expected = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
    result: Any = diagnostics.monitors["posterior_kl"].result
    assert float(result.total) == pytest.approx(float(expected), rel=0.05)
