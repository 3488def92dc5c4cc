"""GANs under other names, and models that make images of images, which are no autoencoders and take no noise."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from example_models.data import digits
from lightning_gendiag import DiagnosticWarning, GenerativeDiagnostics, ModelAdapter
from tests.helpers.running import trainer

pytestmark = pytest.mark.filterwarnings("ignore:generated images span")

IMAGES, LABELS = digits(16)
IMAGES, LABELS = IMAGES[:256], LABELS[:256]
NOISE = 24
SAMPLED = {"cms", "manifold_entropy", "memorization", "adversary", "training_data"}


def generator(noise: int = NOISE) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (noise, 1, 1)), *upwards(noise))


def upwards(noise: int) -> list[nn.Module]:
    return [
        nn.ConvTranspose2d(noise, 16, 4), nn.BatchNorm2d(16), nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 1, 4, 2, 1), nn.Tanh(),
    ]  # fmt: skip


def critic(channels: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 4, 2, 1), nn.Flatten(), nn.Linear(128, 1)
    )


def translator() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1), nn.Tanh())


class Trained(LightningModule):
    """Two networks with an optimizer each; what they do with a batch does not matter here."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def networks(self) -> list[nn.Module]:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, network in zip(self.optimizers(), self.networks(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(sum(p.square().sum() for p in network.parameters()))
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(network.parameters(), 1e-4) for network in self.networks()]


class Named(Trained):
    """A GAN whose networks have any names."""

    def __init__(self, of_generator: str, of_critic: str) -> None:
        super().__init__()
        self.names = of_generator, of_critic
        setattr(self, of_generator, generator())
        setattr(self, of_critic, critic())

    def networks(self) -> list[nn.Module]:
        return [getattr(self, name) for name in self.names]


class Wrapped(Trained):
    """A plain module with both networks, under one attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"g": generator(), "d": critic()})

    def networks(self) -> list[nn.Module]:
        return [self.net["g"], self.net["d"]]


class OfPixels(Trained):
    """A fully convolutional generator, which also takes images of enough channels."""

    def __init__(self) -> None:
        super().__init__()
        self.G_net, self.F_net = nn.Sequential(*upwards(NOISE)), critic()

    def networks(self) -> list[nn.Module]:
        return [self.G_net, self.F_net]


def fitted(module: LightningModule, data: Dataset[Any], **options: Any) -> GenerativeDiagnostics:
    diagnostics = GenerativeDiagnostics("warn", max_overhead=None, num_samples=32, log_images=False, **options)
    trainer(diagnostics, max_epochs=1).fit(module, DataLoader(data, 64))
    return diagnostics


def places(diagnostics: GenerativeDiagnostics) -> tuple[str, str]:
    """The way of sampling, and the discriminator."""
    adversary: Any = diagnostics.monitors["adversary"]
    return adversary.view.parts.way("sample").name, adversary._found.name


@pytest.mark.parametrize(
    ("make", "path", "of_critic"),
    [
        (lambda: Named("G_net", "F_net"), "G_net", "F_net"),
        (lambda: Named("generator_net", "critic"), "generator_net", "critic"),
        (lambda: Named("img_gen", "disc_A"), "img_gen", "disc_A"),
        (lambda: Named("g", "second"), "g", "second"),
        (Wrapped, "net.g", "net.d"),
        (OfPixels, "G_net", "F_net"),
    ],
)
def test_a_gan_is_found_by_other_names(make: Callable[[], LightningModule], path: str, of_critic: str) -> None:
    diagnostics = fitted(make(), TensorDataset(IMAGES, LABELS))
    assert set(diagnostics.attached) >= SAMPLED
    sampled, scored = places(diagnostics)
    # any of the usual names for the length of the noise is missing, so that it is read from the first layer
    assert sampled.startswith(f"self.{path} from normal noise (n, {NOISE}")
    assert scored == f"self.{of_critic}(images)"


class Conditional(Trained):
    """A generator of noise and classes, of which nothing states the length of the noise, or ``hparams`` in other words."""

    def __init__(self, **lengths: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.gen, self.dis = OfClasses(), critic()

    def networks(self) -> list[nn.Module]:
        return [self.gen, self.dis]


class OfClasses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(10, 6), generator(NOISE + 6)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        return self.layers(torch.cat([noise, self.embed(labels)], 1))


def test_the_length_of_the_noise_is_asked_for_where_nothing_states_it() -> None:
    def reason(diagnostics: GenerativeDiagnostics) -> str:
        return diagnostics.left_out.get("cms", "")

    with pytest.warns(DiagnosticWarning, match="watches the training data only"):
        unknown = fitted(Conditional(), TensorDataset(IMAGES, LABELS))
    # the first layer takes noise and classes together
    assert "sample must be known, but" in reason(unknown)
    stated = fitted(Conditional(latent=NOISE), TensorDataset(IMAGES, LABELS))
    assert not reason(stated)
    assert places(stated)[0] == f"self.gen from normal noise (n, {NOISE}) and labels"


class Playing(Trained):
    """A GAN whose training step gives its generator what :meth:`draw` returns."""

    def __init__(self, generates: nn.Module) -> None:
        super().__init__()
        self.gen, self.dis = generates, critic()

    def networks(self) -> list[nn.Module]:
        return [self.gen, self.dis]

    def draw(self, labels: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        fakes = self.gen(*self.draw(labels))
        of_generator, of_critic = self.optimizers()
        of_critic.zero_grad()
        self.manual_backward((self.dis(fakes.detach()) - self.dis(images)).mean())
        of_critic.step()
        of_generator.zero_grad()
        self.manual_backward(-self.dis(fakes).mean())
        of_generator.step()


class Drawing(Playing):
    """With classes that the step draws."""

    def __init__(self) -> None:
        super().__init__(OfClasses())

    def draw(self, labels: Tensor) -> tuple[Tensor, ...]:
        return torch.randn(len(labels), NOISE), torch.randint(10, (len(labels),))


class Uniform(Playing):
    def __init__(self) -> None:
        super().__init__(generator())

    def draw(self, labels: Tensor) -> tuple[Tensor, ...]:
        return (2 * torch.rand(len(labels), NOISE) - 1,)


class OfTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = generator(NOISE + 3)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.layers(torch.cat([first, second], 1))


class Unusual(Playing):
    """A generator of two kinds of noise under names of its own."""

    def __init__(self) -> None:
        super().__init__(OfTwo())

    def draw(self, labels: Tensor) -> tuple[Tensor, ...]:
        return torch.randn(len(labels), NOISE), torch.rand(len(labels), 3)


class OfRows(nn.Module):
    """A generator of noise and one-hot rows, whose images are as bright as their class says."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.scale = generator(), nn.Linear(10, 1, bias=False)
        with torch.no_grad():
            self.scale.weight[0] = torch.arange(10.0)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        images: Tensor = self.layers(z)
        return 1e-3 * images + self.scale(labels)[..., None, None] / 5 - 1


class OfConditions(OfRows):
    """Its second parameter has a name that says nothing of classes."""

    def forward(self, z: Tensor, c: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(z, c)


class OfJoined(OfRows):
    def __init__(self, classes_first: bool) -> None:
        super().__init__()
        self.classes_first = classes_first

    def forward(self, z: Tensor) -> Tensor:  # type: ignore[override]
        z = z.flatten(1)
        rows, z = (z[:, :10], z[:, 10:]) if self.classes_first else (z[:, NOISE:], z[:, :NOISE])
        return super().forward(z, rows)


class Rows(Playing):
    """One-hot labels of the batch in one tensor with the noise, before or behind it, or beside it."""

    def __init__(self, place: str) -> None:
        beside = {"beside": OfRows, "beside, as c": OfConditions}
        super().__init__(beside[place]() if place in beside else OfJoined(classes_first=place == "before"))
        self.place = place

    def draw(self, labels: Tensor) -> tuple[Tensor, ...]:
        noise, rows = torch.randn(len(labels), NOISE), F.one_hot(labels, 10).float()
        if self.place.startswith("beside"):
            return noise, rows
        parts = [rows, noise] if self.place == "before" else [noise, rows]
        return (torch.cat(parts, 1)[..., None, None] if self.place == "behind, as maps" else torch.cat(parts, 1),)


class Codes(Playing):
    """Binary codes of the batch beside the noise, in one tensor."""

    def __init__(self) -> None:
        super().__init__(generator(NOISE + 10))

    def draw(self, labels: Tensor) -> tuple[Tensor, ...]:
        codes = (labels[:, None] >> torch.arange(10)) % 2
        return (torch.cat([torch.randn(len(labels), NOISE), codes], 1),)


def test_a_training_step_shows_the_length_of_the_noise() -> None:
    diagnostics = fitted(Drawing(), TensorDataset(IMAGES, LABELS))
    assert set(diagnostics.attached) >= SAMPLED
    assert places(diagnostics)[0] == f"self.gen from normal noise (n, {NOISE}) and labels"


@pytest.mark.parametrize("make", [Uniform, Unusual])
def test_a_training_step_samples_where_its_generator_takes_other_noise(make: Callable[[], LightningModule]) -> None:
    diagnostics = fitted(make(), TensorDataset(IMAGES, LABELS))
    assert {"cms", "memorization", "adversary"} <= set(diagnostics.attached)
    assert places(diagnostics)[0] == "self.gen as training_step calls it"
    view: Any = diagnostics.monitors["cms"].view  # type: ignore[attr-defined]
    samples = view.samples().images
    assert samples.shape[1:] == IMAGES.shape[1:]
    # of many steps, each with other draws
    assert len(samples.flatten(1).unique(dim=0)) == len(samples) > 8
    assert "manifold_entropy" in diagnostics.left_out


@pytest.mark.parametrize("place", ["before", "behind", "behind, as maps", "beside", "beside, as c"])
def test_a_generator_is_given_one_hot_labels_where_a_training_step_gives_it_such(place: str) -> None:
    diagnostics = fitted(Rows(place), TensorDataset(IMAGES, LABELS))
    assert {"cms", "generation_balance", "memorization"} <= set(diagnostics.attached)
    joined = f"self.gen from normal noise (n, {NOISE})"
    given = {"beside": "and labels as one-hot rows", "beside, as c": "and one-hot labels"}
    assert places(diagnostics)[0] == f"{joined} {given.get(place, 'joined with one-hot labels')}"
    view: Any = diagnostics.monitors["cms"].view  # type: ignore[attr-defined]
    brightness = 5 * (view.samples().images.flatten(1).mean(1) + 1)
    assert len(brightness.round().unique()) > 5
    assert (brightness - brightness.round()).abs().max() < 0.1


class TwoHeads(nn.Module):
    """A generator of two domains whose heads are given features that are no noise."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(NOISE, 64), nn.ReLU())
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Unflatten(1, (1, 16, 16))) for _ in "ab"
        )

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        features = self.shared(z)
        return self.heads[0](features), self.heads[1](features)


class OfTwoDomains(Trained):
    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"latent_dim": NOISE})
        self.gen, self.dis = TwoHeads(), critic()

    def networks(self) -> list[nn.Module]:
        return [self.gen, self.dis]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        fakes = self.gen(torch.randn(len(batch[0]), NOISE))
        for optimizer, sign in zip(self.optimizers(), (-1, 1), strict=True):
            optimizer.zero_grad()
            scores = [self.dis(images).mean() for images in fakes]
            self.manual_backward(sign * (scores[0] + scores[1]), retain_graph=True)
        for optimizer in self.optimizers():
            optimizer.step()


def test_what_a_part_makes_of_noise_is_no_noise() -> None:
    diagnostics = fitted(OfTwoDomains(), TensorDataset(IMAGES, -IMAGES))
    assert set(diagnostics.attached) >= SAMPLED - {"training_data"}
    assert places(diagnostics)[0] == f"the first of 2 outputs of self.gen from normal noise (n, {NOISE})"


def test_a_generator_of_what_a_batch_holds_gets_no_noise_in_its_place() -> None:
    with pytest.warns(DiagnosticWarning, match="watches the training data only"):
        diagnostics = fitted(Codes(), TensorDataset(IMAGES, LABELS))
    assert "training_step gives the generator other noise than N(0, 1)" in diagnostics.left_out["cms"]


class OfTexts(nn.Module):
    """A generator of embeddings and noise, in either order, which joins them for layers under a generator's name."""

    def __init__(self, noise_first: bool) -> None:
        super().__init__()
        self.noise_first = noise_first
        self.project, self.netG = nn.Sequential(nn.Linear(32, 8), nn.LeakyReLU(0.2)), generator(NOISE + 8)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        z, embedding = (first, second) if self.noise_first else (second, first)
        return self.netG(torch.cat([self.project(embedding), z], 1))


class Texts(Playing):
    def __init__(self, noise_first: bool) -> None:
        super().__init__(OfTexts(noise_first))
        self.register_buffer("embeddings", torch.randn(10, 32))

    def draw(self, labels: Tensor) -> tuple[Tensor, ...]:
        embedding, z = self.embeddings[labels], torch.randn(len(labels), NOISE)
        return (z, embedding) if self.gen.noise_first else (embedding, z)


@pytest.mark.parametrize("noise_first", [False, True])
def test_layers_of_a_generator_of_texts_get_no_noise_in_their_place(noise_first: bool) -> None:
    with pytest.warns(DiagnosticWarning, match="watches the training data only"):
        diagnostics = fitted(Texts(noise_first), TensorDataset(IMAGES, LABELS))
    for name in ("cms", "manifold_entropy"):
        assert "training_step gives the generator rows of its batch" in diagnostics.left_out[name]


class Projecting(nn.Module):
    """A projection discriminator (https://arxiv.org/abs/1802.05637), whose classes are optional."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.of_class = critic(), nn.Embedding(10, 256)

    def forward(self, images: Tensor, y: Tensor | None = None) -> Tensor:
        scores: Tensor = self.layers(images)
        return scores if y is None else scores + (self.of_class(y) * images.flatten(1)).sum(1, keepdim=True)


class OfOptionalClasses(OfClasses):
    """Without a class, its layers get rows of another width, as a normalization by class would fail."""

    def forward(self, noise: Tensor, y: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self.layers(noise) if y is None else super().forward(noise, y)


class Projected(Playing):
    """Its discriminator judges real images first."""

    def __init__(self, by_name: bool) -> None:
        super().__init__(OfOptionalClasses())
        self.dis, self.by_name = Projecting(), by_name

    def training_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        classes = {"y": labels} if self.by_name else {}
        given = () if self.by_name else (labels,)
        noise = torch.randn(len(images), NOISE)
        self.dis(images, *given, **classes)
        self.dis(self.gen(noise, *given, **classes), *given, **classes)
        super(Playing, self).training_step(batch, batch_idx)


@pytest.mark.parametrize("by_name", [False, True])
def test_optional_classes_are_given_where_a_training_step_gives_them(by_name: bool) -> None:
    diagnostics = fitted(Projected(by_name), TensorDataset(IMAGES, LABELS))
    assert set(diagnostics.attached) >= SAMPLED | {"generation_balance"}
    assert places(diagnostics) == (f"self.gen from normal noise (n, {NOISE}) and labels", "self.dis(images, labels)")


class OfStyles(nn.Module):
    """A generator of a list of noise, which it mixes, and which returns no latents unless it is asked for them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = generator()

    def forward(self, styles: list[Tensor], return_latents: bool = False) -> tuple[Tensor, Tensor | None]:
        z = torch.stack([self.normalized(style) for style in styles]).mean(0)
        return self.layers(z), z if return_latents else None

    def normalized(self, z: Tensor) -> Tensor:
        return z * z.square().mean(1, keepdim=True).rsqrt()


class Styles(Playing):
    def __init__(self) -> None:
        super().__init__(OfStyles())

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.gen([torch.randn(len(batch[0]), NOISE) for _ in range(2)])
        super(Playing, self).training_step(batch, batch_idx)


def test_a_generator_gets_a_list_of_noise_where_a_training_step_gives_it_one() -> None:
    diagnostics = fitted(Styles(), TensorDataset(IMAGES, LABELS))
    assert set(diagnostics.attached) >= SAMPLED
    assert places(diagnostics)[0] == f"self.gen from normal noise (n, {NOISE})"


class Bidirectional(Drawing):
    """A bidirectional GAN (https://arxiv.org/abs/1605.09782): its encoder and its generator meet in the discriminator."""

    def __init__(self) -> None:
        super().__init__()
        self.gen, self.encoder = generator(), nn.Sequential(nn.Flatten(), nn.Linear(256, NOISE))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.encoder(batch[0])
        self.gen(torch.randn(len(batch[0]), NOISE))
        super(Playing, self).training_step(batch, batch_idx)


def test_noise_as_long_as_latents_is_their_prior() -> None:
    diagnostics = fitted(Bidirectional(), TensorDataset(IMAGES, LABELS))
    view: Any = diagnostics.monitors["cms"].view  # type: ignore[attr-defined]
    assert view.parts.has_prior


class Joint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Linear(256 + NOISE, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        scores: Tensor = self.layers(torch.cat([x.flatten(1), z], 1))
        return scores


def test_a_discriminator_of_images_and_latents_is_left_out_with_what_it_takes() -> None:
    module = Bidirectional()
    module.dis = Joint()
    diagnostics = fitted(module, TensorDataset(IMAGES, LABELS))
    assert (
        "discriminator must be known, but self.dis takes (x: 'Tensor', z: 'Tensor')"
        in diagnostics.left_out["adversary"]
    )


class OfImagesAndAttributes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Linear(256 + 4, 1)

    def forward(self, x: Tensor, attr: Tensor) -> Tensor:
        scores: Tensor = self.layers(torch.cat([x.flatten(1), attr], 1))
        return scores


def test_a_discriminator_of_images_and_attributes_is_left_out_with_what_it_takes() -> None:
    module = Named("G_net", "D_net")
    module.D_net = OfImagesAndAttributes()
    diagnostics = fitted(module, TensorDataset(IMAGES, torch.rand(len(IMAGES), 4)))
    assert "self.D_net takes (x: 'Tensor', attr: 'Tensor')" in diagnostics.left_out["adversary"]


class JudgingFirst(Uniform):
    """Its discriminator judges real images before the generator makes any."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.dis(batch[0])
        super().training_step(batch, batch_idx)


def test_a_discriminator_is_found_where_a_training_step_that_makes_samples_calls_it_first() -> None:
    diagnostics = fitted(JudgingFirst(), TensorDataset(IMAGES, LABELS))
    assert places(diagnostics) == ("self.gen as training_step calls it", "self.dis(images)")


def test_training_is_the_same_where_its_steps_make_the_samples() -> None:
    weights = []
    for watched in (True, False):
        torch.manual_seed(0)
        module = Unusual()
        callbacks = [GenerativeDiagnostics("warn", max_overhead=None, num_samples=32)] if watched else []
        trainer(*callbacks, max_epochs=2).fit(module, DataLoader(TensorDataset(IMAGES, LABELS), 64, shuffle=True))
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*weights)


class Gray(Playing):
    """Of batches (N, H, W), to which its step adds the axis for the channel."""

    def __init__(self) -> None:
        super().__init__(generator())

    def draw(self, labels: Tensor) -> tuple[Tensor, ...]:
        return (torch.randn(len(labels), NOISE),)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        super().training_step((images[:, None], labels), batch_idx)


def test_squares_without_an_axis_for_channels_are_gray_images() -> None:
    diagnostics = fitted(Gray(), TensorDataset(IMAGES[:, 0], LABELS))
    assert set(diagnostics.attached) >= SAMPLED
    view: Any = diagnostics.monitors["cms"].view  # type: ignore[attr-defined]
    assert torch.equal(view.reference.images, IMAGES)


def test_squares_are_series_where_the_user_names_them() -> None:
    squares = IMAGES[:, 0]
    assert torch.equal(ModelAdapter().find_data((squares, LABELS)), IMAGES)
    assert torch.equal(ModelAdapter(images=lambda batch: batch[0]).find_data((squares, LABELS)), squares)


class Pairs(Dataset[Any]):
    """Images of two domains, or of two sizes."""

    def __init__(self, first: Tensor, second: Tensor, names: tuple[str, str] | None) -> None:
        self.first, self.second, self.names = first, second, names

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: int) -> Any:
        pair = self.first[index], self.second[index]
        return pair if self.names is None else dict(zip(self.names, pair, strict=True))


class Translation(Trained):
    """A generator that makes images of images, as pix2pix and CycleGAN have one."""

    def __init__(self, name: str, translates: nn.Module, encodes: bool = False) -> None:
        super().__init__()
        self.name = name
        setattr(self, name, translates)
        self.d_A = critic(1)
        if encodes:
            translates.encoder, translates.decoder = translates[:2], translates[2:]  # type: ignore[index]

    def forward(self, images: Tensor) -> Tensor:
        return getattr(self, self.name)(images)

    def networks(self) -> list[nn.Module]:
        return [getattr(self, self.name), self.d_A]


class Larger(nn.Module):
    """A generator of images of twice the size."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(4, 1, 3, padding=1))

    def forward(self, small: Tensor) -> Tensor:
        return self.layers(small)


class GeneratorUNet(nn.Sequential):
    """A generator with the name of a network of diffusion models."""


TRANSLATIONS: list[tuple[Callable[[], LightningModule], Dataset[Any]]] = [
    (lambda: Translation("gen", translator()), Pairs(-IMAGES, IMAGES, ("A", "B"))),
    (lambda: Translation("g_AB", GeneratorUNet(translator())), Pairs(-IMAGES, IMAGES, None)),
    (lambda: Translation("netG", translator(), encodes=True), Pairs(-IMAGES, IMAGES, None)),
    (lambda: Translation("generator", Larger()), Pairs(F.avg_pool2d(IMAGES, 2), IMAGES, ("lr", "hr"))),
]


@pytest.mark.parametrize(("make", "data"), TRANSLATIONS)
def test_what_makes_images_of_images_is_no_autoencoder_and_gets_no_noise(
    make: Callable[[], LightningModule], data: Dataset[Any]
) -> None:
    module = make()
    encodes = any(name.endswith("encoder") for name, _ in module.named_modules())
    with nullcontext() if encodes else pytest.warns(DiagnosticWarning, match="watches the training data only"):
        diagnostics = fitted(module, data)
    assert not {"cms", "round_trip", "memorization"} & set(diagnostics.attached)
    assert "sample must be known" in diagnostics.left_out["cms"]
    assert "reconstruct must be known" in diagnostics.left_out["round_trip"]
    assert (
        "no name says that a part of Translation takes times or levels of noise"
        in diagnostics.left_out["timestep_loss"]
    )


def test_the_images_that_a_translator_makes_of_given_ones_are_compared_with_those_that_are_wanted() -> None:
    module, inputs = Translation("gen", translator()), -IMAGES[:64]
    diagnostics = fitted(
        module, Pairs(-IMAGES, IMAGES, ("A", "B")), images=lambda batch: batch["B"],
        sample=lambda own, n: own.gen(inputs[torch.arange(n) % len(inputs)]),
    )  # fmt: skip
    cms: Any = diagnostics.monitors["cms"]
    assert {"cms", "memorization"} <= set(diagnostics.attached)
    assert torch.equal(cms.view.reference.images, IMAGES)


class Reconstructing(LightningModule):
    """An autoencoder without a part that is called an encoder, as it is often written first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(256, 16), nn.ReLU(), nn.Linear(16, 256), nn.Unflatten(1, (1, 16, 16))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, target = batch
        return F.mse_loss(self(x), target)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-3)


def test_an_autoencoder_reconstructs_also_where_a_batch_holds_its_images_twice() -> None:
    twice = fitted(Reconstructing(), TensorDataset(IMAGES, IMAGES.clone()))
    assert {"cms", "round_trip"} <= set(twice.attached)
    with pytest.warns(DiagnosticWarning, match="watches the training data only"):
        cleaning = fitted(Reconstructing(), TensorDataset(IMAGES + 0.5 * torch.randn_like(IMAGES), IMAGES))
    assert "a batch holds two batches of images, of which forward may make one of the other" in cleaning.left_out["cms"]


class Denoiser(nn.Module):
    """The network of a diffusion model of latents."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.layer(z) * t[:, None]


class InStages(Reconstructing):
    """Latent diffusion, of which an argument says which stage is trained."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage, self.denoiser = stage, Denoiser()

    def sample(self, n: int) -> Tensor:
        return self.layers[3:](self.denoiser(torch.randn(n, 16), torch.ones(n)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.stage == "first":
            return F.mse_loss(self(batch[0]), batch[0])
        return self.denoiser(self.layers[:2](batch[0]).detach(), torch.ones(len(batch[0]))).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam((self.layers if self.stage == "first" else self.denoiser).parameters(), 1e-3)


def test_a_network_that_is_trained_in_a_later_stage_makes_no_samples(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        first = fitted(InStages("first"), TensorDataset(IMAGES))
    assert {"cms", "round_trip"} <= set(first.attached)
    assert "memorization" not in first.attached
    assert "self.sample(n) fails (self.denoiser is in no optimizer)" in first.left_out["memorization"]
    assert "Reconstructions: self." in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        assert "memorization" in fitted(InStages("second"), TensorDataset(IMAGES)).attached
    assert "Samples: self.sample(n)" in caplog.text


class OfPartitions(InStages):
    """One whose optimizer has other tensors than the module, as strategies that divide them among processes give it."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([nn.Parameter(torch.zeros(3))], 1e-3)


def test_an_optimizer_of_other_tensors_does_not_show_what_is_trained() -> None:
    assert "memorization" in fitted(OfPartitions("second"), TensorDataset(IMAGES)).attached


class Translating(Reconstructing):
    """A model that makes an image ``x`` of another one ``y``, as Brownian bridges call them."""

    forward = nn.Module.forward

    def sample(self, y: Tensor) -> Tensor:
        return self.layers(y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self.sample(y), x)


def test_what_a_sampler_of_pairs_takes_is_an_image_and_no_label() -> None:
    with pytest.warns(DiagnosticWarning, match="watches the training data only"):
        diagnostics = fitted(Translating(), TensorDataset(IMAGES, IMAGES.flip(3)))
    assert "a batch holds two batches of images" in diagnostics.left_out["cms"]
    assert "labels" not in diagnostics.left_out["cms"]


class OfSquares(Reconstructing):
    """An autoencoder of gray images (N, H, W) with an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = self.layers[:2], nn.Sequential(*self.layers[2:4], nn.Unflatten(1, (16, 16)))

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x.reshape(-1, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 3
        return self.decoder(self.encode(x))


def test_an_autoencoder_of_squares_gets_them_without_the_axis_for_channels() -> None:
    diagnostics = fitted(OfSquares(), TensorDataset(IMAGES[:, 0], IMAGES[:, 0]))
    assert {"cms", "round_trip"} <= set(diagnostics.attached)
    view: Any = diagnostics.monitors["round_trip"].view  # type: ignore[attr-defined]
    assert view.parts.way("reconstruct").name == "self.forward(images) without channels"


class Autoencoding(nn.Module):
    """The discriminator of BEGAN (https://arxiv.org/abs/1703.10717), which is an autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 8, 4, 2, 1), nn.Flatten(), nn.Linear(512, NOISE))
        self.decoder = nn.Sequential(nn.Linear(NOISE, 256), nn.Unflatten(1, (1, 16, 16)))

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.encoder(images))


class BEGAN(Trained):
    def __init__(self) -> None:
        super().__init__()
        self.latent_dim = NOISE
        self.generator, self.discriminator = generator(), Autoencoding()

    def networks(self) -> list[nn.Module]:
        return [self.generator, self.discriminator]


def test_the_encoder_of_a_discriminator_is_none_of_the_models() -> None:
    diagnostics = fitted(BEGAN(), TensorDataset(IMAGES, LABELS))
    assert {"cms", "manifold_entropy"} <= set(diagnostics.attached)
    assert not {"k_star", "latent_regions", "round_trip"} & set(diagnostics.attached)
    entropy: Any = diagnostics.monitors["manifold_entropy"]
    assert entropy.view.has_prior


class WithEmbedding(Autoencoding):
    """The discriminator of EBGAN (https://arxiv.org/abs/1609.03126), which returns its latents too."""

    def forward(self, images: Tensor) -> Any:
        latents = self.encoder(images)
        return self.decoder(latents), latents


class EBGAN(BEGAN):
    def __init__(self) -> None:
        super().__init__()
        self.discriminator = WithEmbedding()


def test_reconstructions_of_a_discriminator_are_no_scores() -> None:
    diagnostics = fitted(EBGAN(), TensorDataset(IMAGES, LABELS))
    assert "self.discriminator returns no score for each image" in diagnostics.left_out["adversary"]


class Adversarial(Trained):
    """An adversarial autoencoder (https://arxiv.org/abs/1511.05644), whose latents are as long as its images are wide."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(256, 16))
        self.decoder = nn.Sequential(nn.Linear(16, 256), nn.Unflatten(1, (1, 16, 16)))
        self.discriminator = nn.Sequential(nn.Linear(16, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))

    def networks(self) -> list[nn.Module]:
        return [self.decoder, self.discriminator]


def test_a_discriminator_of_latents_does_not_score_the_rows_of_images() -> None:
    diagnostics = fitted(Adversarial(), TensorDataset(IMAGES, LABELS))
    assert {"cms", "k_star"} <= set(diagnostics.attached)
    assert "discriminator must be known, but self.discriminator" in diagnostics.left_out["adversary"]


class OfSeries(LightningModule):
    """What reads series in both directions; its states (2, N, L) have as many rows as two series."""

    def __init__(self) -> None:
        super().__init__()
        self.d_rnn = nn.LSTM(2, 16, batch_first=True, bidirectional=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.d_rnn(batch[0])[0].square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-3)


def test_what_fits_two_inputs_alone_does_not_reconstruct() -> None:
    with pytest.warns(DiagnosticWarning, match="watches the training data only"):
        diagnostics = fitted(OfSeries(), TensorDataset(torch.randn(64, 16, 2)))
    assert "round_trip" not in diagnostics.attached
