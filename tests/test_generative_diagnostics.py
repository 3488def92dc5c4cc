from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from example_models import flow
from example_models.data import digits
from example_models.diffusion import Diffusion
from example_models.gan import GAN
from example_models.vae import VAE
from lightning_gendiag import (
    CollapseStopping,
    CosineMeanSimilarityMonitor,
    GenerativeDiagnostics,
    KStarMonitor,
    ModelAdapter,
)
from tests.helpers.running import batches, loading, state_after_training, trainer


def small() -> ModelAdapter:
    return ModelAdapter(num_samples=64, num_reference=64)


ALL = [
    "cms",
    "generation_balance",
    "k_star",
    "manifold_entropy",
    "posterior_kl",
    "latent_regions",
    "round_trip",
    "regional_primitives",
    "memorization",
    "training_data",
]
EXAMPLES = {
    "gan": (
        lambda: GAN(8, width=4),
        32,
        [
            "cms",
            "generation_balance",
            "manifold_entropy",
            "regional_primitives",
            "memorization",
            "adversary",
            "training_data",
        ],
    ),
    "vae": (lambda: VAE(3, width=2), 32, ALL),
    "flow": (
        lambda: flow.Flow(64, (1, 8, 8), transforms=2, hidden=16),
        8,
        [*ALL[:4], "latent_regions", "round_trip", "memorization", "training_data"],
    ),
    "diffusion": (
        lambda: Diffusion(width=4, steps=2),
        16,
        ["cms", "generation_balance", "timestep_loss", "memorization", "training_data"],
    ),
}


class Plain(LightningModule):
    """A generator that has only ``forward(z)`` and ``hparams.latent_dim``."""

    def __init__(self, latent_dim: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(latent_dim, 64), nn.Unflatten(1, (1, 8, 8)))

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images = batch[0] if isinstance(batch, (list, tuple)) else batch
        return (self(torch.randn(len(images), 4)) - images).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


# untrained models generate images in another range of values
unlearned = pytest.mark.filterwarnings("ignore:generated images span")


@unlearned
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_applicable_diagnostics_are_attached_to_every_example(name: str) -> None:
    make, size, expected = EXAMPLES[name]
    diagnostics = GenerativeDiagnostics(adapter=small(), on_error="raise", max_overhead=None)
    # the run has one epoch, in which every monitor must be due
    for monitor in diagnostics.monitors.values():
        monitor.every_n_epochs = 1
    own = trainer(diagnostics, max_epochs=1)
    own.fit(make(), batches(size))
    assert diagnostics.attached == expected
    # none of them has a codebook, and one predicts from several levels of noise
    assert set(diagnostics.left_out) == {*ALL, "codebook", "adversary", "timestep_loss"} - set(expected)
    assert all(diagnostics.left_out.values())
    assert [m.evaluations for name, m in diagnostics.monitors.items() if name in expected] == [1] * len(expected)
    assert diagnostics.stopping is not None
    assert diagnostics.stopping.judge.evaluations.keys() == set(expected)


@unlearned
def test_a_plain_module_gets_the_diagnostics_of_samples_and_latents() -> None:
    diagnostics = GenerativeDiagnostics()
    trainer(diagnostics, max_epochs=1).fit(Plain(), batches())
    assert diagnostics.attached == ["cms", "generation_balance", "manifold_entropy", "memorization", "training_data"]
    assert "encode must be known" in diagnostics.left_out["posterior_kl"]
    assert "split must be given" in diagnostics.left_out["regional_primitives"]


@unlearned
def test_without_labels_the_diagnostics_of_classes_are_left_out() -> None:
    diagnostics = GenerativeDiagnostics(adapter=small())
    trainer(diagnostics, max_epochs=1).fit(Plain(), DataLoader(digits(8)[0][:64], batch_size=16))
    assert diagnostics.attached == ["cms", "manifold_entropy", "memorization", "training_data"]
    assert "the batches hold no labels; pass labels=" in diagnostics.left_out["generation_balance"]


def test_rows_are_evaluated_by_what_needs_no_images() -> None:
    diagnostics = GenerativeDiagnostics(adapter=ModelAdapter(num_samples=16))
    data = DataLoader(TensorDataset(torch.randn(64, 2)), batch_size=16)
    trainer(diagnostics, max_epochs=1).fit(flow.Flow(2), data)
    assert diagnostics.attached == [
        "cms",
        "manifold_entropy",
        "latent_regions",
        "round_trip",
        "memorization",
        "training_data",
    ]


def test_monitors_and_a_stopper_of_the_trainer_replace_the_automatic_ones(tmp_path: Any) -> None:
    own_k_star, stopping = KStarMonitor(), CollapseStopping(action="warn")
    diagnostics = GenerativeDiagnostics(
        adapter=small(), skip=("posterior_kl", "codebook", "adversary", "timestep_loss"), max_overhead=None
    )
    checkpoint = ModelCheckpoint(tmp_path)
    own = trainer(diagnostics, own_k_star, stopping, checkpoint, max_epochs=1, enable_checkpointing=True)
    own.fit(VAE(3, width=2), batches(32))
    assert "k_star" not in diagnostics.attached
    skipped = dict.fromkeys(("posterior_kl", "codebook", "adversary", "timestep_loss"), "it is in skip")
    assert diagnostics.left_out == {**skipped, "k_star": "the trainer has a monitor of it"}
    assert own.callbacks == [diagnostics, own_k_star, stopping, checkpoint]
    assert set(stopping.judge.evaluations) == {*diagnostics.attached, "k_star"} - {
        "latent_regions",
        "memorization",
        "regional_primitives",
        "round_trip",
    }
    assert diagnostics.stopping is not None
    assert diagnostics.stopping.judge.evaluations == {}


def test_it_resumes_from_a_checkpoint_and_may_be_used_for_another_fit(tmp_path: Any) -> None:
    own = trainer(GenerativeDiagnostics(adapter=small(), max_overhead=None), max_epochs=2)
    own.fit(VAE(3, width=2), batches(32))
    own.save_checkpoint(tmp_path / "last.ckpt")
    diagnostics = GenerativeDiagnostics(adapter=small(), max_overhead=None)
    trainer(diagnostics, max_epochs=3).fit(VAE(3, width=2), batches(32), ckpt_path=tmp_path / "last.ckpt", **loading())
    assert diagnostics.monitors["cms"].evaluations == 3
    again = trainer(diagnostics, max_epochs=1)
    again.fit(VAE(3, width=2), batches(32))
    assert diagnostics.attached == ALL


def test_training_is_bit_identical_with_and_without_diagnostics() -> None:
    def run(*callbacks: Any) -> Any:
        return state_after_training(*callbacks, module=lambda: VAE(3, width=2), size=32)

    diagnostics = GenerativeDiagnostics(adapter=small(), on_error="raise")
    torch.testing.assert_close(run(diagnostics), run(), rtol=0, atol=0)
    assert diagnostics.attached == ALL


@unlearned
def test_a_given_reference_replaces_images_in_batches() -> None:
    class FromNoise(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0]).square().mean()

    images, labels = (rows[:64] for rows in digits(8))
    diagnostics = GenerativeDiagnostics(
        adapter=ModelAdapter(reference=(images, labels), num_samples=64), max_overhead=None
    )
    trainer(diagnostics, max_epochs=1).fit(FromNoise(), DataLoader(TensorDataset(torch.randn(64, 4)), batch_size=16))
    assert diagnostics.attached == ["cms", "generation_balance", "manifold_entropy", "memorization", "training_data"]
    assert diagnostics.monitors["cms"].evaluations == 1


@unlearned
def test_the_monitors_save_one_common_reference(tmp_path: Any) -> None:
    class Flat(VAE):
        def decode(self, z: Tensor) -> Tensor:
            return super().decode(z).flatten(1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.encode(batch[0])[0].square().mean()

    own = trainer(GenerativeDiagnostics(adapter=small(), max_overhead=None), max_epochs=1)
    own.fit(Flat(3, width=2), batches(32))
    own.save_checkpoint(tmp_path / "last.ckpt")
    states = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"].values()
    (own_state,) = states
    images = [state["session"]["reference"]["images"] for state in own_state["monitors"].values()]
    assert [len(rows) for rows in images] == [64] * len(images)
    # all states share one storage
    assert len({rows.data_ptr() for rows in images}) == 1


@unlearned
def test_a_second_module_is_inspected_again() -> None:
    diagnostics = GenerativeDiagnostics(adapter=small(), max_overhead=None, on_error="raise")
    own = trainer(diagnostics, max_epochs=1)
    own.fit(VAE(5, width=2), batches(32))
    assert diagnostics.attached == ALL
    own.fit_loop.max_epochs = 2
    own.fit(VAE(3, width=2), batches(32))
    assert diagnostics.attached == ALL
    own.fit_loop.max_epochs = 3
    own.fit(GAN(8, width=4), batches(32))
    assert diagnostics.attached == EXAMPLES["gan"][2]


@unlearned
def test_other_monitors_of_the_trainer_share_the_view() -> None:
    before = CosineMeanSimilarityMonitor(num_regions=2)
    diagnostics = GenerativeDiagnostics(max_overhead=None)
    trainer(before, diagnostics, max_epochs=1).fit(Plain(), batches())
    assert before.view is diagnostics.monitors["manifold_entropy"].view


def test_an_unknown_diagnostic_raises_an_error() -> None:
    with pytest.raises(ValueError, match=r"skip must name diagnostics out of cms, .*, got fid"):
        GenerativeDiagnostics(skip=("fid",))


class Mute(LightningModule):
    """A module that neither samples nor encodes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_where_nothing_applies_the_reasons_are_in_the_warning_alone(caplog: pytest.LogCaptureFixture) -> None:
    match = "(?s)watches the training data only, since no diagnostic of Mute.*Left out: cms.*sample must be known"
    with caplog.at_level("INFO"), pytest.warns(UserWarning, match=match):
        trainer(GenerativeDiagnostics(max_overhead=None), max_epochs=1).fit(Mute(), batches())
    assert "Left out" not in caplog.text
    # which the report does not take for a judgement of the model
    assert "Not judged: there was no evaluation of the model, only of its training data." in caplog.text


def test_where_not_even_the_data_are_watched_nothing_is_planned_or_evaluated(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), pytest.warns(UserWarning, match="found nothing to evaluate in Mute"):
        trainer(GenerativeDiagnostics(skip=("training_data",)), max_epochs=1).fit(Mute(), batches())
    assert "Plan" not in caplog.text


def test_a_stopper_beside_it_is_no_error_where_nothing_applies() -> None:
    for callbacks in ([CollapseStopping(), GenerativeDiagnostics()], [GenerativeDiagnostics(), CollapseStopping()]):
        own = trainer(*callbacks, max_epochs=2)
        with pytest.warns(UserWarning, match="watches the training data only, since no diagnostic of Mute"):
            own.fit(Mute(), batches())
        assert own.current_epoch == 2


def test_a_callable_of_the_user_that_fails_costs_what_needs_it_and_not_the_run() -> None:
    diagnostics = GenerativeDiagnostics(images=lambda batch: batch["nothing"], num_samples=32, max_overhead=None)
    own = trainer(diagnostics, max_epochs=2)
    own.fit(VAE(3, width=2), batches(32))
    assert own.current_epoch == 2
    assert diagnostics.attached == ["manifold_entropy"]
    assert diagnostics.left_out["cms"]


def test_nothing_is_attached_before_the_first_batch() -> None:
    diagnostics = GenerativeDiagnostics()
    assert diagnostics.attached == []
    own = trainer(diagnostics, limit_train_batches=0)
    own.fit(GAN(16, width=4), batches(32))
    assert diagnostics.attached == []


@pytest.mark.parametrize("first", ["cms", "adversary", "user"])
def test_each_batch_is_counted_once_whichever_monitor_is_the_first(first: str) -> None:
    skip = [name for name in ALL if first == "adversary"]
    own = [CosineMeanSimilarityMonitor(num_regions=2, every_n_epochs=2)] if first == "user" else []
    diagnostics = GenerativeDiagnostics("warn", adapter=small(), skip=skip, max_overhead=None, log_images=False)
    trainer(*own, diagnostics, max_epochs=3).fit(GAN(8, width=4), batches(32, 64, batch_size=16))
    assert diagnostics.session.monitors[0].name == {"user": "cms"}.get(first, first)
    assert diagnostics.session.batches == 12
    assert [monitor.evaluations for monitor in own] == [1] * len(own)
