"""Models of known libraries, as stand-ins: classes of the same names and packages that behave as is relied on."""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily, Normal, OneHotCategorical

from lightning_gendiag.model.adapters.base import Context, Way
from lightning_gendiag.model.adapters.libraries import LIBRARIES

BETAS = torch.linspace(1e-4, 0.02, 1000)
IMAGES = (1, 8, 8)


def stand_in(name: str, package: str, *bases: type) -> Any:
    """Makes a class of a name as if a package had defined it."""
    return type(name, bases or (nn.Module,), {"__module__": package})


class Wrapped(LightningModule):
    """Holds what it is given under the names that it is given."""

    def __init__(self, **held: Any) -> None:
        super().__init__()
        for name, value in held.items():
            setattr(self, name, value)


def ways(module: nn.Module, shape: tuple[int, ...] | None = IMAGES) -> list[Way]:
    """All ways in which a module is used, in order."""
    context = Context(shape=shape, device=torch.device("cpu"))
    return [way for recognise in LIBRARIES for way in recognise(module.eval(), context)]


def named(module: nn.Module, shape: tuple[int, ...] | None = IMAGES) -> list[tuple[str, str]]:
    return [(way.need, way.name) for way in ways(module, shape)]


def way(module: nn.Module, need: str, shape: tuple[int, ...] | None = IMAGES) -> Way:
    """The first way of a need."""
    return next(way for way in ways(module, shape) if way.need == need)


# ---- diffusers and MONAI ----


class Denoiser(nn.Module):
    """Predicts the noise that leads to a constant image, and notes what it is called with."""

    def __init__(self, value: float = 0.5, channels: int = 1, classes: int | None = None, size: int = 8) -> None:
        super().__init__()
        self.value, self.channels, self.calls = value, channels, list[Any]()
        self.config = {"in_channels": channels, "sample_size": size}
        self.class_embedding = None if classes is None else nn.Embedding(classes, 2)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Any:
        if sample.shape[1] != self.channels:
            raise RuntimeError("wrong channels")
        self.calls.append(class_labels)
        alphas = (1 - BETAS.double()).cumprod(0)[timestep.long()].float()[:, None, None, None]
        return SimpleNamespace(sample=(sample - alphas.sqrt() * self.value) / (1 - alphas).sqrt())


class Scheduler:
    """A forward process, with steps that jump to the predicted sample."""

    def __init__(self, **config: Any) -> None:
        self.alphas_cumprod = (1 - BETAS).cumprod(0)
        self.config = {"num_train_timesteps": 1000, "prediction_type": "epsilon", **config}
        self.timesteps = torch.zeros(0)

    def set_timesteps(self, count: int, device: Any = None) -> None:
        self.timesteps = torch.linspace(999, 0, count).round().long()

    def step(self, output: Tensor, t: Tensor, sample: Tensor) -> Any:
        alpha = self.alphas_cumprod[t]
        return SimpleNamespace(prev_sample=(sample - (1 - alpha).sqrt() * output) / alpha.sqrt())


UNet = stand_in("UNet2DModel", "diffusers.models.unets", Denoiser)
DDPM = stand_in("DDPMScheduler", "diffusers.schedulers", Scheduler)
EulerDiscrete = stand_in("EulerDiscreteScheduler", "diffusers.schedulers", Scheduler)
MonaiUNet = stand_in("DiffusionModelUNet", "monai.networks.nets.diffusion_model_unet", Denoiser)
MonaiDDPM = stand_in("DDPMScheduler", "monai.networks.schedulers.ddpm", Scheduler)
OlderUNet = stand_in("DiffusionModelUNet", "generative.networks.nets", Denoiser)
OlderDDPM = stand_in("DDPMScheduler", "generative.networks.schedulers", Scheduler)
DDIM = stand_in("DDIMScheduler", "diffusers.schedulers", Scheduler)
Multistep = stand_in("DPMSolverMultistepScheduler", "diffusers.schedulers", Scheduler)
WITHOUT_NOISE = "20 steps of DPM-Solver++ with the betas of"
OURS = "20 steps of SDE-DPM-Solver++ with the betas of"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (Wrapped(unet=UNet(), noise_scheduler=DDPM()), f"{OURS} self.noise_scheduler over self.unet"),
        (Wrapped(unet=UNet(), scheduler=EulerDiscrete()), "20 steps of self.scheduler over self.unet"),
        (Wrapped(model=MonaiUNet(), scheduler=MonaiDDPM()), f"{OURS} self.scheduler over self.model"),
        (Wrapped(model=OlderUNet(), scheduler=OlderDDPM()), f"{OURS} self.scheduler over self.model"),
        (
            Wrapped(diffusion=SimpleNamespace(unet=UNet(), scheduler=DDPM())),
            f"{OURS} self.diffusion.scheduler over self.diffusion.unet",
        ),
        (Wrapped(loss=nn.MSELoss(), net=Denoiser(), scheduler=DDPM()), f"{OURS} self.scheduler over self.net"),
    ],
)
def test_a_network_beside_a_scheduler_samples(module: nn.Module, name: str) -> None:
    sample = way(module, "sample")
    assert (sample.name, sample.takes_labels) == (name, False)
    torch.testing.assert_close(sample.call(2), torch.full((2, *IMAGES), 0.5), atol=1e-3, rtol=0)


class Halfway(Denoiser):
    """Predicts half of the noise that an image of zeros would have, so that samples show the noise of the steps."""

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Any:
        return SimpleNamespace(sample=sample / 2)


@pytest.mark.parametrize(
    ("scheduler", "name"),
    [
        (DDPM(), OURS),
        (Multistep(algorithm_type="sde-dpmsolver++"), OURS),
        (Multistep(algorithm_type="dpmsolver++"), WITHOUT_NOISE),
        (DDIM(), WITHOUT_NOISE),
    ],
)
def test_steps_add_noise_where_those_of_the_scheduler_do(scheduler: Any, name: str) -> None:
    module = Wrapped(unet=stand_in("UNet2DModel", "diffusers.models.unets", Halfway)(), scheduler=scheduler)
    sample = way(module, "sample")
    assert sample.name == f"{name} self.scheduler over self.unet"
    torch.manual_seed(0)
    start = torch.randn(2, *IMAGES)
    torch.manual_seed(0)
    samples = sample.call(2)
    # without noise in its steps, a network that scales its input scales the start
    ratio = samples / start
    assert bool((ratio.std() < 1e-3 * ratio.mean().abs()).item()) == (name == WITHOUT_NOISE)


def test_a_scheduler_is_left_as_it_was() -> None:
    module = Wrapped(unet=UNet(), scheduler=EulerDiscrete())
    way(module, "sample").call(2)
    assert len(module.scheduler.timesteps) == 0


@pytest.mark.parametrize(
    ("config", "expected"),
    [({}, 3.0), ({"clip_sample": True}, 1.0), ({"clip_sample": True, "clip_sample_range": 2.0}, 2.0)],
)
def test_samples_are_clipped_as_the_scheduler_says(config: dict[str, Any], expected: float) -> None:
    sample = way(Wrapped(unet=UNet(3.0), scheduler=DDPM(**config)), "sample")
    torch.testing.assert_close(sample.call(2), torch.full((2, *IMAGES), expected), atol=1e-2, rtol=0)


def test_a_network_with_classes_takes_labels() -> None:
    module = Wrapped(unet=UNet(classes=3), scheduler=DDPM())
    sample, labels = way(module, "sample"), torch.tensor([2, 0])
    assert sample.takes_labels
    sample.call(2, labels)
    assert all(given is labels for given in module.unet.calls)


def test_no_network_is_looked_for_where_there_is_no_scheduler() -> None:
    assert named(Wrapped(unet=UNet(), net=Denoiser())) == []


def test_a_loss_and_a_first_stage_are_no_networks() -> None:
    assert named(Wrapped(loss=nn.MSELoss(), layer=nn.Conv2d(1, 1, 1), scheduler=DDPM())) == []


def test_without_real_data_the_network_states_the_shape() -> None:
    module = Wrapped(unet=UNet(channels=2, size=4), scheduler=DDPM())
    assert way(module, "sample", None).call(3).shape == (3, 2, 4, 4)


class Halved(nn.Module):
    """A first stage whose latents have twice the channels, half the size and 10 times the values of its images."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"scaling_factor": 0.5}

    def encode(self, x: Tensor) -> Any:
        mean = 10 * x[:, :, ::2, ::2].repeat(1, 2, 1, 1)
        return SimpleNamespace(latent_dist=Normal(mean, torch.ones_like(mean)))

    def decode(self, z: Tensor) -> Any:
        return SimpleNamespace(sample=z[:, :1].repeat_interleave(2, 2).repeat_interleave(2, 3) / 10)


class MonaiHalved(Halved):
    def encode(self, x: Tensor) -> Any:
        posterior = super().encode(x).latent_dist
        return posterior.mean, posterior.stddev

    def decode(self, z: Tensor) -> Any:
        return super().decode(z).sample


KL = stand_in("AutoencoderKL", "diffusers.models.autoencoders", Halved)
MonaiKL = stand_in("AutoencoderKL", "monai.networks.nets.autoencoderkl", MonaiHalved)


@pytest.mark.parametrize("stage", [KL(), MonaiKL()], ids=["diffusers", "MONAI"])
def test_a_first_stage_encodes_decodes_and_reconstructs(stage: nn.Module) -> None:
    module, x = Wrapped(vae=stage), torch.rand(2, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert named(module) == [
        ("encode", "self.vae.encode"),
        ("decode", "self.vae.decode"),
        ("reconstruct", "self.vae.decode of self.vae.encode"),
    ]
    posterior = way(module, "encode").call(x)
    torch.testing.assert_close(posterior.mean, 10 * x[:, :, ::2, ::2].repeat(1, 2, 1, 1))
    torch.testing.assert_close(posterior.stddev, torch.ones(2, 2, 4, 4))
    torch.testing.assert_close(way(module, "decode").call(posterior.mean), x)
    torch.testing.assert_close(way(module, "reconstruct").call(x), x)


@pytest.mark.parametrize(
    ("held", "scale"),
    [
        ({}, 0.5),
        ({"scale_factor": 0.25}, 0.25),
        ({"inferer": stand_in("LatentDiffusionInferer", "monai.inferers", SimpleNamespace)(scale_factor=2.0)}, 2.0),
    ],
    ids=["of the first stage", "of the module", "of the inferer"],
)
def test_latents_of_a_schedule_are_scaled_back_and_decoded(held: dict[str, Any], scale: float) -> None:
    module = Wrapped(vae=KL(), unet=UNet(channels=2), noise_scheduler=DDPM(), **held)
    sample = way(module, "sample")
    assert sample.name == f"{OURS} self.noise_scheduler over self.unet, decoded by self.vae at scale {scale:g}"
    torch.testing.assert_close(sample.call(2), torch.full((2, *IMAGES), 0.05 / scale), atol=1e-3, rtol=0)


class Rounding(nn.Module):
    """A VQ-VAE whose codebook holds the integers."""

    def encode(self, images: Tensor) -> Tensor:
        return images

    def quantize(self, z: Tensor) -> tuple[Tensor, float]:
        return z.round(), 0.0

    def decode(self, z: Tensor) -> Tensor:
        return z

    def decode_stage_2_outputs(self, z: Tensor) -> Tensor:
        return self.decode(self.quantize(z)[0])


def test_monais_vqvae_quantizes_what_it_reconstructs_and_what_a_schedule_made() -> None:
    stage = stand_in("VQVAE", "monai.networks.nets.vqvae", Rounding)()
    x = torch.tensor([0.2, 0.9]).view(2, 1, 1, 1).expand(2, *IMAGES)
    assert torch.equal(way(Wrapped(model=stage), "reconstruct").call(x), x.round())
    assert torch.equal(way(Wrapped(model=stage), "encode").call(x), x)
    sample = way(Wrapped(model=stage, unet=MonaiUNet(0.9), scheduler=MonaiDDPM()), "sample")
    assert torch.equal(sample.call(2), torch.ones(2, *IMAGES))


class Pipeline:
    """A pipeline without a network that is known."""

    def __init__(self) -> None:
        self.noise: Any = None

    def __call__(self, batch_size: int = 1, num_inference_steps: int = 1000) -> Any:
        print("100 %", file=sys.stderr)
        return SimpleNamespace(images=[num_inference_steps] * batch_size)


class PromptedPipeline(Pipeline):
    def __call__(self, prompt: str, height: int = 8) -> Any:  # type: ignore[override]
        raise AssertionError("there is no prompt")


def test_a_pipeline_without_a_prompt_samples_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    base = stand_in("DiffusionPipeline", "diffusers.pipelines", object)
    mine = type("MyPipeline", (Pipeline, base), {})
    prompted = type("Text", (PromptedPipeline, base), {})
    module = Wrapped(text=prompted(), pipe=mine())
    assert named(module) == [("sample", "self.pipe(batch_size=n) with 20 steps")]
    assert way(module, "sample").call(3) == [20, 20, 20]
    assert capsys.readouterr().err == ""


class Fixed(nn.Module):
    """MONAI's autoencoder of fixed size, whose images are its two latents."""

    latent_size = 2
    use_sigmoid = False

    def encode_forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, 0, 0, :2], torch.zeros(len(x), 2)

    def decode_forward(self, z: Tensor, use_sigmoid: bool = True) -> Tensor:
        return torch.sigmoid(z) if use_sigmoid else z

    def forward(self, x: Tensor) -> Any:
        return self.encode_forward(x)[0], None


def test_monais_variational_autoencoder_samples_from_its_prior() -> None:
    plain = stand_in("AutoEncoder", "monai.networks.nets.autoencoder", Fixed)
    module = Wrapped(model=stand_in("VarAutoEncoder", "monai.networks.nets.varautoencoder", plain)())
    assert [need for need, _ in named(module)] == ["reconstruct", "encode", "decode", "sample"]
    z = torch.tensor([[3.0, -3.0]])
    assert torch.equal(way(module, "decode").call(z), z)
    assert way(module, "sample").call(4).shape == (4, 2)
    assert [need for need, _ in named(Wrapped(model=plain()))] == ["reconstruct"]


# ---- other diffusion models and flow matching ----


class Gaussian(nn.Module):
    """Samples that show with how many steps they were made."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.sampling_timesteps, self.is_ddim_sampling, self.ddim_sampling_eta = steps, False, 0.0

    def sample(self, batch_size: int = 16) -> Tensor:
        print("100 %", file=sys.stderr)
        value = self.sampling_timesteps + 1000 * self.is_ddim_sampling + 100 * self.ddim_sampling_eta
        return torch.full((batch_size, *IMAGES), float(value))


class ByDDIM(Gaussian):
    def __init__(self, steps: int) -> None:
        super().__init__(steps)
        self.is_ddim_sampling = True


class OfClasses(Gaussian):
    def sample(self, classes: Tensor) -> Tensor:  # type: ignore[override]
        return classes[:, None, None, None].expand(-1, *IMAGES)


class Elucidated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_sample_steps = 32

    def sample(self, batch_size: int = 16) -> Tensor:
        return torch.full((batch_size, *IMAGES), float(self.num_sample_steps))


@pytest.mark.parametrize(
    ("model", "kind", "name", "value"),
    [
        # those of DDPM with as much noise, and those of DDIM as they are
        (Gaussian, (1000,), "self.model.sample with 20 steps", 1120.0),
        (ByDDIM, (250,), "self.model.sample with 20 steps", 1020.0),
        (Gaussian, (10,), "self.model.sample", 10.0),
        (Elucidated, (), "self.model.sample with 20 steps", 20.0),
    ],
)
def test_a_diffusion_model_that_samples_does_so_in_few_steps_and_in_silence(
    model: type, kind: tuple[int, ...], name: str, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    known = "ElucidatedDiffusion" if model is Elucidated else "GaussianDiffusion"
    module = Wrapped(model=stand_in(known, "denoising_diffusion_pytorch.x", model)(*kind)).eval()
    before = {name: value for name, value in vars(module.model).items() if not name.startswith("_")}
    assert named(module) == [("sample", name)]
    assert torch.equal(way(module, "sample").call(2), torch.full((2, *IMAGES), value))
    assert {name: getattr(module.model, name) for name in before} == before
    assert capsys.readouterr().err == ""


def test_attributes_are_put_back_where_sampling_fails() -> None:
    class Failing(Gaussian):
        def sample(self, batch_size: int = 16) -> Tensor:
            raise RuntimeError("no")

    module = Wrapped(model=stand_in("GaussianDiffusion", "denoising_diffusion_pytorch.x", Failing)(1000))
    with pytest.raises(RuntimeError, match="no"):
        way(module, "sample").call(2)
    assert (module.model.sampling_timesteps, module.model.is_ddim_sampling) == (1000, False)


def test_a_diffusion_model_of_classes_takes_labels() -> None:
    module = Wrapped(model=stand_in("GaussianDiffusion", "denoising_diffusion_pytorch.cfg", OfClasses)(1000))
    sample = way(module, "sample")
    assert sample.takes_labels
    assert sample.call(2, torch.tensor([3, 1]))[:, 0, 0, 0].tolist() == [3, 1]


class TimeFirst(nn.Module):
    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return (2.0 - x) / (1 - t)[:, None]


class TimeSecond(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (2.0 - x) / (1 - t)[:, None]


class TimeJoined(nn.Module):
    time_varying = True

    def forward(self, x: Tensor) -> Tensor:
        return (2.0 - x[:, :-1]) / (1 - x[:, -1:])


class Classes(nn.Module):
    num_classes = 3

    def forward(self, t: Tensor, x: Tensor, y: Tensor | None = None) -> Tensor:
        assert y is not None
        return (y[:, None] - x) / (1 - t)[:, None]


FlowMatcher = stand_in("ExactOptimalTransportConditionalFlowMatcher", "torchcfm.conditional_flow_matching", object)
"""Stands beside the field that it trains."""


@pytest.mark.parametrize(
    "network",
    [TimeFirst(), TimeSecond(), stand_in("MLP", "torchcfm.models.models", TimeJoined)()],
    ids=["t, x", "x, t", "joined"],
)
def test_a_field_beside_a_flow_matcher_is_integrated(network: nn.Module) -> None:
    sample = way(Wrapped(net=network, fm=FlowMatcher()), "sample", (3,))
    assert sample.name == "10 midpoint steps over self.net"
    # the last step of the midpoint method leads exactly to where all lines of this field meet
    torch.testing.assert_close(sample.call(200), torch.full((200, 3), 2.0), atol=1e-4, rtol=0)


def test_a_field_of_classes_takes_labels() -> None:
    sample = way(Wrapped(net=Classes(), fm=FlowMatcher()), "sample", (3,))
    assert sample.takes_labels
    expected = torch.tensor([1.0, 2.0])[:, None].expand(2, 3)
    torch.testing.assert_close(sample.call(2, torch.tensor([1, 2])), expected, atol=1e-4, rtol=0)


def test_a_field_without_a_flow_matcher_is_left_alone() -> None:
    assert named(Wrapped(net=TimeFirst()), (3,)) == []


# ---- autoencoders ----


class ModelOutput(OrderedDict[str, Any]):
    """A dictionary with attributes."""


class Pythae(nn.Module):
    """A model of pythae with two latents, which are the first two values of its data."""

    latent_dim = 2

    def __init__(self, variational: bool) -> None:
        super().__init__()
        self.variational = variational

    def encoder(self, x: Tensor) -> ModelOutput:
        z = x.flatten(1)[:, :2]
        return ModelOutput(embedding=z, **({"log_covariance": torch.zeros_like(z)} if self.variational else {}))

    def decoder(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=z[:, :1, None, None].expand(-1, *IMAGES))

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x)["embedding"])["reconstruction"]


BaseAE = stand_in("BaseAE", "pythae.models.base", Pythae)
VAE = stand_in("VAE", "pythae.models.vae", BaseAE)


def test_pythaes_vamp_samples_from_the_posteriors_of_its_pseudo_inputs() -> None:
    model = stand_in("VAMP", "pythae.models.vamp", VAE)(True)
    model.model_config, model.idle_input = SimpleNamespace(input_dim=IMAGES), torch.eye(2)
    # two pseudo-inputs, whose posteriors are N(-100, 1) and N(100, 1)
    model.pseudo_inputs = lambda x: torch.tensor([[-100.0], [100.0]]).expand(2, 64)
    torch.manual_seed(0)
    values = way(Wrapped(model=model), "sample").call(1000)[:, 0, 0, 0]
    assert values.sign().mean().abs() < 0.1
    assert abs(float((values.abs() - 100).std()) - 1) < 0.1


@pytest.mark.parametrize(
    ("kind", "samples"),
    [
        (stand_in("AE", "pythae.models.ae", BaseAE), False),
        (stand_in("VQVAE", "pythae.models.vq_vae", BaseAE), False),
        (stand_in("WAE_MMD", "pythae.models.wae_mmd", BaseAE), True),
        (VAE, True),
        (stand_in("BetaVAE", "pythae.models.beta_vae", VAE), True),
        (stand_in("SVAE", "pythae.models.svae", VAE), False),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_pythaes_models_sample_only_where_their_prior_is_normal(kind: Any, samples: bool) -> None:
    module, x = Wrapped(model=kind(issubclass(kind, VAE))), torch.rand(2, *IMAGES)
    assert [need for need, _ in named(module)] == ["sample"] * samples + ["encode", "decode", "reconstruct"]
    encoded = way(module, "encode").call(x)
    assert torch.equal(encoded["embedding"] if issubclass(kind, VAE) else encoded, x.flatten(1)[:, :2])
    assert torch.equal(way(module, "reconstruct").call(x), x[:, :1, :1, :1].expand(-1, *IMAGES))
    if samples:
        assert way(module, "sample").call(4).shape == (4, *IMAGES)


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class Integers(nn.Module):
    """A quantizer; one that takes rows has as many entries in its last axis as images have channels."""

    def __init__(self, accept_image_fmap: bool = True) -> None:
        super().__init__()
        self.accept_image_fmap = accept_image_fmap

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert z.ndim == 4 if self.accept_image_fmap else z.shape[-1] == 3
        return z.round(), z.argmax(1), z.new_zeros(1)


Quantizer = stand_in("VectorQuantize", "vector_quantize_pytorch.vector_quantize_pytorch", Integers)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (Wrapped(decoder=Times(0.1), vq=Quantizer(), encoder=Times(10.0)), "self"),
        (Wrapped(vq=Quantizer(False), encoder=Times(10.0), decoder=Times(0.1)), "self"),
        (
            Wrapped(
                post_quant_conv=Times(0.5), quant_conv=Times(2.0), encoder=Times(5.0), vq=Quantizer(), dec=Times(0.2)
            ),
            "self",
        ),
        (Wrapped(model=nn.Sequential(Times(5.0), Times(2.0), Quantizer(), Times(0.1))), "self.model"),
        (
            Wrapped(model=Wrapped(layers=nn.ModuleList([Times(10.0), Quantizer(), Times(0.1)]))),
            "self.model.layers",
        ),
    ],
)
def test_layers_around_a_quantizer_encode_decode_and_reconstruct(module: nn.Module, name: str) -> None:
    x = torch.tensor([0.26, 0.71, 0.34]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    before, after = [way for way in ways(module, (3, 4, 4)) if way.need == "encode"]
    assert (before.name, after.name) == (f"{name} before its quantizer", f"{name} after its quantizer")
    torch.testing.assert_close(before.call(x), 10 * x)
    torch.testing.assert_close(after.call(x), (10 * x).round())
    torch.testing.assert_close(way(module, "decode").call(10 * x), x)
    torch.testing.assert_close(way(module, "reconstruct").call(x), (10 * x).round() / 10)


# ---- flows and distributions ----


class Shifted(nn.Module):
    """A flow that adds 5 to normal noise (n, 4)."""

    def sample(self, n: int, y: Any = None) -> Any:
        return torch.zeros(n, 4) + 5 if y is None else y[:, None].expand(n, 4)

    def transform_to_noise(self, x: Tensor) -> Tensor:
        assert x.ndim == 2
        return x - 5

    def inverse(self, x: Tensor) -> Tensor:
        return self.transform_to_noise(x)

    def forward(self, z: Tensor) -> Tensor:
        return z + 5


class WithDensity(Shifted):
    def sample(self, n: int, y: Any = None) -> Any:
        return super().sample(n, y), torch.zeros(n)


class Shift:
    """A transform of zuko."""

    def __call__(self, x: Tensor) -> Tensor:
        return x - 5

    def inv(self, z: Tensor) -> Tensor:
        return z + 5


class Lazy(nn.Module):
    """Makes a distribution at each call, and holds another one as zuko does."""

    def __init__(self, base: nn.Module | None = None) -> None:
        super().__init__()
        self.base = base

    def forward(self) -> Any:
        return SimpleNamespace(sample=lambda shape: torch.full((*shape, 4), 5.0), transform=Shift())


LazyDistribution = stand_in("LazyDistribution", "zuko.lazy", Lazy)
NORMFLOW = stand_in("NormalizingFlow", "normflows.core", WithDensity)
NFLOW = stand_in("Flow", "nflows.flows.base", Shifted)
ZUKO = stand_in("Flow", "zuko.lazy", LazyDistribution)


@pytest.mark.parametrize(
    ("flow", "sampler"),
    [
        (NORMFLOW(), "self.flow.sample(n)"),
        (NFLOW(), "self.flow.sample(n)"),
        (stand_in("RealNVP", "nflows.flows.realnvp", NFLOW)(), "self.flow.sample(n)"),
        (ZUKO(LazyDistribution()), "self.flow().sample((n,))"),
        (stand_in("NSF", "zuko.flows", ZUKO)(), "self.flow().sample((n,))"),
    ],
)
def test_flows_sample_and_encode_and_their_base_does_not(flow: nn.Module, sampler: str) -> None:
    module, x = Wrapped(flow=flow), torch.rand(2, 4)
    assert [name for need, name in named(module, (4,)) if need == "sample"] == [sampler]
    assert torch.equal(way(module, "sample").call(3), torch.full((3, 4), 5.0))
    assert torch.equal(way(module, "encode").call(x), x - 5)
    flattened = [way for way in ways(module, (1, 2, 2)) if way.need == "encode"][1]
    assert torch.equal(flattened.call(x.view(2, 1, 2, 2)), x - 5)
    for decode in (way for way in ways(module, (4,)) if way.need == "decode"):
        assert torch.equal(decode.call(x), x + 5)


def test_a_flow_of_nflows_decodes_latents_that_are_standard_normal() -> None:
    flow = NFLOW()
    flow._transform = SimpleNamespace(inverse=lambda z: (z + 5, torch.zeros(len(z))))
    for base, needs in (("StandardNormal", ["decode"]), ("DiagonalNormal", [])):
        flow._distribution = stand_in(base, "nflows.distributions.normal")()
        assert [need for need, _ in named(Wrapped(flow=flow), (4,)) if need == "decode"] == needs
    flow._distribution = stand_in("StandardNormal", "nflows.distributions.normal")()
    x = torch.rand(2, 4)
    module = Wrapped(flow=flow)
    assert torch.equal(way(module, "decode", (4,)).call(x), x + 5)
    torch.testing.assert_close(way(module, "decode", (4,)).call(way(module, "encode", (4,)).call(x)), x)


class Scales(nn.Module):
    """Splits off the second row of (n, 1, 2, 2) data as the latents of the second scale, and adds 5 to the first."""

    class_cond = False

    def __init__(self, base: str) -> None:
        super().__init__()
        kind = stand_in(base, "normflows.distributions.base")
        self.q0 = nn.ModuleList(kind() for _ in range(2))
        for number, part in enumerate(self.q0):
            part.shape = (1, 2 - number, 2) if number else (2,)
            part.loc = torch.full((1, *part.shape), float(number))
            part.log_scale = torch.full((1, *part.shape), 0.5 * number)

    def sample(self, n: int) -> Any:
        z = [part.loc + part.log_scale.exp() * torch.randn(n, *part.shape) for part in self.q0]
        return *self.forward_and_log_det(z)[:1], torch.zeros(n)

    def inverse_and_log_det(self, x: Tensor) -> Any:
        return [x[:, 0, 0] - 5, x[:, :, 1:]], torch.zeros(len(x))

    def forward_and_log_det(self, z: list[Tensor]) -> Any:
        return torch.cat([z[0][:, None, None] + 5, z[1]], 2), torch.zeros(len(z[0]))


def test_a_flow_of_several_scales_has_latents_of_all_of_them() -> None:
    module, x = (
        Wrapped(flow=stand_in("MultiscaleFlow", "normflows.core", Scales)("DiagGaussian")),
        torch.rand(3, 1, 2, 2),
    )
    encode, decode = way(module, "encode", (1, 2, 2)), way(module, "decode", (1, 2, 2))
    assert decode.latent == (4,)
    z = encode.call(x)
    expected = torch.cat([x[:, 0, 0] - 5, (x[:, 0, 1] - 1) * math.exp(-0.5)], 1)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(decode.call(z), x)
    # normal latents are decoded to what the flow samples
    torch.manual_seed(0)
    sampled = way(module, "sample", (1, 2, 2)).call(2)
    torch.manual_seed(0)
    latents = torch.cat([torch.randn(2, 2), torch.randn(2, 1, 1, 2).flatten(1)], 1)
    torch.testing.assert_close(decode.call(latents), sampled)


def test_a_flow_of_several_scales_with_other_priors_only_samples() -> None:
    module = Wrapped(flow=stand_in("MultiscaleFlow", "normflows.core", Scales)("GlowBase"))
    assert named(module, (1, 2, 2)) == [("sample", "self.flow.sample(n)")]


def test_flows_of_classes_take_labels() -> None:
    flow = stand_in("MultiscaleFlow", "normflows.core", WithDensity)()
    flow.class_cond = True
    sample = way(Wrapped(flow=flow), "sample", (4,))
    assert sample.takes_labels
    assert sample.call(2, torch.tensor([7, 8]))[:, 0].tolist() == [7, 8]


class Conditional(nn.Module):
    """Makes a distribution of four numbers for a context, whose samples are the place of the context's largest entry.

    Its first layer takes two numbers of the data as well, as a coupling does, so that it does not state the length alone.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.hyper = nn.Linear(length + 2, 1)

    def forward(self, c: Tensor | None = None) -> Any:
        def transform(x: Tensor) -> Tensor:
            half = x[:, :2]
            return self.hyper(half if c is None else torch.cat([half, c.expand(len(x), -1)], 1))

        def sample() -> Tensor:
            assert c is not None
            transform(torch.zeros(len(c), 4))
            return c.argmax(1)[:, None].expand(-1, 4).float()

        return SimpleNamespace(sample=sample, transform=transform, event_shape=(4,))


class ConditionalMixture(Conditional):
    """Calls its layer when it makes a distribution, which has no transform."""

    def forward(self, c: Tensor | None = None) -> Any:
        made = super().forward(c)
        made.transform(torch.zeros(1 if c is None else len(c), 4))
        return SimpleNamespace(sample=made.sample)


ZUKO_OF_CLASSES = stand_in("MAF", "zuko.flows", Conditional, stand_in("Flow", "zuko.lazy", object))
ZUKO_MIXTURE = stand_in("GMM", "zuko.mixtures", ConditionalMixture, stand_in("LazyDistribution", "zuko.lazy", object))


@pytest.mark.parametrize("kind", [ZUKO_OF_CLASSES, ZUKO_MIXTURE], ids=["flow", "mixture"])
def test_a_distribution_of_a_context_takes_labels_in_the_length_that_its_layers_state(kind: Any) -> None:
    module = Wrapped(flow=kind(3)).eval()
    state = torch.get_rng_state()
    assert named(module, (4,)) == [("sample", "self.flow(one_hot(y, 3)).sample()")]
    assert torch.equal(torch.get_rng_state(), state)
    sample = way(module, "sample", (4,))
    assert sample.takes_labels
    assert sample.call(3, torch.tensor([2, 0, 1]))[:, 0].tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match="it takes 3 classes, got a label 3"):
        sample.call(1, torch.tensor([3]))


def test_an_embedding_of_the_length_of_the_context_comes_before_one_hot_labels() -> None:
    module = Wrapped(flow=ZUKO_OF_CLASSES(3), other=nn.Embedding(5, 4), classes=nn.Embedding(5, 3))
    assert [name for _, name in named(module, (4,))] == [
        "self.flow(self.classes(y)).sample()",
        "self.flow(one_hot(y, 3)).sample()",
    ]
    with torch.no_grad():
        module.classes.weight.copy_(torch.eye(3)[torch.tensor([0, 1, 2, 1, 0])])
    assert way(module, "sample", (4,)).call(2, torch.tensor([3, 4]))[:, 0].tolist() == [1, 0]


def test_a_context_of_one_number_is_not_taken_for_classes() -> None:
    assert named(Wrapped(flow=ZUKO_OF_CLASSES(1)), (4,)) == []


class Doubling(nn.Module):
    """An invertible network of FrEIA that doubles (n, 2, 2) data, and adds the class where it has a condition."""

    def __init__(self, outputs: list[tuple[int, ...]], classes: int | None = None, inputs: int = 1) -> None:
        super().__init__()
        self.dims_in, self.global_out_shapes = [(2, 2)] * inputs, outputs
        self.dims_c = [] if classes is None else [(classes,)]

    def forward(self, x: Any, c: Any = None, rev: bool = False) -> tuple[Any, Tensor]:
        shift = torch.zeros(1) if c is None else c[0].argmax(1).float()
        assert (c is None) == (not self.dims_c)
        if rev:
            parts = x if isinstance(x, (tuple, list)) else [x]
            assert [tuple(part.shape[1:]) for part in parts] == self.global_out_shapes
            data = torch.cat([part.flatten(1) for part in parts], 1).view(-1, 2, 2)
            return data / 2 + shift[:, None, None], torch.zeros(len(data))
        assert x.shape[1:] == (2, 2)
        split = (2 * x).flatten(1).split([torch.Size(shape).numel() for shape in self.global_out_shapes], 1)
        outputs = tuple(part.view(-1, *shape) for part, shape in zip(split, self.global_out_shapes, strict=True))
        return outputs if len(outputs) > 1 else outputs[0], torch.zeros(len(x))


GRAPH = stand_in("GraphINN", "FrEIA.framework.graph_inn", Doubling)
REVERSIBLE = stand_in("ReversibleGraphNet", "FrEIA.framework.reversible_graph_net", GRAPH)


class Block(nn.Module):
    def __init__(self, classes: int | None) -> None:
        super().__init__()
        self.dims_c = [] if classes is None else [(classes,)]


class Sequence(Doubling):
    """States shapes between its blocks, and conditions by them."""

    def __init__(self, classes: int | None = None) -> None:
        super().__init__([(4,)], classes)
        self.shapes, self.conditions = [(2, 2), (2, 2), (4,)], [None, None if classes is None else 0]
        self.module_list = nn.ModuleList([Block(None), Block(classes)])
        self.outputs = self.global_out_shapes

    def __getattr__(self, name: str) -> Any:
        return self.outputs if name == "global_out_shapes" else super().__getattr__(name)


SEQUENCE = stand_in("SequenceINN", "FrEIA.framework.sequence_inn", Sequence)


@pytest.mark.parametrize(
    "network",
    [GRAPH([(4,)]), REVERSIBLE([(2, 2)]), GRAPH([(1,), (3, 1)]), SEQUENCE()],
    ids=["graph", "older graph", "two outputs", "sequence"],
)
@pytest.mark.parametrize("shape", [(4,), (2, 2), (1, 2, 2)])
def test_an_invertible_network_samples_encodes_and_decodes(network: nn.Module, shape: tuple[int, ...]) -> None:
    module, x = Wrapped(inn=network), torch.randn(3, *shape)
    assert named(module, shape) == [
        ("sample", "self.inn(z, rev=True) from normal noise (n, 4)"),
        ("encode", "self.inn(x)"),
        ("decode", "self.inn(z, rev=True)"),
    ]
    z = way(module, "encode", shape).call(x)
    assert torch.equal(z, 2 * x.flatten(1))
    assert torch.equal(way(module, "decode", shape).call(z).flatten(1), x.flatten(1))
    torch.manual_seed(0)
    samples = way(module, "sample", shape).call(3)
    torch.manual_seed(0)
    assert torch.equal(samples.flatten(1), torch.randn(3, 4) / 2)


@pytest.mark.parametrize("network", [GRAPH([(4,)], 3), SEQUENCE(3)], ids=["graph", "sequence"])
def test_the_condition_of_an_invertible_network_is_taken_for_one_hot_labels(network: nn.Module) -> None:
    module = Wrapped(inn=network)
    name = "self.inn(z, c=[one_hot(y, 3)], rev=True) from normal noise (n, 4)"
    assert named(module, (4,)) == [("sample", name)]
    sample, labels = way(module, "sample", (4,)), torch.tensor([2, 0, 1])
    assert sample.takes_labels
    torch.manual_seed(0)
    samples = sample.call(3, labels)
    torch.manual_seed(0)
    assert torch.equal(samples.flatten(1), torch.randn(3, 4) / 2 + labels[:, None])


def test_invertible_networks_of_several_inputs_or_of_conditions_that_are_no_classes_are_left_alone() -> None:
    images = GRAPH([(4,)], 3)
    images.dims_c = [(3, 8, 8)]
    assert named(Wrapped(pair=GRAPH([(4,)], inputs=2), images=images), (4,)) == []


class Mixture(nn.Module):
    """Returns a mixture of two normal distributions around -3 and 3."""

    def __init__(self) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.tensor([[-3.0, -3.0], [3.0, 3.0]]))

    def forward(self) -> Distribution:
        return MixtureSameFamily(Categorical(torch.ones(2)), Independent(Normal(self.means, 0.01), 1))


class MixtureModule(LightningModule):
    forward = Mixture.forward

    def __init__(self) -> None:
        super().__init__()
        self.means = Mixture().means


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (Wrapped(mixture=Mixture(), net=nn.Linear(2, 2)), "self.mixture().sample((n,))"),
        (MixtureModule(), "self().sample((n,))"),
        (Wrapped(prior=Normal(torch.zeros(2), 1.0), density=Mixture()()), "self.density.sample((n,))"),
    ],
)
def test_distributions_sample_but_a_prior_does_not(module: nn.Module, name: str) -> None:
    assert named(module, (2,)) == [("sample", name)]
    samples = way(module, "sample", (2,)).call(50)
    assert samples.shape == (50, 2)
    torch.testing.assert_close(samples.abs(), torch.full((50, 2), 3.0), atol=0.1, rtol=0)


@pytest.mark.parametrize("shape", [(3, 64, 64), (64,), (1, 8, 8)])
def test_a_distribution_of_other_shapes_than_the_data_is_no_sampler(shape: tuple[int, ...]) -> None:
    # as the VAEs with categories of PyTorch-VAE hold one of their latents
    latents = Wrapped(sampling_dist=OneHotCategorical(torch.ones(40, 1) / 40), eps=Normal(0.0, 1.0))
    assert named(latents, shape) == []
    rows = Normal(torch.zeros(64), 1.0)
    assert named(Wrapped(density=rows), shape) == [("sample", "self.density.sample((n,))")] * (math.prod(shape) == 64)


# ---- what is looked at ----


def test_averaged_copies_are_not_looked_at() -> None:
    assert named(Wrapped(model_ema=NFLOW(), ema=SimpleNamespace(ema_model=NFLOW())), (4,)) == []


def test_a_compiled_part_is_recognised_as_what_it_was_compiled_from() -> None:
    module = Wrapped(flow=torch.compile(NFLOW()))
    assert way(module, "sample", (4,)).name == "self.flow.sample(n)"


def test_an_unknown_module_is_left_alone_and_none_of_its_properties_runs() -> None:
    class Guarded(Wrapped):
        @property
        def flow(self) -> Any:
            raise AssertionError("a property ran")

    uninitialised = nn.Module.__new__(nn.Module)
    module = Guarded(encoder=nn.Linear(2, 2), helper=SimpleNamespace(part=uninitialised), torch=torch, kind=nn.Linear)
    assert named(module) == []


def test_no_library_is_imported() -> None:
    packages = ("diffusers", "monai", "generative", "pythae", "normflows", "nflows", "zuko", "FrEIA", "torchcfm")
    before = set(sys.modules)
    ways(Wrapped(unet=UNet(), noise_scheduler=DDPM(), flow=NFLOW()))
    assert not {name.partition(".")[0] for name in set(sys.modules) - before} & set(packages)
