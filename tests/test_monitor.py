from __future__ import annotations

import math
import random
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn

from example_models.data import digits
from lightning_gendiag import (
    CollapseStopping,
    CosineMeanSimilarity,
    CosineMeanSimilarityMonitor,
    DiagnosticWarning,
    GenerativeDiagnostics,
    Probe,
    RegionMap,
)
from tests.conftest import ScriptedGenerator, TinyGAN, batches, trainer
from tests.test_board_and_panels import events, layout

HALVES = RegionMap(torch.arange(8).ge(4).long().repeat(8, 1))


def monitor(**options: Any) -> CosineMeanSimilarityMonitor:
    return CosineMeanSimilarityMonitor(
        **({"num_regions": 3, "probe": Probe(num_samples=100, num_reference=60)} | options)
    )


class Numbers(Callback):
    """What ``callback_metrics`` holds after each epoch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.rows.append({key: float(v) for key, v in trainer.callback_metrics.items() if key.startswith("gendiag")})


def state_after_training(*callbacks: Any, module: Any = TinyGAN, size: int = 8) -> list[Any]:
    seed_everything(3, verbose=False)
    model = module()
    own = trainer(*callbacks, max_epochs=3)
    own.fit(model, batches(size))
    optimizers = [optimizer.state_dict()["state"] for optimizer in own.optimizers]
    return [
        model.state_dict(),
        optimizers,
        [part.training for part in model.modules()],
        [parameter.grad for parameter in model.parameters()],
        torch.get_rng_state(),
        torch.tensor([random.random(), np.random.rand()]),
    ]


def test_training_is_bit_for_bit_the_same_with_and_without() -> None:
    expected = state_after_training()
    for callbacks in (
        [monitor(), CollapseStopping()],
        [CollapseStopping(), monitor(every_n_train_steps=3)],
        [monitor(probe=Probe(reference=batches(), num_samples=64))],
    ):
        found = state_after_training(*callbacks)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_the_first_look_finds_regions_and_each_look_is_logged() -> None:
    watched, numbers = monitor(), Numbers()
    trainer(watched, numbers, max_epochs=3).fit(TinyGAN(), batches())
    assert watched.region_map is not None
    assert watched.region_map.num_regions == 3
    assert len(numbers.rows) == 3
    assert set(numbers.rows[0]) == {
        f"gendiag/cms/{name}"
        for name in ["image", "product", "residual", "worst", "median", "best", "invalid", "z_image", "z_worst"]
        + [f"region_{r}" for r in range(3)]
    }
    for row in numbers.rows:
        assert row["gendiag/cms/worst"] == min(row[f"gendiag/cms/region_{r}"] for r in range(3))


def test_the_numbers_are_those_of_the_function() -> None:
    images = digits(8)[0]
    watched = monitor(regions=HALVES, probe=Probe(num_samples=100, reference=images, num_reference=300))
    model = TinyGAN()
    trainer(watched, max_epochs=1).fit(model, batches())
    assert watched.probe is not None
    assert watched.probe.reference is not None
    metric = CosineMeanSimilarity(HALVES)
    metric.update(watched.probe.reference.images, real=True)
    model.eval()
    with torch.no_grad():
        torch.manual_seed(0)
        metric.update(model(torch.randn(100, 4)), real=False)
    torch.testing.assert_close(watched.result, metric.compute(), equal_nan=True)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [3, 7, 11, 15]),
        ({"every_n_epochs": 2}, [7, 15]),
        ({"warmup_epochs": 2}, [11, 15]),
        # at the third step the reference is not complete
        ({"every_n_train_steps": 3}, [5, 8, 11, 14]),
        ({"every_n_train_steps": 4, "warmup_epochs": 1}, [7, 11, 15]),
    ],
)
def test_the_schedule(options: dict[str, Any], steps: list[int], tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    watched = monitor(**options)
    trainer(watched, max_epochs=4, logger=logger, log_every_n_steps=1).fit(TinyGAN(), batches())
    accumulator = events(logger.log_dir)
    assert [event.step for event in accumulator.Scalars("gendiag/cms/image")] == steps
    # two optimizers: the axis is that of self.log, and not of global_step
    assert [event.step for event in accumulator.Scalars("loss_g")] == list(range(16))
    assert [event.step for event in accumulator.Images("gendiag/cms/panel")] == steps


def test_tensorboard_holds_curves_charts_map_and_panel(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    trainer(monitor(), logger=logger).fit(TinyGAN(), batches())
    accumulator = events(logger.log_dir)
    assert len(accumulator.Scalars("gendiag/cms/seconds")) == 2
    charts = layout(accumulator).category[0].chart
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
    trainer(checkpoint, monitor(), numbers, max_epochs=3, enable_checkpointing=True).fit(module(), *loaders)
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
def test_it_runs_with_every_logger_and_none_and_in_every_mode(options: dict[str, Any], tmp_path: Path) -> None:
    loggers = {"csv": CSVLogger(tmp_path), "two": [TensorBoardLogger(tmp_path / "1"), CSVLogger(tmp_path / "2")]}
    options = options | ({"logger": loggers.get(options["logger"], False)} if "logger" in options else {})
    watched, stopping = monitor(on_error="raise"), CollapseStopping()
    own = trainer(watched, stopping, **options)
    own.fit(WithValidation(), batches(), batches(shuffle=False))
    assert watched.evaluations == (1 if own.fast_dev_run else 2)
    assert watched.result.image.dtype == torch.float32
    assert watched.result.image.isfinite()
    for logger in own.loggers:
        if isinstance(logger, CSVLogger):
            assert "gendiag/cms/worst" in (Path(logger.log_dir) / "metrics.csv").read_text()


class CliGAN(TinyGAN):
    pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_lightning_cli_with_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        probe:
          class_path: lightning_gendiag.Probe
          init_args: {sample: forward, num_samples: 50}
    - class_path: lightning_gendiag.CollapseStopping
      init_args: {action: warn}
"""
    )
    monkeypatch.setattr("sys.argv", ["train.py", "--config", str(config)])
    cli = LightningCLI(CliGAN, Data, run=False, save_config_callback=None, seed_everything_default=1)
    cli.trainer.fit(cli.model, cli.datamodule)
    watched = next(c for c in cli.trainer.callbacks if isinstance(c, CosineMeanSimilarityMonitor))
    assert watched.evaluations == 1
    assert watched.given_probe is not None
    assert watched.given_probe.num_samples == 50


class TestFailures:
    class Failing(TinyGAN):
        fails_from, fails_to = 2, 99

        def sample(self, n: int) -> Tensor:
            if n > 2 and self.fails_from <= self.current_epoch < self.fails_to:
                raise RuntimeError("no luck")
            return self(torch.randn(n, self.latent_dim))

    def test_a_failure_is_told_once_and_switches_off_after_three(self, tmp_path: Path) -> None:
        watched, logger = monitor(), TensorBoardLogger(tmp_path)
        with pytest.warns(DiagnosticWarning) as told:
            own = trainer(watched, max_epochs=7, logger=logger)
            own.fit(self.Failing(), batches())
        assert own.current_epoch == 7
        words = [str(warning.message) for warning in told if warning.category is DiagnosticWarning]
        assert len(words) == 2
        assert "the run goes on without it this time: ValueError: sample must make 100 images" in words[0]
        assert "the run goes on without it from now on" in words[1]
        assert not watched.enabled
        assert watched.evaluations == 2
        assert len(events(logger.log_dir).Tensors("gendiag/cms/failure/text_summary")) == 2

    def test_a_failure_that_passes_is_forgiven(self) -> None:
        class Passing(self.Failing):  # type: ignore[name-defined, misc]
            fails_to = 4

        watched = monitor()
        with pytest.warns(DiagnosticWarning, match="this time"):
            trainer(watched, max_epochs=6).fit(Passing(), batches())
        assert watched.enabled
        assert watched.evaluations == 4

    def test_raise_is_for_those_who_debug(self) -> None:
        with pytest.raises(ValueError, match="no luck"):
            trainer(monitor(on_error="raise"), max_epochs=4).fit(self.Failing(), batches())

    def test_a_picture_that_fails_costs_the_pictures_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        watched = monitor()
        monkeypatch.setattr(watched, "_panel", lambda *_: 1 / 0)
        with pytest.warns(DiagnosticWarning, match="with its pictures switched off: ZeroDivisionError"):
            trainer(watched, max_epochs=3).fit(TinyGAN(), batches())
        assert watched.evaluations == 3

    def test_batches_without_images_are_told_and_cost_no_run(self) -> None:
        class OfDicts(TinyGAN):
            def training_step(self, batch: Any, batch_idx: int) -> None:
                return super().training_step(batch["picture"], batch_idx)

        loader = torch.utils.data.DataLoader([{"picture": image} for image in digits(8)[0][:64]], batch_size=16)
        with pytest.warns(
            DiagnosticWarning, match=r"a batch must hold .* got \{picture: \(16, 1, 8, 8\)\}. To fix this"
        ):
            trainer(monitor(), max_epochs=2).fit(OfDicts(), loader)
        watched = monitor(probe=Probe(images=lambda batch: batch["picture"], num_samples=50))
        trainer(watched).fit(OfDicts(), loader)
        assert watched.evaluations == 2

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (
                {"regions": torch.zeros(9, 9, dtype=torch.long)},
                r"generated must be \(N, 1, 9, 9\) to match the region map",
            ),
            ({"probe": Probe("nowhere")}, "sample must name a method or submodule of TinyGAN"),
            ({"probe": Probe(reference=torch.rand(10, 3, 8, 8))}, "must have the reference's shape"),
            ({"regions": HALVES, "probe": Probe(reference=torch.rand(10, 1, 16, 16))}, "the reference must be"),
            ({"per_class": True}, "per_class must go with a sampler that takes labels"),
        ],
    )
    def test_a_wrong_configuration_is_refused_before_training(self, options: dict[str, Any], words: str) -> None:
        model = TinyGAN()
        before = [parameter.clone() for parameter in model.parameters()]
        with pytest.raises(ValueError, match=words):
            trainer(monitor(**options)).fit(model, batches())
        assert all(map(torch.equal, model.parameters(), before))

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"every_n_epochs": 0}, "every_n_epochs and every_n_train_steps must be at least 1"),
            ({"on_error": "ignore"}, "on_error must be 'warn' or 'raise'"),
            ({"bandwidth": -1.0}, "bandwidth must be"),
            ({"null_splits": 0}, "null_splits must be at least 2"),
        ],
    )
    def test_wrong_arguments_are_refused_at_once(self, options: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            monitor(**options)

    def test_images_of_another_size_than_the_batches_are_told(self) -> None:
        class Larger(TinyGAN):
            def sample(self, n: int) -> Tensor:
                return 2 * torch.rand(n, 1, 9, 9) - 1

        with pytest.warns(DiagnosticWarning, match=r"generated must be \(N, 1, 8, 8\) to match the region map"):
            trainer(monitor(), max_epochs=1).fit(Larger(), batches())

    @pytest.mark.parametrize("kind", ["constant", "nan", "one image"])
    def test_degenerate_samples_are_flagged(self, kind: str) -> None:
        class Degenerate(TinyGAN):
            def sample(self, n: int) -> Tensor:
                if kind == "one image":
                    return digits(8)[0][:1].expand(n, -1, -1, -1)
                return torch.full((n, 1, 8, 8), math.nan if kind == "nan" else 0.3)

        watched, numbers = monitor(), Numbers()
        trainer(watched, CollapseStopping(), numbers).fit(Degenerate(), batches())
        assert watched.evaluations == 2
        assert numbers.rows[-1]["gendiag/cms/invalid"] == float(kind == "nan")
        if kind != "nan":
            assert numbers.rows[-1]["gendiag/cms/worst"] < 0.95

    def test_constant_real_images_are_flagged(self) -> None:
        loader = torch.utils.data.DataLoader([torch.ones(1, 8, 8)] * 64, batch_size=16)
        with pytest.warns(UserWarning, match="the reference images never vary|all images are equal"):
            watched = monitor(probe=Probe(num_samples=50))
            trainer(watched).fit(TinyGAN(), loader)
        assert watched.evaluations == 2


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
class TestCheckpoints:
    def fit(self, folder: Path, *callbacks: Any, epochs: int, ckpt: Any = None, **options: Any) -> Any:
        own = trainer(
            *callbacks, ModelCheckpoint(folder / str(epochs)), max_epochs=epochs, enable_checkpointing=True, **options
        )
        own.fit(TinyGAN(), batches(), ckpt_path=ckpt)
        return own

    def test_map_reference_and_counts_travel(self, tmp_path: Path) -> None:
        first = monitor()
        path = self.fit(tmp_path, first, CollapseStopping(), epochs=2).checkpoint_callback.best_model_path
        assert torch.load(path, weights_only=True)["callbacks"][first.state_key]["evaluations"] == 2
        second = monitor()
        self.fit(tmp_path, second, CollapseStopping(), epochs=3, ckpt=path)
        assert second.evaluations == 3
        assert second.region_map == first.region_map
        assert first.probe is not None
        assert second.probe is not None
        assert torch.equal(first.probe.reference.images, second.probe.reference.images)  # type: ignore[union-attr]
        assert len(second._curve) == 3

    def test_the_plugin_may_be_added_later(self, tmp_path: Path) -> None:
        path = self.fit(tmp_path, epochs=1).checkpoint_callback.best_model_path
        watched = monitor()
        self.fit(tmp_path, watched, CollapseStopping(), epochs=2, ckpt=path)
        assert watched.evaluations == 1

    def test_the_plugin_may_be_removed(self, tmp_path: Path) -> None:
        path = self.fit(tmp_path, monitor(), CollapseStopping(), epochs=1).checkpoint_callback.best_model_path
        with warnings.catch_warnings():
            # Lightning says that callbacks of the checkpoint are missing
            warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
            assert self.fit(tmp_path, epochs=2, ckpt=path).current_epoch == 2

    def test_two_monitors_of_a_kind_live_side_by_side(self, tmp_path: Path) -> None:
        one, two = monitor(), monitor(name="cms_halves", regions=HALVES, probe=None)
        numbers = Numbers()
        self.fit(tmp_path, one, two, numbers, epochs=1)
        assert one.probe is two.probe
        assert "gendiag/cms_halves/region_1" in numbers.rows[0]
        assert "gendiag/cms/region_2" in numbers.rows[0]


def test_monitors_share_one_draw() -> None:
    calls = []

    class Counting(TinyGAN):
        def sample(self, n: int) -> Tensor:
            calls.append(n)
            return self(torch.randn(n, self.latent_dim))

    one, two = CosineMeanSimilarityMonitor(num_regions=2), CosineMeanSimilarityMonitor(num_regions=3, name="other")
    trainer(one, two, max_epochs=1).fit(Counting(), batches())
    # tried once with two, then eight chunks for both
    assert calls == [2] + [128] * 8


def test_a_feature_space_takes_the_place_of_pixels() -> None:
    # features that do not care where things stand, as the README has it
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def features(images: Tensor) -> Tensor:
        with torch.no_grad():
            return network(images).flatten(1)[:, :, None, None]

    class Shifted(ScriptedGenerator):
        def sample(self, n: int) -> Tensor:
            return super().sample(n).roll((2, 3), (2, 3))

    probe = Probe(
        sample=lambda module, n: features(module.sample(n)), images=lambda batch: features(batch[0]), num_samples=500
    )
    where = CosineMeanSimilarityMonitor(num_regions=1, probe=Probe(num_samples=500), name="pixels")
    what = CosineMeanSimilarityMonitor(num_regions=1, probe=probe, name="features")
    trainer(where, what, max_epochs=1).fit(Shifted(size=16), batches(16, 500))
    # images that were moved are as real to the features, and not to the pixels
    assert float(what.result.image) > 0.99
    assert abs(float(what.result.image_z)) < 4
    assert float(where.result.image_z) < -50


def test_classes_are_followed_when_the_sampler_takes_labels() -> None:
    class Conditional(ScriptedGenerator):
        def sample(self, n: int, labels: Tensor) -> Tensor:  # type: ignore[override]
            images, known = digits(16)
            return torch.stack([images[known == label][int(torch.randint(100, ()))] for label in labels.tolist()])

    watched = CosineMeanSimilarityMonitor(
        num_regions=2, per_class=True, probe=Probe(conditional=True, reference=digits(16), num_samples=600)
    )
    trainer(watched, max_epochs=1).fit(Conditional(), batches(16))
    assert watched.result.classes.shape == (10, 3)
    assert float(watched.result.classes.min()) > 0.9
    scalars = watched.result.scalars()
    assert float(scalars["worst_class"]) == min(float(scalars[f"class_{k}"]) for k in range(10))


def test_one_batch_that_cannot_be_read_costs_nothing_once_there_is_a_reference() -> None:
    calls = iter(range(1000))

    def images(batch: Any) -> Any:
        return "nothing" if next(calls) == 2 else batch[0]

    watched = monitor(probe=Probe(images=images, num_samples=64, num_reference=48))
    trainer(watched, max_epochs=3).fit(TinyGAN(), batches())
    assert watched.enabled
    assert watched.evaluations == 3


def test_what_the_users_callables_do_leaves_no_trace() -> None:
    seen = []

    def dithered(batch: Any) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return batch[0] + torch.rand_like(batch[0]) / 255

    watched = monitor(probe=Probe(images=dithered, num_samples=64, num_reference=60))
    torch.testing.assert_close(state_after_training(watched), state_after_training(), rtol=0, atol=0)
    assert watched.evaluations == 3
    assert seen
    assert not any(seen)


def test_samples_are_of_the_module_as_it_is() -> None:
    drawn = []

    class Counting(TinyGAN):
        def sample(self, n: int) -> Tensor:
            drawn.append(self.discriminator[1].weight.detach().clone())
            return self(torch.randn(n, self.latent_dim))

    probe = Probe(num_samples=8, num_reference=16)
    steps, epochs = monitor(probe=probe, every_n_train_steps=1, name="steps"), monitor(probe=probe, name="epochs")
    trainer(steps, epochs, max_epochs=1).fit(Counting(), batches())
    # tried, then after each of four batches, the last of which ends the epoch; nothing is held while training goes on
    assert len(drawn) == 5
    assert all(not torch.equal(a, b) for a, b in pairwise(drawn))
    probe.forget()
    assert probe._drawn is None


class TestContained:
    """What goes wrong beside the evaluation itself."""

    def test_text_that_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> None:
            raise OSError("no space left")

        monkeypatch.setattr("lightning_gendiag.board.Board.text", full)
        probe = Probe(num_samples=64, num_reference=60)
        watched = GenerativeDiagnostics(None, probe=probe, max_share=None, draw_pictures=False)
        own = trainer(watched, max_epochs=2, logger=TensorBoardLogger(tmp_path))
        with pytest.warns(DiagnosticWarning, match="attached could not be logged: no space left"):
            own.fit(TinyGAN(), batches())
        assert own.current_epoch == 2

    def test_numbers_that_cannot_be_told(self) -> None:
        class Broken(CosineMeanSimilarityMonitor):
            def scalars(self, result: Any) -> dict[str, Tensor]:
                raise IndexError("none there")

        watched = Broken(num_regions=2, probe=Probe(num_samples=64, num_reference=60))
        with pytest.warns(DiagnosticWarning, match="IndexError: none there"):
            trainer(watched, max_epochs=2).fit(TinyGAN(), batches())
        assert watched.evaluations == 0

    def test_a_checkpoint_of_another_make(self, tmp_path: Path) -> None:
        first = trainer(monitor(), max_epochs=1)
        first.fit(TinyGAN(), batches())
        first.save_checkpoint(tmp_path / "whole.ckpt")
        state = torch.load(tmp_path / "whole.ckpt", weights_only=True)
        del state["callbacks"]["CosineMeanSimilarityMonitor[cms]"]["curve"]
        torch.save(state, tmp_path / "old.ckpt")
        watched = monitor()
        with pytest.warns(DiagnosticWarning, match="begins anew: what a checkpoint holds of it could not be read"):
            trainer(watched, max_epochs=2).fit(TinyGAN(), batches(), ckpt_path=tmp_path / "old.ckpt", weights_only=True)
        assert watched.latest is not None
