"""Sessions: what monitors share, how a second fit starts, and how other callbacks use the logged keys."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from example_models.data import digits
from lightning_gendiag import (
    CollapseStopping,
    CosineMeanSimilarityMonitor,
    GenerativeDiagnostics,
    KStarMonitor,
    ModelAdapter,
    PosteriorKLMonitor,
    cosine_mean_similarity,
)
from lightning_gendiag.callbacks.logging import DiagnosticWarning
from tests.helpers.models import ScriptedGenerator, SmallVAE, TinyGAN
from tests.helpers.running import batches, loading, trainer

pytestmark = pytest.mark.filterwarnings("ignore:generated images span")

WHOLE = torch.zeros(8, 8, dtype=torch.long)


def cms(**options: Any) -> CosineMeanSimilarityMonitor:
    return CosineMeanSimilarityMonitor(
        **({"regions": WHOLE, "adapter": ModelAdapter(num_samples=64, num_reference=64)} | options)
    )


def test_two_monitors_with_one_name_raise_an_error() -> None:
    with pytest.raises(ValueError, match=r"name must be unique .* got 'mine' twice. .*KStarMonitor\(name=...\)"):
        trainer(cms(name="mine"), KStarMonitor("discriminator.1", name="mine")).fit(TinyGAN(), batches())


def test_the_first_monitor_drives_the_session_and_all_evaluate_once() -> None:
    one, two = cms(), cms(name="other", every_n_epochs=2)
    trainer(one, two, max_epochs=4).fit(TinyGAN(), batches())
    assert one.session is two.session
    assert one.session.leads(one)
    assert (one.evaluations, two.evaluations) == (4, 2)


def test_a_session_is_deleted_with_its_trainer() -> None:
    def trained() -> Any:
        own = trainer(cms(), max_epochs=1)
        own.fit(TinyGAN(), batches())
        return weakref.ref(own), weakref.ref(own.callbacks[0].session)

    dead = trained()
    gc.collect()
    assert [reference() for reference in dead] == [None, None]


@pytest.mark.parametrize("accumulated", [1, 3, 4])
def test_steps_of_an_optimizer_are_counted_and_not_batches(accumulated: int) -> None:
    seen = []

    class Counting(SmallVAE):
        steps = 0

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.steps += 1

    class Peek(CosineMeanSimilarityMonitor):
        def update(self, view: Any) -> None:
            super().update(view)
            seen.append((view.subject.trained.steps, self.last_step))

    monitor = Peek(WHOLE, every_n_train_steps=2, adapter=ModelAdapter(reference=digits(8)[0], num_samples=32))
    trainer(monitor, max_epochs=4, accumulate_grad_batches=accumulated).fit(Counting(), batches())
    steps = 4 * {1: 4, 3: 2, 4: 1}[accumulated]
    # the axis of the loggers counts from 0
    assert seen == [(step, step - 1) for step in range(2, steps + 1, 2)]


class Inverted(TensorDataset):
    """The same images with inverted values."""

    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return -image, label


def inverted() -> DataLoader[Any]:
    images, labels = (rows[:64] for rows in digits(8))
    return DataLoader(Inverted(images, labels), batch_size=16, shuffle=True)


# models that hardly train are not similar to real images
@pytest.mark.filterwarnings("ignore::lightning_gendiag.CollapseWarning")
class TestAnotherFit:
    def similarity(self, monitor: CosineMeanSimilarityMonitor, images: Tensor) -> float:
        monitor.view.refresh()
        return float(cosine_mean_similarity(monitor.view.samples().images, images, WHOLE).image)

    @pytest.mark.parametrize("options", [{}, {"adapter": None}])
    def test_of_other_data_starts_again_with_these_data(
        self, options: dict[str, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        monitor, stopping = cms(**options), CollapseStopping()
        own = trainer(monitor, stopping, max_epochs=3)
        model = SmallVAE()
        own.fit(model, batches())
        own.fit_loop.max_epochs = 6
        with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
            own.fit(model, inverted())
        assert "The training data are others than before" in caplog.text
        images = digits(8)[0][:64]
        logged = float(own.callback_metrics["gendiag/cms/image"])
        assert logged == pytest.approx(self.similarity(monitor, -images), abs=1e-5)
        assert logged != pytest.approx(self.similarity(monitor, images), abs=1e-2)
        assert monitor.evaluations == len(monitor.session.history.curves("cms")["image"].values) == 3
        assert stopping.judge.evaluations == {"cms": 3}

    def test_of_the_same_data_continues(self) -> None:
        monitor = cms()
        own = trainer(monitor, max_epochs=3)
        model = SmallVAE()
        own.fit(model, batches())
        reference = monitor.view.reference.images.clone()
        own.fit_loop.max_epochs = 6
        own.fit(model, batches())
        assert monitor.evaluations == 6
        assert torch.equal(monitor.view.reference.images, reference)

    def test_by_another_trainer_continues_with_the_same_module(self) -> None:
        monitor, model = cms(), SmallVAE()
        for epochs in (2, 3):
            trainer(monitor, max_epochs=epochs).fit(model, batches())
        assert monitor.evaluations == 5
        assert len(monitor.session.history.curves("cms")["image"].values) == 5

    @pytest.mark.filterwarnings("ignore:Checkpoint directory")
    def test_from_an_older_checkpoint_judges_only_what_comes_after_it(self, tmp_path: Path) -> None:
        monitor, other, stopping, model = cms(), cms(name="other"), CollapseStopping("warn"), SmallVAE()
        checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", auto_insert_metric_name=False, save_top_k=-1)
        own = trainer(monitor, other, stopping, checkpoint, max_epochs=4, enable_checkpointing=True)
        own.fit(model, batches())
        other.warmup_epochs = 5
        own.fit_loop.max_epochs = 5
        own.fit(model, batches(), ckpt_path=tmp_path / "1.ckpt", **loading())
        assert (monitor.evaluations, other.evaluations) == (5, 2)
        assert stopping.judge.evaluations == {"cms": 5, "other": 2}
        assert len(monitor.session.history.curves("other")["image"].values) == 2

    def test_from_an_unreadable_checkpoint_judges_from_the_first_evaluation_on(self, tmp_path: Path) -> None:
        own = trainer(cms(), CollapseStopping("warn"), max_epochs=3)
        own.fit(SmallVAE(), batches())
        own.save_checkpoint(tmp_path / "whole.ckpt")
        state = torch.load(tmp_path / "whole.ckpt", weights_only=True)
        del state["callbacks"]["CosineMeanSimilarityMonitor[cms]"]["evaluations"]
        torch.save(state, tmp_path / "broken.ckpt")
        monitor, stopping = cms(), CollapseStopping("warn")
        again = trainer(monitor, stopping, max_epochs=5)
        with pytest.warns(UserWarning, match="begins anew, since its state in the checkpoint cannot be read"):
            again.fit(SmallVAE(), batches(), ckpt_path=tmp_path / "broken.ckpt", **loading())
        assert monitor.evaluations == len(monitor.session.history.curves("cms")["image"].values) == 2
        assert stopping.judge.evaluations == {"cms": 2}

    def test_from_a_checkpoint_on_other_data_starts_again(self, tmp_path: Path) -> None:
        own = trainer(cms(), max_epochs=2)
        own.fit(SmallVAE(), batches())
        own.save_checkpoint(tmp_path / "a.ckpt")
        monitor = cms()
        fine = trainer(monitor, max_epochs=5)
        fine.fit(SmallVAE(), inverted(), ckpt_path=tmp_path / "a.ckpt", **loading())
        assert monitor.evaluations == 3
        logged = float(fine.callback_metrics["gendiag/cms/image"])
        assert logged == pytest.approx(self.similarity(monitor, -digits(8)[0][:64]), abs=1e-5)

    @pytest.mark.parametrize("automatic", [False, True])
    def test_of_another_module_starts_again(self, automatic: bool) -> None:
        """A new model is much worse than a trained one, which must not raise an alarm."""
        callbacks: list[Any] = [cms(), PosteriorKLMonitor(), CollapseStopping()]
        skipped = ("latent_regions", "regional_primitives", "generation_balance", "manifold_entropy")
        if automatic:
            adapter = ModelAdapter(num_samples=64, num_reference=64)
            callbacks = [GenerativeDiagnostics(adapter=adapter, max_overhead=None, skip=skipped, log_images=False)]
        stopping = callbacks[0].stopping if automatic else callbacks[-1]
        monitor = callbacks[0].monitors["cms"] if automatic else callbacks[0]
        for seed in range(2):
            seed_everything(seed, verbose=False)
            own = trainer(*callbacks, max_epochs=14)
            own.fit(SmallVAE(), batches())
            assert own.current_epoch == 14
            # after so few epochs neither model is similar to real images, which is no change
            assert all(alarm.rule for alarm in stopping.alarms)
            assert monitor.evaluations == 14


class WithValidation(SmallVAE):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_mean", batch[0].mean())


class Keys(Callback):
    """Records whether the key exists at the end of every validation and training epoch."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.seen.append("gendiag/cms/worst" in trainer.callback_metrics)

    on_train_epoch_end = on_validation_end


class Batches(Callback):
    """Counts the batches that ended."""

    state_key = "Batches"

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}


def attributes(callback: Callback) -> set[str]:
    """Returns the names of a callback's attributes, without the logging functions that Lightning adds."""
    return set(vars(callback)) - {"log", "log_dict"}


class TestKeys:
    def fit(self, *callbacks: Any, validation: bool = True, **options: Any) -> Any:
        seed_everything(0, verbose=False)
        own = trainer(*callbacks, **({"max_epochs": 8, "enable_checkpointing": True} | options))
        own.fit(WithValidation(), batches(), *([batches(shuffle=False)] if validation else []))
        return own

    @pytest.mark.parametrize("validation", [True, False])
    @pytest.mark.parametrize(
        ("options", "epochs"),
        [
            ({}, [0, 1, 2, 3, 4, 5, 6, 7]),
            ({"every_n_epochs": 3}, [2, 5]),
            ({"warmup_epochs": 5}, [5, 6, 7]),
            ({"every_n_train_steps": 12}, [2, 5]),
        ],
    )
    def test_a_checkpoint_is_saved_only_for_epochs_with_an_evaluation(
        self, options: dict[str, Any], epochs: list[int], validation: bool, tmp_path: Path
    ) -> None:
        keys = Keys()
        checkpoint = ModelCheckpoint(
            tmp_path, monitor="gendiag/cms/worst", mode="max", save_top_k=-1, auto_insert_metric_name=False,
            filename="{epoch}",
        )  # fmt: skip
        self.fit(cms(**options), keys, checkpoint, validation=validation)
        assert sorted(int(path.stem) for path in tmp_path.glob("*.ckpt")) == epochs
        assert all(math.isfinite(float(score)) for score in checkpoint.best_k_models.values())
        # the key exists from the first epoch on
        assert all(keys.seen)

    @pytest.mark.parametrize("options", [{"val_check_interval": 0.5}, {"check_val_every_n_epoch": 2}])
    def test_the_frequency_of_validation_does_not_matter(self, options: dict[str, Any], tmp_path: Path) -> None:
        checkpoint = ModelCheckpoint(
            tmp_path, monitor="gendiag/cms/worst", mode="max", save_top_k=-1, filename="{epoch}"
        )
        self.fit(cms(), checkpoint, max_epochs=4, **options)
        assert len(list(tmp_path.glob("*.ckpt"))) == 4

    @pytest.mark.parametrize(
        ("options", "steps"),
        [
            ({}, [6, 9, 12, 15, 18, 21, 24]),
            ({"every_n_epochs": 2}, [6, 15, 21, 24]),
            ({"every_n_train_steps": 6}, [6, 12, 18, 24]),
        ],
    )
    def test_a_checkpoint_is_saved_right_after_evaluations_within_epochs(
        self, options: dict[str, Any], steps: list[int], tmp_path: Path
    ) -> None:
        """Else none would be saved where no evaluation comes at the end of an epoch."""
        checkpoint = ModelCheckpoint(
            tmp_path, monitor="gendiag/cms/worst", mode="max", save_top_k=-1, auto_insert_metric_name=False,
            filename="{step}", **options,
        )  # fmt: skip
        monitor, batches_seen = cms(every_n_train_steps=3), Batches()
        self.fit(monitor, checkpoint, batches_seen, max_epochs=6)
        assert sorted(int(path.stem) for path in tmp_path.glob("*.ckpt")) == steps
        entries = {entry.step + 1: entry.value for entry in monitor.session.history.entries("cms", "image")}
        assert set(steps) <= set(entries)
        for step in steps:
            held = torch.load(tmp_path / f"{step}.ckpt", weights_only=True)
            # the callbacks behind the monitors have ended the batch as well
            assert held["callbacks"]["Batches"]["count"] == step

    def test_a_checkpoint_of_the_last_batch_has_the_numbers_of_validation_in_its_name(self, tmp_path: Path) -> None:
        checkpoint = ModelCheckpoint(
            tmp_path, monitor="gendiag/cms/worst", mode="max", save_top_k=-1, auto_insert_metric_name=False,
            filename="{step}={val_mean:.4f}",
        )  # fmt: skip
        own = self.fit(cms(every_n_train_steps=4), checkpoint, max_epochs=2)
        mean = f"{float(own.callback_metrics['val_mean']):.4f}"
        assert mean != "0.0000"
        assert sorted(path.stem for path in tmp_path.glob("*.ckpt")) == [f"4={mean}", f"8={mean}"]

    @pytest.mark.parametrize(
        ("key", "options", "every", "words"),
        [
            ("wurst", {}, 3, "the metric was not evaluated. To fix this, monitor another one, such as gendiag/cms/"),
            ("worst", {}, 99, "the metric was not evaluated. To fix this, evaluate earlier, with every_n_train_steps"),
            (
                "worst",
                {"every_n_train_steps": 5},
                3,
                "none of its evaluations came when it saves. To fix this, pass it",
            ),
        ],
    )
    def test_a_checkpoint_that_was_never_saved_is_named(
        self, key: str, options: dict[str, int], every: int, words: str, tmp_path: Path
    ) -> None:
        checkpoint = ModelCheckpoint(tmp_path, monitor=f"gendiag/cms/{key}", mode="max", **options)
        with pytest.warns(DiagnosticWarning) as caught:
            self.fit(cms(every_n_train_steps=every), checkpoint, max_epochs=3)
        [text] = [str(one.message) for one in caught if "saved no checkpoint" in str(one.message)]
        assert text.startswith(f"ModelCheckpoint(monitor='gendiag/cms/{key}') saved no checkpoint, since {words}")
        assert not checkpoint.best_model_path

    def test_a_checkpoint_that_is_to_save_nothing_is_not_named(self, tmp_path: Path) -> None:
        checkpoint = ModelCheckpoint(tmp_path, monitor="gendiag/cms/worst", mode="max", save_top_k=0)
        # warnings are errors
        self.fit(cms(every_n_train_steps=3), checkpoint, max_epochs=2)

    @pytest.mark.parametrize("first", [True, False])
    @pytest.mark.parametrize("validation", [True, False])
    def test_a_strict_stopper_counts_evaluations_and_not_epochs(self, validation: bool, first: bool) -> None:
        stopper = EarlyStopping("gendiag/cms/worst", mode="max", patience=2, min_delta=10.0, strict=True)
        monitor = cms(every_n_epochs=3)
        both = [stopper, monitor] if first else [monitor, stopper]
        own = self.fit(*both, validation=validation, max_epochs=20)
        # the first evaluation is the best; two more after it end the run
        assert own.current_epoch == 9
        assert stopper.wait_count == 2

    @pytest.mark.filterwarnings("ignore:Checkpoint directory")
    def test_a_second_fit_defines_the_keys_too(self) -> None:
        keys, monitor = Keys(), cms(every_n_epochs=3)
        own = self.fit(monitor, keys, max_epochs=3)
        own.fit_loop.max_epochs = 5
        own.fit(WithValidation(), batches(), batches(shuffle=False))
        assert monitor.evaluations == 0
        assert len(keys.seen) == 10
        assert all(keys.seen)

    def test_callbacks_that_monitor_other_keys_stay_unchanged(self, tmp_path: Path) -> None:
        checkpoint, stopper = ModelCheckpoint(tmp_path, monitor="val_mean"), EarlyStopping("val_mean", patience=1)
        before = attributes(checkpoint), attributes(stopper)
        own = self.fit(cms(every_n_epochs=3), checkpoint, stopper)
        assert (attributes(checkpoint), attributes(stopper)) == before
        assert own.current_epoch == 2

    def test_changes_in_a_callback_are_undone_after_the_run(self, tmp_path: Path) -> None:
        checkpoint = ModelCheckpoint(tmp_path, monitor="gendiag/cms/worst", mode="max")
        before = attributes(checkpoint)
        self.fit(cms(), checkpoint)
        assert attributes(checkpoint) == before
        # a later run without a monitor behaves as Lightning documents
        assert checkpoint._save_on_train_epoch_end is None

    def test_a_failing_first_evaluation_leaves_keys_defined(self, tmp_path: Path) -> None:
        class Late(WithValidation):
            def sample(self, n: int) -> Tensor:
                if self.current_epoch == 0 and n > 2:
                    raise RuntimeError("out of memory")
                return super().sample(n)

        checkpoint = ModelCheckpoint(tmp_path, monitor="gendiag/cms/worst", mode="max", save_top_k=-1)
        own = trainer(cms(), checkpoint, max_epochs=3, enable_checkpointing=True)
        with pytest.warns(UserWarning, match="out of memory"):
            own.fit(Late(), batches(), batches(shuffle=False))
        assert len(list(tmp_path.glob("*.ckpt"))) == 2


class TestLogging:
    @pytest.mark.parametrize("method", ["encode", "decode", "sample"])
    def test_a_module_logs_nothing_while_it_is_evaluated(self, method: str) -> None:
        class Chatty(SmallVAE):
            pass

        def chatty(self: Any, x: Any) -> Any:
            made = getattr(SmallVAE, method)(self, x)
            self.log("own", float(x if isinstance(x, int) else x.detach().mean()), on_step=False, on_epoch=True)
            return made

        setattr(Chatty, method, chatty)

        def logged(*callbacks: Any) -> dict[str, float]:
            seed_everything(0, verbose=False)
            own = trainer(*callbacks, max_epochs=2)
            own.fit(Chatty(), batches())
            return {key: float(v) for key, v in own.callback_metrics.items() if not key.startswith("gendiag")}

        diagnostics = GenerativeDiagnostics(
            adapter=ModelAdapter(num_samples=32, num_reference=64), max_overhead=None, on_error="raise"
        )
        assert logged(diagnostics) == logged()
        assert "cms" in diagnostics.attached

    def test_a_module_may_override_log(self) -> None:
        class Prefixed(SmallVAE):
            def log(self, name: str, value: Any, prog_bar: bool = False) -> None:  # type: ignore[override]
                super().log(f"vae/{name}", value, prog_bar=prog_bar)

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                loss = super().training_step(batch, batch_idx)
                self.log("loss", loss)
                return loss

        own = trainer(cms(on_error="raise"), max_epochs=2)
        own.fit(Prefixed(), batches())
        assert {"vae/loss", "gendiag/cms/image"} <= set(own.callback_metrics)

    @pytest.mark.filterwarnings("ignore:.*barebones.*")
    def test_a_barebones_trainer_gets_no_scalars_and_no_error(self) -> None:
        from lightning.pytorch import Trainer

        monitor = cms(on_error="raise")
        own = Trainer(max_epochs=2, accelerator="cpu", barebones=True, callbacks=[monitor])
        own.fit(SmallVAE(), batches())
        assert monitor.evaluations == 2


def test_charts_that_cannot_be_written_do_not_end_the_run(tmp_path: Path) -> None:
    def full(layout: Any) -> None:
        raise OSError("no space left on device")

    logger = TensorBoardLogger(tmp_path)
    logger.experiment.add_custom_scalars = full
    monitor = cms()
    with pytest.warns(UserWarning, match="no space left on device"):
        trainer(monitor, max_epochs=2, logger=logger).fit(SmallVAE(), batches())
    assert monitor.evaluations == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda callbacks: pickle.loads(pickle.dumps(callbacks))])
def test_callbacks_can_be_copied_after_a_fit_and_used_again(copied: Any) -> None:
    callbacks = [cms(), CollapseStopping(), GenerativeDiagnostics(num_samples=64, skip=("regional_primitives",))]
    model = SmallVAE()
    trainer(*callbacks, max_epochs=2).fit(model, batches())
    twins = copied(callbacks)
    assert twins[0].evaluations == 2
    with pytest.raises(RuntimeError, match="CosineMeanSimilarityMonitor is not attached to a trainer yet"):
        _ = twins[0].session
    trainer(*twins, max_epochs=1).fit(model, batches())
    assert (callbacks[0].evaluations, twins[0].evaluations) == (2, 3)


def test_representations_are_the_calls_that_create_the_objects() -> None:
    assert repr(CosineMeanSimilarityMonitor(num_regions=3, every_n_epochs=2)) == (
        "CosineMeanSimilarityMonitor(num_regions=3, every_n_epochs=2)"
    )
    assert repr(CollapseStopping("warn", patience=4)) == "CollapseStopping(action='warn', patience=4)"
    assert repr(cms(regions=WHOLE, adapter=None)).startswith("CosineMeanSimilarityMonitor(regions=<")
    assert repr(GenerativeDiagnostics(num_samples=256)) == "GenerativeDiagnostics(num_samples=256)"


@pytest.mark.filterwarnings("ignore::lightning_gendiag.CollapseWarning")
def test_a_monitor_still_raises_alarms_after_it_was_used_for_another_module() -> None:
    """A reset clears the state of a monitor, and does not switch it off."""
    monitor, stopping = CosineMeanSimilarityMonitor(torch.zeros(16, 16).long()), CollapseStopping("warn")
    trainer(monitor, stopping, max_epochs=3).fit(ScriptedGenerator(), batches(16, 32))
    own = trainer(monitor, stopping, max_epochs=16)
    own.fit(ScriptedGenerator(lambda images, epoch: images * 0 if epoch > 9 else images), batches(16, 32))
    assert 11 <= stopping.alarms[0].epoch <= 13


def test_steps_that_are_due_before_the_reference_is_full_do_not_stop_the_schedule() -> None:
    monitor = cms(every_n_train_steps=1, max_overhead=1.0)
    trainer(monitor, max_epochs=4).fit(SmallVAE(), batches())
    assert monitor.evaluations > 0


def test_a_stopper_acts_once_for_each_evaluation_of_its_own_monitor() -> None:
    by_steps, by_epochs = cms(every_n_train_steps=2, name="steps"), cms(name="epochs")
    stopper = EarlyStopping("gendiag/steps/worst", mode="max", patience=1000, min_delta=10.0)
    trainer(stopper, by_steps, by_epochs, max_epochs=3).fit(SmallVAE(), batches())
    # the first evaluation is the best
    assert stopper.wait_count == by_steps.evaluations - 1 > 0


def test_images_of_several_sizes_in_a_second_fit_do_not_end_it() -> None:
    class Free(SmallVAE):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.decode(self.noise(4, 3)).square().mean()

    monitor, model = cms(), Free()
    own = trainer(monitor, max_epochs=2)
    own.fit(model, batches())
    own.fit_loop.max_epochs = 4
    sizes = [(torch.rand(16, 1, size, size), torch.zeros(16).long()) for size in (8, 10, 8, 10)]
    with pytest.warns(UserWarning, match="CosineMeanSimilarityMonitor failed"):
        own.fit(model, DataLoader(sizes, batch_size=None))  # type: ignore[arg-type]
    assert own.current_epoch == 4
