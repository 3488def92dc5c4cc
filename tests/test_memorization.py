from __future__ import annotations

import io
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from scipy.optimize import linear_sum_assignment
from scipy.stats import mannwhitneyu
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from example_models.data import digits
from example_models.gan import GAN
from lightning_gendiag import (
    CollapseStopping,
    CollapseWarning,
    Evaluation,
    GenerativeDiagnostics,
    Memorization,
    MemorizationMonitor,
    ModelAdapter,
    memorization,
    vendi_score,
)
from lightning_gendiag.diagnostics.memorization import functional
from lightning_gendiag.diagnostics.memorization.functional import nearest, rank_sum, repeats
from lightning_gendiag.diagnostics.memorization.monitor import compacted
from tests.helpers.cases import Case
from tests.helpers.logs import events
from tests.helpers.models import ScriptedGenerator, TinyGAN
from tests.helpers.recorded_runs import Replay
from tests.helpers.running import batches, loading, state_after_training, trainer


def shuffled(size: int = 8) -> Tensor:
    images = digits(size)[0]
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]


def updates(count: int = 12, n: int = 15) -> list[dict[str, Any]]:
    """Returns training images, held-out images and samples in turn, of which some are copies and some repeat others."""
    images = shuffled()
    found: list[dict[str, Any]] = []
    for index in range(count):
        some = images[index * n : (index + 1) * n]
        real, held_out = index % 3 != 2, index % 3 == 1
        if not real:
            some = torch.cat([some[:5], images[:5], images[index * n :][:5] + 1e-3])
        found.append({"images": some, "real": real, "held_out": held_out, "features": some.flatten(1)[:, 10:30] ** 2})
    return found


CASE = Case(make=lambda: Memorization(max_side=4), updates=updates(), tolerance=1e-5)


# ---- slow twins ----


def slow(generated: Tensor, real: Tensor, held_out: Tensor | None = None) -> dict[str, float]:
    """Returns the numbers by their definitions, one image after the other, in float64."""
    training = real.flatten(1).double().numpy()

    def closeness(image: np.ndarray, others: np.ndarray) -> tuple[float, float]:
        distances, indices = NearestNeighbors(n_neighbors=1).fit(others).kneighbors(image[None])
        neighbour = indices[0, 0]
        rest = np.delete(others, neighbour, 0)
        return distances[0, 0], distances[0, 0] / np.linalg.norm(rest - others[neighbour], axis=1).min()

    made = [closeness(image, training) for image in generated.flatten(1).double().numpy()]
    if held_out is None:
        fresh = [closeness(image, np.delete(training, i, 0)) for i, image in enumerate(training)]
    else:
        fresh = [closeness(image, training) for image in held_out.flatten(1).double().numpy()]
    u = mannwhitneyu([d for d, _ in made], [d for d, _ in fresh]).statistic
    m, n = len(made), len(fresh)
    return {
        "copied": float(np.mean([c < 0.5 for _, c in made])),
        "real_copied": float(np.mean([c < 0.5 for _, c in fresh])),
        "authenticity": float(np.mean([c >= 1 for _, c in made])),
        "real_authenticity": float(np.mean([c >= 1 for _, c in fresh])),
        "copying_z": (u - m * n / 2) / math.sqrt(m * n * (m + n + 1) / 12),
    }


@pytest.mark.parametrize("cells", [1 << 21, 500])
@pytest.mark.parametrize("has_held_out", [True, False])
def test_the_numbers_equal_those_of_one_image_after_the_other(
    has_held_out: bool, cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "CELLS", cells)
    images = shuffled()
    real, held_out = images[:150], images[300:400] if has_held_out else None
    noise = torch.randn(30, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    generated = torch.cat([images[150:200], real[:30] + 0.1 * noise])
    result = memorization(generated, real, held_out)
    expected = slow(generated, real, held_out)
    if not has_held_out:
        del expected["copying_z"]
    assert {name: float(result.scalars()[name]) for name in expected} == pytest.approx(expected, abs=1e-6)
    assert float(result.num_held_out) == (100 if has_held_out else 0)


def test_neighbours_equal_those_of_scikit_learn_also_next_to_a_row(generator: torch.Generator) -> None:
    x, y = torch.randn(40, 12, generator=generator), torch.randn(60, 12, generator=generator)
    x[:5] = y[:5] + 1e-5
    distances, indices = NearestNeighbors(n_neighbors=2).fit(y.double().numpy()).kneighbors(x.double().numpy())
    found = nearest(x, y, k=2)
    assert found.indices.tolist() == indices.tolist()
    # by the product alone, distances of 1e-5 would be lost
    torch.testing.assert_close(found.distances.double(), torch.from_numpy(distances), rtol=2e-3, atol=0)
    distances, indices = NearestNeighbors(n_neighbors=1).fit(y.double().numpy()).kneighbors()
    torch.testing.assert_close(nearest(y).distances.double(), torch.from_numpy(distances), rtol=1e-5, atol=0)


def test_repeats_are_all_but_the_first_of_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "CELLS", 12)
    rows = torch.tensor([0, 1, 0, 2, 2, 0])[:, None].float()
    assert repeats(rows, 0.0).tolist() == [False, False, True, False, True, True]


# ---- closed forms ----


def test_the_vendi_score_counts_different_items(generator: torch.Generator) -> None:
    assert float(vendi_score(torch.eye(7))) == pytest.approx(7)
    assert float(vendi_score(torch.ones(7, 7))) == pytest.approx(1)
    # k groups of equal size
    groups = torch.eye(3).repeat_interleave(4, 0)
    assert float(vendi_score(groups @ groups.T)) == pytest.approx(3)
    # of two items of similarity s, the eigenvalues are (1 + s) / 2 and (1 - s) / 2
    s = 0.3
    entropy = -sum(p * math.log(p) for p in ((1 + s) / 2, (1 - s) / 2))
    assert float(vendi_score(torch.tensor([[1, s], [s, 1]]))) == pytest.approx(math.exp(entropy))
    assert vendi_score(torch.zeros(0, 0)).isnan()
    with pytest.raises(ValueError, match=r"similarities must be \(n, n\), got \(2, 3\)"):
        vendi_score(torch.zeros(2, 3))


def test_copies_are_all_found_and_named(generator: torch.Generator) -> None:
    real = torch.randn(100, 1, 4, 4, generator=generator)
    metric = Memorization()
    metric.update(real, real=True)
    metric.update(real[[7, 7, 7, 30]], real=False)
    result = metric.compute()
    assert float(result.authenticity) == 0
    assert float(result.copied) == 1
    assert float(result.images_copied) == 2
    named = metric.training_images[result.copy_index]
    torch.testing.assert_close(named[result.copy_closeness < 0.5].sum(0), real[[7, 30]].sum(0))
    torch.testing.assert_close(result.copies[:2, 0], result.copies[:2, 1])
    assert float(result.repeated) == 0.75
    assert result.surely_copied.tolist() == [True]


def test_fresh_real_images_are_as_authentic_as_expected(generator: torch.Generator) -> None:
    """A neighbour of a fresh point is that of a point that is left out, so their shares agree within their intervals."""
    real, fresh = torch.randn(2, 1000, 2, 1, 1, generator=generator)
    result = memorization(fresh, real)
    # the share of points in a plane that are the neighbour of their neighbour (Pickard, 1982)
    expected = 6 * math.pi / (8 * math.pi + 3 * math.sqrt(3))
    assert float(result.real_closer) == pytest.approx(expected, abs=0.04)
    assert float(result.closer) == pytest.approx(expected, abs=0.04)
    assert not result.surely_copied.any()
    assert float(result.diversity) == pytest.approx(1, abs=0.1)


def test_the_rank_sum_equals_that_of_scipy_with_ties(generator: torch.Generator) -> None:
    x = torch.randint(0, 9, (40,), generator=generator).float()
    y = torch.randint(2, 9, (30,), generator=generator).float()
    u = mannwhitneyu(x.numpy(), y.numpy()).statistic
    assert float(rank_sum(x, y)) == pytest.approx((u - 600) / math.sqrt(40 * 30 * 71 / 12))
    assert rank_sum(x, y[:0]).isnan()


# ---- degenerate images ----


def test_training_images_that_repeat_do_not_make_samples_look_copied() -> None:
    images = shuffled()
    real, fresh = images[:300], images[400:500]
    result, once = memorization(fresh, torch.cat([real] * 3)), memorization(fresh, real)
    assert float(result.duplicates) == pytest.approx(2 / 3)
    assert float(result.num_training) == 300
    for name in ("copied", "real_copied", "authenticity", "real_authenticity", "repeated"):
        assert float(result.scalars()[name]) == pytest.approx(float(once.scalars()[name]), abs=1e-6), name
    # and copies of them are found all the same
    assert float(memorization(real[:50], torch.cat([real] * 3)).copied) == 1


def test_held_out_images_that_are_training_images_are_left_out() -> None:
    images = shuffled()
    result = memorization(images[500:600], images[:300], torch.cat([images[:200], images[300:400]]))
    assert float(result.num_held_out) == 100
    assert float(result.real_copied) < 0.02
    too_few = memorization(images[500:600], images[:300], images[:310])
    assert float(too_few.num_held_out) == 0
    assert float(too_few.real_copied) < 0.02


@pytest.mark.parametrize(
    ("generated", "real"),
    [
        (torch.zeros(5, 1, 4, 4), torch.zeros(5, 1, 4, 4)),
        (torch.rand(5, 1, 4, 4), torch.zeros(5, 1, 4, 4)),
        (torch.rand(5, 1, 4, 4), torch.rand(1, 1, 4, 4)),
        (torch.zeros(0, 1, 4, 4), torch.rand(9, 1, 4, 4)),
    ],
)
def test_where_nothing_can_be_compared_numbers_are_nan(generated: Tensor, real: Tensor) -> None:
    result = memorization(generated, real)
    assert result.copied.isnan().all()
    assert result.diversity.isnan().all()
    assert not result.surely_copied.any()
    observed = MemorizationMonitor().observations(result)
    assert [observation.severity for observation in observed if observation.series.role == "rule"] == [0, 0]


def test_one_sample_and_constant_samples_are_finite_or_flagged() -> None:
    real = shuffled()[:100]
    one = memorization(real[:1], real)
    assert float(one.copied) == 1
    assert one.repeated.isnan().all()
    same = memorization(torch.zeros(50, 1, 8, 8), real)
    assert float(same.repeated) == 1
    assert float(same.vendi) == pytest.approx(1)
    assert float(same.copied) == 0
    two = memorization(real[:9], real[:2])
    assert two.real_copied.isnan().all()
    assert two.copied.isfinite().all()
    assert not two.surely_copied.any()


def test_samples_with_nan_are_left_out_and_counted() -> None:
    real = shuffled()[:100]
    broken = real[:4].clone()
    broken[0, 0, 0, 0] = torch.nan
    metric = Memorization()
    metric.update(real, real=True, features=real.flatten(1))
    metric.update(
        broken, real=False, features=torch.where(torch.arange(4)[:, None] == 1, torch.inf, real[:4].flatten(1))
    )
    result = metric.compute()
    assert float(result.invalid) == 0.5
    assert result.closeness.shape == (2, 2)
    assert result.copied.tolist() == [1, 1]


def test_distances_keep_their_digits_far_from_zero() -> None:
    real = shuffled()[:200]
    expected = memorization(real[:50] + 0.01, real)
    moved = memorization(real[:50] + 0.01 + 100, real + 100)
    for name, value in expected.scalars().items():
        assert float(moved.scalars()[name]) == pytest.approx(float(value), abs=2e-2, nan_ok=True), name


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Memorization(0.0), r"ratio must be in \(0, 1\], got 0.0"),
        (lambda: Memorization(max_side=0), "max_side must be at least 1, got 0"),
        (lambda: MemorizationMonitor(ratio=2), r"ratio must be in \(0, 1\], got 2"),
        (lambda: memorization(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 5)), r"generated must be \(N, 1, 4, 5\)"),
        (lambda: memorization(torch.zeros(2, 3), torch.full((2, 3), torch.nan)), "real must be finite, got nan"),
        (lambda: filled_with(features=None), "features of generated must be given as before, got None"),
        (
            lambda: filled_with(features=torch.zeros(2, 5)),
            r"features must be \(2, 3\) of floats, got torch.float32 of shape",
        ),
        (
            lambda: filled_with(has_features=False, features=torch.zeros(2, 5)),
            "features of generated must be None as before",
        ),
    ],
)
def test_invalid_arguments_raise_errors(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def filled_with(features: Tensor | None, has_features: bool = True) -> None:
    metric = Memorization()
    metric.update(torch.rand(4, 1, 4, 4), real=True, features=torch.zeros(4, 3) if has_features else None)
    metric.update(torch.rand(2, 1, 4, 4), real=False, features=features)


# ---- the monitor ----


class Copier(ScriptedGenerator):
    """Returns images of its own pool, and from some epoch on training images with a little noise."""

    def __init__(self, start: int = 99, share: float = 1.0) -> None:
        super().__init__(size=8)
        images = shuffled()
        self.seen, self.pool = images[:600], images[600:1200]
        self.start, self.share = start, share

    def sample(self, n: int) -> Tensor:
        made = super().sample(n)
        if self.current_epoch < self.start:
            return made
        chosen = self.seen[torch.randint(len(self.seen), (n,))] + 0.02 * torch.randn(n, 1, 8, 8)
        return torch.where(torch.rand(n, 1, 1, 1) < self.share, chosen, made)

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...


def loader(images: Tensor, batch_size: int = 100, shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(TensorDataset(images, torch.arange(len(images)) % 2), batch_size=batch_size, shuffle=shuffle)


def fit(module: LightningModule, *callbacks: Any, epochs: int, held_out: Tensor | None = None, **options: Any) -> Any:
    own = trainer(*callbacks, max_epochs=epochs, **options)
    own.fit(module, loader(module.seen), None if held_out is None else loader(held_out, shuffle=False))
    return own


@pytest.mark.parametrize("has_validation", [True, False])
def test_training_images_of_the_first_epoch_are_held_and_validation_images_are_fresh(has_validation: bool) -> None:
    monitor = MemorizationMonitor(on_error="raise")
    module = Copier()
    own = fit(module, monitor, epochs=3, held_out=shuffled()[1200:1400] if has_validation else None)
    assert monitor.result is not None
    assert float(monitor.result.num_training) == 600
    assert float(monitor.result.duplicates) == 0
    assert float(monitor.result.num_held_out) == (200 if has_validation else 0)
    assert {tuple(image.flatten().tolist()) for image in monitor.training_images} == {
        tuple(image.flatten().tolist()) for image in module.seen
    }
    assert own.callback_metrics["gendiag/memorization/copied"] < 0.02
    # samples are real images that were not trained on
    assert float(monitor.result.authenticity[0]) == pytest.approx(1 - float(monitor.result.real_closer[0]), abs=0.1)


def test_a_given_reference_takes_the_place_of_validation_images() -> None:
    images = shuffled()
    monitor = MemorizationMonitor(on_error="raise", adapter=ModelAdapter(reference=images[550:700], num_samples=64))
    fit(Copier(), monitor, epochs=1)
    assert monitor.result is not None
    assert float(monitor.result.num_training) == 600
    # those that are training images are left out
    assert float(monitor.result.num_held_out) == 100


def test_few_copies_are_found_named_and_shown_and_do_not_stop_the_run(tmp_path: Any) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    monitor, stopping = MemorizationMonitor(on_error="raise"), CollapseStopping()
    with pytest.warns(CollapseWarning, match=r"the model copies training images: \d+% of 1,024 samples are copies of"):
        own = fit(Copier(start=4, share=0.2), monitor, stopping, epochs=14, held_out=shuffled()[1200:], logger=logger)
    assert own.current_epoch == 14
    alarm = stopping.alarms[0]
    assert alarm.diagnostic == "memorization"
    assert alarm.epoch == 6
    assert monitor.result is not None
    assert "of the 600 training images held (such as number " in str(alarm)
    seen = events(logger.log_dir)
    assert "gendiag/memorization/images_copied" in seen.Tags()["scalars"]
    # what the tab shows
    page = monitor.page_numbers(monitor.result)
    assert page["interval"][0] < float(monitor.result.copied[0]) < page["interval"][1]
    assert page["real"][1] <= page["real"][0] <= page["real"][2]
    assert page["images"] == [float(monitor.result.images_copied[0]), 600]
    frame = monitor.page_frame(monitor.result)
    assert frame is not None
    assert frame.fields["numbers"] == monitor.result.copy_index.tolist()
    shown = np.asarray(Image.open(io.BytesIO(frame.pictures["copies"].content)))
    assert shown.shape == (2 * 8, 8 * 8)
    # samples are above their training images
    low, high = monitor.result.copies.min(), monitor.result.copies.max()
    expected = 255 * (monitor.result.copies[:, :, 0] - low) / (high - low)
    for place, (made, held) in enumerate(expected.numpy()):
        columns = slice(8 * place, 8 * place + 8)
        np.testing.assert_allclose(shown[:8, columns], made, atol=1)
        np.testing.assert_allclose(shown[8:, columns], held, atol=1)
    assert {"gendiag/memorization/panel", "gendiag/alarm_1/picture"} <= set(seen.Tags()["images"])


def test_samples_that_repeat_each_other_are_reported() -> None:
    class Repeating(Copier):
        def sample(self, n: int) -> Tensor:
            made = super().sample(n)
            return made if self.current_epoch < 3 else self.pool[torch.arange(n) % 10]

    monitor, stopping = MemorizationMonitor(on_error="raise"), CollapseStopping()
    with pytest.warns(CollapseWarning, match="the model repeats images: 100% of 1,024 samples have a near-duplicate"):
        fit(Repeating(), monitor, stopping, epochs=13)
    assert monitor.result is not None
    assert float(monitor.result.diversity[0]) < 0.2


def test_a_network_of_the_users_decides_where_one_is_given() -> None:
    """Copies that are turned upside down are none by pixels."""

    class Turned(Copier):
        def sample(self, n: int) -> Tensor:
            return super().sample(n).flip(2)

    monitor = MemorizationMonitor(
        nn.Sequential(nn.Flatten(), Sorted()), on_error="raise", adapter=ModelAdapter(num_samples=100)
    )
    fit(Turned(start=0), monitor, epochs=1)
    result = monitor.result
    assert result is not None
    assert float(result.copied[0]) < 0.1
    assert float(result.copied[1]) > 0.5
    rules = {o.series.name: o.severity for o in monitor.observations(result)}
    assert rules["memorization"] == math.inf
    moving = MemorizationMonitor(lambda module, images: images.flatten(1).sort().values, on_error="raise")
    fit(Turned(start=0), moving, epochs=2)
    assert moving.result is not None
    assert float(moving.result.copied[1]) > 0.5


class Sorted(nn.Module):
    """Forgets where the pixels of rows (N, D) stand."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows.sort(1).values


# ---- what it holds ----


class Large(Copier):
    """The same at 48 pixels a side, in colour."""

    def __init__(self, start: int = 99) -> None:
        super().__init__(start)
        self.seen, self.pool = (enlarged(images) for images in (self.seen[:200], self.pool))

    def sample(self, n: int) -> Tensor:
        images = self.seen if self.current_epoch >= self.start else self.pool
        return images[torch.randint(len(images), (n,))]


def enlarged(images: Tensor) -> Tensor:
    return F.interpolate(images, size=(48, 48)).expand(-1, 3, -1, -1)


@pytest.mark.parametrize("start", [0, 99])
def test_large_images_are_held_small_and_copies_are_found_all_the_same(start: int) -> None:
    monitor = MemorizationMonitor(on_error="raise", adapter=ModelAdapter(num_samples=64))
    module = Large(start)
    fit(module, monitor, epochs=1, held_out=enlarged(shuffled()[1200:1400]))
    assert monitor.training_images.shape == (200, 3, 32, 32)
    assert {part.dtype for state in ("real", "held_out") for part in getattr(monitor.metric, state)} == {torch.half}
    assert monitor.result is not None
    assert monitor.result.copies.shape == (8, 2, 3, 32, 32)
    assert float(monitor.result.num_held_out) == 200
    assert (float(monitor.result.copied) > 0.9) == (start == 0)
    # of the samples nothing stays
    assert monitor.metric.rows("generated").numel() == 0


@pytest.mark.parametrize(("max_side", "features"), [(None, None), (16, nn.Flatten())])
def test_images_keep_their_size_where_all_pixels_are_needed(max_side: int | None, features: Any) -> None:
    monitor = MemorizationMonitor(features, max_side=max_side, on_error="raise", adapter=ModelAdapter(num_samples=64))
    fit(Large(0), monitor, epochs=1)
    assert monitor.training_images.shape == (200, 3, 48, 48)


def test_no_more_images_are_held_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_gendiag.diagnostics.memorization.monitor.HELD_BYTES", 150 * 3 * 32 * 32 * 2)
    monitor = MemorizationMonitor(on_error="raise", adapter=ModelAdapter(num_samples=64, num_reference=100))
    fit(Large(0), monitor, epochs=1)
    assert len(monitor.training_images) == 150


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (shuffled(), torch.half),
        (torch.rand(9, 3, generator=torch.Generator().manual_seed(0)), torch.half),
        (torch.zeros(0, 3), torch.half),
        (torch.full((4, 3), 2.0), torch.half),
        # a thousandth of a deviation of 0.3 is less than the spacing of halves near 100, and there are none above 65504
        (100 + torch.rand(9, 3, generator=torch.Generator().manual_seed(0)), torch.float32),
        (1e5 * torch.rand(9, 3, generator=torch.Generator().manual_seed(0)), torch.float32),
    ],
)
def test_half_precision_is_used_where_it_keeps_the_digits(images: Tensor, expected: torch.dtype) -> None:
    held = compacted(images)
    assert held.dtype == expected
    assert held.data_ptr() != images.data_ptr() or not len(images)
    torch.testing.assert_close(held.float(), images, rtol=0, atol=1e-3)


def test_a_metric_holds_halves_as_they_are_and_compares_them_exactly() -> None:
    images = shuffled()
    single, half = Memorization(), Memorization()
    for metric, real in ((single, images[:300]), (half, images[:300].half())):
        metric.update(real, real=True)
        metric.update(images[280:330] + 0.01, real=False)
    assert half.real[0].dtype == torch.half
    for name, value in single.compute().scalars().items():
        # digits are sixteenths, which are exact in half precision
        assert float(half.compute().scalars()[name]) == float(value), name


def test_rows_are_compared_without_features() -> None:
    class Rows(Copier):
        def sample(self, n: int) -> Tensor:
            return super().sample(n).flatten(1)[:, :50]

    module = Rows(start=0)
    monitor = MemorizationMonitor(on_error="raise", adapter=ModelAdapter(num_samples=64))
    trainer(monitor, max_epochs=1).fit(module, loader(module.seen.flatten(1)[:, :50]))
    assert monitor.result is not None
    assert monitor.result.copied.shape == (1,)
    assert float(monitor.result.copied) > 0.9


def test_training_is_bit_identical_with_and_without_the_monitor() -> None:
    for module in (TinyGAN, partial(GAN, 8, width=4)):
        size = 8 if module is TinyGAN else 32
        run = partial(state_after_training, module=module, size=size)
        torch.testing.assert_close(run(MemorizationMonitor(on_error="raise")), run(), rtol=0, atol=0)


def test_a_resumed_run_holds_training_images_again(tmp_path: Any) -> None:
    first = MemorizationMonitor(on_error="raise")
    own = fit(Copier(), first, epochs=2)
    own.save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    second = MemorizationMonitor(on_error="raise")
    again = trainer(second, max_epochs=3)
    again.fit(Copier(), loader(Copier().seen), ckpt_path=tmp_path / "last.ckpt", **loading(False))
    assert second.evaluations == 3
    assert second.result is not None
    assert float(second.result.num_training) == 600


# ---- real training ----


class Transport(LightningModule):
    """A generator that is drawn to the images that optimal transport assigns to its samples."""

    def __init__(self, seen: Tensor, latent_dim: int = 4, width: int = 256) -> None:
        super().__init__()
        self.seen, self.latent_dim = seen, latent_dim
        self.generator = nn.Sequential(
            nn.Linear(latent_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 64),
            nn.Tanh(), nn.Unflatten(1, (1, 8, 8)),
        )  # fmt: skip

    def sample(self, n: int) -> Tensor:
        return self.generator(torch.randn(n, self.latent_dim))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images = batch[0].repeat(200 // len(batch[0]), 1, 1, 1)
        made = self.sample(len(images))
        costs = torch.cdist(made.flatten(1), images.flatten(1)).square()
        assigned = linear_sum_assignment(costs.detach().numpy())[1]
        return F.mse_loss(made, images[assigned])

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 2e-3)


def transported(images: int) -> tuple[MemorizationMonitor, CollapseStopping]:
    """Trains on so many images, with as many steps for any number."""
    seed_everything(0, verbose=False)
    module = Transport(shuffled()[:images])
    adapter = ModelAdapter(num_samples=256)
    monitor = MemorizationMonitor(on_error="raise", adapter=adapter, every_n_train_steps=100)
    stopping = CollapseStopping()
    batch_size = min(images, 200)
    own = trainer(monitor, stopping, max_epochs=-1, max_steps=800, check_val_every_n_epoch=10_000)
    own.fit(module, loader(module.seen, batch_size), loader(shuffled()[1400:], shuffle=False))
    return monitor, stopping


def test_a_generator_that_memorises_fifty_images_is_found_and_named() -> None:
    with pytest.warns(CollapseWarning, match="the model copies training images"):
        monitor, stopping = transported(50)
    result = monitor.result
    assert result is not None
    assert stopping.alarms[0].diagnostic == "memorization"
    assert float(result.images_copied[0]) > 20
    assert float(result.num_training) == len(monitor.training_images) == 50
    # what is named is what the samples look like
    named = monitor.training_images[result.copy_index]
    torch.testing.assert_close(named, result.copies[:, 1])
    apart = (result.copies[:, 0] - named).flatten(1).norm(dim=1)
    others = (result.copies[:, 0] - named.roll(1, 0)).flatten(1).norm(dim=1)
    assert (apart < others / 3).all()


def test_the_same_generator_that_learns_from_many_images_is_not() -> None:
    monitor, stopping = transported(1400)
    assert [str(alarm) for alarm in stopping.alarms if "copie" in str(alarm)] == []
    assert monitor.result is not None
    assert not monitor.result.surely_copied[0]


def test_a_healthy_gan_is_not() -> None:
    seed_everything(0, verbose=False)
    monitor, stopping = MemorizationMonitor(on_error="raise", adapter=ModelAdapter(num_samples=256)), CollapseStopping()
    own = trainer(monitor, stopping, max_epochs=6)
    own.fit(GAN(16, width=4), batches(32, 1797, 64))
    assert stopping.alarms == []
    assert monitor.result is not None
    assert monitor.result.surely_copied.tolist() == [False]
    assert float(monitor.result.repeated[0]) < 0.1


@pytest.mark.parametrize(
    ("shares", "expected"),
    [([0.5] * 5, 3), ([0.0] * 12 + [0.4] * 5, 15), ([0.004] * 20, None), ([0.3, 0.0, 0.3, 0.3, 0.0] * 3, None)],
)
def test_the_rule_asks_for_three_evaluations_in_a_row(shares: list[float], expected: int | None) -> None:
    monitor, replay = MemorizationMonitor(), Replay()
    real = shuffled()
    blank = memorization(real[600:800], real[:600])
    for number, share in enumerate(shares, start=1):
        bounds = functional.binomial_interval(torch.tensor([200 * share, 200 * (1 - share)]), 0.005)[:1]
        row = blank._replace(copied=torch.tensor([share]), interval=bounds)
        replay.add(monitor, Evaluation(number, number, 0, monitor.observations(row)))
    assert [a.number for a in replay.judge.alarms if a.rule] == ([expected] if expected else [])


def test_it_is_attached_where_something_samples(caplog: pytest.LogCaptureFixture) -> None:
    diagnostics = GenerativeDiagnostics(adapter=ModelAdapter(num_samples=64), max_overhead=None, every_n_epochs=1)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        fit(Copier(), diagnostics, epochs=5, held_out=shuffled()[1200:1400])
    assert "memorization" in diagnostics.attached
    monitor = diagnostics.monitors["memorization"]
    # a fifth as often as others
    assert monitor.evaluations == 1
    assert monitor.result is not None
    assert float(monitor.result.num_held_out) == 200
    assert (
        "Memorization: samples are compared with about 600 training images; fresh real images are held out."
        in caplog.text
    )


def test_a_rehearsal_leaves_its_samples_to_the_first_evaluation() -> None:
    def values(**options: Any) -> dict[str, list[float]]:
        seed_everything(0, verbose=False)
        monitor = MemorizationMonitor(adapter=ModelAdapter(num_samples=64), log_images=False, **options)
        trainer(monitor, max_epochs=1).fit(GAN(8, width=4), batches(32, 64, batch_size=16))
        return {name: curve.values for name, curve in monitor.session.history.curves("memorization").items()}

    planned = values(max_overhead=0.05)
    assert planned == values() != {}
    assert all(math.isfinite(value) for curve in planned.values() for value in curve)
