from __future__ import annotations

import logging
import math
import warnings
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn

from example_models.data import digits
from lightning_gendiag import (
    CollapseStopping,
    CollapseWarning,
    CosineMeanSimilarity,
    CosineMeanSimilarityMonitor,
    DiagnosticWarning,
    GenerativeDiagnostics,
    ModelAdapter,
    RegionMap,
)
from tests.helpers.logs import events, written_layout
from tests.helpers.models import ScriptedGenerator, TinyGAN
from tests.helpers.running import Numbers, batches, loading, state_after_training, trainer

HALVES = RegionMap(torch.arange(8).ge(4).long().repeat(8, 1))


def make_monitor(**options: Any) -> CosineMeanSimilarityMonitor:
    return CosineMeanSimilarityMonitor(
        **({"num_regions": 3, "adapter": ModelAdapter(num_samples=100, num_reference=60)} | options)
    )


def test_training_is_bit_for_bit_the_same_with_and_without_monitors() -> None:
    expected = state_after_training()
    for callbacks in (
        [make_monitor(), CollapseStopping()],
        [CollapseStopping(), make_monitor(every_n_train_steps=3)],
        [make_monitor(adapter=ModelAdapter(reference=batches(), num_samples=64))],
    ):
        found = state_after_training(*callbacks)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_the_first_evaluation_finds_regions_and_each_region_is_logged() -> None:
    monitor, numbers = make_monitor(), Numbers()
    trainer(monitor, numbers, max_epochs=3).fit(TinyGAN(), batches())
    assert monitor.region_map is not None
    assert monitor.region_map.num_regions == 3
    assert len(numbers.rows) == 3
    assert set(numbers.rows[0]) == {
        f"gendiag/cms/{name}"
        for name in ["image", "product", "residual", "worst", "median", "best", "invalid", "z_image", "z_worst"]
        + ["spread", "unreached"]
        + [f"region_{r}" for r in range(3)]
    }
    for row in numbers.rows:
        assert row["gendiag/cms/worst"] == min(row[f"gendiag/cms/region_{r}"] for r in range(3))


def test_the_result_is_that_of_the_metric() -> None:
    images = digits(8)[0]
    monitor = make_monitor(regions=HALVES, adapter=ModelAdapter(num_samples=100, reference=images, num_reference=300))
    model = TinyGAN()
    trainer(monitor, max_epochs=1).fit(model, batches())
    assert monitor.view.has_reference
    metric = CosineMeanSimilarity(HALVES)
    metric.update(monitor.view.reference.images, real=True)
    model.eval()
    with torch.no_grad():
        torch.manual_seed(0)
        metric.update(model(torch.randn(100, 4)), real=False)
    assert monitor.result is not None
    # the monitor alone knows the evaluations before
    assert float(monitor.result.unchanged) == float(monitor.result.never_valid) == 0
    torch.testing.assert_close(
        monitor.result._replace(unchanged=torch.tensor(math.nan), never_valid=torch.tensor(math.nan)),
        metric.compute(),
        equal_nan=True,
    )


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [3, 7, 11, 15]),
        ({"every_n_epochs": 2}, [7, 15]),
        ({"warmup_epochs": 2}, [11, 15]),
        # the reference is not complete at the third step
        ({"every_n_train_steps": 3}, [5, 8, 11, 14]),
        ({"every_n_train_steps": 4, "warmup_epochs": 1}, [7, 11, 15]),
    ],
)
def test_evaluations_follow_the_schedule(options: dict[str, Any], steps: list[int], tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    monitor = make_monitor(**options)
    trainer(monitor, max_epochs=4, logger=logger, log_every_n_steps=1).fit(TinyGAN(), batches())
    accumulator = events(logger.log_dir)
    assert [event.step for event in accumulator.Scalars("gendiag/cms/image")] == steps
    # with two optimizers, the axis of self.log differs from global_step
    assert [event.step for event in accumulator.Scalars("loss_g")] == list(range(16))
    assert [event.step for event in accumulator.Images("gendiag/cms/panel")] == steps


def test_tensorboard_holds_curves_charts_map_and_panel(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    trainer(make_monitor(), logger=logger).fit(TinyGAN(), batches())
    accumulator = events(logger.log_dir)
    assert len(accumulator.Scalars("gendiag/cms/seconds")) == 2
    charts = written_layout(accumulator).category[0].chart
    assert list(charts[0].multiline.tag) == [f"gendiag/cms/region_{r}$" for r in range(3)]
    assert charts[1].margin.series[0].value == "gendiag/cms/median"
    assert len(accumulator.Images("gendiag/cms/regions")) == 1
    text = accumulator.Tensors("gendiag/cms/regions/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| region_0 |" in text


class WithValidation(TinyGAN):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_mean", batch[0].mean())


@pytest.mark.parametrize("module", [TinyGAN, WithValidation])
def test_checkpoints_can_be_chosen_by_the_worst_region(module: type[TinyGAN], tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(
        tmp_path, monitor="gendiag/cms/worst", mode="max", save_top_k=-1, auto_insert_metric_name=False
    )
    numbers = Numbers()
    loaders = [batches()] + [batches(shuffle=False)] * (module is WithValidation)
    trainer(checkpoint, make_monitor(), numbers, max_epochs=3, enable_checkpointing=True).fit(module(), *loaders)
    expected = sorted(row["gendiag/cms/worst"] for row in numbers.rows)
    assert sorted(float(score) for score in checkpoint.best_k_models.values()) == pytest.approx(expected)


@pytest.mark.parametrize(
    "options",
    [
        {"logger": "csv"},
        {"logger": False},
        {"logger": "two"},
        {"fast_dev_run": True},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"limit_train_batches": 2},
        {"num_sanity_val_steps": 2, "check_val_every_n_epoch": 1},
    ],
    ids=str,
)
def test_a_monitor_runs_with_and_without_loggers_and_in_every_mode(options: dict[str, Any], tmp_path: Path) -> None:
    loggers = {"csv": CSVLogger(tmp_path), "two": [TensorBoardLogger(tmp_path / "1"), CSVLogger(tmp_path / "2")]}
    options = options | ({"logger": loggers.get(options["logger"], False)} if "logger" in options else {})
    monitor, stopping = make_monitor(on_error="raise"), CollapseStopping()
    own = trainer(monitor, stopping, **options)
    own.fit(WithValidation(), batches(), batches(shuffle=False))
    assert monitor.evaluations == (1 if own.fast_dev_run else 2)
    assert monitor.result.image.dtype == torch.float32
    assert monitor.result.image.isfinite()
    for logger in own.loggers:
        if isinstance(logger, CSVLogger):
            assert "gendiag/cms/worst" in (Path(logger.log_dir) / "metrics.csv").read_text()


class CliGAN(TinyGAN):
    pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_lightning_cli_reads_the_callbacks_from_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch import LightningDataModule

    class Data(LightningDataModule):
        def train_dataloader(self) -> Any:
            return batches()

    config = tmp_path / "config.yaml"
    config.write_text(
        """
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_gendiag.CosineMeanSimilarityMonitor
      init_args:
        num_regions: 2
        every_n_epochs: 1
        on_error: raise
        adapter:
          class_path: lightning_gendiag.ModelAdapter
          init_args: {sample: forward, num_samples: 50}
    - class_path: lightning_gendiag.CollapseStopping
      init_args: {action: warn}
"""
    )
    monkeypatch.setattr("sys.argv", ["train.py", "--config", str(config)])
    cli = LightningCLI(CliGAN, Data, run=False, save_config_callback=None, seed_everything_default=1)
    cli.trainer.fit(cli.model, cli.datamodule)
    monitor = next(c for c in cli.trainer.callbacks if isinstance(c, CosineMeanSimilarityMonitor))
    assert monitor.evaluations == 1
    assert monitor.adapter is not None
    assert monitor.adapter.num_samples == 50


class TestFailures:
    class Failing(TinyGAN):
        fails_from, fails_to = 2, 99

        def sample(self, n: int) -> Tensor:
            if n > 2 and self.fails_from <= self.current_epoch < self.fails_to:
                raise RuntimeError("no luck")
            return self(torch.randn(n, self.latent_dim))

    def test_a_monitor_warns_at_the_first_failure_and_is_switched_off_after_three(self, tmp_path: Path) -> None:
        monitor, logger = make_monitor(), TensorBoardLogger(tmp_path)
        with pytest.warns(DiagnosticWarning) as warned:
            own = trainer(monitor, max_epochs=7, logger=logger)
            own.fit(self.Failing(), batches())
        assert own.current_epoch == 7
        message = [str(warning.message) for warning in warned if warning.category is DiagnosticWarning]
        assert len(message) == 2
        assert "the run goes on without it this time: ValueError: sample must make 100 images" in message[0]
        assert "the run goes on without it from now on" in message[1]
        assert not monitor.enabled
        assert monitor.evaluations == 2
        assert len(events(logger.log_dir).Tensors("gendiag/cms/failure/text_summary")) == 2

    def test_a_temporary_failure_does_not_switch_a_monitor_off(self) -> None:
        class Passing(self.Failing):  # type: ignore[name-defined, misc]
            fails_to = 4

        monitor = make_monitor()
        with pytest.warns(DiagnosticWarning, match="this time"):
            trainer(monitor, max_epochs=6).fit(Passing(), batches())
        assert monitor.enabled
        assert monitor.evaluations == 4

    def test_on_error_raise_passes_the_error_on(self) -> None:
        with pytest.raises(ValueError, match="no luck"):
            trainer(make_monitor(on_error="raise"), max_epochs=4).fit(self.Failing(), batches())

    def test_a_failing_panel_switches_only_the_panels_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monitor = make_monitor()
        monkeypatch.setattr(monitor, "log_plots", lambda *_: 1 / 0)
        with pytest.warns(DiagnosticWarning, match="goes on with its panels switched off: ZeroDivisionError"):
            trainer(monitor, max_epochs=3).fit(TinyGAN(), batches())
        assert monitor.evaluations == 3

    def test_batches_of_flattened_images_are_compared_and_say_what_to_pass(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        class OfDicts(TinyGAN):
            def training_step(self, batch: Any, batch_idx: int) -> None:
                return super().training_step(batch["picture"], batch_idx)

        loader = torch.utils.data.DataLoader(
            [{"picture": image.flatten()} for image in digits(8)[0][:64]], batch_size=16
        )
        series = torch.utils.data.DataLoader(
            [{"picture": image.flatten(1)} for image in digits(8)[0][:64]], batch_size=16
        )
        with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
            trainer(make_monitor(), max_epochs=2).fit(OfDicts(), series)
        assert "positions along the last axis. If they are flattened images, pass" in caplog.text
        # flattened images are rows
        with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
            trainer(make_monitor(), max_epochs=2).fit(OfDicts(), loader)
        assert (
            "Rows of 64 features are compared by groups of features. If they are flattened images, pass" in caplog.text
        )
        adapter = ModelAdapter(images=lambda batch: batch["picture"], num_samples=50)
        with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
            trainer(make_monitor(adapter=adapter)).fit(OfDicts(), loader)
        assert "flattened images, let the callable in ModelAdapter(images=...) take (batch) and return" in caplog.text
        adapter = ModelAdapter(images=lambda batch: batch["picture"].unflatten(1, (1, 8, 8)), num_samples=50)
        monitor = make_monitor(adapter=adapter)
        trainer(monitor).fit(OfDicts(), loader)
        assert monitor.evaluations == 2

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"regions": torch.zeros(9, 9, dtype=torch.long)},
                r"generated must be \(N, 1, 9, 9\) to match the region map",
            ),
            ({"adapter": ModelAdapter("nowhere")}, "sample must name a method or submodule of TinyGAN"),
            ({"adapter": ModelAdapter(reference=torch.rand(10, 3, 8, 8))}, r"must return \(2, 3, 8, 8\) data"),
            (
                {
                    "regions": torch.zeros(9, 9, dtype=torch.long),
                    "adapter": ModelAdapter(reference=torch.rand(10, 1, 8, 8)),
                },
                "must be",
            ),
            ({"per_class": True}, "per_class must go with a sampler that takes labels"),
        ],
    )
    def test_an_invalid_configuration_raises_an_error_before_training(
        self, options: dict[str, Any], message: str
    ) -> None:
        model = TinyGAN()
        before = [parameter.clone() for parameter in model.parameters()]
        with pytest.raises(ValueError, match=message):
            trainer(make_monitor(**options)).fit(model, batches())
        assert all(map(torch.equal, model.parameters(), before))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"every_n_epochs": 0}, "every_n_epochs must be at least 1, got 0"),
            ({"on_error": "ignore"}, "on_error must be 'warn' or 'raise'"),
            ({"bandwidth": -1.0}, "bandwidth must be"),
            ({"null_splits": 0}, "null_splits must be at least 2"),
        ],
    )
    def test_invalid_arguments_raise_an_error_at_once(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make_monitor(**options)

    def test_a_warning_reports_samples_whose_size_is_not_that_of_the_batches(self) -> None:
        class Larger(TinyGAN):
            def sample(self, n: int) -> Tensor:
                return 2 * torch.rand(n, 1, 9, 9) - 1

        with pytest.warns(DiagnosticWarning, match=r"self.sample\(n\) fails .* must return \(2, 1, 8, 8\) data .*9, 9"):
            trainer(make_monitor(adapter=ModelAdapter("sample")), max_epochs=1).fit(Larger(), batches())

    @pytest.mark.parametrize("kind", ["constant", "nan", "one image"])
    def test_degenerate_samples_are_flagged(self, kind: str) -> None:
        class Degenerate(TinyGAN):
            def sample(self, n: int) -> Tensor:
                if kind == "one image":
                    return digits(8)[0][:1].expand(n, -1, -1, -1)
                return torch.full((n, 1, 8, 8), math.nan if kind == "nan" else 0.3)

        monitor, numbers = make_monitor(), Numbers()
        stopping = CollapseStopping()
        with (
            pytest.warns(CollapseWarning, match="nan or inf since the first evaluation")
            if kind == "nan"
            else nullcontext()
        ):
            trainer(monitor, stopping, numbers).fit(Degenerate(), batches())
        assert monitor.evaluations == 2
        assert numbers.rows[-1]["gendiag/cms/invalid"] == float(kind == "nan")
        if kind != "nan":
            assert numbers.rows[-1]["gendiag/cms/worst"] < 0.95

    def test_constant_real_images_are_flagged(self) -> None:
        loader = torch.utils.data.DataLoader([torch.ones(1, 8, 8)] * 64, batch_size=16)
        with pytest.warns(UserWarning, match="the reference images never vary|all images are equal"):
            monitor = make_monitor(adapter=ModelAdapter(num_samples=50))
            trainer(monitor).fit(TinyGAN(), loader)
        assert monitor.evaluations == 2


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
class TestCheckpoints:
    def fit(self, folder: Path, *callbacks: Any, epochs: int, ckpt: Any = None, **options: Any) -> Any:
        own = trainer(
            *callbacks, ModelCheckpoint(folder / str(epochs)), max_epochs=epochs, enable_checkpointing=True, **options
        )
        own.fit(TinyGAN(), batches(), ckpt_path=ckpt)
        return own

    def test_the_map_the_reference_and_the_counts_are_restored(self, tmp_path: Path) -> None:
        first = make_monitor()
        path = self.fit(tmp_path, first, CollapseStopping(), epochs=2).checkpoint_callback.best_model_path
        assert torch.load(path, weights_only=True)["callbacks"][first.state_key]["evaluations"] == 2
        second = make_monitor()
        self.fit(tmp_path, second, CollapseStopping(), epochs=3, ckpt=path)
        assert second.evaluations == 3
        assert second.region_map == first.region_map
        assert torch.equal(first.view.reference.images, second.view.reference.images)  # type: ignore[union-attr]
        assert all(len(curve.values) == 3 for curve in second.session.history.curves("cms").values())

    def test_the_callbacks_may_be_added_later(self, tmp_path: Path) -> None:
        path = self.fit(tmp_path, epochs=1).checkpoint_callback.best_model_path
        monitor = make_monitor()
        self.fit(tmp_path, monitor, CollapseStopping(), epochs=2, ckpt=path)
        assert monitor.evaluations == 1

    def test_the_callbacks_may_be_removed(self, tmp_path: Path) -> None:
        path = self.fit(tmp_path, make_monitor(), CollapseStopping(), epochs=1).checkpoint_callback.best_model_path
        with warnings.catch_warnings():
            # Lightning warns that callbacks of the checkpoint are missing
            warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
            assert self.fit(tmp_path, epochs=2, ckpt=path).current_epoch == 2

    def test_two_monitors_of_one_class_may_be_used_together(self, tmp_path: Path) -> None:
        one, two = make_monitor(), make_monitor(name="cms_halves", regions=HALVES, adapter=None)
        numbers = Numbers()
        self.fit(tmp_path, one, two, numbers, epochs=1)
        assert one.view is two.view
        assert "gendiag/cms_halves/region_1" in numbers.rows[0]
        assert "gendiag/cms/region_2" in numbers.rows[0]


def test_monitors_share_their_samples() -> None:
    calls = []

    class Counting(TinyGAN):
        def sample(self, n: int) -> Tensor:
            calls.append(n)
            return self(torch.randn(n, self.latent_dim))

    one, two = CosineMeanSimilarityMonitor(num_regions=2), CosineMeanSimilarityMonitor(num_regions=3, name="other")
    trainer(one, two, max_epochs=1).fit(Counting(), batches())
    # two samples are tried, sixteen are timed, and then both monitors share eight chunks
    assert calls == [2, 16] + [128] * 8


def test_features_may_replace_pixels() -> None:
    # features that do not depend on positions
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def features(images: Tensor) -> Tensor:
        with torch.no_grad():
            return network(images).flatten(1)[:, :, None, None]

    class Shifted(ScriptedGenerator):
        def sample(self, n: int) -> Tensor:
            return super().sample(n).roll((2, 3), (2, 3))

    adapter = ModelAdapter(
        sample=lambda module, n: features(module.sample(n)), images=lambda batch: features(batch[0]), num_samples=500
    )
    by_pixels = CosineMeanSimilarityMonitor(num_regions=1, adapter=ModelAdapter(num_samples=500), name="pixels")
    by_features = CosineMeanSimilarityMonitor(num_regions=1, adapter=adapter, name="features")
    trainer(by_pixels, by_features, max_epochs=1).fit(Shifted(size=16), batches(16, 500))
    # shifted images have the same features as real images, but other pixels
    assert float(by_features.result.image) > 0.99
    assert abs(float(by_features.result.image_z)) < 4
    assert float(by_pixels.result.image_z) < -50


def test_classes_are_evaluated_when_the_sampler_takes_labels() -> None:
    class Conditional(ScriptedGenerator):
        def sample(self, n: int, labels: Tensor) -> Tensor:  # type: ignore[override]
            images, known = digits(16)
            return torch.stack([images[known == label][int(torch.randint(100, ()))] for label in labels.tolist()])

    monitor = CosineMeanSimilarityMonitor(
        num_regions=2, per_class=True, adapter=ModelAdapter(conditional=True, reference=digits(16), num_samples=600)
    )
    trainer(monitor, max_epochs=1).fit(Conditional(), batches(16))
    assert monitor.result.classes.shape == (10, 3)
    assert float(monitor.result.classes.min()) > 0.9
    scalars = monitor.result.scalars()
    assert float(scalars["worst_class"]) == min(float(scalars[f"class_{k}"]) for k in range(10))


def test_images_are_not_compared_within_a_million_classes() -> None:
    adapter = ModelAdapter(
        sample=lambda module, n, labels: module(torch.randn(n, 4)), conditional=True, num_samples=16,
        reference=(digits(8)[0][:64], 10**6 * (torch.arange(64) % 2)),
    )  # fmt: skip
    monitor = CosineMeanSimilarityMonitor(num_regions=2, per_class=True, adapter=adapter)
    with pytest.warns(
        DiagnosticWarning, match=r"labels must be less than 1,000 with per_class=True, got 1,000,000\. To"
    ):
        trainer(monitor, max_epochs=1).fit(TinyGAN(), batches())
    assert not monitor.enabled


def test_a_lazy_layer_that_is_never_called_is_no_failure() -> None:
    class Lazy(TinyGAN):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.LazyLinear(3)

        def configure_optimizers(self) -> Any:
            return [torch.optim.Adam(part.parameters()) for part in (self.generator, self.discriminator)]

    monitor = make_monitor(on_error="raise")
    trainer(monitor, max_epochs=2).fit(Lazy(), batches())
    assert monitor.evaluations == 2


def test_too_few_images_are_reported_without_a_warning_of_torchmetrics() -> None:
    # the second monitor asks for the images of which the first one found too few
    shared = ModelAdapter(num_samples=100, num_reference=60)
    monitors = make_monitor(adapter=shared), make_monitor(adapter=shared, name="other")
    with pytest.warns(DiagnosticWarning, match="the reference must hold at least 4 finite images, got 3") as caught:
        trainer(*monitors, max_epochs=1).fit(TinyGAN(), batches(n=3, batch_size=3))
    assert [str(w.message) for w in caught if "metric Rows" in str(w.message)] == []


def test_an_unreadable_batch_is_ignored_once_the_reference_is_complete() -> None:
    calls = iter(range(1000))

    def images(batch: Any) -> Any:
        return "nothing" if next(calls) == 2 else batch[0]

    monitor = make_monitor(adapter=ModelAdapter(images=images, num_samples=64, num_reference=48))
    trainer(monitor, max_epochs=3).fit(TinyGAN(), batches())
    assert monitor.enabled
    assert monitor.evaluations == 3


def test_random_numbers_in_the_users_callables_do_not_affect_training() -> None:
    seen = []

    def dithered(batch: Any) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return batch[0] + torch.rand_like(batch[0]) / 255

    monitor = make_monitor(adapter=ModelAdapter(images=dithered, num_samples=64, num_reference=60))
    torch.testing.assert_close(state_after_training(monitor), state_after_training(), rtol=0, atol=0)
    assert monitor.evaluations == 3
    assert seen
    assert not any(seen)


def test_samples_come_from_the_current_weights() -> None:
    weights = []

    class Counting(TinyGAN):
        def sample(self, n: int) -> Tensor:
            weights.append(self.discriminator[1].weight.detach().clone())
            return self(torch.randn(n, self.latent_dim))

    adapter = ModelAdapter(num_samples=8, num_reference=16)
    steps, epochs = (
        make_monitor(adapter=adapter, every_n_train_steps=1, name="steps"),
        make_monitor(adapter=adapter, name="epochs"),
    )
    trainer(steps, epochs, max_epochs=1).fit(Counting(), batches())
    # one call tries the sampler, and each of the four batches has one, since the weights change in between
    assert len(weights) == 5
    assert all(not torch.equal(a, b) for a, b in pairwise(weights))


class TestContainedErrors:
    """Errors outside the evaluation itself do not end the run."""

    def test_a_text_that_cannot_be_logged_raises_a_warning(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any) -> None:
            raise OSError("no space left")

        monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_text", full)
        adapter = ModelAdapter(num_samples=64, num_reference=60)
        diagnostics = GenerativeDiagnostics(None, adapter=adapter, max_overhead=None, log_images=False)
        own = trainer(diagnostics, max_epochs=2, logger=TensorBoardLogger(tmp_path))
        with pytest.warns(DiagnosticWarning, match="gendiag/attached could not be logged: no space left"):
            own.fit(TinyGAN(), batches())
        assert own.current_epoch == 2

    def test_scalars_that_raise_an_error_raise_a_warning(self) -> None:
        class Broken(CosineMeanSimilarityMonitor):
            def scalars(self, result: Any) -> dict[str, Tensor]:
                raise IndexError("none there")

        monitor = Broken(num_regions=2, adapter=ModelAdapter(num_samples=64, num_reference=60))
        with pytest.warns(DiagnosticWarning, match="IndexError: none there"):
            trainer(monitor, max_epochs=2).fit(TinyGAN(), batches())
        assert monitor.evaluations == 0

    def test_an_incomplete_state_in_a_checkpoint_raises_a_warning(self, tmp_path: Path) -> None:
        first = trainer(make_monitor(), max_epochs=1)
        first.fit(TinyGAN(), batches())
        first.save_checkpoint(tmp_path / "whole.ckpt")
        state = torch.load(tmp_path / "whole.ckpt", weights_only=True)
        del state["callbacks"]["CosineMeanSimilarityMonitor[cms]"]["evaluations"]
        torch.save(state, tmp_path / "old.ckpt")
        monitor = make_monitor()
        with pytest.warns(DiagnosticWarning, match="begins anew, since its state in the checkpoint cannot be read"):
            trainer(monitor, max_epochs=2).fit(TinyGAN(), batches(), ckpt_path=tmp_path / "old.ckpt", **loading())
        assert monitor.latest is not None

    def test_a_state_from_before_the_first_fit_is_taken_over_silently(self) -> None:
        monitor = make_monitor()
        with warnings.catch_warnings():
            warnings.simplefilter("error", DiagnosticWarning)
            monitor.load_state_dict(make_monitor().state_dict())
        trainer(monitor, max_epochs=2).fit(TinyGAN(), batches())
        assert monitor.evaluations == 2

    def test_a_state_from_before_the_first_fit_undoes_the_evaluations_since(self) -> None:
        monitor, model = make_monitor(), TinyGAN()
        state = monitor.state_dict()
        own = trainer(monitor, max_epochs=3)
        own.fit(model, batches())
        monitor.load_state_dict(state)
        own.fit_loop.max_epochs = 5
        own.fit(model, batches())
        assert monitor.evaluations == 2
        assert len(monitor.session.history.curves("cms")["image"].values) == 2

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("tune", ["lr", "batch size"])
    def test_a_tuner_raises_no_warning(self, tune: str) -> None:
        class Tuned(TinyGAN):
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization, self.batch_size, self.lr = True, 8, 1e-3

            def train_dataloader(self) -> Any:
                return batches(batch_size=self.batch_size)

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                return self.generator(torch.randn(4, 4)).square().mean()

            def configure_optimizers(self) -> Any:
                return torch.optim.Adam(self.generator.parameters(), self.lr)

        diagnostics = GenerativeDiagnostics(max_overhead=None, num_samples=16)
        own = trainer(diagnostics, max_epochs=2, enable_model_summary=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*begins anew")
            if tune == "lr":
                Tuner(own).lr_find(Tuned(), num_training=8)
            else:
                Tuner(own).scale_batch_size(Tuned(), max_trials=2)
        own.fit(Tuned())
        assert diagnostics.monitors["cms"].evaluations == 2
