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
    Monitor,
    Probe,
)
from tests.conftest import batches, trainer
from tests.test_monitor import state_after_training


def small() -> Probe:
    return Probe(num_samples=64, num_reference=64)


ALL = [
    "cms",
    "generation_balance",
    "k_star",
    "manifold_entropy",
    "posterior_kl",
    "latent_regions",
    "regional_primitives",
]
EXAMPLES = {
    "gan": (lambda: GAN(8, width=4), 32, ["cms", "generation_balance", "manifold_entropy", "regional_primitives"]),
    "vae": (lambda: VAE(3, width=2), 32, ALL),
    "flow": (lambda: flow.Flow(64, (1, 8, 8), transforms=2, hidden=16), 8, [*ALL[:4], "latent_regions"]),
    "diffusion": (lambda: Diffusion(width=4, steps=2), 16, ["cms", "generation_balance"]),
}


class Plain(LightningModule):
    """Only ``forward(z)`` and ``hparams.latent_dim``."""

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


# models that have learned nothing yet
unlearned = pytest.mark.filterwarnings("ignore:generated images span")


@unlearned
@pytest.mark.parametrize("name", EXAMPLES)
def test_without_an_argument_it_attaches_what_applies_to_every_example(name: str) -> None:
    make, size, expected = EXAMPLES[name]
    watched = GenerativeDiagnostics(probe=small(), on_error="raise")
    # shorter than by default, and otherwise the same
    for monitor in watched.monitors.values():
        monitor.every_n_epochs = 1
    own = trainer(watched, max_epochs=1)
    own.fit(make(), batches(size))
    assert watched.attached == expected
    assert set(watched.left_out) == set(ALL) - set(expected)
    assert all(watched.left_out.values())
    assert [m.evaluations for stem, m in watched.monitors.items() if stem in expected] == [1] * len(expected)
    assert any(isinstance(callback, CollapseStopping) for callback in own.callbacks)


@unlearned
def test_a_plain_module_gets_what_it_can() -> None:
    watched = GenerativeDiagnostics()
    trainer(watched, max_epochs=1).fit(Plain(), batches())
    assert watched.attached == ["cms", "generation_balance", "manifold_entropy"]
    assert "encode must be known" in watched.left_out["posterior_kl"]
    assert "split must be given" in watched.left_out["regional_primitives"]


@unlearned
def test_without_labels_it_leaves_out_what_needs_them() -> None:
    watched = GenerativeDiagnostics(probe=small())
    trainer(watched, max_epochs=1).fit(Plain(), DataLoader(digits(8)[0][:64], batch_size=16))
    assert watched.attached == ["cms", "manifold_entropy"]
    assert "the batches hold no labels; pass Probe(labels=" in watched.left_out["generation_balance"]


def test_without_images_only_the_decoder_is_looked_at() -> None:
    watched = GenerativeDiagnostics(probe=Probe(num_samples=16))
    data = DataLoader(TensorDataset(torch.randn(64, 2)), batch_size=16)
    trainer(watched, max_epochs=1).fit(flow.Flow(2), data)
    assert watched.attached == ["manifold_entropy"]


def test_what_the_trainer_has_already_is_left_alone_and_order_is_kept(tmp_path: Any) -> None:
    own_k_star, stopping = KStarMonitor(), CollapseStopping(action="warn")
    watched = GenerativeDiagnostics(probe=small(), skip=("posterior_kl",))
    checkpoint = ModelCheckpoint(tmp_path)
    own = trainer(watched, own_k_star, stopping, checkpoint, max_epochs=1, enable_checkpointing=True)
    own.fit(VAE(3, width=2), batches(32))
    assert "k_star" not in watched.attached
    assert watched.left_out == {"posterior_kl": "it was not wanted", "k_star": "the trainer has one already"}
    assert [c for c in own.callbacks if isinstance(c, CollapseStopping)] == [stopping]
    kinds = [type(c).__name__ for c in own.callbacks]
    last = max(at for at, c in enumerate(own.callbacks) if isinstance(c, Monitor))
    assert last < kinds.index("CollapseStopping") < kinds.index("ModelCheckpoint")


def test_it_goes_on_from_a_checkpoint_and_fits_again(tmp_path: Any) -> None:
    own = trainer(GenerativeDiagnostics(probe=small(), max_share=None), max_epochs=2)
    own.fit(VAE(3, width=2), batches(32))
    own.save_checkpoint(tmp_path / "last.ckpt")
    watched = GenerativeDiagnostics(probe=small(), max_share=None)
    trainer(watched, max_epochs=3).fit(
        VAE(3, width=2), batches(32), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    assert watched.monitors["cms"].evaluations == 3
    again = trainer(watched, max_epochs=1)
    again.fit(VAE(3, width=2), batches(32))
    assert watched.attached == ALL


def test_training_is_bit_identical_with_and_without() -> None:
    def run(*callbacks: Any) -> Any:
        return state_after_training(*callbacks, module=lambda: VAE(3, width=2), size=32)

    watched = GenerativeDiagnostics(probe=small(), on_error="raise")
    torch.testing.assert_close(run(watched), run(), rtol=0, atol=0)
    assert watched.attached == ALL


@unlearned
def test_a_reference_that_is_given_is_enough() -> None:
    class FromNoise(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0]).square().mean()

    images, labels = (rows[:64] for rows in digits(8))
    watched = GenerativeDiagnostics(probe=Probe(reference=(images, labels), num_samples=64), max_share=None)
    trainer(watched, max_epochs=1).fit(FromNoise(), DataLoader(TensorDataset(torch.randn(64, 4)), batch_size=16))
    assert watched.attached == ["cms", "generation_balance", "manifold_entropy"]
    assert watched.monitors["cms"].evaluations == 1


@unlearned
def test_the_reference_is_saved_whoever_leaves(tmp_path: Any) -> None:
    class Flat(VAE):
        def decode(self, z: Tensor) -> Tensor:
            return super().decode(z).flatten(1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.encode(batch[0])[0].square().mean()

    own = trainer(GenerativeDiagnostics(probe=small(), max_share=None), max_epochs=1)
    own.fit(Flat(3, width=2), batches(32))
    own.save_checkpoint(tmp_path / "last.ckpt")
    states = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"].values()
    assert [len(state["probe"]["images"]) for state in states if "probe" in state] == [64]


@unlearned
def test_a_second_module_is_looked_at_for_what_it_is() -> None:
    watched = GenerativeDiagnostics(probe=small(), max_share=None, on_error="raise")
    own = trainer(watched, max_epochs=1)
    own.fit(VAE(5, width=2), batches(32))
    assert watched.attached == ALL
    own.fit_loop.max_epochs = 2
    own.fit(VAE(3, width=2), batches(32))
    assert watched.attached == ALL
    own.fit_loop.max_epochs = 3
    own.fit(GAN(8, width=4), batches(32))
    assert watched.attached == ["cms", "generation_balance", "manifold_entropy", "regional_primitives"]


@unlearned
def test_one_probe_serves_those_that_were_there_before() -> None:
    before = CosineMeanSimilarityMonitor(num_regions=2)
    watched = GenerativeDiagnostics(max_share=None)
    trainer(before, watched, max_epochs=1).fit(Plain(), batches())
    assert before.probe is watched.probe
    assert before.probe is watched.monitors["manifold_entropy"].probe


def test_an_unknown_diagnostic_is_refused() -> None:
    with pytest.raises(ValueError, match=r"skip must name diagnostics out of cms, .*, got fid"):
        GenerativeDiagnostics(skip=("fid",))
