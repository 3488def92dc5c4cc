from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from example_models.data import digits
from lightning_gendiag import CollapseStopping, CollapseWarning, DiagnosticWarning, KStarMonitor, ModelAdapter, k_star
from tests.helpers.logs import events
from tests.helpers.models import ScriptedGenerator, TinyGAN
from tests.helpers.recorded_runs import RecordedClasses
from tests.helpers.running import Numbers, batches, state_after_training, trainer


def make_monitor(features: Any = "encode", **options: Any) -> KStarMonitor:
    return KStarMonitor(features, **({"on_error": "raise"} | options))


class Encoding(ScriptedGenerator):
    """Encodes each class of digits to its own place, with noise that changes each epoch; class 7 may fracture."""

    def __init__(self, fault: str | None = None, start: int = 12) -> None:
        super().__init__()
        self.fault, self.start = fault, start
        images, self.labels = digits(16)
        self.key = {image.numpy().tobytes(): int(label) for image, label in zip(images, self.labels, strict=True)}

    def encode(self, images: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.current_epoch)
        labels = torch.tensor([self.key[image.numpy().tobytes()] for image in images])
        z = 2 * torch.eye(10)[labels] + 0.35 * torch.randn(len(images), 10, generator=generator)
        if self.fault and self.current_epoch >= self.start:
            # two thirds of class 7 move beside class 9
            moved = (labels == 7) & (torch.arange(len(labels)) % 3 > 0)
            z[moved] += 6 * torch.eye(10)[9] - 2 * torch.eye(10)[7]
        return z


def reference() -> ModelAdapter:
    return ModelAdapter(reference=digits(16), num_reference=800)


def test_a_class_that_fractures_is_found_and_named() -> None:
    monitor, stopping = make_monitor(adapter=reference()), CollapseStopping()
    with pytest.warns(CollapseWarning, match="class 7, now next to class 9, fractured: mean k. fell from"):
        own = trainer(monitor, stopping, max_epochs=30)
        own.fit(Encoding("fractured"), batches(16, 32))
    assert own.current_epoch < 22
    assert stopping.alarms[0].names == ["class 7"]


def test_a_healthy_run_raises_no_alarm() -> None:
    monitor, stopping = make_monitor(adapter=reference()), CollapseStopping()
    trainer(monitor, stopping, max_epochs=25).fit(Encoding(), batches(16, 32))
    assert stopping.alarms == []
    assert monitor.evaluations == 25


class WithLayers(TinyGAN):
    """A GAN with a convolutional discriminator, and with a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(), nn.Flatten(), nn.Linear(144, 1)
        )
        self.unused = nn.Linear(2, 2)


@pytest.mark.parametrize(
    "features",
    ["discriminator.2", lambda module, images: module.discriminator[:3](images)],
    ids=["path", "callable"],
)
def test_features_of_a_layer_are_given_by_path_or_callable(features: Any) -> None:
    images, labels = digits(8)
    monitor, numbers, model = (
        make_monitor(features, adapter=ModelAdapter(reference=(images[:300], labels[:300]))),
        Numbers(),
        WithLayers(),
    )
    trainer(monitor, numbers, max_epochs=1).fit(model, batches())
    model.eval()
    with torch.no_grad():
        expected = k_star(model.discriminator[:3](images[:300]).flatten(1), labels[:300])
    torch.testing.assert_close(monitor.result.mean, expected.mean)
    assert numbers.rows[0]["gendiag/k_star/true_skewness"] == pytest.approx(float(expected.true_skewness), abs=1e-6)
    assert numbers.rows[0]["gendiag/k_star/class_3"] == pytest.approx(float(expected.mean[3]))
    # no hook remains on the model
    assert all(not part._forward_hooks for part in model.modules())


def test_training_is_bit_for_bit_the_same_with_and_without_the_monitor() -> None:
    monitor = make_monitor("discriminator.2")
    torch.testing.assert_close(
        state_after_training(monitor, module=WithLayers), state_after_training(module=WithLayers)
    )


def test_generated_images_of_a_conditional_sampler_are_evaluated() -> None:
    images, labels = digits(16)

    class Conditional(Encoding):
        def sample(self, n: int, labels: Tensor) -> Tensor:  # type: ignore[override]
            return torch.stack([images[self.labels == label][int(torch.randint(100, ()))] for label in labels.tolist()])

    adapter = ModelAdapter(conditional=True, reference=(images, labels), num_samples=300)
    monitor = make_monitor(images="generated", adapter=adapter)
    trainer(monitor, max_epochs=1).fit(Conditional(), batches(16, 32))
    assert len(monitor.result.values) == 300
    assert float(monitor.result.scalars()["mean"]) > 0.1


def test_the_table_the_histogram_and_the_panel_are_logged(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    trainer(make_monitor(adapter=reference()), logger=logger).fit(Encoding(), batches(16, 32))
    accumulator = events(logger.log_dir)
    text = accumulator.Tensors("gendiag/k_star/classes/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.count("\n") == 11
    assert accumulator.Images("gendiag/k_star/panel")[0].width > 400
    assert len(accumulator.Histograms("gendiag/k_star/values")) == 2


def test_a_class_of_one_image_is_left_out_and_named(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    images, labels = digits(16)
    kept = torch.cat([(labels != 3).nonzero()[:200, 0], (labels == 3).nonzero()[:1, 0]])
    monitor, numbers = make_monitor(adapter=ModelAdapter(reference=(images[kept], labels[kept]))), Numbers()
    own = trainer(monitor, numbers, logger=TensorBoardLogger(tmp_path), max_epochs=2)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        own.fit(Encoding(), batches(16, 32))
    logged = [record.message for record in caplog.records if record.message.startswith("k*")]
    assert logged == ["k* is not measured for 1 of 10 classes with a single real image: 3."]
    assert "class 3" not in monitor.session.history.curves("k_star")
    assert "gendiag/k_star/class_3" not in numbers.rows[0]
    assert "gendiag/k_star/class_4" in numbers.rows[0]
    adapter = ModelAdapter(reference=(images[:8], torch.arange(8)))
    with pytest.warns(
        DiagnosticWarning, match="labels must be classes of 3 real images .*, got 8 different labels of 8"
    ):
        trainer(make_monitor(adapter=adapter, on_error="warn"), max_epochs=1).fit(Encoding(), batches(16, 32))


def test_invalid_features_and_missing_labels_are_reported() -> None:
    with pytest.raises(ValueError, match=r"features must be 'encode', .* got 'nowhere'. Its layers are generator.0"):
        trainer(make_monitor("nowhere")).fit(TinyGAN(), batches())
    with pytest.raises(ValueError, match="encode must be known, but TinyGAN has none of encode, encoder"):
        trainer(make_monitor()).fit(TinyGAN(), batches())
    with pytest.raises(ValueError, match="images='generated' must go with a sampler that takes labels"):
        trainer(make_monitor("discriminator", images="generated")).fit(TinyGAN(), batches())
    with pytest.raises(ValueError, match="features must be a name or a callable"):
        make_monitor(3)
    with pytest.raises(ValueError, match="images must be 'real' or 'generated'"):
        make_monitor(images="both")
    loader = torch.utils.data.DataLoader(digits(8)[0][:64], batch_size=16)
    with pytest.warns(DiagnosticWarning, match="labels must be known, but the batches hold no labels; pass labels="):
        trainer(make_monitor("discriminator", on_error="warn"), max_epochs=1).fit(TinyGAN(), loader)


class TestRecorded:
    """Ten VAEs and GANs on digits, recorded by ``python -m benchmarks.alarms --only k_star --record 10``."""

    runs = RecordedClasses.read()

    @pytest.mark.parametrize("model", ["vae", "gan"])
    def test_ten_healthy_seeds_raise_no_alarm(self, model: str) -> None:
        runs = [run for run in self.runs if run.model == model]
        assert len({run.seed for run in runs}) == 10
        assert [str(alarm) for run in runs for alarm in run.alarms()] == []

    @pytest.mark.parametrize("model", ["vae", "gan"])
    def test_a_class_that_fractures_is_found_and_named(self, model: str) -> None:
        for run in self.runs:
            if run.model == model:
                found = [alarm for alarm in run.alarms("fractured") if "class 7" in alarm.names]
                assert found, run.seed
                assert run.start <= found[0].epoch < run.start + 5
