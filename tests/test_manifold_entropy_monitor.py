from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from benchmarks.manifold_alarms import RECORDS, START, replay, rightly_named
from example_models import flow, vae
from example_models.data import digits
from lightning_gendiag import CollapseStopping, ManifoldEntropy, ManifoldEntropyMonitor, Probe, decoder_gram
from tests.conftest import TinyGAN, batches, trainer
from tests.test_board_and_panels import events
from tests.test_monitor import Numbers, state_after_training


def monitor(**options: Any) -> ManifoldEntropyMonitor:
    return ManifoldEntropyMonitor(**({"num_latents": 20, "on_error": "raise"} | options))


def test_the_numbers_are_those_of_the_metric() -> None:
    watched, model = monitor(), TinyGAN()
    trainer(watched, max_epochs=2).fit(model, batches())
    model.eval()
    parts = [torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)) for n, seed in ((16, 0), (4, 7919))]
    metric = ManifoldEntropy(4, order=watched.result.order)
    metric.update(decoder_gram(model, torch.cat(parts)))
    expected = metric.compute()
    torch.testing.assert_close(watched.result.entropy, expected.entropy)
    torch.testing.assert_close(watched.result.mutual_information, expected.mutual_information)
    assert float(watched.result.latents) == 20


def test_training_is_bit_for_bit_the_same_with_and_without() -> None:
    torch.testing.assert_close(state_after_training(monitor()), state_after_training(), rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_it_is_computed_in_full_precision_and_the_weights_stay_as_they_are(precision: Any) -> None:
    watched, model = monitor(), TinyGAN()
    trainer(watched, max_epochs=1, precision=precision).fit(model, batches())
    assert watched.result.entropy.dtype == torch.float64
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16 if precision == "bf16-true" else torch.float32}
    # what the half weights are in full precision
    model = model.float().eval()
    metric = ManifoldEntropy(4)
    metric.update(decoder_gram(model, torch.cat(list(watched.probe.latents(20)))))  # type: ignore[union-attr]
    torch.testing.assert_close(metric.compute().entropy, watched.result.entropy)


class Wide(TinyGAN):
    """Forty latent dimensions of which the even ones do ten times as much."""

    def __init__(self) -> None:
        super().__init__(latent_dim=40)

    def forward(self, z: Tensor) -> Tensor:
        weights = torch.where(torch.arange(40) % 2 == 0, 1.0, 0.1)
        return super().forward(z * weights.to(z))


def test_of_many_dimensions_the_most_active_are_followed() -> None:
    watched, numbers = monitor(max_dims=12), Numbers()
    trainer(watched, numbers, max_epochs=2).fit(Wide(), batches())
    assert watched.dims is not None
    assert len(watched.dims) == 12
    assert (watched.dims % 2 == 0).all()
    assert list(watched.latest.readings)[:2] == [f"dimension {int(i)}" for i in watched.dims[:2]]  # type: ignore[union-attr]
    assert "gendiag/manifold_entropy/effective_dimensions" in numbers.rows[0]


def test_the_board_tells_spectrum_panel_and_charts(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    trainer(monitor(), logger=logger).fit(TinyGAN(), batches())
    accumulator = events(logger.log_dir)
    assert len(accumulator.Histograms("gendiag/manifold_entropy/spectrum")) == 2
    assert accumulator.Images("gendiag/manifold_entropy/panel")[0].height > 400
    assert len(accumulator.Scalars("gendiag/manifold_entropy/dimension_3")) == 2


class Points(LightningModule):
    """A decoder that makes points and no images."""

    latent_dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(3, 5)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.decoder(torch.ones(2, 3)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_a_decoder_of_points_needs_no_images_and_no_reference(tmp_path: Path) -> None:
    watched = monitor()
    trainer(watched, max_epochs=2, logger=TensorBoardLogger(tmp_path)).fit(
        Points(), torch.utils.data.DataLoader(torch.zeros(8, 5), batch_size=4)
    )
    assert watched.evaluations == 2
    # the decoder is linear: the same at each latent
    w = watched.probe.module.decoder.weight.double()  # type: ignore[union-attr]
    torch.testing.assert_close(watched.result.entropy, 1.4189385332046727 + w.norm(dim=0).log())


def test_a_flow_gives_its_own_volume() -> None:
    model, watched = flow.Flow(transforms=3, hidden=16), monitor(log_volume="log_volume")
    own = trainer(watched, max_epochs=1)
    own.fit(model, flow.moon_batches(256))
    by_gram = ManifoldEntropy(2)
    model.eval()
    by_gram.update(decoder_gram(model.decode, torch.cat(list(watched.probe.latents(20)))))  # type: ignore[union-attr]
    assert float(watched.result.total) == pytest.approx(float(by_gram.compute().total), abs=1e-4)


def test_state_travels(tmp_path: Path) -> None:
    first = monitor(max_dims=12)
    one = trainer(first, ModelCheckpoint(tmp_path / "1"), max_epochs=2, enable_checkpointing=True)
    one.fit(Wide(), batches())
    second = monitor(max_dims=12)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The dirpath has changed")
        trainer(second, ModelCheckpoint(tmp_path / "2"), max_epochs=3, enable_checkpointing=True).fit(
            Wide(), batches(), ckpt_path=one.checkpoint_callback.best_model_path
        )
    assert torch.equal(second.dims, first.dims)  # type: ignore[arg-type]
    assert len(second._curve) == 3
    assert second.evaluations == 3


def test_what_cannot_be_decoded_is_refused_before_training() -> None:
    class Encoder(Points):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = self.decoder, None

    class Flat(TinyGAN):
        def decode(self, z: Tensor) -> Tensor:
            return z.sum()

    with pytest.raises(
        ValueError, match="decode must be known, but Encoder has none of decode, decoder, forward, generator"
    ):
        trainer(monitor()).fit(Encoder(), batches())
    with pytest.raises(ValueError, match=r"decode must return \(1, ...\)"):
        trainer(monitor()).fit(Flat(), batches())
    with pytest.raises(ValueError, match="log_volume must be a callable or name a method of TinyGAN"):
        trainer(monitor(log_volume="nothing")).fit(TinyGAN(), batches())
    with pytest.raises(ValueError, match="num_latents and max_dims must be at least 2"):
        monitor(num_latents=1)
    with pytest.raises(ValueError, match="mode must be"):
        monitor(mode="both")


def test_codes_of_images_are_the_posteriors_mean() -> None:
    model = vae.VAE(latent_dim=3, width=4)
    probe = Probe()
    own = trainer()
    own.strategy.connect(model)
    probe.attach(own, model, ("encode",))
    with probe.looking():
        codes = probe.codes(digits(32)[0][:5])
        assert torch.equal(codes, model.encode(digits(32)[0][:5])[0])


class TestRecorded:
    """Ten VAEs, flows and GANs on digits, recorded by ``python -m benchmarks.manifold_alarms --record 10``."""

    runs = json.loads(RECORDS.read_text())

    def test_there_are_ten_of_each(self) -> None:
        for kind in ("vae", "flow", "gan"):
            assert len({run["seed"] for run in self.runs if run["kind"] == kind}) == 10

    @pytest.mark.parametrize("kind", ["vae", "flow", "gan"])
    def test_healthy_seeds_raise_no_alarm(self, kind: str) -> None:
        runs = [run for run in self.runs if run["kind"] == kind]
        assert [str(finding) for run in runs for finding in replay(run, "healthy").findings] == []

    @pytest.mark.parametrize("fault", ["dead", "entangled", "collapse"])
    @pytest.mark.parametrize("kind", ["vae", "flow", "gan"])
    def test_a_planted_fault_is_found_and_named(self, kind: str, fault: str) -> None:
        for run in self.runs:
            if run["kind"] == kind:
                first = replay(run, fault).findings[0]
                assert rightly_named(run, fault, first.where), (run["seed"], first)
                assert START <= first.epoch <= START + 3


@pytest.mark.parametrize("fault", ["dead", "entangled", "collapse"])
def test_the_example_is_stopped_and_says_why(fault: str) -> None:
    stopping, watched = CollapseStopping(), ManifoldEntropyMonitor(num_latents=32)
    with pytest.warns(UserWarning, match="collapsed|entangled"):
        trainer(watched, stopping, max_epochs=20).fit(vae.FaultyVAE(fault, 12, width=4), batches(32, 512, 64))
    found = stopping.findings[0]
    expected = {"dead": "dimension 1", "entangled": "dimension 0 with dimension 1", "collapse": "all dimensions"}[fault]
    assert found.where == expected
    assert found.epoch <= 15
    if fault == "collapse":
        assert "It shows in dimension 1, " in str(found)


def test_two_moons_order_as_in_the_papers_first_figure() -> None:
    """With a reconstruction from one dimension: one high and one low entropy, and little shared; without it, neither."""
    found = {}
    for core in (0, 1):
        torch.manual_seed(0)
        model = flow.Flow(core=core)
        trainer(max_epochs=30).fit(model, flow.moon_batches())
        model.eval()
        metric = ManifoldEntropy(2)
        z = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
        metric.update(decoder_gram(model.decode, z), model.log_volume(z))
        found[core] = metric.compute()
    free, aligned = found[0], found[1]
    gap = {core: float(result.entropy[0] - result.entropy[1]) for core, result in found.items()}
    assert gap[1] > 1.2
    assert gap[1] > abs(gap[0]) + 0.3
    assert float(aligned.mutual_information[0, 1]) < 0.6 * float(free.mutual_information[0, 1])
    # of two dimensions total correlation and mutual information are the same
    assert float(aligned.total_correlation) == pytest.approx(float(aligned.mutual_information[0, 1]), abs=1e-3)
