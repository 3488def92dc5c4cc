"""Data in what samplers and decoders of other people's models return, in the forms in which it was seen."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Independent, MultivariateNormal, Normal, RelaxedBernoulli

from lightning_gendiag.model.outputs import data_in, fields_of, scaled_like

X = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5) / 120
"""Two images of 3 channels, 4 rows and 5 columns, of which no two values are equal."""

BYTES = (X * 240).to(torch.uint8)
GREY = BYTES[:, :1]
OTHER = torch.zeros(2, 4, 4)
"""What an output holds beside the images."""


class WithMetadata(Tensor):
    """A subclass, as MONAI's."""


class ModelOutput(OrderedDict[str, Any]):
    """A dictionary with attributes, as those of pythae, transformers and diffusers."""


@dataclass
class Reconstructed:
    loss: Tensor
    x_hat: Tensor


class Slots:
    __slots__ = ("samples",)

    def __init__(self) -> None:
        self.samples = X


class Posterior:
    """A distribution of someone's own, as ldm's."""

    def __init__(self, mean: Tensor | None = X) -> None:
        if mean is not None:
            self.mean = mean

    def sample(self) -> Tensor:
        return X


Pair = namedtuple("Pair", ["logits", "sample"])

OUTPUTS: dict[str, Any] = {
    "tensor": X,
    "subclass": X.as_subclass(WithMetadata),
    "parameter": nn.Parameter(X),
    "channels last": X.permute(0, 2, 3, 1),
    "flat": X.flatten(1),
    "array": X.numpy(),
    "array, channels last": X.permute(0, 2, 3, 1).numpy(),
    "list of images": list(X),
    "list of arrays, channels last": list(X.permute(0, 2, 3, 1).numpy()),
    "with log probabilities": (X, torch.zeros(2)),
    "with steps between": (X, {"x_inter": [X + 1, X + 2], "pred_x0": [X + 3]}),
    "reconstruction, mean, log variance": (X, torch.zeros(2, 7), torch.zeros(2, 7)),
    "loss first": [torch.zeros(()), X, None],
    "latents first": [OTHER, X],
    "one": (X,),
    "ldm's and diffusers' images": {"images": X, "nsfw": [False, False]},
    "dictionary without known names": {"loss": torch.zeros(()), "a": X, "b": X + 1},
    "named before others": {"input": X + 1, "recon": X},
    "better name first": {"output": X + 1, "samples": X},
    "logits last": {"logits": X + 1, "probabilities": X},
    "ModelOutput": ModelOutput(loss=torch.zeros(()), recon_x=X, z=OTHER),
    "dataclass": Reconstructed(torch.zeros(()), X),
    "named tuple": Pair(X + 1, X),
    "namespace": SimpleNamespace(images=X),
    "slots": Slots(),
    "named but of another shape": {"sample": OTHER, "decoded": X},
    "in containers": {"out": ({"image": X}, None)},
    "normal": Normal(X, 1.0),
    "independent": (Independent(Normal(X, 1.0), 3), OTHER),
    "flat distribution": Bernoulli(X.flatten(1)),
    "posterior of one's own": Posterior(),
    "only a sample": Posterior(None),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_images_are_found(kind: str) -> None:
    found = data_in(OUTPUTS[kind], 2, (3, 4, 5))
    assert type(found) in (Tensor, nn.Parameter)
    assert torch.equal(found, X)


@pytest.mark.parametrize("shape", [(1, 4, 5), None])
@pytest.mark.parametrize(
    "output",
    [GREY, (GREY, None), {"images": GREY}, GREY.numpy(), GREY.as_subclass(WithMetadata)],
    ids=["tensor", "tuple", "dictionary", "array", "subclass"],
)
def test_the_shape_need_not_be_known_and_integers_stay_integers(output: Any, shape: Any) -> None:
    found = data_in(output, 2, shape)
    assert type(found) is Tensor
    assert found.dtype == torch.uint8
    assert torch.equal(found, GREY)


@pytest.mark.parametrize("images", [BYTES, GREY], ids=["RGB", "L"])
def test_pictures_become_a_batch(images: Tensor) -> None:
    pictures = [Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()) for image in images]
    for output in (pictures, (pictures, [False, False]), SimpleNamespace(images=pictures)):
        assert torch.equal(data_in(output, 2, tuple(images.shape[1:])), images)


def test_one_channel_may_have_no_axis() -> None:
    assert torch.equal(data_in(GREY[:, 0], 2, (1, 4, 5)), GREY)


@pytest.mark.parametrize(
    ("shape", "data"),
    [((7,), torch.rand(2, 7)), ((3, 9), torch.rand(2, 3, 9)), ((1, 2, 3, 4), torch.rand(2, 1, 2, 3, 4))],
    ids=["rows", "series", "volumes"],
)
def test_data_need_not_be_images(shape: tuple[int, ...], data: Tensor) -> None:
    for output in (data, data.flatten(1), data.movedim(1, -1), {"loss": torch.zeros(2, 5), "x": data}):
        assert torch.equal(data_in(output, 2, shape), data)


def test_a_distribution_of_one_sample_is_sampled_n_times() -> None:
    """As flows that return their distribution; its two values differ by far more than their deviation."""
    for flow in (
        Normal(torch.tensor([0.0, 100.0]), 1e-3),
        MultivariateNormal(torch.tensor([0.0, 100.0]), 1e-6 * torch.eye(2)),
    ):
        for shape in ((2,), None):
            samples = data_in(flow, 3, shape)
            torch.testing.assert_close(samples, torch.tensor([[0.0, 100.0]] * 3), atol=0.1, rtol=0)
        # two samples are two rows, not the two means
        assert data_in(flow, 2, (2,)).shape == (2, 2)


def test_a_distribution_without_a_mean_gives_one_sample() -> None:
    logits = torch.full((2, 1, 4, 5, 3), -1e4).scatter(4, (GREY.long() % 3)[..., None], 0.0)
    assert torch.equal(data_in(Categorical(logits=logits), 2, (1, 4, 5)), GREY.long() % 3)
    relaxed = data_in(RelaxedBernoulli(torch.tensor(0.1), probs=torch.full((2, 3, 4, 5), 0.5)), 2, (3, 4, 5))
    assert relaxed.shape == X.shape
    assert float(relaxed.std()) > 0.1


def test_gradients_and_transforms_pass_through() -> None:
    for wrap in (lambda z: z, lambda z: (z, None), lambda z: Normal(z, 1.0), lambda z: {"recon": z}):
        jacobian = torch.func.jacfwd(lambda z, wrap=wrap: data_in(wrap(2 * z.view(1, 3)), 1, (1, 1, 3)).flatten())(
            torch.ones(3)
        )
        assert torch.equal(jacobian, 2 * torch.eye(3))


@pytest.mark.parametrize(
    ("output", "shape", "message"),
    [
        (torch.zeros(16, 3, 4, 5), (3, 4, 5), r"sample must return \(2, 3, 4, 5\) data when asked for 2, got \(16, 3"),
        (torch.zeros(2, 4, 4), (3, 4, 5), r"got \(2, 4, 4\)\.$"),
        ((torch.zeros(2, 8), torch.zeros(2)), (3, 4, 5), r"got \(2, 8\) and \(2,\)\.$"),
        (torch.zeros(2), None, r"return \(2, \.\.\.\) data .* got \(2,\)\.$"),
        (None, None, "got NoneType"),
        ("images", (3, 4, 5), "got str"),
        (nn.Linear(2, 2), (3, 4, 5), "got Linear"),
        ([], (3, 4, 5), "got list"),
        ([torch.zeros(3, 4, 5)] * 3, (3, 4, 5), r"got \(3, 4, 5\) and"),
        ((X, X + 1), (3, 4, 5), r"one batch of data, got 2 of \(2, 3, 4, 5\)\.$"),
        ([X] * 4, None, r"one batch of data, got 4 of \(2, 3, 4, 5\)\.$"),
    ],
)
def test_what_does_not_fit_is_named(output: Any, shape: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data_in(output, 2, shape)


def test_an_output_that_contains_itself_ends() -> None:
    endless: dict[str, Any] = {}
    endless["x"] = endless
    with pytest.raises(ValueError, match="got dict"):
        data_in(endless, 2, None)


def test_fields_are_those_that_can_be_read() -> None:
    class Lazy:
        def __init__(self) -> None:
            self.a, self._hidden = 1, 2

        @property
        def b(self) -> int:
            return 3

        @property
        def broken(self) -> int:
            raise RuntimeError

        def method(self) -> int:
            return 4

    assert fields_of(Lazy()) == {"a": 1, "b": 3}
    assert fields_of({1: 2}) == {"1": 2}
    for other in (X, [1], (1,), Normal(0.0, 1.0), nn.Linear(1, 1), len, Lazy, "text", 1, None):
        assert fields_of(other) == {}


INTEGERS = torch.tensor([0, 51, 255])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.2, 1.0]),
        (0.1, 0.7, [0.0, 0.2, 1.0]),
        (-1.0, 1.0, [-1.0, -0.6, 1.0]),
        (-0.4, 0.3, [-1.0, -0.6, 1.0]),
        (-1.04, 1.06, [-1.0, -0.6, 1.0]),
        (0.0, 255.0, [0.0, 51.0, 255.0]),
        (0.0, 0.0, [0.0, 0.2, 1.0]),
    ],
)
def test_8_bit_images_come_to_the_range_of_the_real_ones(
    dtype: torch.dtype, low: float, high: float, expected: list[float]
) -> None:
    torch.testing.assert_close(scaled_like(INTEGERS.to(dtype), low, high), torch.tensor(expected))


def test_floats_and_binary_images_keep_their_values() -> None:
    floats = torch.tensor([0.0, 200.0])
    assert scaled_like(floats, -1, 1) is floats
    for binary in (torch.tensor([0, 1]), torch.tensor([False, True])):
        assert scaled_like(binary, 0, 1).tolist() == [0.0, 1.0]
    # eight bits are nearly black, and of images in -1 to 1 both values are
    assert scaled_like(torch.tensor([0, 1], dtype=torch.uint8), 0, 1).tolist() == pytest.approx([0, 1 / 255])
    assert scaled_like(torch.tensor([0, 1]), -1, 1).tolist() == pytest.approx([-1, 2 / 255 - 1])
    assert scaled_like(torch.empty(0, 3, dtype=torch.uint8), 0, 1).shape == (0, 3)


@pytest.mark.parametrize(
    ("images", "low", "high", "message"),
    [
        (torch.tensor([0, 256]), 0, 1, "integer images must be in 0 to 255, got 0 to 256"),
        (torch.tensor([-1, 5]), 0, 1, "integer images must be in 0 to 255, got -1 to 5"),
        (INTEGERS, -0.42, 2.82, "real images must be in .* got -0.42 to 2.82. To fix this, return floats"),
        (INTEGERS, 0, 4000, "real images must be in .* got 0 to 4e"),
    ],
)
def test_other_ranges_are_refused(images: Tensor, low: float, high: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scaled_like(images, low, high)
