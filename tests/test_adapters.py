"""How models as people write them are sampled, encoded, decoded and reconstructed: stand-ins of each kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from example_models.data import digits
from lightning_gendiag import GenerativeDiagnostics, ManifoldEntropyMonitor, ModelAdapter
from lightning_gendiag.model.adapters.base import Need
from lightning_gendiag.model.adapters.own import inverse_of
from lightning_gendiag.model.denoising import TrainingStep
from lightning_gendiag.model.fakes import find_fakes
from lightning_gendiag.model.posterior import posterior_in
from lightning_gendiag.model.view import ModelView
from tests.helpers.running import attached, batches, trainer

# untrained models generate images in another range of values
pytestmark = pytest.mark.filterwarnings("ignore:generated images span")

IMAGES, LABELS = (rows[:64] for rows in digits(8))


def view_of(module: LightningModule, **options: Any) -> ModelView:
    """Returns a view of a module with 8x8 digits as its reference."""
    options = {"reference": (IMAGES, LABELS), "num_samples": 8} | options
    return attached(module, ModelAdapter(**options), ())


def name_of(view: ModelView, need: Need) -> str:
    return view.parts.way(need).name


class Coder(nn.Module):
    """A VAE of 8x8 images with 3 latents."""

    latent_dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.to_latents, self.to_images = nn.Linear(64, 6), nn.Linear(3, 64)

    def encode(self, x: Tensor) -> Any:
        return self.to_latents(x.flatten(1)).chunk(2, 1)

    def decode(self, z: Tensor) -> Tensor:
        return self.to_images(z).view(-1, 1, 8, 8)


class Wrapper(LightningModule):
    """Holds a model under a name."""

    def __init__(self, name: str = "model", part: nn.Module | None = None) -> None:
        super().__init__()
        setattr(self, name, part or Coder())


def test_a_model_in_a_wrapper_is_found() -> None:
    view = view_of(Wrapper())
    assert name_of(view, "sample") == "self.model.decode from normal noise (n, 3)"
    assert name_of(view, "encode") == "self.model.encode(images)"
    assert name_of(view, "decode") == "self.model.decode"
    assert view.samples().images.shape == (8, 1, 8, 8)
    assert view.latent_dim == 3


def noise(n: int) -> Tensor:
    return torch.rand(n, 1, 8, 8)


SAMPLERS: dict[str, tuple[Callable[..., Any], str]] = {
    "n": (lambda self, n: noise(n), "self.sample(n)"),
    "any name": (lambda self, how_many: noise(how_many), "self.sample(n)"),
    "batch size by keyword": (lambda self, cond, batch_size=16: noise(batch_size), "self.sample(None, n)"),
    "device": (lambda self, num_samples, current_device: noise(num_samples), "self.sample(n, device)"),
    "shape": (lambda self, img_shape, z_init=None: torch.rand(*img_shape), "self.sample(shape)"),
    "default": (lambda self, batch_size=16, steps=5: noise(batch_size), "self.sample(n)"),
    "labels": (lambda self, n, y: noise(n) + y.view(-1, 1, 1, 1), "self.sample(n, labels)"),
    "device of another machine": (
        lambda self, n, clip=True, device="cuda:7": noise(n).to(device).clamp(0, 1),
        "self.sample(n, device)",
    ),
    "labels alone": (
        lambda self, labels, steps=5: noise(len(labels)) + labels.view(-1, 1, 1, 1),
        "self.sample(labels)",
    ),
    "only keywords": (lambda self, *, num_images, device=None: noise(num_images), "self.sample(n, device)"),
}


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_sampler_is_called_by_the_names_of_its_parameters(kind: str) -> None:
    sample, name = SAMPLERS[kind]
    view = view_of(type("Model", (LightningModule,), {"sample": sample})())
    assert name_of(view, "sample") == name
    assert view.samples().images.shape == (8, 1, 8, 8)
    assert (view.samples().labels is not None) == kind.startswith("labels")


class Squeezing(LightningModule):
    """A multiscale flow, as in Lightning's tutorial: its latents have four times the channels and half the size."""

    def encode(self, images: Tensor) -> Any:
        return nn.functional.pixel_unshuffle(2 * images, 2), torch.zeros(len(images))

    def sample(self, img_shape: tuple[int, ...], z_init: Tensor | None = None) -> Tensor:
        z = torch.randn(img_shape) if z_init is None else z_init
        return nn.functional.pixel_shuffle(z, 2) / 2


def test_a_multiscale_flow_is_given_the_shape_of_its_latents() -> None:
    view = view_of(Squeezing())
    assert name_of(view, "sample") == "self.sample(shape of latents (4, 4, 4))"
    assert view.samples().images.shape == (8, 1, 8, 8)


class OfTwoMaps(nn.Module):
    """Decodes two maps of latents, as a quantizer of two levels does (https://arxiv.org/abs/1906.00446)."""

    def decode(self, top: Tensor, bottom: Tensor) -> Tensor:
        return top + bottom


def test_a_method_of_a_part_that_takes_more_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"decode must be known, but self.model.decode takes \(top: 'Tensor', bottom: 'Tens"
    ):
        view_of(Wrapper("model", OfTwoMaps())).parts.way("decode")


class Scaling(nn.Module):
    """A flow whose latents are half of its data, inverted by ``backward``; both directions call their argument z."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 2.0))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z / self.scale, -z[0].numel() * self.scale.log().expand(len(z))

    def backward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z * self.scale, z[0].numel() * self.scale.log().expand(len(z))


def test_a_flow_may_be_inverted_by_a_method_called_backward() -> None:
    view = view_of(Wrapper("net", Scaling()))
    assert name_of(view, "encode") == "self.net.forward(images)"
    assert name_of(view, "sample") == "self.net.backward from normal noise (n, 1, 8, 8)"
    assert torch.allclose(view.parts.latents_of(IMAGES[:2]), IMAGES[:2].flatten(1) / 2)


class ByDimension(Scaling):
    """Returns the logarithms of the diagonal of its Jacobian, as autoregressive flows do."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x / self.scale, -self.scale.log().expand(x.shape)

    def inverse(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return u * self.scale, self.scale.log().expand(u.shape)


def test_a_determinant_of_each_dimension_is_no_spread() -> None:
    view = view_of(Wrapper("net", ByDimension()))
    assert name_of(view, "sample") == "self.net.inverse from normal noise (n, 1, 8, 8)"
    latents, volume = view.parts.encode(IMAGES[:2])
    assert torch.equal(latents, IMAGES[:2] / 2)
    torch.testing.assert_close(volume, torch.full((2,), -64 * math.log(2)))
    with pytest.raises(ValueError, match="encode must return a pair of mean and log variance"):
        posterior_in((latents, volume), 2)


class Clamping(Scaling):
    """Takes the logit of data in 0 to 1, whose ends it clamps."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.add(1).div(2).clamp(0.01, 0.99).logit() / self.scale

    def backward(self, z: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * (z * self.scale).sigmoid() - 1


def test_a_flow_that_clamps_its_data_has_a_normal_prior() -> None:
    view = view_of(Wrapper("net", Clamping()))
    with torch.no_grad():
        error = view.parts.decode(view.parts.latents_of(IMAGES)) - IMAGES
    assert float(error.norm()) > 0.01 * float(IMAGES.norm())
    assert name_of(view, "sample") == "self.net.backward from normal noise (n, 1, 8, 8)"


def test_backward_of_a_lightning_module_is_no_inverse() -> None:
    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(1)).view_as(x)

    assert inverse_of(Model()) is None


class Multiscale(nn.Module):
    """A flow of two scales, of which the first has a learned prior where ``learns``, as Glow has."""

    def __init__(self, learns: bool = False) -> None:
        super().__init__()
        self.learns, self.mean = learns, nn.Parameter(torch.full((1,), 3.0))

    def forward(self, x: Tensor) -> Any:
        squeezed = nn.functional.pixel_unshuffle(2 * x, 2)
        zs, zeros = [squeezed[:, :2], nn.functional.pixel_unshuffle(squeezed[:, 2:], 2)], torch.zeros(len(x))
        return (zeros - 7, zeros + 1, zs) if self.learns else (zs, zeros + 1)

    def merged(self, first: Tensor, second: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(torch.cat([first, nn.functional.pixel_shuffle(second, 2)], 1), 2) / 2

    def inverse(self, zs: list[Tensor]) -> Tensor:
        return self.merged(*zs)


class Learned(Multiscale):
    def __init__(self) -> None:
        super().__init__(learns=True)

    def inverse(self, zs: list[Tensor], reconstruct: bool = False) -> Tensor:
        return self.merged(zs[0] if reconstruct else zs[0] + self.mean, zs[1])


def test_the_scales_of_a_flow_are_one_row_of_latents() -> None:
    view = view_of(Wrapper("net", Multiscale()), num_samples=256)
    assert name_of(view, "encode") == "self.net.forward(images)"
    assert name_of(view, "sample") == "self.net.inverse from normal noise (n, 64)"
    latents = view.parts.latents_of(IMAGES[:3])
    assert latents.shape == (3, 64)
    assert torch.allclose(latents.norm(dim=1), 2 * IMAGES[:3].flatten(1).norm(dim=1))
    assert torch.allclose(view.parts.decode(latents), IMAGES[:3], atol=1e-6)
    assert view.parts.has_prior
    assert float(view.samples().images.std()) == pytest.approx(0.5, rel=0.05)


def test_a_flow_with_a_learned_prior_is_sampled_from_it() -> None:
    view = view_of(Wrapper("net", Learned()), num_samples=256)
    assert name_of(view, "decode") == "self.net.inverse(reconstruct=True)"
    assert name_of(view, "sample") == "self.net.inverse from normal noise (n, 64)"
    assert torch.allclose(view.parts.decode(view.parts.latents_of(IMAGES[:3])), IMAGES[:3], atol=1e-6)
    # half of the pixels are of the scale with a mean of 3
    assert float(view.samples().images.mean()) == pytest.approx(3 / 4, abs=0.05)
    # latents that are decoded as they are have that prior, too
    assert not view.parts.has_prior
    # the log-likelihood is not mistaken for the log-determinant
    assert isinstance(view.parts.encode(IMAGES[:3]), Tensor)


class Quantizing(LightningModule):
    """A VQ-VAE whose encoder has twice as many channels as its decoder takes, and whose codes are all alike at first."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 6, 4, 4), nn.ReLU())
        self.quantizer = VectorQuantizer()
        self.decoder = nn.ConvTranspose2d(3, 1, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.quantizer(self.encoder(x)))


class VectorQuantizer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.codebook = nn.Conv2d(6, 3, 1), nn.Embedding(4, 3)
        nn.init.constant_(self.codebook.weight, 9.0)
        nn.init.zeros_(self.codebook.weight[0].data)

    def forward(self, z: Tensor) -> Tensor:
        rows = self.proj(z).permute(0, 2, 3, 1)
        codes = torch.cdist(rows.flatten(0, 2), self.codebook.weight).argmin(1)
        return self.codebook(codes).view_as(rows).permute(0, 3, 1, 2)


def test_twice_as_many_channels_before_a_quantizer_are_no_posterior() -> None:
    view = view_of(Quantizing())
    assert view.parts.stated_length is None
    assert view.parts.latents_of(IMAGES[:2]).shape == (2, 24)


def test_what_a_new_codebook_reconstructs_may_be_the_same_for_all_images() -> None:
    view = view_of(Quantizing())
    assert name_of(view, "reconstruct") == "self.forward(images)"
    assert len(view.reconstructions().images.unique(dim=0)) == 1


class OfCodes(LightningModule):
    """A generator as in InfoGAN, which notes what it is given."""

    def __init__(self, one_hot: bool, **sizes: int) -> None:
        super().__init__()
        self.one_hot, self.layer = one_hot, nn.Linear(1, 64)
        self.given: tuple[Tensor, ...] = ()
        for name, size in sizes.items():
            setattr(self, name, size)

    def generator(self, noise: Tensor, labels: Tensor, code: Tensor) -> Tensor:
        if labels.is_floating_point() != self.one_hot:
            raise TypeError("wrong labels")
        self.given = noise, labels, code
        return self.layer(code[:, :1]).view(-1, 1, 8, 8)


@pytest.mark.parametrize("one_hot", [True, False])
def test_a_generator_of_noise_a_class_and_a_code_draws_all_three(one_hot: bool) -> None:
    module = OfCodes(one_hot, latent_dim=62, n_classes=10, code_dim=2)
    view = view_of(module, num_samples=4000)
    words = "one-hot classes" if one_hot else "classes"
    assert name_of(view, "sample") == f"self.generator from normal noise (n, 62), {words} of 10 and codes (n, 2)"
    way = view.parts.way("sample")
    assert not way.takes_labels
    torch.manual_seed(0)
    way.call(4000)
    noise, labels, code = view.module.given
    assert noise.shape == (4000, 62)
    assert abs(float(noise.std()) - 1) < 0.01
    classes = labels.argmax(1) if one_hot else labels
    assert (classes.bincount(minlength=10) / 4000 - 0.1).abs().max() < 0.02
    assert code.shape == (4000, 2)
    assert float(code.min()) >= -1
    assert float(code.max()) <= 1
    # of an even distribution from -1 to 1
    assert abs(float(code.std()) - 3**-0.5) < 0.01


class Coupled(LightningModule):
    """A generator of two domains, as in CoGAN."""

    latent_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 64), nn.Linear(4, 64)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(z).view(-1, 1, 8, 8), self.second(z).view(-1, 1, 8, 8)


PAIR, OTHERS = (IMAGES, LABELS), (-IMAGES, LABELS)


@pytest.mark.parametrize("batch", [(PAIR, OTHERS), {"a": IMAGES, "b": -IMAGES}, [PAIR, OTHERS]])
def test_of_a_generator_of_as_many_images_as_a_batch_holds_the_first_is_compared(batch: Any) -> None:
    view, other = (attached(Coupled(), ModelAdapter(num_samples=8), ()) for _ in range(2))
    view.real.collect(batch)
    assert view.real.ready(epoch_over=True)
    assert torch.equal(view.reference.images, IMAGES)
    name = "the first of 2 outputs of self.forward from normal noise (n, 4)"
    assert name_of(view, "sample") == name
    assert name_of(view, "decode") == "the first of 2 outputs of self.forward"
    with view.isolated():
        torch.manual_seed(0)
        made = view.parts.way("sample").call(8)
        torch.manual_seed(0)
        assert torch.equal(made, view.module(torch.randn(8, 4))[0])
    other.real.load_state_dict(view.real.state_dict())
    assert name_of(other, "sample") == name


@pytest.mark.parametrize(
    "batch", [PAIR, (PAIR, OTHERS, OTHERS), {"a": IMAGES, "image": -IMAGES}, (IMAGES, -IMAGES[:, :, :4])]
)
def test_of_a_generator_of_several_images_none_is_compared_where_it_is_not_clear_which(batch: Any) -> None:
    view = attached(Coupled(), ModelAdapter(num_samples=8), ())
    view.real.collect(batch)
    assert view.real.ready(epoch_over=True)
    with pytest.raises(ValueError, match=r"one batch of data, got 2 of \(2, 1, 8, 8\)"):
        view.find("sample")


@pytest.mark.parametrize("sizes", [{"latent_dim": 62, "n_classes": 10}, {"n_classes": 10, "code_dim": 2}])
def test_a_generator_of_codes_is_left_alone_where_a_size_is_not_stated(sizes: dict[str, int]) -> None:
    assert not view_of(OfCodes(True, **sizes)).parts.has("sample")


def test_noise_of_a_sampler_has_the_length_that_a_configuration_states() -> None:
    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(z_dim=5)
            self.layer = nn.Linear(5, 64)

        def sample(self, z: Tensor) -> Tensor:
            return self.layer(z).view(-1, 1, 8, 8)

    assert name_of(view_of(Model()), "sample") == "self.sample(noise)"


@pytest.mark.parametrize(
    "attributes",
    [
        {"latent_dim": np.int64(3)},
        {"z_dim": 3.0},
        {"nz": torch.tensor(3)},
        {"config": {"model": {"latent_size": 3}}},
        {"cfg": SimpleNamespace(params={"z_size": 3})},
        {},
    ],
)
def test_the_length_of_the_noise_is_found_in_many_places(attributes: dict[str, Any]) -> None:
    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.generator = nn.Sequential(nn.Linear(3, 64), nn.Unflatten(1, (1, 8, 8)))
            for name, value in attributes.items():
                setattr(self, name, value)

        @property
        def hidden_dim(self) -> int:
            raise RuntimeError("not built yet")

        sample = decode = z_dim = hidden_dim

        if "z_dim" in attributes:
            z_dim = 3.0

    view = view_of(Model())
    assert name_of(view, "sample") == "self.generator from normal noise (n, 3)"


def test_a_sampler_of_latents_is_followed_by_the_decoder_of_the_first_stage() -> None:
    class Latent(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.first_stage_model = nn.ConvTranspose2d(4, 1, 2, 2)

        def sample(self, cond: Any, batch_size: int = 16) -> Tensor:
            return torch.randn(batch_size, 4, 4, 4)

        def decode_first_stage(self, z: Tensor) -> Tensor:
            return self.first_stage_model(z)

    view = view_of(Latent())
    assert name_of(view, "sample") == "self.decode_first_stage of self.sample(None, n)"
    assert view.samples().images.shape == (8, 1, 8, 8)


class Denoiser(nn.Module):
    """A network of noisy images and times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x) * t.view(-1, 1, 1, 1)


class Denoising(LightningModule):
    """A diffusion model whose own forward makes images of noise as large as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Denoiser()

    def forward(self, x_t: Tensor) -> Tensor:
        for step in reversed(range(4)):
            x_t = x_t - self.decoder(x_t, x_t.new_full((len(x_t),), step / 4))
        return x_t


def test_noise_as_large_as_an_image_is_denoised(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert view_of(Denoising()).source() == "samples"
    assert "Samples: self.forward from normal noise (n, 1, 8, 8). To choose another" in caplog.text


def test_a_forward_of_noise_is_no_sampler_where_it_returns_a_loss_or_nothing_takes_times() -> None:
    class Loss(Denoising):
        def forward(self, x_t: Tensor) -> Tensor:
            return super().forward(x_t).square().mean()

    class Timeless(Denoising):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Identity()

        def forward(self, x_t: Tensor) -> Tensor:
            return x_t

    class Step(Denoising):
        def forward(self, x_t: Tensor, t: Tensor | None = None) -> Tensor:
            return super().forward(x_t)

    class Conditional(Timeless):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = type("Generator", (nn.Identity,), {"forward": lambda self, noise, labels: noise})()

    for module in (Loss(), Timeless(), Step(), Conditional()):
        with pytest.raises(ValueError, match="sample must be known"):
            view_of(module).source()


def test_a_sampler_of_a_part_is_preferred_to_a_forward_of_noise() -> None:
    class Holding(Denoising):
        def __init__(self) -> None:
            super().__init__()
            self.diffusion = type("Sampler", (nn.Identity,), {"sample": lambda self, n: torch.rand(n, 1, 8, 8)})()

    assert name_of(view_of(Holding()), "sample") == "self.diffusion.sample(n)"


def test_latents_of_another_size_are_no_images_that_noise_is_denoised_to() -> None:
    class Latent(Denoising):
        def encode(self, images: Tensor) -> Tensor:
            return nn.functional.avg_pool2d(images, 2)

    with pytest.raises(ValueError, match="sample must be known"):
        view_of(Latent()).source("samples")


def steps_of_langevin(self: Any, n: int) -> list[Tensor]:
    steps = [torch.randn(n, 1, 8, 8)]
    for _ in range(5):
        steps.append(steps[-1] * 0.9 + 0.2 * torch.randn(n, 1, 8, 8))
    return steps


def one_batch_for_each_class(self: Any, n: int) -> list[Tensor]:
    return [torch.randn(n, 1, 8, 8) for _ in range(10)]


def test_the_last_of_all_steps_of_a_sampler_is_taken() -> None:
    view = view_of(type("Model", (LightningModule,), {"sample": steps_of_langevin})())
    assert name_of(view, "sample") == "the last step of self.sample(n)"
    # noise has a deviation of 1
    assert view.samples().images.std() < 0.9


def test_batches_that_do_not_go_on_from_each_other_are_no_steps() -> None:
    with pytest.raises(ValueError, match=r"got 10 of \(2, 1, 8, 8\)\)\. To fix this"):
        name_of(view_of(type("Model", (LightningModule,), {"sample": one_batch_for_each_class})()), "sample")


class Process:
    """A plain object beside a network, which returns all steps from noise to data, as many diffusion processes do."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def sample(self, z: Tensor, cond: Tensor, null_cond: Any = None, sample_steps: int = 4) -> list[Tensor]:
        assert cond.shape == (len(z),)
        steps = [z]
        for step in range(sample_steps):
            steps.append(steps[-1] - self.model(steps[-1], z.new_full((len(z),), step / sample_steps)))
        return steps


class Guided:
    """A plain object that is given the network, and asks for labels as one-hot rows."""

    def p_sample_loop(self, model: nn.Module, shape: tuple[int, ...], y_cond: Tensor) -> Tensor:
        assert y_cond.shape == (shape[0], 10)
        return model(torch.randn(shape), torch.ones(shape[0]))


class Memory:
    """A plain object that returns data, and has nothing to do with the network."""

    def sample(self, n: int) -> Tensor:
        return IMAGES[:n]


HELPERS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "holds the network": (Process, "self.helper.sample from normal noise (n, 1, 8, 8) and labels"),
    "is given it": (lambda _: Guided(), "self.helper.p_sample_loop(self.net, shape, labels) as one-hot rows"),
}


class Helped(LightningModule):
    """A network, and what is trained or sampled with it."""

    def __init__(self, helper: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.net = Denoiser()
        self.helper = helper(self.net)


@pytest.mark.parametrize("kind", HELPERS)
def test_a_plain_object_samples_with_the_network_of_the_copy(kind: str) -> None:
    helper, name = HELPERS[kind]
    module = Helped(helper)
    one_hot = {"reference": (IMAGES, nn.functional.one_hot(LABELS, 10))} if "one-hot" in name else {}
    view = view_of(module, **one_hot)
    assert name_of(view, "sample") == name
    before = view.samples()
    assert before.labels is not None
    with torch.no_grad():
        module.net.layer.weight.zero_()
        module.net.layer.bias.fill_(-1.0)
    changed = view_of(module, **one_hot).samples()
    assert not changed.images.equal(before.images)
    if "noise" in name:
        # the last of four steps, at times that sum to 1.5
        assert changed.images.mean().item() == pytest.approx(1.5, abs=0.2)


def test_a_plain_object_that_has_no_network_is_no_sampler() -> None:
    with pytest.raises(ValueError, match="sample must be known"):
        view_of(Helped(lambda _: Memory())).source("samples")


def test_latents_that_a_plain_object_samples_are_decoded() -> None:
    class Latent(Helped):
        def encode_first_stage(self, images: Tensor) -> Tensor:
            return nn.functional.avg_pool2d(images, 2)

        def decode_first_stage(self, z: Tensor) -> Tensor:
            return nn.functional.interpolate(z, scale_factor=2)

    class Latents:
        def sample(self, model: nn.Module, n: int) -> Tensor:
            return model(torch.randn(n, 1, 4, 4), torch.ones(n))

    name = name_of(view_of(Latent(lambda _: Latents())), "sample")
    assert name == "self.decode_first_stage of self.helper.sample(self.net, n)"


def test_a_model_that_only_its_average_holds_is_sampled_in_its_trained_copy() -> None:
    class Model(Denoiser):
        def sample(self, batch_size: int = 16) -> Tensor:
            return noise(batch_size)

    class Average(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.ema_model, self.online_model = deepcopy(model).requires_grad_(False), model

    assert name_of(view_of(Wrapper("ema", Average(Model()))), "sample") == "self.ema.online_model.sample(n)"


class Energy(LightningModule):
    """Samples by gradients of its energy, and by other steps that need none and are no substitute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 1)

    def langevin_sample(self, n: int) -> Tensor:
        x = torch.rand(n, 1, 8, 8, requires_grad=True)
        (slope,) = torch.autograd.grad(self.layer(x.flatten(1)).square().sum(), x)
        return x - 0.1 * slope

    def mcmc_sample(self, n: int) -> Tensor:
        return noise(n)


class Backward(Energy):
    """Takes gradients by ``backward``, which weights would get as well."""

    def langevin_sample(self, n: int) -> Tensor:
        x = torch.rand(n, 1, 8, 8, requires_grad=True)
        self.layer(x.flatten(1)).square().sum().backward()
        assert x.grad is not None
        assert self.layer.weight.grad is None
        return (x - 0.1 * x.grad).detach()


@pytest.mark.parametrize("kind", [Energy, Backward])
@pytest.mark.parametrize("sample", [None, lambda module, n: module.langevin_sample(n)])
def test_a_sampler_that_needs_gradients_has_them(kind: type[Energy], sample: Any) -> None:
    module = kind()
    view = view_of(module, sample=sample)
    images = view.samples().images
    assert not images.requires_grad
    assert "langevin_sample(n)" in name_of(view, "sample") or sample is not None
    assert module.layer.weight.requires_grad
    assert module.layer.weight.grad is None
    assert view.module.layer.weight.requires_grad


def test_a_condition_that_a_sampler_works_without_is_none() -> None:
    class Free(LightningModule):
        def sample(self, n: int, cond: Tensor | None) -> Tensor:
            return noise(n)

    class Bound(LightningModule):
        def sample(self, n: int, cond: Tensor) -> Tensor:
            return noise(len(cond))

    assert name_of(view_of(Free()), "sample") == "self.sample(n, None)"
    assert name_of(view_of(Bound()), "sample") == "self.sample(n, labels)"


def test_a_shape_that_is_known_only_after_a_step_of_training_is_given() -> None:
    class Late(LightningModule):
        shape: tuple[int, ...] | None = None

        def sample(self, batch_size: int = 1, data_shape: tuple[int, ...] | None = None) -> Tensor:
            data_shape = data_shape or self.shape
            assert data_shape is not None, "the shape of the data must be known"
            return torch.rand(batch_size, *data_shape)

    late, known = Late(), Late()
    known.shape = (1, 8, 8)
    assert name_of(view_of(late), "sample") == "self.sample(n, size)"
    assert name_of(view_of(known), "sample") == "self.sample(n)"


def test_what_samples_is_found_again_on_each_copy() -> None:
    module = Wrapper()
    view = view_of(module)
    first = view.samples().images
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    view.expire()
    view.subject.expire()
    view.refresh()
    assert first.any()
    assert not view.samples().images.any()


class Auto(LightningModule):
    """An autoencoder without a prior."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 64), nn.Unflatten(1, (1, 8, 8)))
        self.latent_dim = 3


class Spatial(LightningModule):
    """A first stage: a posterior of spatial latents."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.d = nn.Conv2d(1, 8, 2, 2), nn.ConvTranspose2d(4, 1, 2, 2)

    def encode(self, x: Tensor) -> Any:
        return self.e(x).chunk(2, 1)

    def decode(self, z: Tensor) -> Tensor:
        return self.d(z)


class OnlyForward(LightningModule):
    """A model whose forward reconstructs, and returns more beside."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.net(x), x, torch.zeros(())


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (Auto, "self.decoder of self.encoder(images)"),
        (Spatial, "self.decode of latents (4, 4, 4) of self.encode(images)"),
        (OnlyForward, "self.forward(images)"),
        (lambda: Wrapper("autoencoder", OnlyForward()), "self.autoencoder.forward(images)"),
    ],
)
def test_what_has_no_prior_is_judged_by_its_reconstructions(make: Any, name: str) -> None:
    view = view_of(make())
    assert view.source() == "reconstructions"
    assert name_of(view, "reconstruct") == name
    made = view.reconstructions()
    assert made.images.shape == (32, 1, 8, 8)
    assert made.labels is not None
    assert torch.equal(made.labels, LABELS[1::2])
    assert torch.equal(view.compared_with("reconstructions").images, IMAGES[0::2])
    # each image's own reconstruction, computed one by one
    module = view.module
    with torch.no_grad():
        if isinstance(module, Auto):
            again = torch.cat([module.decoder(module.encoder(image[None])) for image in IMAGES[1::2]])
            assert torch.allclose(made.images, again, atol=1e-6)


def test_a_flow_that_inverts_itself_has_a_normal_prior() -> None:
    class Flow(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((64,), 2.0))

        def encode(self, x: Tensor) -> Tensor:
            return x.flatten(1) / self.scale

        def decode(self, z: Tensor) -> Tensor:
            return (z * self.scale).view(-1, 1, 8, 8)

    view = view_of(Flow())
    assert view.source() == "samples"
    assert name_of(view, "sample") == "self.decode from normal noise (n, 64)"


def test_a_stated_length_of_the_latents_states_their_prior() -> None:
    assert view_of(Auto(), latent_dim=3).source() == "samples"


@pytest.mark.parametrize(("length", "states_prior"), [(3, False), (None, False), (12, True)])
def test_a_stated_length_states_the_prior_of_latents_of_that_length(length: int | None, states_prior: bool) -> None:
    class Spatial(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Conv2d(1, 3, 4, 4), nn.ConvTranspose2d(3, 1, 4, 4)

    view = view_of(Spatial(), latent_dim=length)
    assert view.latent_dim == 12
    assert view.has_prior is view.parts.has("sample") is states_prior


def test_images_of_another_size_are_not_taken() -> None:
    class Small(LightningModule):
        latent_dim = 3

        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.ConvTranspose2d(3, 1, 4, 4)

    with pytest.raises(ValueError, match=r"sample must be known"):
        view_of(Small()).find("sample")


def test_noise_is_not_tried_where_the_type_of_a_model_states_another_prior() -> None:
    part = Coder()
    assert view_of(Wrapper("model", part)).source() == "samples"
    part.__class__ = type("VAMP", (Coder,), {"__module__": "pythae.models.vamp"})
    assert view_of(Wrapper("model", part)).source() == "reconstructions"


def test_a_part_that_is_not_trained_is_not_evaluated() -> None:
    class Latent(Wrapper):
        """Trains a diffusion model in the latents of a frozen first stage."""

        def __init__(self) -> None:
            super().__init__("first_stage_model")
            self.first_stage_model.requires_grad_(False)
            self.unet = nn.Conv2d(4, 4, 1)

    view = view_of(Latent())
    with pytest.raises(ValueError, match=r"self.first_stage_model.decode .* is of a part that is not trained"):
        view.source()
    assert not view.parts.has("encode")


class Broken(Coder, LightningModule):
    """A VAE whose sampler works on another device only."""

    def sample(self, n: int) -> Tensor:
        raise RuntimeError("no such device")


def test_the_log_says_why_a_sampler_of_the_module_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        view_of(Broken()).source()
    assert (
        "Reconstructions: self.decode of self.encode(images), since self.sample(n) fails (RuntimeError: no such device). "
        "To choose another, pass reconstruct=...." in caplog.text
    )


def test_a_distribution_of_latents_is_no_sampler_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    class Joint(Coder):
        """As PyTorch-VAE's model of continuous and discrete latents, which never uses the distribution that it holds."""

        def __init__(self) -> None:
            super().__init__()
            self.sampling_dist = torch.distributions.OneHotCategorical(torch.ones(10, 1) / 10)

        def sample(self, num_samples: int, current_device: Any) -> Tensor:
            return self.decode(torch.randn(num_samples, 3))

    with caplog.at_level("INFO"):
        view_of(Wrapper(part=Joint())).source()
    assert "Samples: self.model.sample(n, device). To choose another, pass sample=...." in caplog.text


def test_noise_does_not_take_the_place_of_a_sampler_that_fails() -> None:
    # it may draw from another prior
    view = view_of(Broken())
    assert not view.has_prior
    assert view.source() == "reconstructions"
    with pytest.raises(ValueError, match=r"nothing shows that normal noise is the prior of its latents"):
        view.find("sample")
    assert view_of(Broken(), latent_dim=3).source() == "samples"
    assert view_of(Broken(), sample="decode").source() == "samples"


def test_the_prior_is_not_known_either_where_samples_are_not_asked_for() -> None:
    assert not attached(Broken(), ModelAdapter(reference=(IMAGES, LABELS)), ("decode",)).has_prior


def test_where_nothing_encodes_either_the_message_asks_for_the_prior() -> None:
    view = view_of(type("Decoder", (Broken,), {"encode": None})())
    assert not view.has_prior
    message = (
        r"the prior of the latents must be known, but self.sample\(n\) fails \(RuntimeError: no such device\). To fix"
    )
    with pytest.raises(ValueError, match=message):
        next(view.prior_latents(2))


def test_a_generator_takes_noise_also_where_a_sampler_beside_it_fails() -> None:
    class GAN(LightningModule):
        latent_dim = 3

        def __init__(self) -> None:
            super().__init__()
            self.generator = nn.Sequential(nn.Linear(3, 64), nn.Unflatten(1, (1, 8, 8)))

        sample = Broken.sample

    class Forward(GAN):
        def __init__(self) -> None:
            super().__init__()
            self.layers = self._modules.pop("generator")

        def forward(self, z: Tensor) -> Tensor:
            return self.layers(z)

    for module, name in ((GAN(), "self.generator"), (Forward(), "self.forward")):
        view = view_of(module)
        assert name_of(view, "sample") == f"{name} from normal noise (n, 3)"
        assert view.has_prior


def test_latents_of_real_images_are_mentioned_only_where_they_are_decoded(caplog: pytest.LogCaptureFixture) -> None:
    class Sampled(Broken):
        def decode(self, z: Tensor) -> Tensor:
            raise TypeError("needs labels")

    for module, mentioned in ((Sampled(), False), (Broken(), True)):
        caplog.clear()
        view = view_of(module)
        with caplog.at_level("INFO"), suppress(ValueError):
            next(view.prior_latents(2))
        assert ("Latents of real images are decoded" in caplog.text) == mentioned


def test_a_single_monitor_learns_with_the_first_batch_that_the_prior_is_not_known() -> None:
    class Trained(Broken):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.decode(self.encode(batch[0])[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    monitor = ManifoldEntropyMonitor(num_latents=8)
    trainer(monitor, max_epochs=1).fit(Trained(), batches())
    assert monitor.evaluations == 1
    assert not monitor.view.has_prior


def of_base_class(self: Any, num_samples: int) -> Tensor:
    raise NotImplementedError


NO_SAMPLERS: dict[str, Callable[..., Any]] = {
    "of a base class": of_base_class,
    "of a posterior": lambda self, mean_and_spread: mean_and_spread[0],
    "of a batch": lambda self, batch: batch[0],
}


@pytest.mark.parametrize("kind", NO_SAMPLERS)
def test_what_only_has_the_name_of_a_sampler_does_not_hide_the_prior(kind: str) -> None:
    module = type("Named", (Coder, LightningModule), {"sample": NO_SAMPLERS[kind]})()
    view = view_of(module)
    assert view.has_prior
    assert name_of(view, "sample") == "self.decode from normal noise (n, 3)"


def test_parameters_that_are_all_positive_are_of_no_normal_posterior() -> None:
    class Gamma(Coder):
        latent_dim = 8

        def __init__(self) -> None:
            super().__init__()
            self.to_latents, self.to_images = nn.Linear(64, 16), nn.Linear(8, 64)

        def encode(self, x: Tensor) -> Any:
            return tuple(part.softmax(1) for part in super().encode(x))

    class Sigma(Gamma):
        def encode(self, x: Tensor) -> Any:
            mean, spread = Coder.encode(self, x)
            return mean, nn.functional.softplus(spread)

    assert view_of(Wrapper("model", Gamma())).source() == "reconstructions"
    assert view_of(Wrapper("model", Sigma())).source() == "samples"


@pytest.mark.parametrize(
    ("keyword", "one_hot", "name"),
    [
        ("labels", True, "self.sample(n, device, labels=labels) as one-hot rows"),
        ("labels", False, "self.sample(n, device, labels=labels)"),
        ("y", False, "self.sample(n, device, y=labels)"),
    ],
)
def test_a_sampler_of_any_keywords_gets_labels_as_the_batches_have_them(keyword: str, one_hot: bool, name: str) -> None:
    class Conditional(Coder, LightningModule):
        def sample(self, num_samples: int, current_device: Any, **kwargs: Any) -> Tensor:
            labels = kwargs[keyword].to(current_device)
            assert labels.shape == ((num_samples, 10) if one_hot else (num_samples,))
            values = labels.argmax(1) if one_hot else labels
            return values.view(-1, 1, 1, 1).expand(-1, 1, 8, 8) / 10

    labels = nn.functional.one_hot(LABELS, 10) if one_hot else LABELS
    view = view_of(Conditional(), reference=(IMAGES, labels))
    assert name_of(view, "sample") == name
    made = view.samples()
    assert made.labels is not None
    assert torch.equal((made.images[:, 0, 0, 0] * 10).round().long(), made.labels)
    assert view.has_prior
    # a run that goes on knows the form of the labels before its first batch
    view, other = (attached(Conditional(), ModelAdapter(), ()) for _ in range(2))
    view.real.collect((IMAGES, labels))
    assert view.real.ready(epoch_over=True)
    other.real.load_state_dict(view.real.state_dict())
    assert name_of(other, "sample") == name


class OfClasses(LightningModule):
    """A conditional VAE, whose encoder and decoder take the class as well."""

    def __init__(self, one_hot: bool) -> None:
        super().__init__()
        self.one_hot, self.to_latents, self.to_images = one_hot, nn.Linear(64 + 10, 6), nn.Linear(3 + 10, 64)

    def with_classes(self, x: Tensor, y: Tensor) -> Tensor:
        assert y.shape == ((len(x), 10) if self.one_hot else (len(x),))
        return torch.cat([x.flatten(1), y if self.one_hot else nn.functional.one_hot(y, 10)], 1)

    def encode(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return self.to_latents(self.with_classes(x, y)).chunk(2, dim=1)

    def decode(self, z: Tensor, y: Tensor) -> Tensor:
        return self.to_images(self.with_classes(z, y)).view(-1, 1, 8, 8)

    def sample(self, n: int, y: Tensor) -> Tensor:
        return self.decode(torch.randn(n, 3), y)


@pytest.mark.parametrize(
    ("given", "one_hot"),
    [
        (None, True),
        (None, False),
        ("encode", True),
        ("encode", False),
        (lambda module, images, labels: module.encode(images, labels), False),
    ],
)
def test_an_encoder_that_takes_classes_gets_those_of_the_images(given: Any, one_hot: bool) -> None:
    module = OfClasses(one_hot)
    labels = nn.functional.one_hot(LABELS, 10) if one_hot else LABELS
    view = view_of(module, encode=given, reference=(IMAGES, labels))
    if given is None:
        assert name_of(view, "encode") == "self.encode(images, labels)" + " as one-hot rows" * one_hot
    assert view.has_prior
    made = torch.cat([view.latents_in(output, size) for output, size, _ in view.encoded()])
    torch.testing.assert_close(made, module.encode(IMAGES, labels)[0])
    # without classes of its own, what it decodes cannot be compared with images
    with pytest.raises(ValueError, match="reconstruct must be known"):
        view.find("reconstruct")


def test_an_encoder_that_takes_classes_is_left_out_where_the_batches_have_others() -> None:
    with pytest.raises(ValueError, match="encode must be known"):
        view_of(OfClasses(False), reference=IMAGES).find("encode")
    attributes = torch.rand(len(IMAGES), 10)
    with pytest.raises(ValueError, match="the labels of the batches are no classes"):
        view_of(OfClasses(True), reference=(IMAGES, attributes)).find("encode")


class OfAttributes(Coder):
    """As PyTorch-VAE's conditional model, whose labels are the attributes of faces."""

    def __init__(self) -> None:
        super().__init__()
        self.to_images = nn.Linear(3 + 40, 64)

    def sample(self, num_samples: int, current_device: Any, **kwargs: Any) -> Tensor:
        y = kwargs["labels"].float()
        return self.decode(torch.cat([torch.randn(num_samples, 3), y], dim=1))


class GeneratorOfAttributes(nn.Module):
    latent_dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(43, 64)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return self.linear(torch.cat([z, labels.to(z)], 1)).view(-1, 1, 8, 8)


ATTRIBUTES = torch.rand(64, 40, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rows", [2 * (ATTRIBUTES > 0.5).long() - 1, (ATTRIBUTES > 0.5).long(), ATTRIBUTES])
@pytest.mark.parametrize(
    ("name", "part", "way"),
    [
        ("model", OfAttributes, "self.model.sample(n, device, labels=labels)"),
        ("generator", GeneratorOfAttributes, "self.generator from normal noise (n, 3) and labels"),
    ],
)
def test_a_sampler_gets_rows_of_attributes_of_real_images(name: str, part: Any, way: str, rows: Tensor) -> None:
    view = view_of(Wrapper(name, part()), reference=(IMAGES, rows))
    assert name_of(view, "sample") == way
    given = view.parts.sample_labels(50)
    assert given.dtype == rows.dtype
    assert all((rows == row).all(1).any() for row in given)
    # they are no classes
    assert view.samples().labels is None
    if name == "generator":
        assert name_of(view, "decode") == "self.generator with the label of one image"


class OfAngles(LightningModule):
    """Generates images at angles (n,) or (n, 1)."""

    latent_dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 64)

    def generator(self, z: Tensor, y: Tensor) -> Tensor:
        angle = y.view(-1, 1)
        return self.linear(torch.cat([z, angle.sin(), angle.cos()], 1)).view(-1, 1, 8, 8)


@pytest.mark.parametrize("shape", [(64,), (64, 1)])
def test_a_generator_gets_the_fractions_that_real_images_have_as_labels(shape: tuple[int, ...]) -> None:
    angles = ATTRIBUTES[:, 0].view(shape)
    view = view_of(OfAngles(), reference=(IMAGES, angles))
    assert name_of(view, "sample") == "self.generator from normal noise (n, 3) and labels"
    given = view.parts.sample_labels(50)
    assert given.shape == (50, *shape[1:])
    assert torch.isin(given, angles).all()
    assert view.samples().labels is None
    # at the angle of the first image
    assert name_of(view, "decode") == "self.generator with the label of one image"
    z = torch.randn(4, 3)
    torch.testing.assert_close(view.parts.decode(z), view.module.generator(z, angles[0].expand(4)))


@pytest.mark.parametrize("rows", [(ATTRIBUTES > 0.5).long(), ATTRIBUTES.double()])
def test_a_generator_gets_attributes_as_floats_where_it_takes_no_others(rows: Tensor) -> None:
    class Strict(GeneratorOfAttributes):
        def forward(self, z: Tensor, labels: Tensor) -> Tensor:
            assert labels.dtype == z.dtype
            return super().forward(z, labels)

    view = view_of(Wrapper("generator", Strict()), reference=(IMAGES, rows))
    assert name_of(view, "sample") == "self.generator from normal noise (n, 3) and labels as floats"
    assert name_of(view, "decode") == "self.generator with the label of one image as floats"
    z = torch.randn(4, 3)
    torch.testing.assert_close(view.parts.decode(z), view.module.generator(z, rows[0].float().expand(4, -1)))
    assert len(view.samples().images) > 0


@pytest.mark.parametrize("name", ["context", "y"])
def test_a_condition_that_is_optional_by_name_only_is_given(name: str) -> None:
    class OfContext(OfAngles):
        def sample(self, n: int, context: Tensor | None = None) -> Tensor:
            assert context is not None
            return self.generator(torch.randn(n, 3), context)

    class OfLabels(OfAngles):
        def sample(self, n: int, y: Tensor | None = None) -> Tensor:
            assert y is not None
            return self.generator(torch.randn(n, 3), y)

    module = OfContext() if name == "context" else OfLabels()
    view = view_of(module, reference=(IMAGES, ATTRIBUTES[:, 0]))
    assert name_of(view, "sample") == "self.sample(n, labels)"
    assert len(view.samples().images) > 0


def test_attributes_are_collected_from_batches_and_kept_in_checkpoints() -> None:
    rows = 2 * (ATTRIBUTES > 0.5).long() - 1
    view, other, half = (
        attached(Wrapper("model", OfAttributes()), ModelAdapter(num_reference=48), ()) for _ in range(3)
    )
    view.real.collect((IMAGES[:32], rows[:32]))
    half.real.load_state_dict(view.real.state_dict())
    for one in (view, half):
        one.real.collect((IMAGES[32:], rows[32:]))
        assert one.real.ready(epoch_over=True)
    other.real.load_state_dict(view.real.state_dict())
    for one in (view, half, other):
        assert one.real.conditions is not None
        assert torch.equal(one.real.conditions, rows[:48])
        assert name_of(one, "sample") == "self.model.sample(n, device, labels=labels)"


def test_a_message_keeps_the_dots_of_the_line_that_it_shows() -> None:
    class Conditional(LightningModule):
        def sample(self, n: int, y: Tensor) -> Tensor:
            return noise(n)

    view = view_of(Conditional(), reference=(IMAGES, LABELS - 1))
    with pytest.raises(ValueError, match=r"negative values, which are no classes; pass labels=lambda batch: \.\.\.\)"):
        view.find("sample")


class Mute(LightningModule):
    """Has no part that is found."""


def wrong(*given: Any) -> Tensor:
    return torch.zeros(3, 5, 5)


@pytest.mark.parametrize(
    ("need", "options", "advised"),
    [
        ("sample", {}, "take (module, n) and return images (n, 1, 8, 8)."),
        ("sample", {"conditional": True}, "take (module, n, labels) and return images (n, 1, 8, 8)."),
        ("encode", {}, "take (module, images) and return latents (n, L)."),
        (
            "decode",
            {"encode": lambda module, images: images.flatten(1)},
            "take (module, z) and return images (n, 1, 8, 8).",
        ),
        ("reconstruct", {}, "take (module, images) and return images (n, 1, 8, 8)."),
    ],
)
def test_what_was_given_is_not_suggested_again(need: Need, options: dict[str, Any], advised: str) -> None:
    view = view_of(Mute(), **{need: wrong}, **options)
    with pytest.raises(ValueError, match=f"^{need} must be ") as raised:
        view.find(need)
    assert str(raised.value).endswith(f"To fix this, let the callable in ModelAdapter({need}=...) {advised}")


def test_a_sampler_that_fails_later_is_not_suggested_again_either() -> None:
    view = view_of(Mute(), sample=lambda module, n: noise(n) if n == 2 else wrong())
    with pytest.raises(ValueError, match=r"must make 8 images.*let the callable in ModelAdapter\(sample=\.\.\.\) take"):
        view.samples()


def test_callables_that_read_batches_are_not_suggested_again() -> None:
    adapter = ModelAdapter(images=lambda batch: None, labels=lambda batch: torch.rand(64, 5))
    reference = attached(Mute(), adapter, ()).real
    with pytest.raises(
        ValueError, match=r"To fix this, let the callable in ModelAdapter\(images=\.\.\.\) take \(batch\)"
    ):
        reference.collect((IMAGES, LABELS))
    reason = adapter.find_labels((IMAGES, LABELS), IMAGES).reason
    assert reason.endswith("; let the callable in ModelAdapter(labels=...) take (batch) and return class numbers (N,)")


def test_a_sampler_that_works_without_labels_is_given_none() -> None:
    class Free(LightningModule):
        def sample(self, n: int, **kwargs: Any) -> Tensor:
            return noise(n)

    assert name_of(view_of(Free()), "sample") == "self.sample(n)"
    assert view_of(Free()).samples().labels is None
    assert name_of(view_of(Free(), conditional=True), "sample") == "self.sample(n, labels=labels)"


class OfPackedLayers(nn.Module):
    """A VAE whose encoder and decoder are layers under the names of methods, with mean and log variance in one tensor."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 4, 4), nn.Conv2d(16, 6, 1))
        self.decode = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.ConvTranspose2d(16, 1, 8))
        for weight in self.parameters():
            nn.init.normal_(weight, 0.0, std)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, log_variance = self.encode(x).chunk(2, 1)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return self.decode(z), mean, log_variance, z.flatten(1)


class WithCritic(LightningModule):
    """Its discriminator compares latents with permuted ones (https://arxiv.org/abs/1802.05983)."""

    def __init__(self, std: float = 0.02) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.vae, self.discriminator = OfPackedLayers(std), nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        images, again = batch
        made, mean, log_variance, z = self.vae(images)
        divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(1).mean()
        loss = F.mse_loss(made, images) + 0.01 * divergence + self.discriminator(z).mean()
        others = self.vae(again)[3].detach()
        critic = F.softplus(self.discriminator(z.detach())).mean() + F.softplus(-self.discriminator(others)).mean()
        for optimizer, value in zip(self.optimizers(), (loss, critic), strict=True):
            optimizer.zero_grad()
            self.manual_backward(value)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), 1e-3) for part in (self.vae, self.discriminator)]


def test_a_vae_with_a_critic_of_its_latents_is_sampled_from_its_prior() -> None:
    diagnostics = GenerativeDiagnostics(adapter=ModelAdapter(num_samples=32, num_reference=64), max_overhead=None)
    data = DataLoader(TensorDataset(IMAGES, IMAGES.flip(0)), batch_size=32)
    trainer(diagnostics, max_epochs=1).fit(WithCritic(), data)
    assert {"cms", "posterior_kl", "manifold_entropy", "memorization"} <= set(diagnostics.attached)
    view = diagnostics.monitors["cms"].view
    assert name_of(view, "decode") == "self.vae.decode of latents (3, 1, 1)"
    assert name_of(view, "sample") == "self.vae.decode from normal noise (n, 3, 1, 1)"


def test_what_encodes_images_is_no_maker_of_samples_before_it_is_trained() -> None:
    module = WithCritic(0.01)
    module.optimizers = list
    step = TrainingStep(module, (IMAGES[:8], IMAGES[8:16]), 8, lambda seed: torch.manual_seed(seed))
    assert find_fakes(step, (1, 8, 8), 0).maker is None
