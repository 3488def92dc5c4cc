from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from example_models import flow, vae
from example_models.data import digits
from lightning_gendiag import CollapseStopping, ManifoldEntropy, ManifoldEntropyMonitor, ModelAdapter, decoder_gram
from lightning_gendiag.detection.detector import Detector
from lightning_gendiag.diagnostics.manifold_entropy.monitor import PAIR, entanglement
from tests.helpers.logs import events
from tests.helpers.models import TinyGAN
from tests.helpers.recorded_runs import RecordedDimensions
from tests.helpers.running import Numbers, attached, batches, state_after_training, trainer


def make_monitor(**options: Any) -> ManifoldEntropyMonitor:
    return ManifoldEntropyMonitor(**({"num_latents": 20, "on_error": "raise"} | options))


def test_the_result_is_that_of_the_metric() -> None:
    monitor, model = make_monitor(), TinyGAN()
    trainer(monitor, max_epochs=2).fit(model, batches())
    model.eval()
    parts = [torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)) for n, seed in ((16, 0), (4, 7919))]
    metric = ManifoldEntropy(4, order=monitor.result.order)
    metric.update(decoder_gram(model, torch.cat(parts)))
    expected = metric.compute()
    torch.testing.assert_close(monitor.result.entropy, expected.entropy)
    torch.testing.assert_close(monitor.result.mutual_information, expected.mutual_information)
    assert float(monitor.result.latents) == 20


def test_training_is_bit_for_bit_the_same_with_and_without_the_monitor() -> None:
    torch.testing.assert_close(state_after_training(make_monitor()), state_after_training(), rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_derivatives_are_in_full_precision_and_the_weights_stay_the_same(precision: Any) -> None:
    monitor, model = make_monitor(), TinyGAN()
    trainer(monitor, max_epochs=1, precision=precision).fit(model, batches())
    assert monitor.result.entropy.dtype == torch.float64
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16 if precision == "bf16-true" else torch.float32}
    # the weights in half precision, converted to full precision
    model = model.float().eval()
    metric = ManifoldEntropy(4)
    metric.update(decoder_gram(model, torch.cat(list(monitor.view.prior_latents(20)))))  # type: ignore[union-attr]
    torch.testing.assert_close(metric.compute().entropy, monitor.result.entropy)


UNCOMPILED = """
import sys
import torch
from lightning_gendiag import ManifoldEntropy, decoder_gram
from tests.helpers.models import TinyGAN
from tests.helpers.running import batches, trainer
from tests.test_manifold_entropy_monitor import make_monitor

RULES = "torch._decomp.decompositions_for_jvp"

class Descent(torch.nn.Module):
    def forward(self, x):
        return x - torch.func.grad(lambda y: torch.nn.functional.layer_norm(y, y.shape[1:]).pow(3).sum())(x)

for layer, needs in ((torch.nn.Tanh(), False), (Descent(), True)):
    monitor, model = make_monitor(), TinyGAN()
    model.generator.append(layer)
    trainer(monitor, max_epochs=2).fit(model, batches())
    assert (RULES in sys.modules) is needs, layer
    if needs:
        metric = ManifoldEntropy(4)
        metric.update(decoder_gram(model.eval(), torch.cat(list(monitor.view.prior_latents(20)))))
        torch.testing.assert_close(metric.compute().entropy, monitor.result.entropy)
assert monitor.evaluations == 2
"""


def test_rules_of_forward_mode_are_compiled_only_for_a_decoder_that_needs_them() -> None:
    # in a process where nothing has used forward mode before
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-Wignore", "-c", UNCOMPILED], check=True, env=environment)


class Wide(TinyGAN):
    """A GAN with forty latent dimensions, of which the even ones have ten times the effect."""

    def __init__(self) -> None:
        super().__init__(latent_dim=40)

    def forward(self, z: Tensor) -> Tensor:
        weights = torch.where(torch.arange(40) % 2 == 0, 1.0, 0.1)
        return super().forward(z * weights.to(z))


def test_of_many_dimensions_the_most_active_are_observed() -> None:
    monitor, numbers = make_monitor(max_dims=12), Numbers()
    trainer(monitor, numbers, max_epochs=2).fit(Wide(), batches())
    assert len(monitor.dims) == 12
    assert (monitor.dims % 2 == 0).all()
    assert [o.series.name for o in monitor.latest.observations[:2]] == [f"dimension {int(i)}" for i in monitor.dims[:2]]  # type: ignore[union-attr]
    assert "gendiag/manifold_entropy/effective_dimensions" in numbers.rows[0]


def test_the_spectrum_the_panel_and_the_scalars_are_logged(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    trainer(make_monitor(), logger=logger).fit(TinyGAN(), batches())
    accumulator = events(logger.log_dir)
    assert len(accumulator.Histograms("gendiag/manifold_entropy/spectrum")) == 2
    assert accumulator.Images("gendiag/manifold_entropy/panel")[0].height > 400
    assert len(accumulator.Scalars("gendiag/manifold_entropy/dimension_3")) == 2


class Points(LightningModule):
    """A module whose decoder returns points and not images."""

    latent_dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(3, 5)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.decoder(torch.ones(2, 3)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_a_decoder_of_points_needs_no_images_and_no_reference(tmp_path: Path) -> None:
    monitor = make_monitor()
    trainer(monitor, max_epochs=2, logger=TensorBoardLogger(tmp_path)).fit(
        Points(), torch.utils.data.DataLoader(torch.zeros(8, 5), batch_size=4)
    )
    assert monitor.evaluations == 2
    # the decoder is linear, so that its Jacobian is the same at each latent
    w = monitor.view.subject.trained.decoder.weight.double()  # type: ignore[union-attr]
    torch.testing.assert_close(monitor.result.entropy, 1.4189385332046727 + w.norm(dim=0).log())


def test_the_volume_of_a_flow_gives_the_same_total() -> None:
    model, monitor = flow.Flow(transforms=3, hidden=16), make_monitor(log_volume="log_volume")
    own = trainer(monitor, max_epochs=1)
    own.fit(model, flow.moon_batches(256))
    by_gram = ManifoldEntropy(2)
    model.eval()
    by_gram.update(decoder_gram(model.decode, torch.cat(list(monitor.view.prior_latents(20)))))  # type: ignore[union-attr]
    assert float(monitor.result.total) == pytest.approx(float(by_gram.compute().total), abs=1e-4)


def test_the_state_is_restored_from_a_checkpoint(tmp_path: Path) -> None:
    first = make_monitor(max_dims=12)
    one = trainer(first, ModelCheckpoint(tmp_path / "1"), max_epochs=2, enable_checkpointing=True)
    one.fit(Wide(), batches())
    second = make_monitor(max_dims=12)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The dirpath has changed")
        trainer(second, ModelCheckpoint(tmp_path / "2"), max_epochs=3, enable_checkpointing=True).fit(
            Wide(), batches(), ckpt_path=one.checkpoint_callback.best_model_path
        )
    assert torch.equal(second.dims, first.dims)  # type: ignore[arg-type]
    assert len(second.session.history.curves("manifold_entropy")["dimensions in use"].values) == 3
    assert second.evaluations == 3


def test_modules_that_cannot_be_decoded_raise_errors_before_training() -> None:
    class Encoder(Points):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = self.decoder, None

    class Flat(TinyGAN):
        def decode(self, z: Tensor) -> Tensor:
            return z.sum()

    with pytest.raises(
        ValueError, match=r"decode must be known, but Encoder has none of decode, decoder, .*forward, generator"
    ):
        trainer(make_monitor()).fit(Encoder(), batches())
    with pytest.raises(ValueError, match=r"decode must .*, but self.decode fails .*must return \(2, ...\) data"):
        trainer(make_monitor(adapter=ModelAdapter(decode="decode"))).fit(Flat(), batches())
    detached = ModelAdapter(decode=lambda module, z: module(z).detach(), latent_dim=4)
    with pytest.raises(ValueError, match="decode must be differentiable"):
        trainer(ManifoldEntropyMonitor(mode="reverse", adapter=detached), max_epochs=1).fit(TinyGAN(), batches())
    with pytest.raises(ValueError, match="log_volume must be a callable or name a method of TinyGAN"):
        trainer(make_monitor(log_volume="nothing")).fit(TinyGAN(), batches())
    with pytest.raises(ValueError, match="num_latents and max_dims must be at least 2"):
        make_monitor(num_latents=1)
    with pytest.raises(ValueError, match="mode must be"):
        make_monitor(mode="both")


def test_latents_of_images_are_the_posteriors_mean() -> None:
    model = vae.VAE(latent_dim=3, width=4)
    view = attached(model, ModelAdapter(), ("encode",))
    with view.isolated():
        latents = view.latents_of(digits(32)[0][:5])
    model.eval()
    assert torch.equal(latents, model.encode(digits(32)[0][:5])[0])


class TestEntanglement:
    """The pair of dimensions that shares most, of 32 dimensions and three other series."""

    @staticmethod
    def opened(shared: list[float]) -> list[int]:
        detector = Detector(3e-4 / 36, min_std=PAIR.min_std, min_delta=PAIR.min_delta)
        return [i for i, nats in enumerate(shared) if detector.update(i, entanglement(nats)).opened]

    @pytest.mark.parametrize("width", [1.5, 2.0, 2.5, 3.0, 4.0])
    def test_a_smooth_rise_from_the_start_on_is_how_a_generator_learns(self, width: float) -> None:
        assert self.opened([2.1 / (1 + math.exp((7 - i) / width)) for i in range(40)]) == []

    @pytest.mark.parametrize("before", [0.1, 0.5, 0.9])
    def test_a_sudden_rise_is_found_at_its_second_value(self, before: float) -> None:
        assert self.opened([before + 0.02 * (i % 3) for i in range(20)] + [2.0] * 5) == [21]

    def test_a_pair_that_shares_less_than_a_nat_is_no_news(self) -> None:
        assert self.opened([0.1] * 20 + [0.99] * 20) == []

    def test_the_severity_is_what_is_shared_beyond_a_nat(self) -> None:
        assert entanglement(3.0) == pytest.approx(2.0, abs=1e-3)
        assert entanglement(0.0) == pytest.approx(0.0, abs=0.02)
        assert entanglement(1.0) == pytest.approx(PAIR.min_delta)
        assert math.isnan(entanglement(math.nan))
        assert entanglement(math.inf) == math.inf


class TestRecorded:
    """Ten VAEs, flows and GANs on digits, recorded by ``python -m benchmarks.alarms --only manifold_entropy``."""

    runs = RecordedDimensions.read()

    def test_there_are_ten_of_each(self) -> None:
        for model in ("vae", "flow", "gan"):
            assert len({run.seed for run in self.runs if run.model == model}) == 10

    @pytest.mark.parametrize("model", ["vae", "flow", "gan"])
    def test_healthy_seeds_raise_no_alarm(self, model: str) -> None:
        runs = [run for run in self.runs if run.model == model]
        assert [str(alarm) for run in runs for alarm in run.alarms()] == []

    @pytest.mark.parametrize("fault", ["dead", "entangled", "collapse"])
    @pytest.mark.parametrize("model", ["vae", "flow", "gan"])
    def test_a_planted_fault_is_found_and_named(self, model: str, fault: str) -> None:
        for run in self.runs:
            if run.model == model:
                first = run.alarms(fault)[0]
                assert run.is_right(fault, first), (run.seed, first)
                assert run.start <= first.epoch <= run.start + 4


@pytest.mark.parametrize("fault", ["dead", "entangled", "collapse"])
def test_the_example_is_stopped_and_the_fault_is_named(fault: str) -> None:
    stopping, monitor = CollapseStopping(), ManifoldEntropyMonitor(num_latents=32)
    with pytest.warns(UserWarning, match="collapsed|entangled"):
        trainer(monitor, stopping, max_epochs=20).fit(vae.FaultyVAE(fault, 12, width=4), batches(32, 512, 64))
    found = stopping.alarms[0]
    expected = {"dead": "dimension 1", "entangled": "dimension 0 with dimension 1", "collapse": "all dimensions"}[fault]
    # of a collapse, the dimension that shows it first may be named
    assert found.label == expected or (fault == "collapse" and found.label.startswith("dimension"))
    assert found.epoch <= 15


def test_two_moons_have_the_entropies_of_the_papers_first_figure() -> None:
    """A reconstruction from one dimension separates the two entropies and reduces the mutual information."""
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
