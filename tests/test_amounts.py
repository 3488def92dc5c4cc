"""How much is done at an evaluation: chosen once by the time of a small piece, equal on all processes, and kept."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from example_models.data import digits
from example_models.gan import GAN
from example_models.vae import VAE
from lightning_gendiag import (
    CosineMeanSimilarityMonitor,
    DiagnosticWarning,
    GenerativeDiagnostics,
    LatentRegionsMonitor,
    ManifoldEntropyMonitor,
    ModelAdapter,
    RegionalPrimitivesMonitor,
    decoder_gram,
)
from lightning_gendiag.callbacks.schedule import stream_period
from lightning_gendiag.model import amounts
from lightning_gendiag.model.amounts import fitting, reference_size, seconds_of
from lightning_gendiag.model.view import ModelView
from tests.helpers.models import SmallVAE, TinyGAN
from tests.helpers.running import attached, batches, loading, trainer

# not an attribute of a module, which would be copied with it
CLOCK = SimpleNamespace(now=100.0, busy=7.0, monotonic=lambda: CLOCK.now, thread_time=lambda: CLOCK.busy)


def take(seconds: float, load: float = 1.0) -> None:
    """Lets a time pass, in which this thread is at work for its part of a CPU."""
    CLOCK.now += seconds * load
    CLOCK.busy += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amounts, "time", CLOCK)


@pytest.fixture
def each_piece_takes(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    def set_seconds(seconds: float) -> None:
        monkeypatch.setattr(ModelView, "seconds_of", lambda view, work: (work(), seconds)[1])

    return set_seconds


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.0, 90), (0.1, 90), (0.125, 80), (0.2, 50), (1.0, 10), (5.0, 4), (100.0, 4)]
)
def test_as_many_pieces_as_fit_a_limit_within_bounds(seconds: float, expected: int) -> None:
    assert fitting(seconds, 10.0, 4, 90) == expected


@pytest.mark.usefixtures("clock")
def test_work_that_fails_takes_no_time_since_it_fails_again_where_this_is_reported() -> None:
    def work(fails: bool) -> None:
        take(3)
        if fails:
            raise ValueError("out of noise")

    assert seconds_of(lambda: work(False), torch.device("cpu")) == 3
    assert seconds_of(lambda: work(True), torch.device("cpu")) == 0


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("device", "load", "expected"), [("cpu", 1, 2), ("cpu", 4, 2), ("cpu", 80, 40), ("cpu", 0.5, 1), ("meta", 4, 8)]
)
def test_the_load_of_other_processes_does_not_count_on_a_cpu(device: str, load: float, expected: float) -> None:
    # a device of its own works while the thread waits; what takes a CPU for less than a quarter of its time waits too
    assert seconds_of(lambda: take(2, load), torch.device(device)) == expected


def test_time_that_other_processes_take_from_a_cpu_does_not_count() -> None:
    def work() -> None:
        for _ in range(400):
            torch.linalg.svdvals(a)

    a = torch.rand(150, 150, generator=torch.Generator().manual_seed(0))
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        started = time.monotonic()
        counted = seconds_of(work, torch.device("cpu"))
        passed = time.monotonic() - started
    finally:
        for other in others:
            other.kill()
            other.wait()
    # each of the processes takes its share
    assert 0 < counted < 0.7 * passed


class Slow(SmallVAE):
    """A VAE that takes a time of its own for each image."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def sample(self, n: int) -> Tensor:
        take(self.seconds * n)
        return super().sample(n)

    def encode(self, images: Tensor) -> Any:
        take(self.seconds * len(images))
        return super().encode(images)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("seconds", "given", "expected"),
    [
        (0.0, None, 1024),
        (1 / 256, None, 512),
        (1 / 64, None, 128),
        (1 / 8, None, 64),
        (0.25, None, 40),
        (1.0, None, 16),
        (1.0, 70, 70),
        (9.0, 12, 12),
    ],
)
def test_a_slow_sampler_draws_as_many_samples_as_fit_and_this_is_logged_once(
    caplog: pytest.LogCaptureFixture, seconds: float, given: int | None, expected: int
) -> None:
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        view = attached(Slow(seconds), ModelAdapter(num_samples=given))
        assert len(view.samples().images) == expected
        # a machine that is faster later changes nothing
        view.module.seconds = 0.0
        view.expire()
        assert len(view.samples().images) == expected
    logged = [record.message for record in caplog.records if "pass num_samples=" in record.message]
    assert len(logged) == (given is None and expected < 1024)


class Autoregressive(Slow):
    """Takes a time of its own for each sample, one pixel after the other, and none to encode."""

    encode = SmallVAE.encode


@pytest.mark.usefixtures("clock")
def test_the_fewest_samples_are_drawn_once() -> None:
    view = attached(Autoregressive(1.0), ModelAdapter())
    started = CLOCK.now
    samples = view.samples().images
    assert CLOCK.now - started == 16
    # those that were timed are those of every evaluation
    view.expire()
    torch.testing.assert_close(view.samples().images, samples, rtol=0, atol=0)
    assert CLOCK.now - started == 32


@pytest.mark.usefixtures("clock")
def test_a_sampler_that_takes_longer_than_a_minute_is_left_out_unless_a_number_is_given() -> None:
    message = r"at most 60 s for 16 images, but two took 8 s. To evaluate samples all the same, pass num_samples=16"
    diagnostics = GenerativeDiagnostics(max_overhead=None, log_images=False)
    started = CLOCK.now
    with pytest.warns(DiagnosticWarning, match=message):
        trainer(diagnostics, max_epochs=2).fit(Autoregressive(4.0), batches())
    # the two by which the sampler was found
    assert CLOCK.now - started == 8
    assert "cms" not in diagnostics.attached
    assert "manifold_entropy" in diagnostics.attached
    monitor = CosineMeanSimilarityMonitor(num_regions=2, adapter=ModelAdapter(num_samples=16), on_error="raise")
    trainer(monitor, max_epochs=1).fit(Autoregressive(4.0), batches())
    assert monitor.evaluations == 1


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("seconds", "given", "expected"),
    [(0.0, None, 1024), (0.003, None, 512), (1 / 16, None, 128), (1.0, None, 64), (1.0, 200, 200)],
)
def test_a_slow_encoder_gets_evenly_spaced_images_and_all_of_a_number_that_was_given(
    seconds: float, given: int | None, expected: int
) -> None:
    images, _ = digits(8)
    adapter = ModelAdapter(reference=images, num_reference=given)
    view = attached(Slow(seconds), adapter, ("encode",))
    latents = torch.cat([view.latents_in(output, size) for output, size, _ in view.encoded()])
    assert len(latents) == expected
    every = len(view.reference.images) // expected
    with view.isolated(exact=True):
        torch.testing.assert_close(latents, view.latents_of(view.reference.images[::every]))


def test_fewer_large_images_are_kept_unless_the_user_says_how_many(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert [reference_size(3 * size**2) for size in (64, 128, 256, 1024)] == [1024, 1024, 341, 256]
    # as if images of 64 numbers were large
    monkeypatch.setattr(amounts, "REFERENCE_NUMBERS", 64 * 20)
    monkeypatch.setattr(amounts, "LEAST_REFERENCE", 10)
    images, labels = (rows[:48] for rows in digits(8))
    data = torch.utils.data.TensorDataset(images, labels)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        collected = attached(SmallVAE(), ModelAdapter())
        for start in range(0, 48, 16):
            collected.real.collect((images[start : start + 16], labels[start : start + 16]))
        # once there are enough, no more batches are waited for
        assert collected.real.ready(epoch_over=False)
    assert "Real images: 20 of 1x8x8 are kept instead of 1,024, since they are large." in caplog.text
    given = [attached(SmallVAE(), ModelAdapter(reference=one)) for one in ((images, labels), data)]
    assert [len(view.reference.images) for view in (collected, *given)] == [20, 20, 20]
    assert torch.equal(collected.reference.labels, labels[:20])
    assert len(attached(SmallVAE(), ModelAdapter(reference=data, num_reference=30)).reference.images) == 30


@pytest.mark.usefixtures("clock")
def test_the_numbers_are_kept_in_checkpoints_and_chosen_anew_for_other_data(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    first = trainer(CosineMeanSimilarityMonitor(num_regions=2), max_epochs=1)
    first.fit(Slow(1 / 64), batches())
    first.save_checkpoint(path)
    monitor = CosineMeanSimilarityMonitor(num_regions=2)
    trainer(monitor, max_epochs=2).fit(Slow(0.0), batches(), ckpt_path=path, **loading())
    assert len(monitor.view.samples().images) == 128
    monitor.view.forget_reference()
    assert len(monitor.view.samples().images) == 1024


@pytest.mark.parametrize(
    ("seconds", "options", "expected"),
    [
        # seconds of one dimension of one latent, and of sixteen unless that is slow; 40 dimensions may be monitored
        (0.0, {}, (32, 40)),
        (0.032, {}, (15, 40)),
        (0.07, {}, (8, 34)),
        (0.08, {}, (8, 16)),
        (0.25, {}, (5, 16)),
        (9.0, {}, (2, 16)),
        (9.0, {"num_latents": 20}, (20, 16)),
        (9.0, {"max_dims": 30}, (2, 30)),
        (9.0, {"num_latents": 3, "max_dims": 50}, (3, 40)),
    ],
)
def test_a_slow_decoder_gets_fewer_latents_then_fewer_dimensions(
    each_piece_takes: Callable[[float], None], seconds: float, options: dict[str, int], expected: tuple[int, int]
) -> None:
    each_piece_takes(seconds)
    monitor = ManifoldEntropyMonitor(on_error="raise", **options)
    trainer(monitor, max_epochs=1).fit(TinyGAN(latent_dim=40), batches())
    assert (int(monitor.result.latents), len(monitor.result.entropy)) == expected
    again = ManifoldEntropyMonitor(on_error="raise", **options)
    again.set_extra_state(monitor.get_extra_state())
    each_piece_takes(0.0)
    trainer(again, max_epochs=1).fit(TinyGAN(latent_dim=40), batches())
    assert (int(again.result.latents), len(again.result.entropy)) == expected


def test_a_decoder_with_noise_of_its_own_is_derived_at_one_noise() -> None:
    def noisy(z: Tensor) -> Tensor:
        return z * 3 + torch.randn(2)

    gram = decoder_gram(noisy, torch.zeros(2, 2), mode="forward")
    torch.testing.assert_close(gram, 9 * torch.eye(2, dtype=torch.float64).expand(2, 2, 2))


@pytest.mark.parametrize(
    ("seconds", "options", "expected"),
    [
        # seconds of two steps of two sets; 2^3 sets of regions
        (0.0, {}, (3, 20, 3)),
        (1.0, {}, (3, 10, 1)),
        (100.0, {}, (3, 4, 1)),
        (100.0, {"regions": "grid"}, (5, 4, 1)),
    ],
)
def test_slow_steps_leave_fewer_images_then_fewer_steps_then_fewer_regions(
    each_piece_takes: Callable[[float], None], seconds: float, options: dict[str, Any], expected: tuple[int, int, int]
) -> None:
    each_piece_takes(seconds)
    monitor = RegionalPrimitivesMonitor(
        # one of them is the border, which never varies and is left out
        num_regions=4,
        num_images=3,
        max_regions=5,
        on_error="raise",
        every_n_epochs=1,
        log_images=False,
        **options,
    )
    with pytest.warns(UserWarning, match="only the 5") if options else torch.no_grad():
        trainer(monitor, max_epochs=1).fit(GAN(8, width=4), batches(32))
    steps = monitor.get_extra_state()["amounts"]["steps"]
    assert (len(monitor.names), steps, int(monitor.result.images)) == expected


def test_regions_that_were_found_are_left_out_where_their_sets_take_too_long(
    each_piece_takes: Callable[[float], None],
) -> None:
    each_piece_takes(100.0)
    monitor = RegionalPrimitivesMonitor(
        num_regions=6, num_images=1, on_error="raise", every_n_epochs=1, log_images=False
    )
    with pytest.warns(UserWarning, match=r"Of 5 regions, only the 3 .* longer than max_seconds=20"):
        trainer(monitor, max_epochs=1).fit(GAN(8, width=4), batches(32))
    assert len(monitor.names) == 3
    assert monitor.labels.unique().tolist() == [-1, 0, 1, 2]


@pytest.mark.parametrize(
    ("seconds", "given", "expected"), [(0.0, None, 500), (0.032, None, 285), (9.0, None, 100), (9.0, 130, 130)]
)
def test_slow_points_of_latent_regions_are_fewer(
    each_piece_takes: Callable[[float], None], seconds: float, given: int | None, expected: int
) -> None:
    each_piece_takes(seconds)
    monitor = LatentRegionsMonitor(num_points=given, components=1, on_error="raise")
    monitor.adapter = ModelAdapter(reference=digits(32), num_reference=64, num_samples=8)
    drawn: list[Tensor] = []
    monitor.log_plots = lambda result, context: drawn.append(monitor._points[0])  # type: ignore[method-assign]
    trainer(monitor, max_epochs=1).fit(VAE(3, width=2), batches(32))
    # four kinds are decoded, and three of them drawn by trial
    assert len(drawn[0]) == expected


@pytest.mark.parametrize("limit", [[], ["0.5"]])
def test_two_processes_choose_the_same_numbers(tmp_path: Path, limit: list[str]) -> None:
    command = [sys.executable, "-m", "tests.amounts_on_two", str(tmp_path), *limit]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, timeout=120, env=environment, cwd=Path(__file__).parents[1])
    first, second = (torch.load(tmp_path / f"amounts_{rank}.pt", weights_only=True) for rank in range(2))
    assert first == second
    assert first["samples"] < 1024
    assert first.get("planned") == (64 if limit else None)


@pytest.mark.parametrize(
    ("max_steps", "batches_of_an_epoch", "accumulated", "optimizers", "expected"),
    [
        (-1, float("inf"), 1, 1, 1000),
        (-1, float("inf"), 1, 2, 1000),
        (300, float("inf"), 1, 1, 4),
        (300, float("inf"), 1, 2, 2),
        (100_000, float("inf"), 1, 1, 1333),
        (10, float("inf"), 1, 1, 1),
        (300, 300, 1, 1, 4),
        (300, 299, 1, 1, None),
        (300, 600, 2, 1, 4),
        (300, 599, 2, 1, None),
        (-1, 300, 1, 1, None),
    ],
)
def test_a_run_within_one_epoch_is_evaluated_by_steps(
    max_steps: int, batches_of_an_epoch: float, accumulated: int, optimizers: int, expected: int | None
) -> None:
    own = SimpleNamespace(
        max_steps=max_steps, num_training_batches=batches_of_an_epoch, accumulate_grad_batches=accumulated,
        optimizers=[None] * optimizers, max_epochs=-1,
    )  # fmt: skip
    assert stream_period(own) == expected  # type: ignore[arg-type]


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        images, labels = digits(8)
        while True:
            yield from zip(images, labels, strict=True)


def stream() -> Any:
    return torch.utils.data.DataLoader(Stream(), batch_size=16)


@pytest.mark.parametrize(
    ("options", "evaluations"), [({}, 75), ({"every_n_train_steps": 50}, 3), ({"every_n_epochs": 1}, 1)]
)
def test_a_stream_is_evaluated_by_steps_unless_the_user_chose(
    caplog: pytest.LogCaptureFixture, options: dict[str, int], evaluations: int
) -> None:
    diagnostics = GenerativeDiagnostics(
        "warn", num_samples=16, num_reference=16, max_overhead=None, log_images=False,
        skip=("generation_balance", "manifold_entropy", "k_star", "posterior_kl", "latent_regions"), **options,
    )  # fmt: skip
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        trainer(diagnostics, max_epochs=-1, max_steps=300).fit(TinyGAN(), stream())
    assert diagnostics.monitors["cms"].evaluations == evaluations
    logged = [record.message for record in caplog.records if "Diagnostics evaluate every" in record.message]
    assert len(logged) == (not options)


class Short(Stream):
    """Ends, which its length does not say."""

    def __iter__(self) -> Any:
        images, labels = (rows[:64] for rows in digits(8))
        yield from zip(images, labels, strict=True)


def test_a_stream_whose_epochs_end_soon_is_evaluated_at_their_ends(caplog: pytest.LogCaptureFixture) -> None:
    diagnostics = GenerativeDiagnostics(num_samples=16, max_overhead=None, log_images=False, skip=("latent_regions",))
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        trainer(diagnostics, max_epochs=3).fit(TinyGAN(), torch.utils.data.DataLoader(Short(), batch_size=16))
    assert diagnostics.monitors["cms"].evaluations == 3
    assert "every 1,000 training steps, since the length of an epoch is not known" in caplog.text
    assert caplog.text.count("Diagnostics evaluate at the ends of epochs, since the first one had an end.") == 1


def test_a_stream_that_is_shorter_than_the_reference_is_evaluated_in_its_second_half() -> None:
    monitor = CosineMeanSimilarityMonitor(num_regions=2, every_n_train_steps=1, adapter=ModelAdapter(num_samples=16))
    trainer(monitor, max_epochs=-1, max_steps=20).fit(SmallVAE(), stream())
    assert len(monitor.view.reference.images) == 160
    assert monitor.evaluations == 11


def test_the_report_of_an_interrupted_run_is_written(caplog: pytest.LogCaptureFixture) -> None:
    class Interrupted(SmallVAE):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 2:
                raise RuntimeError("the power went off")

    diagnostics = GenerativeDiagnostics(num_samples=16, max_overhead=None, log_images=False)
    own = trainer(diagnostics, max_epochs=5)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"), pytest.raises(RuntimeError, match="power"):
        own.fit(Interrupted(), batches())
    assert sum("Not judged: there were 2 evaluations" in record.message for record in caplog.records) == 1
