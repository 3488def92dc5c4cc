from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import zuko
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.metrics import r2_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.zoo.autoencoders import VQVAE
from example_models.data import digits
from lightning_gendiag import (
    Alarm,
    CollapseStopping,
    GenerativeDiagnostics,
    ModelAdapter,
    RoundTrip,
    RoundTripMonitor,
    jacobian_volume,
    round_trip_error,
)
from lightning_gendiag.model.inversion import layers_of, log_det_ways
from tests.helpers.cases import LEFT_AND_RIGHT, Case
from tests.helpers.inversions import (
    LOST,
    NAMED,
    START,
    START_OF_AUTOENCODERS,
    PlantedAutoencoder,
    Run,
    Zuko,
    autoencoder_run,
    flow_run,
    is_named,
    loader,
)
from tests.helpers.logs import events
from tests.helpers.models import TinyGAN
from tests.helpers.running import batches, loading, state_after_training, trainer


def updates(count: int = 10, n: int = 20) -> list[dict[str, Any]]:
    """Returns round trips of images of two regions, latents, noise and two layers, with Jacobians of some."""
    generator = torch.Generator().manual_seed(0)

    def pair(*shape: int, error: float = 0.1) -> dict[str, Tensor]:
        before = torch.randn(n, *shape, generator=generator)
        return {"before": before, "after": before + error * torch.randn(before.shape, generator=generator)}

    found: list[dict[str, Any]] = []
    for _ in range(count):
        root = torch.randn(3, 5, 5, generator=generator).double() + 3 * torch.eye(5)
        volume = {"gram": root.mT @ root, "log_det": torch.linalg.slogdet(root)[1] + 0.01}
        found += [
            pair(1, 8, 8) | volume, pair(1, 8, 8) | {"kind": "held_out"}, pair(6) | {"kind": "latents"},
            pair(1, 8, 8) | {"kind": "noise"}, pair(5) | {"layer": 0} | volume, pair(5) | {"layer": 1},
        ]  # fmt: skip
    return found


CASE = Case(make=lambda: RoundTrip(LEFT_AND_RIGHT, 2), updates=updates(), tolerance=1e-9)


# ---- the numbers ----


def test_errors_are_those_of_a_loop_over_rows_and_positions() -> None:
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(30, 2, 3, 4, generator=generator).double() * torch.rand(3, 4, generator=generator) + 5
    after = before + torch.randn(before.shape, generator=generator) * torch.rand(3, 4, generator=generator)
    x, y = before.numpy(), after.numpy()
    variance, error = np.zeros((3, 4)), np.zeros((3, 4))
    for row in range(3):
        for column in range(4):
            values = [x[n, c, row, column] for n in range(30) for c in range(2)]
            again = [y[n, c, row, column] for n in range(30) for c in range(2)]
            variance[row, column] = np.var(values)
            error[row, column] = np.mean([(a - b) ** 2 for a, b in zip(values, again, strict=True)])
    expected = np.sqrt(error / variance.mean()).reshape(-1)
    np.testing.assert_allclose(round_trip_error(before, after).numpy(), expected, rtol=1e-9)


def test_what_comes_back_independently_has_an_error_of_the_root_of_two() -> None:
    before, after = torch.randn(2, 200_000, 1, generator=torch.Generator().manual_seed(0))
    assert float(round_trip_error(before, after)) == pytest.approx(math.sqrt(2), rel=0.01)
    assert float(round_trip_error(before, before)) == 0


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_errors_do_not_depend_on_the_unit(scale: float) -> None:
    before, noise = torch.randn(2, 50, 7, generator=torch.Generator().manual_seed(0)).double()
    expected = round_trip_error(before, before + 0.1 * noise)
    torch.testing.assert_close(round_trip_error(scale * before, scale * (before + 0.1 * noise)), expected)


def test_fractions_of_the_variance_are_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(40, 3, generator=generator)
    after = before + torch.tensor([0.1, 0.5, 2.0]) * torch.randn(40, 3, generator=generator)
    metric = RoundTrip(torch.tensor([0, 1, 2]))
    metric.update(before, after)
    metric.update(before, after, "latents")
    result = metric.compute()
    expected = 1 - r2_score(before.numpy(), after.numpy(), multioutput="raw_values")
    np.testing.assert_allclose(result.unexplained.numpy(), expected, rtol=1e-4)
    np.testing.assert_allclose(result.latent_unexplained.numpy(), expected, rtol=1e-4)
    assert result.worst_positions(2) == [2, 1]


def test_the_fraction_of_a_region_is_of_all_its_positions() -> None:
    before = torch.randn(30, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    after = before.clone()
    after[:, :, :, 4:] = before[:, :, :, 4:].mean(0)
    metric = RoundTrip(LEFT_AND_RIGHT)
    metric.update(before, after)
    torch.testing.assert_close(metric.compute().unexplained, torch.tensor([0.0, 1.0]).double())


@pytest.mark.parametrize("dims", [1, 2, 20])
def test_volumes_are_those_of_slogdet_and_svd(dims: int) -> None:
    jacobian = torch.randn(6, dims, dims, generator=torch.Generator().manual_seed(dims)).double()
    log_det, condition = jacobian_volume(jacobian.mT @ jacobian)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian)[1])
    values = torch.linalg.svdvals(jacobian)
    torch.testing.assert_close(condition, values[:, 0] / values[:, -1], rtol=1e-4, atol=1e-9)


def test_what_float32_does_not_resolve_has_no_volume() -> None:
    grams = torch.stack([torch.diag(torch.tensor(d).double()) for d in ([1.0, 0.0], [1.0, 1e-16], [1.0, math.nan])])
    log_det, condition = jacobian_volume(grams)
    assert log_det.isnan().all()
    assert (condition > 1e7).all()


def test_nan_is_counted_by_row_and_left_out() -> None:
    before = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    after = before.clone()
    after[2, 1], after[7, 0] = math.nan, math.inf
    metric = RoundTrip(num_layers=1)
    metric.update(before, after)
    metric.update(before, after, layer=0)
    result = metric.compute()
    assert float(result.invalid[0]) == float(result.layer_invalid[0]) == 2 / 10
    assert (result.data_error == 0).all()
    assert result.worst_layer() == 0


@pytest.mark.parametrize(
    "rows", [torch.full((4, 3), 2.0), torch.full((4, 3), math.nan), torch.zeros(0, 3), torch.zeros(1, 3)]
)
def test_constant_empty_and_nan_data_raise_no_error(rows: Tensor) -> None:
    metric = RoundTrip(num_layers=1)
    metric.update(rows, rows)
    metric.update(rows, rows, "latents")
    metric.update(rows, rows, layer=0)
    result = metric.compute()
    assert not (result.data_error > 0).any()
    monitor = RoundTripMonitor()
    assert monitor.observations(result) == []
    assert {name: value.shape for name, value in result.scalars().items() if value.ndim} == {}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"before": torch.zeros(3), "after": torch.zeros(3)}, "after must be"),
        ({"before": torch.zeros(3, 2), "after": torch.zeros(3, 4)}, "after must be"),
        ({"before": torch.zeros(3, 2), "after": torch.zeros(3, 2), "kind": "x"}, "kind must be one of"),
        ({"before": torch.zeros(3, 2), "after": torch.zeros(3, 2), "layer": 1}, "layer must be 0 to 0"),
        ({"before": torch.zeros(3, 2), "after": torch.zeros(3, 2)}, "before must be of 64 positions"),
        (
            {
                "before": torch.zeros(0, 64),
                "after": torch.zeros(0, 64),
                "gram": torch.eye(2)[None],
                "log_det": torch.zeros(2),
            },
            r"log_det must be \(1,\)",
        ),
        ({"before": torch.zeros(0, 64), "after": torch.zeros(0, 64), "gram": torch.zeros(1, 2, 3)}, "gram must be"),
    ],
)
def test_wrong_arguments_raise_errors_with_a_fix(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        RoundTrip(LEFT_AND_RIGHT, 1).update(**arguments)
    assert "To fix this, " in str(caught.value)


@pytest.mark.parametrize("arguments", [{"tolerance": 0.0}, {"tolerance": math.nan}, {"patience": 0}])
def test_arguments_of_the_monitor_are_checked(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be"):
        RoundTripMonitor(**arguments)


@pytest.mark.parametrize(
    "arguments", [{"num_layers": -1}, {"regions": torch.tensor([0, 2])}, {"regions": torch.zeros(2)}]
)
def test_arguments_of_the_metric_are_checked(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be"):
        RoundTrip(**arguments)


# ---- how flows are written ----


class Scale(nn.Module):
    """A coupling of rows in the manner of most flows; the subclasses are called in other ways."""

    def __init__(self, dims: int, flip: bool) -> None:
        super().__init__()
        self.flip, self.net = flip, nn.Linear(dims // 2, dims)
        nn.init.normal_(self.net.weight, 0.0, 0.05)

    def apply_to(self, x: Tensor, back: bool) -> tuple[Tensor, Tensor]:
        first, second = x.chunk(2, 1)[:: -1 if self.flip else 1]
        scale, shift = self.net(first).chunk(2, 1)
        second = (second - shift) * (-scale).exp() if back else second * scale.exp() + shift
        parts = (second, first) if self.flip else (first, second)
        return torch.cat(parts, 1), scale.sum(1) * (-1 if back else 1)


class TwoMethods(Scale):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.apply_to(x, False)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.apply_to(z, True)


class OnlyValues(TwoMethods):
    def inverse(self, z: Tensor) -> Tensor:  # type: ignore[override]
        return self.apply_to(z, True)[0]


class Adding(Scale):
    """Adds to the log-determinant that it is given, with a parameter for the direction."""

    def forward(self, x: Tensor, log_det: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
        out, own = self.apply_to(x, reverse)
        return out, log_det + own


class Writing(Adding):
    """Adds to the log-determinant in place."""

    def forward(self, x: Tensor, log_det: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
        out, own = self.apply_to(x, reverse)
        log_det += own
        return out, log_det


class Listed(Scale):
    """Takes and returns tuples of tensors, as FrEIA's modules do."""

    def forward(self, x: Any, rev: bool = False, jac: bool = True) -> Any:
        out, own = self.apply_to(x[0], rev)
        return (out,), own


class Chain(LightningModule):
    """A flow of rows whose layers are called in one of these ways."""

    def __init__(self, kind: Any, count: int = 4, dims: int = 64) -> None:
        super().__init__()
        self.latent_dim, self.kind = dims, kind
        self.layers = nn.ModuleList(kind(dims, flip=bool(number % 2)) for number in range(count))

    def run(self, x: Tensor, back: bool) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for layer in reversed(self.layers) if back else self.layers:
            if issubclass(self.kind, Adding):
                x, total = layer(x, total, reverse=back)
                continue
            if self.kind is Listed:
                (x,), own = layer((x,), rev=back)
            elif back:
                out = layer.inverse(x)
                x, own = out if isinstance(out, tuple) else (out, 0.0)
            else:
                x, own = layer(x)
            total = total + own
        return x, total

    def encode(self, x: Tensor) -> Tensor:
        return self.run(x.flatten(1), False)[0]

    def decode(self, z: Tensor) -> Tensor:
        return self.run(z, True)[0].view(-1, 1, 8, 8)

    def log_det_of(self, x: Tensor) -> Tensor:
        return self.run(x.flatten(1), False)[1]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z, log_det = self.run(batch[0].flatten(1), False)
        return (0.5 * z.square().sum(1) - log_det).mean() / self.latent_dim

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


class Backwards(Chain):
    """A flow that samples by ``forward``, as those of normflows: its encoder calls the method ``inverse``."""

    def run(self, x: Tensor, back: bool) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for layer in self.layers if back else reversed(self.layers):
            x, own = layer(x) if back else layer.inverse(x)
            total = total + own
        return x, total


class WithPair(Chain):
    def encode(self, x: Tensor) -> Any:
        return self.run(x.flatten(1), False)


def jacobian_at(encode: Any, x: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(lambda flat: encode(flat.view(1, 1, 8, 8)).flatten(), x.flatten())


FLOWS: dict[str, tuple[Any, str]] = {
    "two methods": (lambda: Chain(TwoMethods), ""),
    "an inverse without determinant": (lambda: Chain(OnlyValues), ""),
    "a direction and a sum": (lambda: Chain(Adding), ""),
    "a sum in place": (lambda: Chain(Writing), ""),
    "tuples": (lambda: Chain(Listed), ""),
    "sampling forward": (lambda: Backwards(TwoMethods), ""),
    "a pair": (lambda: WithPair(TwoMethods), "what encodes"),
    "zuko": (Zuko, "the transform of self.flow.transform"),
    "autoregressive": (lambda: Zuko(zuko.flows.MAF), "the transform of self.flow.transform"),
}


@pytest.mark.parametrize("name", FLOWS)
def test_layers_are_found_and_each_has_the_determinant_of_its_jacobian(name: str) -> None:
    make, reports = FLOWS[name]
    seed_everything(0, verbose=False)
    module = make().eval()
    images = digits(8)[0][:5]

    def encode(x: Tensor) -> Tensor:
        out = module.encode(x)
        return out[0] if isinstance(out, tuple) else out

    with torch.no_grad():
        layers = layers_of(module, module.encode, module.decode, images)
        assert len(layers) == (3 if name in ("zuko", "autoregressive") else 4)
        total = torch.zeros(5)
        h = images.flatten(1)
        for layer in layers:
            torch.testing.assert_close(layer.before, h)
            h, volume = layer.forward(layer.before, None)
            assert volume is not None
            torch.testing.assert_close(layer.inverse(h), layer.before, rtol=1e-3, atol=1e-4)
            one, of_one = layer.forward(layer.before[3:4], 3)
            torch.testing.assert_close(one, h[3:4], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(of_one, volume[3:4], rtol=1e-4, atol=1e-5)
            total = total + volume
        torch.testing.assert_close(h, encode(images))
    for row in range(2):
        expected = torch.linalg.slogdet(jacobian_at(encode, images[row]).double())[1]
        assert float(total[row]) == pytest.approx(float(expected), abs=1e-3)
    ways = list(log_det_ways(module, module.encode, images, lambda: None))
    assert [way for way, _ in ways][:1] == ([reports] if reports else [])
    for _, through in ways:
        torch.testing.assert_close(through(images)[1], total, rtol=1e-4, atol=1e-4)


def test_a_layer_inside_another_one_is_taken_alone() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = TwoMethods(64, False), TwoMethods(64, True)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x, a = self.first(x)
            x, b = self.second(x)
            return x, a + b

        def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
            return self.first.inverse(self.second.inverse(z)[0])

    module = Chain(TwoMethods, 1)
    module.layers = nn.ModuleList([Block()])
    with torch.no_grad():
        layers = layers_of(module, module.encode, module.decode, digits(8)[0][:4])
    assert [layer.name for layer in layers] == ["self.layers.0.first (TwoMethods)", "self.layers.0.second (TwoMethods)"]


class Conditional(nn.Module):
    """Makes the second of two halves normal by what the first one says, as a split of Glow does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(32, 64)

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = self.net(first).chunk(2, 1)
        return (second - mean) * (-log_scale).exp(), -log_scale.sum(1)

    def inverse(self, first: Tensor, z: Tensor) -> Tensor:
        mean, log_scale = self.net(first).chunk(2, 1)
        return z * log_scale.exp() + mean


class Split(Chain):
    def __init__(self) -> None:
        super().__init__(TwoMethods, 2)
        self.split = Conditional()

    def encode(self, x: Tensor) -> Tensor:
        first, second = super().encode(x).chunk(2, 1)
        return torch.cat([first, self.split(first, second)[0]], 1)

    def decode(self, z: Tensor) -> Tensor:
        first, second = z.chunk(2, 1)
        return super().decode(torch.cat([first, self.split.inverse(first, second)], 1))


def test_a_layer_that_is_given_two_values_alike_is_not_judged_alone() -> None:
    module = Split()
    with torch.no_grad():
        layers = layers_of(module, module.encode, module.decode, digits(8)[0][:4])
    assert [layer.name for layer in layers] == ["self.layers.0 (TwoMethods)", "self.layers.1 (TwoMethods)"]


# ---- the monitor ----


def fitted(module: LightningModule, monitor: RoundTripMonitor, epochs: int = 2, **options: Any) -> Any:
    stopping = CollapseStopping("warn")
    trainer(monitor, stopping, max_epochs=epochs, **options).fit(module, loader())
    return stopping


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_inverts_itself_however_it_is_written(name: str) -> None:
    seed_everything(0, verbose=False)
    module = FLOWS[name][0]()
    monitor = RoundTripMonitor(on_error="raise")
    fitted(module, monitor, 1)
    scalars = monitor.scalars(monitor.result)
    assert float(scalars["data_error"]) < 1e-4
    assert float(scalars["latent_error"]) < 1e-4
    assert float(scalars["condition"]) > 1
    assert not any("unexplained" in tag for tag in scalars)
    of = [float(value) for tag, value in scalars.items() if "log_det_error" in tag]
    assert of
    assert max(of) < 1e-4


def test_a_callable_of_the_users_reports_the_determinant() -> None:
    for given in ("log_det_of", lambda module, images: module.run(images.flatten(1), False)):
        seed_everything(0, verbose=False)
        monitor = RoundTripMonitor(given, on_error="raise")
        fitted(Chain(TwoMethods), monitor, 1)
        assert float(monitor.result["log_det_error"]) < 1e-5
        assert len(monitor.result.log_det) == 2
    with pytest.raises(ValueError, match="log_det must be a callable or name a method of Chain"):
        fitted(Chain(TwoMethods), RoundTripMonitor("missing", on_error="raise"), 1)
    with pytest.raises(ValueError, match=r"log_det must return \(2,\) log-determinants of 2 images"):
        fitted(Chain(TwoMethods), RoundTripMonitor(lambda module, images: 0.0, on_error="raise"), 1)


@pytest.mark.filterwarnings("ignore:generated images span")
def test_it_is_attached_to_flows_and_autoencoders_and_left_out_elsewhere() -> None:
    for make, flow in ((lambda: Chain(TwoMethods), True), (lambda: VQVAE(8, 1e-3), False)):
        diagnostics = GenerativeDiagnostics(adapter=ModelAdapter(num_samples=32, num_reference=64), max_overhead=None)
        trainer(diagnostics, max_epochs=4).fit(make(), batches(8 if flow else 32))
        assert "round_trip" in diagnostics.attached
        assert ("condition" in diagnostics.monitors["round_trip"].result.scalars()) == flow
    other = GenerativeDiagnostics(adapter=ModelAdapter(num_samples=32, num_reference=64), max_overhead=None)
    trainer(other, max_epochs=1).fit(TinyGAN(), batches())
    assert "reconstruct must be known" in other.left_out["round_trip"]


@pytest.mark.parametrize("make", [lambda: Chain(TwoMethods), lambda: PlantedAutoencoder()])
def test_training_is_bit_identical_with_and_without_the_monitor(make: Any) -> None:
    def run(*callbacks: Any) -> Any:
        return state_after_training(*callbacks, module=make, size=8)

    torch.testing.assert_close(run(RoundTripMonitor(on_error="raise")), run(), rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_flows_are_inverted_in_full_precision(precision: str) -> None:
    monitor = RoundTripMonitor(on_error="raise")
    fitted(Chain(TwoMethods), monitor, 1, precision=precision)
    assert float(monitor.result["data_error"]) < 1e-5


def test_a_flow_that_returns_pictures_in_8_bits_is_not_judged_by_its_latents() -> None:
    class Rounding(Chain):
        def decode(self, z: Tensor) -> Tensor:
            return ((super().decode(z).clamp(-1, 1) * 127).round()) / 127

    monitor = RoundTripMonitor(on_error="raise")
    fitted(Rounding(TwoMethods), monitor, 1)
    assert "latent_error" not in monitor.result.scalars()
    assert "latents" not in [o.series.name for o in monitor.latest.observations]
    assert len(monitor.result.layer_error) == 4


class Dequantizing(Chain):
    """A flow of pixels of 5 bits, which adds noise to them and takes their logit, in the module as its users write it."""

    def __init__(self, kind: Any) -> None:
        super().__init__(kind)
        for layer in self.layers:
            nn.init.normal_(layer.net.weight, 0.0, 0.005)

    def encode(self, x: Tensor) -> Any:
        noisy = ((x.flatten(1) + 1) * 15.5 + torch.rand_like(x.flatten(1))) / 32
        squeezed = 0.05 + 0.9 * noisy
        volume = torch.log(0.9 / 32 * 15.5 / (squeezed * (1 - squeezed))).sum(1)
        z, log_det = self.run(torch.logit(squeezed), False)
        return z, log_det + volume

    def decode(self, z: Tensor) -> Tensor:
        noisy = (torch.sigmoid(self.run(z, True)[0]) - 0.05) / 0.9
        return (noisy * 32 / 15.5 - 1).clamp(-1, 1).view(-1, 1, 8, 8)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z, log_det = self.encode(batch[0])
        return (0.5 * z.square().sum(1) - log_det).mean() / self.latent_dim


def five_bits() -> DataLoader[Any]:
    values = (digits(8)[0].clamp(-1, 1) * 15.5 + 15.5).round() / 15.5 - 1
    return DataLoader(TensorDataset(values), batch_size=64)


def test_a_flow_that_adds_noise_to_its_data_is_not_called_one_that_does_not_invert_itself() -> None:
    monitor, stopping = RoundTripMonitor(on_error="raise"), CollapseStopping("warn")
    trainer(monitor, stopping, max_epochs=4).fit(Dequantizing(TwoMethods), five_bits())
    assert stopping.alarms == []
    assert {o.series.name for o in monitor.latest.observations} >= {"data", "noise"}
    assert "latent_error" not in monitor.result.scalars()
    with monitor.view.isolated(exact=True):
        assert monitor.view.parts.has_prior
    # what explodes is found all the same, and the layers are looked at alone
    assert len(monitor.result.layer_error) == 4
    worse = monitor.result._replace(data_error=torch.full_like(monitor.result.data_error, 3.0))
    assert any(o.series.name == "data" and o.is_bad for o in monitor.observations(worse))


@pytest.mark.filterwarnings("ignore:the log-determinant")
@pytest.mark.parametrize(("asked", "wrong"), [(False, False), (True, True)])
def test_zeros_that_were_not_asked_for_are_no_log_determinants(asked: bool, wrong: bool) -> None:
    class Optional(Chain):
        def flow(self, x: Tensor, reverse: bool = False, with_volume: bool = False) -> tuple[Tensor, Tensor]:
            z, log_det = self.run(x.flatten(1), reverse)
            return z, log_det if with_volume else torch.zeros_like(log_det)

    class Forgotten(Chain):
        def flow(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z, log_det = self.run(x.flatten(1), False)
            return z, torch.zeros_like(log_det)

    monitor, stopping = RoundTripMonitor(on_error="raise"), CollapseStopping("warn")
    module = (Forgotten if asked else Optional)(TwoMethods)
    trainer(monitor, stopping, max_epochs=5).fit(module, loader())
    assert bool(stopping.alarms) == wrong
    assert bool(monitor.result.log_det.numel()) == wrong


def test_scalars_and_panels_are_logged(tmp_path: Any) -> None:
    for module, expected in (
        (Chain(TwoMethods), {"data_error", "latent_error", "noise_error", "condition", "layer_error_3"}),
        (PlantedAutoencoder(), {"unexplained", "unexplained_2", "latent_unexplained"}),
    ):
        logger = TensorBoardLogger(tmp_path, name=type(module).__name__)
        trainer(RoundTripMonitor(on_error="raise"), max_epochs=2, logger=logger).fit(module, loader())
        seen = events(logger.log_dir)
        assert expected <= {tag.removeprefix("gendiag/round_trip/") for tag in seen.Tags()["scalars"]}
        picture = seen.Images("gendiag/round_trip/panel")[-1]
        assert picture.width < 600
        assert picture.height < 1000


def test_a_resumed_run_remembers_the_first_difference_and_what_was_reconstructed(tmp_path: Any) -> None:
    own = trainer(RoundTripMonitor(on_error="raise"), max_epochs=1)
    own.fit(WithPair(TwoMethods), loader())
    own.save_checkpoint(tmp_path / "flow.ckpt")
    first = own.callbacks[0].result.log_det_offset
    monitor = RoundTripMonitor(on_error="raise")
    trainer(monitor, max_epochs=3).fit(WithPair(TwoMethods), loader(), ckpt_path=tmp_path / "flow.ckpt", **loading())
    assert monitor.evaluations == 3
    assert float(monitor.result.first_offset) == float(first) != float(monitor.result.log_det_offset)


def test_a_fall_from_far_worse_than_the_mean_to_less_far_is_no_recovery() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(200, 4, generator=generator)
    values = []
    for error in (1.3, 1.2, 0.99):
        after = before.clone()
        after[:, 2] = before[:, 2] * (1 - error)
        metric = RoundTrip()
        metric.update(before, before)
        metric.update(before, after, kind="latents")
        result = metric.compute()
        result = result._replace(latents_kept=torch.ones_like(result.latents_kept))
        observations = RoundTripMonitor()._of_autoencoder(result)
        values += [seen.value for seen in observations if seen.series.name == "latent dimensions"]
    assert values == [1.0, 1.0, pytest.approx(1 - r2_score(before[:, 2], after[:, 2]), abs=1e-6)]


# ---- planted faults in real training ----


def alarms_of(run: Run) -> list[Alarm]:
    stopping = CollapseStopping("warn")
    trainer(run.monitor, stopping, max_epochs=run.epochs).fit(run.module, run.batches)
    return stopping.alarms


@pytest.mark.filterwarnings("ignore::lightning_gendiag.CollapseWarning")
@pytest.mark.parametrize("fault", NAMED)
def test_a_flow_that_breaks_is_found_and_the_layer_is_named(fault: str) -> None:
    alarms = alarms_of(flow_run(fault, 0))
    assert is_named(alarms, NAMED[fault])
    assert min(alarm.epoch for alarm in alarms) in range(START, START + 4)
    assert {alarm.stop for alarm in alarms} == {"never"}


@pytest.mark.parametrize("fault", ["", "glow", "fixed"])
def test_a_healthy_flow_raises_no_alarm(fault: str) -> None:
    assert alarms_of(flow_run(fault, 0)) == []


@pytest.mark.filterwarnings("ignore::lightning_gendiag.CollapseWarning")
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("fault", LOST)
def test_what_an_autoencoder_no_longer_reconstructs_is_named(fault: str, beta: float) -> None:
    alarms = alarms_of(autoencoder_run(fault, 0, beta))
    assert is_named(alarms, LOST[fault])
    assert all(alarm.epoch >= START_OF_AUTOENCODERS for alarm in alarms)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_healthy_autoencoder_raises_no_alarm(beta: float) -> None:
    assert alarms_of(autoencoder_run("", 0, beta)) == []
