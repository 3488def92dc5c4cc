from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from example_models.data import digits
from lightning_gendiag import Probe
from lightning_gendiag.probe import images_of, labels_of, untouched
from tests.conftest import TinyGAN, batches, trainer


def attached(module: LightningModule, probe: Probe, needs: tuple[str, ...] = ("sample",)) -> Probe:
    own = trainer()
    own.strategy.connect(module)
    probe.attach(own, module, needs)
    return probe


class Disturbed(TinyGAN):
    """A sampler that does all that it should not."""

    def sample(self, n: int) -> Tensor:
        self.generator.train()
        self.still.weight.data.add_(0)
        self.still.running_mean += 1
        self.still.num_batches_tracked = torch.tensor(99)
        random.random()
        np.random.rand()
        return self(torch.randn(n, self.latent_dim))


def test_looking_leaves_no_trace() -> None:
    module = Disturbed()
    module.generator[1].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    probe = attached(module, Probe(num_samples=300))
    images = probe.samples(0).images
    assert images.shape == (300, 1, 8, 8)
    assert not images.requires_grad
    after = module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [part.training for part in module.modules()] == modes
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()


def test_a_failing_sampler_leaves_no_trace_either() -> None:
    class Failing(TinyGAN):
        def sample(self, n: int) -> Tensor:
            self.still.running_mean += 1
            torch.randn(3)
            raise RuntimeError("no luck")

    module = Failing()
    probe = attached(module, Probe())
    state, modes = torch.get_rng_state(), [part.training for part in module.modules()]
    with pytest.raises(ValueError, match=r"sample must make 128 images .* got RuntimeError: no luck"):
        probe.samples(0)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(module.still.running_mean, torch.zeros(3))
    assert [part.training for part in module.modules()] == modes


def test_parameters_that_initialise_themselves_at_the_first_look_are_put_back() -> None:
    module = nn.Linear(2, 2)
    before = module.weight.clone()
    with untouched(module, parameters=True):
        module.weight.add_(1)
    assert torch.equal(module.weight, before)


def test_samples_are_the_same_at_each_step_and_drawn_once() -> None:
    calls = []

    class Counting(TinyGAN):
        def sample(self, n: int) -> Tensor:
            calls.append(n)
            return self(torch.randn(n, self.latent_dim))

    probe = attached(Counting(), Probe(num_samples=200))
    first = probe.samples(0)
    assert probe.samples(0) is first
    assert calls == [128, 72]
    assert torch.equal(probe.samples(1).images, first.images)
    assert not torch.equal(first.images[:72], first.images[128:])


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_together_draw_what_one_process_draws(world: int) -> None:
    module = TinyGAN()
    whole = attached(module, Probe(num_samples=300)).samples(0).images
    parts = []
    for rank in range(world):
        probe = attached(module, Probe(num_samples=300))
        probe.trainer = SimpleNamespace(
            global_rank=rank, world_size=world, callbacks=[], precision_plugin=probe.trainer.precision_plugin
        )
        parts += list(probe.samples(0).images)
    assert len(parts) == 300
    known = {tuple(image.flatten().tolist()) for image in whole}
    assert {tuple(image.flatten().tolist()) for image in parts} == known


def conditional(module: Any, n: int, labels: Tensor) -> Tensor:
    return labels.float().view(n, 1, 1, 1).expand(n, 1, 8, 8)


@pytest.mark.parametrize(
    "sample",
    [None, "forward", "generator_image", "draw", lambda module, n: module.draw(n)],
)
def test_samplers_are_found_by_every_name(sample: Any) -> None:
    class Many(TinyGAN):
        def __init__(self) -> None:
            super().__init__()
            self.generator_image = nn.Sequential(self.generator, nn.Unflatten(1, (1, 8, 8)))

        def draw(self, n: int) -> Tensor:
            return self(torch.randn(n, self.latent_dim))

    assert attached(Many(), Probe(sample, num_samples=10)).samples(0).images.shape == (10, 1, 8, 8)


def test_a_conditional_sampler_gets_the_references_labels() -> None:
    reference = 3 + 3 * torch.rand(40, 1, 8, 8), torch.arange(40) % 4 + 3
    probe = attached(TinyGAN(), Probe(conditional, conditional=True, reference=reference, num_samples=60))
    drawn = probe.samples(0)
    assert drawn.labels is not None
    assert torch.equal(drawn.images[:, 0, 0, 0].long(), drawn.labels)
    assert set(drawn.labels.tolist()) == {3, 4, 5, 6}


def test_encode_and_decode_are_found_or_asked_for() -> None:
    module = TinyGAN()
    with pytest.raises(
        ValueError, match=r"encode must be known, but TinyGAN has none of encode, encoder. To fix this, define"
    ):
        attached(module, Probe(), ("encode",))
    probe = attached(module, Probe(encode="discriminator", decode=lambda m, z: m(z)), ("encode", "decode"))
    with probe.looking():
        assert probe._resolve("encode")(torch.zeros(2, 1, 8, 8)).shape == (2, 1)
        assert probe._resolve("decode")(torch.zeros(2, 4)).shape == (2, 1, 8, 8)


def test_what_cannot_be_sampled_is_refused_in_words() -> None:
    class Mute(LightningModule):
        pass

    class NoNoise(LightningModule):
        def forward(self, x: Tensor) -> Tensor:
            return x

    class Other(TinyGAN):
        def sample(self, z: Tensor) -> Tensor:
            return self(z)

    with pytest.raises(ValueError, match="Mute has none of sample, decode, decoder, forward, generator"):
        attached(Mute(), Probe())
    with pytest.raises(ValueError, match=r"latent_dim must be known .* pass Probe\(latent_dim=...\)"):
        attached(NoNoise(), Probe())
    with pytest.raises(ValueError, match=r"sample must name a method or submodule of TinyGAN, got 'nowhere.at_all'"):
        attached(TinyGAN(), Probe("nowhere.at_all"))
    with pytest.raises(ValueError, match=r"sample must make 2 images when called with 2, got TypeError"):
        attached(Other(), Probe()).try_out()
    with pytest.raises(ValueError, match=r"sample must return \(2, C, H, W\) images when asked for 2, got \(2, 64\)"):
        attached(TinyGAN(), Probe("generator")).try_out()
    with pytest.raises(ValueError, match="weights must be 'raw' or 'auto' where no callback averages weights"):
        attached(TinyGAN(), Probe(weights="ema"))
    with pytest.raises(ValueError, match="num_samples must be an integer of at least 2"):
        Probe(num_samples=1)
    with pytest.raises(ValueError, match="weights must be 'auto'"):
        Probe(weights="best")  # type: ignore[arg-type]


class WithEncoder(LightningModule):
    """Latents of length 4, and an encoder whose output may be something else."""

    def __init__(self, length: int, **layers: nn.Module) -> None:
        super().__init__()
        self.latent_dim, self.encoder = 4, nn.Sequential(nn.Flatten(), nn.Linear(64, length))
        for name, layer in layers.items():
            setattr(self, name, layer)


def test_an_encoder_is_taken_for_what_makes_latents_only_where_it_is() -> None:
    def probed(module: LightningModule, **options: Any) -> Tensor:
        probe = attached(module, Probe(**options), ("encode",))
        with probe.looking():
            return probe.codes(torch.zeros(2, 1, 8, 8))

    assert probed(WithEncoder(4)).shape == (2, 4)
    with pytest.raises(ValueError, match=r"encode must return \(2, 4\) latents, got \(2, 7\) of WithEncoder.encoder"):
        probed(WithEncoder(7))
    # what is named is taken at its word
    assert probed(WithEncoder(7), encode="encoder").shape == (2, 7)
    with pytest.raises(
        ValueError, match=r"pass Probe\(encode=lambda module, images: module.encoder\(images\).chunk\(2, 1\)"
    ):
        probed(WithEncoder(8))
    with pytest.raises(ValueError, match=r"images: module.to_mu\(module.encoder\(images\).flatten\(1\)\)\)"):
        probed(WithEncoder(4, to_mu=nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"head in \(module.mu_conv, module.log_var_conv\)"):
        probed(WithEncoder(4, log_var_conv=nn.Conv2d(1, 1, 1), mu_conv=nn.Conv2d(1, 1, 1)))
    # names that only look like it
    assert probed(WithEncoder(4, num=nn.Linear(4, 4), museum=nn.Linear(4, 4))).shape == (2, 4)


def test_what_is_named_for_samples_lends_its_length_and_decodes() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.z_dim, self.layer = 3, nn.Linear(3, 64)

        def paint(self, n: int) -> Tensor:
            return self(torch.randn(n, 3))

        def forward(self, z: Tensor) -> Tensor:
            return self.layer(z).view(-1, 1, 8, 8)

    class Outer(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Inner()

    probe = attached(Outer(), Probe("model", num_samples=4), ("sample", "decode"))
    assert probe.noise_length == 3
    assert probe.samples(0).images.shape == (4, 1, 8, 8)
    with probe.looking():
        assert probe.decoder(torch.zeros(2, 3)).shape == (2, 1, 8, 8)
    # what takes a number decodes nothing
    with pytest.raises(ValueError, match="decode must be known"):
        attached(Outer(), Probe("model.paint"), ("sample", "decode"))


class TestReference:
    images, labels = digits(8)

    @pytest.mark.parametrize("kind", ["tensor", "pair", "dataset", "loader"])
    def test_may_be_given_in_any_form(self, kind: str) -> None:
        given = {
            "tensor": self.images,
            "pair": (self.images, self.labels),
            "dataset": TensorDataset(self.images, self.labels),
            "loader": DataLoader(TensorDataset(self.images, self.labels), batch_size=30, shuffle=True),
        }[kind]
        module = TinyGAN()
        state = torch.get_rng_state()
        probe = attached(module, Probe(reference=given, num_reference=100))
        assert torch.equal(state, torch.get_rng_state())
        assert probe.reference is not None
        assert probe.reference.images.shape == (100, 1, 8, 8)
        assert (probe.reference.labels is None) == (kind == "tensor")
        again = attached(TinyGAN(), Probe(reference=given, num_reference=100))
        assert again.reference is not None
        assert torch.equal(probe.reference.images, again.reference.images)

    def test_is_taken_from_batches_that_pass_by(self) -> None:
        probe = attached(TinyGAN(), Probe(num_reference=50))
        for index, batch in enumerate(batches(n=100)):
            probe.collect(batch, (0, index))
            # a second monitor passes the same batch on
            probe.collect(batch, (0, index))
            assert probe.ready(epoch_over=False) == (index >= 3)
        assert probe.reference is not None
        assert len(probe.reference.images) == 50
        assert len(probe.reference.images.flatten(1).unique(dim=0)) == 50

    def test_is_complete_when_an_epoch_is_over(self) -> None:
        probe = attached(TinyGAN(), Probe(num_reference=500))
        for index, batch in enumerate(batches(n=64)):
            probe.collect(batch, (0, index))
        assert not probe.ready(epoch_over=False)
        assert probe.ready(epoch_over=True)
        assert probe.reference is not None
        assert len(probe.reference.images) == 64

    def test_leaves_images_out_that_are_not_finite(self) -> None:
        images = self.images[:20].clone()
        images[3] = math.nan
        probe = attached(TinyGAN(), Probe(reference=images))
        assert probe.reference is not None
        assert len(probe.reference.images) == 19

    def test_says_what_a_batch_must_hold(self) -> None:
        probe = attached(TinyGAN(), Probe())
        with pytest.raises(
            ValueError, match=r"a batch must hold \(N, C, H, W\) images, got \{text: \(str\)\}. To fix this"
        ):
            probe.collect({"text": ["a"]}, (0, 0))
        with pytest.raises(ValueError, match="reference must hold at least 4 finite images, got 3"):
            attached(TinyGAN(), Probe(reference=self.images[:3]))
        with pytest.raises(ValueError, match="reference must be a tensor, a pair"):
            attached(TinyGAN(), Probe(reference=7))

    def test_round_trips(self) -> None:
        probe = attached(TinyGAN(), Probe(num_reference=50))
        loader = list(batches(n=100))
        for index, batch in enumerate(loader[:2]):
            probe.collect(batch, (0, index))
        other = attached(TinyGAN(), Probe(num_reference=50))
        other.load_state_dict(probe.state_dict())
        for index, batch in enumerate(loader[2:], 2):
            probe.collect(batch, (0, index))
            other.collect(batch, (0, index))
        assert probe.ready(epoch_over=False)
        assert other.ready(epoch_over=False)
        assert probe.reference is not None
        assert other.reference is not None
        assert torch.equal(probe.reference.images, other.reference.images)
        third = attached(TinyGAN(), Probe())
        third.load_state_dict(probe.state_dict())
        assert third.ready(epoch_over=False)


def test_batches_of_every_make_are_read() -> None:
    x, y = torch.zeros(2, 1, 4, 4), torch.tensor([0, 1])
    for batch in (x, (x, y), [x, y], {"image": x, "label": y}, {"pixel_values": x, "labels": y}, ((x, y), y)):
        assert images_of(batch) is x
    assert labels_of((x, y)) is y
    assert labels_of({"x": x, "y": y}) is y
    assert labels_of((x, x)) is None
    assert labels_of(x) is None
    assert images_of("nothing") is None


@pytest.mark.parametrize(
    ("real", "generated", "warns"),
    [((-1, 1), (-1, 1), False), ((0, 1), (-1, 1), True), ((-1, 1), (0, 1), True), ((0, 1), (0, 255), True),
     ((-1, 1), (-0.1, 0.1), False)],
)  # fmt: skip
def test_two_ranges_of_values_are_noticed_once(
    real: tuple[float, float], generated: tuple[float, float], warns: bool, recwarn: pytest.WarningsRecorder
) -> None:
    def spread(low: float, high: float) -> Tensor:
        return torch.linspace(low, high, 64 * 10).view(10, 1, 8, 8)

    probe = attached(TinyGAN(), Probe(reference=spread(*real)))
    probe._check_range(spread(*generated))
    probe._check_range(spread(*generated))
    assert [str(w.message).startswith("generated images span") for w in recwarn] == [True] * warns


class Averaging(WeightAveraging):
    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
@pytest.mark.parametrize("weights", ["raw", "ema", "auto"])
def test_averaged_weights_are_looked_at_if_asked_and_both_sets_stay(weights: Any) -> None:
    from lightning.pytorch.callbacks import Callback

    seen = {}

    class Look(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            probe = Probe(weights=weights)
            probe.attach(trainer, pl_module, ("sample",))
            average = averaging._average_model.module
            before = [p.clone() for p in pl_module.parameters()], [p.clone() for p in average.parameters()]
            with probe.looking():
                now = [p.clone() for p in pl_module.parameters()]
            seen["raw"] = all(map(torch.equal, now, before[0]))
            seen["ema"] = all(map(torch.equal, now, before[1]))
            assert all(map(torch.equal, pl_module.parameters(), before[0]))
            assert all(map(torch.equal, average.parameters(), before[1]))

    averaging = Averaging()
    trainer(averaging, Look(), max_epochs=1).fit(TinyGAN(), batches())
    assert seen == {"raw": weights == "raw", "ema": weights != "raw"}
