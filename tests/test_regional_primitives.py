from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from example_models.gan import GAN
from example_models.vae import VAE
from lightning_gendiag import (
    CollapseStopping,
    CollapseWarning,
    DiagnosticWarning,
    ModelAdapter,
    RegionalPrimitives,
    RegionalPrimitivesMonitor,
    RegionMap,
    decompose,
    minimal_features,
    minimal_features_of,
    or_interactions,
)
from lightning_gendiag.detection.history import Evaluation, History
from lightning_gendiag.detection.rules import Judge
from lightning_gendiag.diagnostics.regional_primitives.functional import importance, memberships
from tests.helpers.cases import Case
from tests.helpers.logs import events
from tests.helpers.running import batches, loading, state_after_training, trainer
from tests.helpers.versions import needs_second_derivatives


def updates(count: int = 10, n: int = 3) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    return [
        {"norms": rand(2**n), "effects": rand(2**n, n), "curve": rand(2**n), "relevant": rand(n), "irrelevant": rand(n),
         "converged": rand()}
        for _ in range(count)
    ]  # fmt: skip


CASE = Case(make=lambda: RegionalPrimitives(3), updates=updates(), tolerance=1e-10)


# ---- the transform ----


def by_definition(u: Tensor, n: int) -> Tensor:
    """Computes ``I(S) = - sum over T in S of (-1)^(|S|-|T|) u(all without T)`` for each set S."""
    regions = range(n)
    out = torch.zeros_like(u)
    out[0] = u[0]
    for size in range(1, n + 1):
        for s in itertools.combinations(regions, size):
            total = torch.zeros_like(u[0])
            for k in range(size + 1):
                for t in itertools.combinations(s, k):
                    rest = sum(2**i for i in regions if i not in t)
                    total -= (-1) ** (size - k) * u[rest]
            out[sum(2**i for i in s)] = total
    return out


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_interactions_equal_the_definition_and_are_complete(n: int, generator: torch.Generator) -> None:
    u = torch.randn(2**n, 4, 3, generator=generator, dtype=torch.float64)
    interactions = or_interactions(u)
    torch.testing.assert_close(interactions, by_definition(u, n))
    torch.testing.assert_close(minimal_features_of(interactions), u)
    meets = memberships(n)
    for mask in range(2**n):
        covering = (meets & meets[mask]).any(1)
        covering[0] = False
        torch.testing.assert_close(u[0] + interactions[covering].sum(0), u[mask], rtol=0, atol=1e-6)


def test_interactions_equal_values_by_hand() -> None:
    assert or_interactions(torch.tensor([1.0, 4.0])).tolist() == [1.0, 3.0]
    # a alone gives 3, b alone 5 and both 6, so that 2 are shared, 1 belongs to a and 3 to b
    assert or_interactions(torch.tensor([0.0, 3.0, 5.0, 6.0])).tolist() == [0.0, 1.0, 3.0, 2.0]
    # one pattern generates three regions, so that each of them needs the whole pattern
    assert or_interactions(torch.tensor([0.0] + [7.0] * 7)).tolist() == [0.0] * 7 + [7.0]


def test_the_transform_is_inverted_for_random_components(generator: torch.Generator) -> None:
    true = torch.randn(16, 2, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(or_interactions(minimal_features_of(true)), true)


# ---- the features ----

REGIONS = torch.zeros(8, 8, dtype=torch.long)
REGIONS[:4, 4:], REGIONS[4:, :4], REGIONS[4:, 4:] = 1, 2, 3
SETS = ((0,), (1, 2), (3,), (0, 3), (0, 1, 2, 3))


def patterns(dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns patterns (5, 1, 8, 8), each of which is zero outside its set of regions."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(len(SETS), 1, 8, 8, generator=generator, dtype=dtype)
    for pattern, regions in zip(images, SETS, strict=True):
        pattern[0][~torch.isin(REGIONS, torch.tensor(regions))] = 0
    return images


def linear(u: Tensor) -> Tensor:
    return (u @ patterns(u.dtype).flatten(1)).view(-1, 1, 8, 8)


def squashed(u: Tensor) -> Tensor:
    return torch.tanh(linear(u) / 3)


FEATURE = torch.tensor([1.5, -2.0, 1.0, 0.8, 1.2], dtype=torch.float64)


@pytest.mark.parametrize("tail", [linear, squashed])
def test_the_components_of_a_generator_built_from_known_patterns_are_recovered(tail: Any) -> None:
    minimal = minimal_features(tail, FEATURE, 0 * FEATURE, REGIONS, penalty=1e-7, tolerance=1e-9, max_steps=60)
    assert minimal.converged.all()
    interactions = or_interactions(minimal.features)
    found = decompose(tail, FEATURE, REGIONS, minimal)
    true = [sum(2**r for r in regions) for regions in SETS]
    for k, mask in enumerate(true):
        expected = torch.zeros(5, dtype=torch.float64)
        expected[k] = FEATURE[k]
        torch.testing.assert_close(interactions[mask], expected, rtol=0, atol=2e-3)
    absent = [mask for mask in range(1, 16) if mask not in true]
    assert float(found.norms[absent].max()) < 1e-3
    metric = RegionalPrimitives(4)
    metric.update(*found)
    result = metric.compute()
    assert set(result.order[:5].tolist()) == set(true)
    assert float(result.leakage.max()) < 1e-4
    assert int(result.components) <= 5
    # the five largest components reconstruct the image
    assert float(found.curve[5]) < 1e-4
    assert float(found.curve[0]) == pytest.approx(1)
    assert float(found.relevant.max()) < 1e-4
    assert float(found.irrelevant.max()) < 1e-4


def test_a_linear_generator_has_a_closed_form() -> None:
    penalty = 0.05
    minimal = minimal_features(linear, FEATURE, 0.3 * FEATURE, REGIONS, penalty=penalty, tolerance=1e-12, max_steps=80)
    mixing, baseline = patterns().flatten(1).T, 0.3 * FEATURE
    own = mixing @ FEATURE
    change = (own - mixing @ baseline).square().sum()
    ridge = penalty / (FEATURE - baseline).square().sum() * torch.eye(5, dtype=torch.float64)
    meets = memberships(4)
    for mask in range(1, 16):
        w = meets[mask][REGIONS.flatten()].double() / change
        left = mixing.T @ (w[:, None] * mixing) + ridge
        expected = torch.linalg.solve(left, mixing.T @ (w * own) + ridge @ baseline)
        torch.testing.assert_close(minimal.features[mask], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(minimal.features[0], baseline)


@pytest.mark.parametrize(
    ("layer", "same"),
    [
        # without a second derivative
        (torch.nn.functional.hardsigmoid, lambda x: (x / 6 + 0.5).clamp(0, 1)),
        # without a derivative in forward mode; it turns the image upside down
        pytest.param(
            lambda x: torch.nn.functional.grid_sample(x, upside_down(x), align_corners=True),
            lambda x: x.flip(2),
            marks=needs_second_derivatives,
        ),
    ],
)
def test_operations_with_only_one_kind_of_derivative_can_be_used(layer: Any, same: Any) -> None:
    tail = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Unflatten(1, (1, 4, 4))).double().requires_grad_(False)
    feature, baseline = torch.linspace(-1, 1, 6).double(), torch.zeros(6).double()
    regions = torch.arange(4).repeat(4, 1) // 2
    found, expected = (
        minimal_features(lambda x, f=f: f(tail(x)), feature, baseline, regions).features for f in (layer, same)
    )
    torch.testing.assert_close(found, expected)


def upside_down(images: Tensor) -> Tensor:
    """Returns the places (N, H, W, 2) from which ``grid_sample`` takes images (N, C, H, W) upside down."""
    turned = torch.tensor([[1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]).to(images).expand(len(images), 2, 3)
    return torch.nn.functional.affine_grid(turned, list(images.shape), align_corners=True)


def test_a_set_optimized_alone_or_in_small_batches_has_the_same_features() -> None:
    together = minimal_features(squashed, FEATURE, 0 * FEATURE, REGIONS)
    small = minimal_features(squashed, FEATURE, 0 * FEATURE, REGIONS, batch_size=3)
    torch.testing.assert_close(small.features, together.features, rtol=0, atol=1e-4)
    alone = minimal_features(squashed, FEATURE, 0 * FEATURE, REGIONS, subsets=torch.tensor([6, 0]))
    torch.testing.assert_close(alone.features, together.features[[6, 0]], rtol=0, atol=1e-4)
    again = minimal_features(squashed, FEATURE, 0 * FEATURE, REGIONS, start=together.features, max_steps=1)
    assert (again.objective <= together.objective + 1e-12).all()


def test_missing_convergence_is_reported() -> None:
    minimal = minimal_features(squashed, FEATURE, 0 * FEATURE, REGIONS, penalty=1e-7, max_steps=1)
    assert minimal.steps == 1
    assert not minimal.converged[1:].all()
    assert minimal.converged[0]


def test_pixels_outside_all_regions_do_not_count() -> None:
    inner = torch.where(REGIONS == 3, -1, REGIONS)
    minimal = minimal_features(linear, FEATURE, 0 * FEATURE, inner, penalty=1e-7, tolerance=1e-9, max_steps=60)
    found = decompose(linear, FEATURE, inner, minimal)
    assert found.norms.shape == (8,)
    # the third pattern lies outside all regions
    assert float(minimal.features[-1][2].abs()) < 1e-3


def test_importance_is_each_regions_fraction_of_the_change() -> None:
    shares = importance(linear, FEATURE, 0 * FEATURE, REGIONS)
    image = linear(FEATURE[None])[0, 0]
    expected = torch.stack([image[r == REGIONS].square().sum() for r in range(4)]) / image.square().sum()
    torch.testing.assert_close(shares, expected)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: or_interactions(torch.zeros(6, 2)), r"there must be 2\^n entries, .* got 6"),
        (lambda: minimal_features(linear, FEATURE, FEATURE[:2], REGIONS), "baseline must have the feature's shape"),
        (lambda: minimal_features(linear, FEATURE, FEATURE, REGIONS[:4]), r"tail must make images \(N, C, 4, 8\), got"),
        (
            lambda: minimal_features(linear, FEATURE, FEATURE, REGIONS * 2),
            r"regions must have each number from 0 to 6, got none of",
        ),
        (lambda: minimal_features(linear, FEATURE, FEATURE, REGIONS.double()), r"regions must be \(H, W\) integers"),
        (
            lambda: minimal_features(linear, FEATURE, FEATURE, torch.arange(64).view(8, 8)),
            "regions must be at most 12, .* got 64. To fix this",
        ),
        (lambda: RegionalPrimitives(13), "num_regions must be 1 to 12, got 13"),
        (
            lambda: RegionalPrimitives(2).update(*updates()[0].values()),
            r"norms must be \(4,\) for 2 regions, got \(8,\)",
        ),
        (lambda: RegionalPrimitivesMonitor(max_regions=20), "max_regions must be 1 to 12, got 20"),
        (lambda: RegionalPrimitivesMonitor(num_images=0), "num_images must be at least 1, got 0"),
        (lambda: RegionalPrimitivesMonitor(penalty=0), "penalty and max_seconds must be above 0"),
    ],
)
def test_invalid_arguments_raise_errors(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_images_that_are_not_finite_are_left_out_and_counted() -> None:
    metric = RegionalPrimitives(3)
    first, second = updates(2)
    second["norms"][2] = torch.nan
    metric.update(**first)
    metric.update(**second)
    result = metric.compute()
    assert float(result.invalid) == 0.5
    torch.testing.assert_close(result.norms, first["norms"])


# ---- the monitor ----


class Painter(LightningModule):
    """A generator whose layer ``front`` makes channels of which ``back`` makes images; a fault may erase a corner."""

    def __init__(self, fault: Any = lambda epoch: None) -> None:
        super().__init__()
        self.latent_dim = 10
        self.front = nn.Sequential(nn.Linear(10, 10), nn.Unflatten(1, (10, 1, 1)), nn.Upsample(4))
        self.back = nn.Sequential(nn.Conv2d(10, 1, 1, bias=False), nn.Upsample(scale_factor=2))
        self.fault = fault
        nn.init.orthogonal_(self.front[0].weight)

    def forward(self, z: Tensor) -> Tensor:
        features = self.front(z)
        images = self.back(features)
        rows = self.fault(self.current_epoch if self._trainer is not None else 0)
        if rows is not None and not self.training:
            images = images.clone()
            images[:, :, :rows, :rows] = 0.1
        return images

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        # the weights change a little, as in a real run
        weight = next(self.back.parameters())
        return 1e-2 * (weight * torch.randn_like(weight)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


QUADRANTS = REGIONS


def make_monitor(split: str | None = "front", regions: Any = QUADRANTS, **options: Any) -> RegionalPrimitivesMonitor:
    return RegionalPrimitivesMonitor(
        split, regions, **({"every_n_epochs": 1, "on_error": "raise", "num_images": 2} | options)
    )


def test_a_generator_is_decomposed_and_no_hook_remains(tmp_path: Any) -> None:
    monitor, model = make_monitor(), Painter()
    logger = TensorBoardLogger(tmp_path, name="run")
    trainer(monitor, max_epochs=2, logger=logger).fit(model, batches())
    assert float(monitor.result.converged) == 1
    assert float(monitor.result.images) == 2
    assert all(not part._forward_hooks and not part._forward_pre_hooks for part in model.modules())
    assert all(parameter.grad is None or not parameter.grad.isnan().any() for parameter in model.parameters())
    seen = events(logger.log_dir)
    expected = {
        f"gendiag/regional_primitives/{name}"
        for name in ("components", "leakage", "strength_3", "leakage_0", "seconds")
    }
    assert expected <= set(seen.Tags()["scalars"])
    assert "gendiag/regional_primitives/panel" in seen.Tags()["images"]


@pytest.mark.parametrize(
    ("model", "split"), [(lambda: GAN(8, width=4), "generator.6"), (lambda: VAE(3, width=2), "decoder.4")]
)
def test_the_split_and_the_regions_are_found(model: Any, split: str) -> None:
    monitor = make_monitor(None, None, num_images=1, num_regions=3, max_steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DiagnosticWarning)
        trainer(monitor, max_epochs=1).fit(model(), batches(32))
    assert monitor.layer == split
    # one of three is the background of digits, in which nothing is drawn
    assert len(monitor.names) == 2
    assert int(monitor.labels.min()) == -1
    assert monitor.result.relevant.isfinite().all()


def test_training_is_bit_identical_and_parameters_get_no_gradients() -> None:
    def run(*callbacks: Any) -> Any:
        return state_after_training(*callbacks, module=lambda: GAN(8, width=4), size=32)

    monitor = make_monitor(None, "grid", num_images=1, max_steps=2, max_regions=4)
    with pytest.warns(DiagnosticWarning, match="Of 9 regions, only the 4 that change most are evaluated"):
        found = run(monitor)
    torch.testing.assert_close(found, run(), rtol=0, atol=0)
    assert len(monitor.names) == 4
    assert int(monitor.labels.min()) == -1


def test_a_compiled_module_is_decomposed() -> None:
    plain, compiled = Painter(), Painter()
    compiled.load_state_dict(plain.state_dict())
    compiled.front = torch.compile(compiled.front, backend="eager")  # type: ignore[assignment]
    compiled.back = torch.compile(compiled.back, backend="eager")  # type: ignore[assignment]
    results = []
    for model in (plain, compiled):
        torch.manual_seed(0)
        monitor = make_monitor()
        trainer(monitor, max_epochs=1, limit_train_batches=1).fit(model, batches())
        results.append(monitor.result.norms)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-3)


def test_a_region_whose_components_vanish_is_found_and_named() -> None:
    monitor, stopping = make_monitor(num_images=4), CollapseStopping()
    with pytest.warns(CollapseWarning, match="top left collapsed: strength of its components fell from"):
        own = trainer(monitor, stopping, max_epochs=25)
        own.fit(Painter(lambda epoch: 4 if epoch >= 12 else None), batches())
    assert stopping.alarms[0].epoch < 17
    assert stopping.alarms[0].names == ["top left"]
    # the other regions are drawn as before
    assert own.current_epoch == 25


def test_components_that_begin_to_leak_are_found_and_named(generator: torch.Generator) -> None:
    monitor, judge, history = make_monitor(), Judge(3e-4, 6), History()
    monitor.names = ["top", "bottom"]
    for number in range(1, 20):
        noise = 1 + 0.05 * torch.rand((), generator=generator, dtype=torch.float64)
        effects = torch.tensor([[0, 0], [1, 0.01], [0.01, 1], [0.1, 0.1]], dtype=torch.float64) * noise
        if number > 14:
            # the component of the bottom changes the top as much
            effects[2, 0] = 0.9
        metric = RegionalPrimitives(2)
        ones = torch.ones(2, dtype=torch.float64)
        norms = torch.tensor([0, 1, 1, 0.3], dtype=torch.float64) * noise
        metric.update(norms, effects, torch.ones(4), 0.01 * ones, 0.01 * ones, torch.ones(()))
        evaluation = Evaluation(number, number, number, monitor.observations(metric.compute()))
        history.append(monitor.name, evaluation)
        judge.update(monitor.name, evaluation, history)
    found = judge.alarms[0]
    assert found.label == "the components of bottom"
    assert "leak into the rest of the image: share of their effect outside their regions rose from 0.0" in str(found)
    assert found.epoch < 18


def test_a_healthy_run_raises_no_alarm() -> None:
    monitor, stopping = make_monitor(), CollapseStopping()
    trainer(monitor, stopping, max_epochs=20).fit(Painter(), batches())
    assert stopping.alarms == []


def test_the_state_is_restored_from_a_checkpoint(tmp_path: Any) -> None:
    first = make_monitor()
    own = trainer(first, max_epochs=2)
    own.fit(Painter(), batches())
    own.save_checkpoint(tmp_path / "last.ckpt")
    second = make_monitor()
    trainer(second, max_epochs=3).fit(Painter(), batches(), ckpt_path=tmp_path / "last.ckpt", **loading())
    assert second.evaluations == 3
    torch.testing.assert_close(second.result.strength, first.result.strength, rtol=0.2, atol=0.05)


def test_the_time_budget_ends_an_evaluation_after_the_first_image() -> None:
    monitor = make_monitor(num_images=50, max_seconds=1e-6)
    trainer(monitor, max_epochs=1).fit(Painter(), batches())
    assert float(monitor.result.images) == 1


def test_invalid_configurations_raise_errors_before_training() -> None:
    for options, match in (
        (
            {"split": "middle"},
            r"split must be the path of a submodule of Painter, got 'middle'. Its children are front, back",
        ),
        (
            {"regions": torch.zeros(4, 4, dtype=torch.long)},
            r"regions must be \(8, 8\), as the images are, got \(4, 4\)",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            trainer(make_monitor(**options), max_epochs=1).fit(Painter(), batches())

    class Vectors(Painter):
        def forward(self, z: Tensor) -> Tensor:
            return super().forward(z).flatten(1)

    with pytest.raises(
        ValueError, match=r"decode must return \(1, C, H, W\) images, got \(1, 64\). .*decode=lambda module, z"
    ):
        trainer(make_monitor(), max_epochs=1).fit(Vectors(), batches())
    with pytest.raises(ValueError, match="split must be given for a decoder without a layer"):
        flat = GAN(8, width=4)
        adapter = ModelAdapter(decode=lambda module, z: z[:, :1, None, None].expand(-1, 1, 8, 8), latent_dim=8)
        trainer(make_monitor(None, adapter=adapter), max_epochs=1).fit(flat, batches(32))


class Squeezed(Painter):
    """A flow of images whose only layer couples one half of the folded image to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.latent_dim = 64
        self.net = nn.Conv2d(8, 8, 1)

    def encode(self, x: Tensor) -> Tensor:
        one, other = nn.functional.pixel_unshuffle(x, 4).chunk(2, 1)
        return torch.cat([one, other - self.net(one)], 1).flatten(1)

    def decode(self, z: Tensor) -> Tensor:
        one, other = z.view(-1, 16, 2, 2).chunk(2, 1)
        return nn.functional.pixel_shuffle(torch.cat([one, other + self.net(one)], 1), 4)


def test_a_network_inside_of_a_coupling_is_no_layer_to_split_a_flow_at() -> None:
    with pytest.raises(ValueError, match="split must be given for a flow"):
        trainer(make_monitor(None), max_epochs=1).fit(Squeezed(), batches())
    # a layer that is given is split at
    trainer(make_monitor("net", max_steps=3), max_epochs=1).fit(Squeezed(), batches())


def test_an_autoencoder_with_latents_of_the_size_of_its_images_is_split() -> None:
    class Halved(Squeezed):
        def encode(self, x: Tensor) -> Tensor:
            return super().encode(x) / 2

    monitor = make_monitor(None, max_steps=3)
    trainer(monitor, max_epochs=1).fit(Halved(), batches())
    assert monitor.layer == "net"


def test_a_tail_without_a_derivative_raises_an_error() -> None:
    @torch.no_grad()
    def frozen(u: Tensor) -> Tensor:
        return linear(u)

    for tail in (frozen, lambda u: linear(u.detach())):
        with pytest.raises((ValueError, RuntimeError), match=r"tail must depend on the features|does not require grad"):
            minimal_features(tail, FEATURE, 0 * FEATURE, REGIONS)


def test_a_region_that_never_changes_does_not_affect_the_means() -> None:
    def dark(u: Tensor) -> Tensor:
        image = linear(u).clone()
        # the corner has the same value at the baseline and in the image, and other values in between
        image[:, :, :4, :4] = 0.01 * (u[:, 1] * (u[:, 1] + 2))[:, None, None, None]
        return image

    minimal = minimal_features(dark, FEATURE, 0 * FEATURE, REGIONS)
    found = decompose(dark, FEATURE, REGIONS, minimal)
    assert float(found.irrelevant.max()) < 10
    assert float(found.relevant.max()) < 10


def test_without_images_everything_is_nan() -> None:
    result = RegionalPrimitives(3).compute()
    assert result.components.isnan()
    assert result.sparsity.isnan()


def test_maps_with_unused_numbers_raise_an_error_at_once() -> None:
    with pytest.raises(ValueError, match="regions must have each number from 0 to 2, got none of"):
        make_monitor(regions=torch.tensor([[-1, 0], [2, 2]]))


def test_the_background_is_left_out() -> None:
    labels = torch.tensor([[0, 1, 2, 2]])
    monitor = RegionalPrimitivesMonitor(regions=RegionMap(labels, background=1))
    assert monitor.names == ["left", "right"]
    assert monitor.labels.tolist() == [[0, -1, 1, 1]]
