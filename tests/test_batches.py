"""What is read of batches in the forms that datasets and libraries give them."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gendiag import GenerationBalanceMonitor, GenerativeDiagnostics, KStarMonitor, ModelAdapter
from lightning_gendiag.callbacks.logging import DiagnosticWarning
from lightning_gendiag.model.batches import data_of, images_of, one_hot_rows, read_labels, shape_of
from tests.helpers.models import TinyGAN
from tests.helpers.running import attached, trainer

N = 5
X = torch.rand(N, 3, 8, 8)
Y = torch.tensor([0, 2, 1, 1, 0])
OTHER = torch.rand(N, 3, 8, 8)
LAST = X.permute(0, 2, 3, 1)
TOKENS = torch.arange(4).repeat(N, 1)
ROWS, SERIES, VOLUMES = torch.rand(N, 7), torch.rand(N, 2, 9), torch.rand(N, 1, 4, 6, 5)


class Recorded(Tensor):
    """A tensor that may not be sliced, as one with records of its rows may not."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            raise ValueError("the records go with other rows")
        return super().__torch_function__(func, types, args, kwargs or {})


@dataclass
class Item:
    """A batch of a dataset of one's own."""

    name: str
    picture: Tensor
    category: Tensor


@dataclass
class Slotted:
    """A batch without a dictionary of attributes."""

    __slots__ = ("image", "label")
    image: Tensor
    label: Tensor


class Output(OrderedDict):  # type: ignore[type-arg]
    """A dictionary with attributes, as libraries return it."""


Pair = namedtuple("Pair", "target input")

BATCHES: dict[str, tuple[Any, bool]] = {
    "images": (X, False),
    "pair": ((X, Y), True),
    "list of a pair": ([X, Y], True),
    "index, images, labels": ((torch.arange(N), X, Y), True),
    "names of files, images, labels": ((("a",) * N, X, Y), True),
    "two crops and labels": ((X, OTHER, Y), True),
    "labels and indices": ((X, (Y, torch.arange(N))), True),
    "dictionary of labels": ((X, {"path": ["a"] * N, "y": Y}), True),
    "image and label": ({"image": X, "label": Y}, True),
    "label before image": ({"label": Y, "image": X}, True),
    "jpg and cls": ({"cls": Y, "jpg": X}, True),
    "jpg and txt": ({"jpg": X, "txt": ["a"] * N}, False),
    "source and target": ({"source": X, "target": Y, "uid": ["a"] * N}, True),
    "pixel_values and fine_label": ({"pixel_values": X, "coarse_label": Y // 2, "fine_label": Y}, True),
    "channels last": ({"image": LAST, "class_label": Y, "human_label": ["a"] * N}, True),
    "names in capitals": ({"Image": X, "Label": Y}, True),
    "unknown name": ({"photo": X, "class": Y}, True),
    "a mask of Booleans first": ({"mask": OTHER > 0.5, "photo": X, "y": Y}, True),
    "a picture first": ({"depth": OTHER, "image": X, "y": Y}, True),
    "a picture beside a dictionary": ({"depth": OTHER, "views": {"image": X}, "meta": {"label": Y}}, True),
    "label is a map, class is one": ({"image": X, "label": OTHER, "class_id": Y}, True),
    "target is an image": ({"image": X, "target": OTHER}, False),
    "an image twice": ((X, OTHER), False),
    "nested": ({"data": {"x": X, "y": Y}}, True),
    "pairs of two loaders": ({"labelled": (X, Y), "more": (OTHER, Y.flip(0))}, True),
    "two loaders, one with labels": ([X, (OTHER, Y)], False),
    "two dictionaries, one with labels": ({"a": {"image": X}, "b": {"image": OTHER, "label": Y}}, False),
    "named tuple": (Pair(Y, X), True),
    "dataclass": (Item("a", X, Y), True),
    "dataclass with slots": (Slotted(X, Y), True),
    "object": (SimpleNamespace(images=X, targets=Y), True),
    "ordered dictionary": (Output(data=X, labels=Y), True),
    "user's dictionary": (UserDict(pixel_values=X, labels=Y), True),
    "subclasses": ({"image": X.as_subclass(Recorded), "label": Y.as_subclass(Recorded)}, True),
    "arrays": ({"image": X.numpy(), "label": Y.numpy()}, True),
    "arrays that are read backwards": ((X.flip(3).numpy()[..., ::-1], Y.numpy()), True),
    "list of images": ((list(X), list(Y)), True),
    "list of arrays, channels last": ([[image.numpy() for image in LAST], Y.tolist()], True),
}  # fmt: skip


@pytest.mark.parametrize("name", BATCHES)
def test_images_and_labels_of_a_batch(name: str) -> None:
    batch, is_labelled = BATCHES[name]
    images, labels, data = images_of(batch), read_labels(batch).labels, data_of(batch)
    assert images is not None
    assert type(images) is Tensor
    assert torch.equal(images, X)
    assert images.is_contiguous() or images.data_ptr() == X.data_ptr()
    assert data is not None
    assert torch.equal(data, X)
    assert (labels is not None) == is_labelled == (read_labels(batch).reason == "")
    if labels is not None:
        assert type(labels) is Tensor
        assert torch.equal(labels, Y)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (ROWS, ROWS),
        ((ROWS, Y), ROWS),
        ((SERIES, ({"path": "a"},) * N), SERIES),
        ((VOLUMES, Y), VOLUMES),
        ({"X": ROWS, "batch": Y[:, None], "labels": Y[:, None]}, ROWS),
        ({"label": F.one_hot(Y).float(), "series": SERIES}, SERIES),
        ({"weights": torch.rand(2, 3), "features": ROWS, "y": Y}, ROWS),
        ({"tokens": Y[:, None].repeat(1, 4), "embedding": ROWS}, ROWS),
        ({"input_ids": TOKENS, "attention_mask": torch.ones(N, 4)}, None),
        ((TOKENS, (TOKENS > 1).float()), None),
        ({"input_ids": TOKENS, "attention_mask": torch.ones(N, 4), "speaker": ROWS}, ROWS),
        ({"visits": (TOKENS > 1).float(), "is_known": (TOKENS > 0).long()}, (TOKENS > 1).float()),
        ({"counts": TOKENS.float(), "tokens": TOKENS}, TOKENS.float()),
        ({"image": VOLUMES.as_subclass(Recorded), "label": VOLUMES}, VOLUMES),
        (ROWS.numpy(), ROWS),
        ((torch.rand(N), Y), None),
        ((Y[:, None], Y), None),
        ([torch.rand(3, 8, 8), torch.rand(3, 9, 8)], None),
        (([torch.rand(3, 8, 8), torch.rand(3, 9, 8)], Y[:2]), None),
        (torch.eye(4).to_sparse(), None),
        ("nothing", None),
        (None, None),
        ([], None),
        ({}, None),
    ],
)
def test_data_other_than_images(batch: Any, expected: Tensor | None) -> None:
    assert images_of(batch) is None
    data = data_of(batch)
    assert (data is None) == (expected is None)
    if data is not None and expected is not None:
        assert type(data) is Tensor
        assert torch.equal(data, expected)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 8, 8, 3), (2, 3, 8, 8)),
        ((2, 8, 6, 1), (2, 1, 8, 6)),
        ((2, 8, 6, 4), (2, 4, 8, 6)),
        ((2, 3, 8, 8), (2, 3, 8, 8)),
        # either layout: as they are
        ((2, 3, 8, 3), (2, 3, 8, 3)),
        ((2, 1, 4, 4), (2, 1, 4, 4)),
        ((2, 4, 4, 3), (2, 4, 4, 3)),
        # square features
        ((2, 16, 4, 4), (2, 16, 4, 4)),
        ((2, 2, 8, 8), (2, 2, 8, 8)),
        ((2, 8, 8, 5), (2, 8, 8, 5)),
    ],
)
def test_channels_are_found(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    images = torch.rand(shape)
    read = images_of(images)
    assert read is not None
    assert read.shape == expected
    assert torch.equal(read, images if shape == expected else images.permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("dtype", "low", "high", "expected"),
    [
        (torch.uint8, 0, 255, torch.uint8),
        (torch.int16, 0, 255, torch.uint8),
        (torch.int32, 0, 255, torch.uint8),
        (torch.int64, 0, 255, torch.uint8),
        (torch.uint16, 0, 255, torch.uint8),
        (torch.int64, 0, 256, torch.float32),
        (torch.int16, -1, 255, torch.float32),
        (torch.uint16, 0, 65535, torch.float32),
        (torch.bool, 0, 1, torch.float32),
        (torch.float16, 0, 1, torch.float16),
        (torch.bfloat16, 0, 1, torch.bfloat16),
        (torch.float64, 0, 1, torch.float64),
    ],
)
def test_types_of_images(dtype: torch.dtype, low: int, high: int, expected: torch.dtype) -> None:
    values = torch.tensor([low, high] * 8).view(1, 1, 4, 4)
    images = images_of((values.to(dtype), Y))
    assert images is not None
    assert images.dtype == expected
    assert images.flatten().tolist() == values.flatten().tolist()


CLASSES = {
    "int64": Y,
    "int32": Y.int(),
    "uint8": Y.to(torch.uint8),
    "column": Y[:, None],
    "floats": Y.float(),
    "half": Y.half()[:, None],
    "one-hot": F.one_hot(Y),
    "one-hot floats": F.one_hot(Y).float(),
    "one-hot Booleans": F.one_hot(Y).bool(),
    "array": Y.numpy(),
    "numbers": Y.tolist(),
    "scalars": list(Y),
}


@pytest.mark.parametrize("name", CLASSES)
def test_what_labels_may_be(name: str) -> None:
    labels = read_labels((X, CLASSES[name])).labels
    assert labels is not None
    assert labels.dtype == torch.long
    assert torch.equal(labels, Y)


@pytest.mark.parametrize("batch", [{"y": Y, "tokens": Y}, {"tokens": Y, "y": Y}, (torch.arange(N), Y)])
def test_labels_are_read_where_there_are_no_data(batch: Any) -> None:
    labels = read_labels(batch).labels
    assert labels is not None
    assert torch.equal(labels, Y)


def test_booleans_are_two_classes() -> None:
    labels = read_labels((X, Y > 1)).labels
    assert labels is not None
    assert labels.tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (X, "the batches hold no labels; pass labels="),
        ({"jpg": X, "txt": ["a"] * N}, "the batches hold no labels; pass labels="),
        ((X, OTHER), "the batches hold no labels; pass labels="),
        ("nothing", "the batches hold no labels; pass labels="),
        ((X, torch.ones(N, 40, dtype=torch.long)), "the labels (5, 40) are attributes, not classes; pass labels="),
        ((X, torch.zeros(N, 2)), "the labels (5, 2) are attributes, not classes"),
        ((X, Y - 1), "the labels (5,) have negative values, which are no classes"),
        ((X, Y + 0.5), "the labels (5,) are not whole numbers"),
        ((X, Y / 0), "the labels (5,) are not whole numbers"),
        ((X, ROWS), "the labels (5, 7) are not whole numbers"),
        ((X, ["cat"] * N), "the labels (5 x str) are not numbers"),
        ((X, Y[:3]), "the labels (3,) go with other data than 5 rows"),
        ({"image": X, "label": torch.tensor(3)}, "the labels () have 0 axes"),
        # what stands further out belongs to other data
        (({"image": X, "label": Y - 1}, Y), "the labels (5,) have negative values"),
        ({"image": X, "label": Y - 1, "class": Y}, ""),
    ],
)
def test_the_reason_why_there_are_no_labels(batch: Any, reason: str) -> None:
    found = read_labels(batch).reason
    assert found.startswith(reason)
    assert (read_labels(batch).labels is None) == bool(reason) == bool(found)


def test_labels_of_the_user_are_judged_by_the_same_rules() -> None:
    def read(labels: Any) -> Any:
        return ModelAdapter(labels=lambda batch: labels).find_labels(X, X)

    assert torch.equal(read(F.one_hot(Y)).labels, Y)
    assert read(torch.ones(N, 40)).reason.startswith("the labels (5, 40) are attributes")
    assert torch.equal(read(torch.ones(N, 40)).conditions, torch.ones(N, 40))
    assert read(F.one_hot(Y)).conditions is None
    assert torch.equal(read(Y + 0.5).conditions, Y + 0.5)
    assert read(Y / 0).conditions is None
    assert read(Y[:2]).reason.startswith("the labels (2,) go with other data than 5 rows")
    assert read({"y": Y}).reason.startswith("the labels {y: (5,)} are not numbers")
    assert read(None).reason.startswith("the batches hold no labels; let the callable")


def test_labels_are_those_of_the_images_that_the_user_chose() -> None:
    batch = {"a": (X, Y), "b": (OTHER, Y.flip(0))}
    adapter = ModelAdapter(images=lambda batch: batch["b"][0])
    images = adapter.find_data(batch)
    assert images is OTHER
    labels = adapter.find_labels(batch, images).labels
    assert labels is not None
    assert labels.tolist() == Y.flip(0).tolist()


def test_the_structure_of_a_batch_as_text() -> None:
    assert (
        shape_of({"image": X, "name": ("a",) * 64, "y": Y.numpy()})
        == "{image: (5, 3, 8, 8), name: (64 x str), y: (5,)}"
    )
    assert shape_of((X, [Y, None])) == "((5, 3, 8, 8), ((5,), NoneType))"


class Trained(TinyGAN):
    """A GAN that reads no batch, and encodes by a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(torch.rand(16, 1, 8, 8), batch_idx)


def loader(labels: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(2 * torch.rand(64, 8, 8, 1) - 1, labels), batch_size=16)


def test_diagnostics_of_classes_are_left_out_with_the_shape_that_was_found() -> None:
    diagnostics = GenerativeDiagnostics(num_samples=16, skip=("latent_regions", "manifold_entropy"))
    trainer(diagnostics, max_epochs=1).fit(Trained(), loader(torch.ones(64, 40)))
    assert diagnostics.attached == ["cms", "memorization", "adversary", "training_data"]
    for name in ("generation_balance", "k_star"):
        assert diagnostics.left_out[name].startswith("the labels (16, 40) are attributes, not classes; pass labels=")


@pytest.mark.parametrize("monitor", [KStarMonitor, GenerationBalanceMonitor])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(64), "labels must have at least two classes, got only class 0"),
        (torch.full((64, 1), 3), "labels must have at least two classes, got only class 3"),
        # of these a matrix of all classes does not fit into any memory
        (
            10**7 * torch.arange(64),
            "labels must be classes of 3 real images or more .*, got 64 different labels of 64 real",
        ),
        (torch.arange(64) // 2, "got 32 different labels of 64 real images. To fix this, pass labels=lambda batch"),
        (
            torch.cat([torch.arange(60), -torch.ones(4)]),
            "labels must be known, but the labels .16,. have negative values",
        ),
    ],
)
def test_what_classes_cannot_be_compared_is_named(monitor: Any, labels: Tensor, message: str) -> None:
    own = trainer(monitor(), max_epochs=1)
    with pytest.warns(DiagnosticWarning, match=message):
        own.fit(Trained(), loader(labels))


def test_a_reference_of_one_class_leaves_diagnostics_of_classes_out_at_once() -> None:
    reference = 2 * torch.rand(32, 1, 8, 8) - 1, torch.zeros(32, dtype=torch.long)
    diagnostics = GenerativeDiagnostics(
        reference=reference, num_samples=16, skip=("latent_regions", "manifold_entropy")
    )
    trainer(diagnostics, max_epochs=1).fit(Trained(), loader(torch.arange(64)))
    assert diagnostics.left_out["k_star"] == "labels must have at least two classes, got only class 0"
    assert "k_star" not in diagnostics.attached


def test_the_reference_holds_images_and_classes_in_one_form() -> None:
    batch = {"image": (255 * LAST).int().numpy(), "class_label": F.one_hot(Y).float()}
    view = attached(TinyGAN(), ModelAdapter())
    view.real.collect(batch)
    assert view.real.ready(epoch_over=True)
    images, labels = view.reference
    assert images.dtype == torch.uint8
    assert torch.equal(images, (255 * X).to(torch.uint8))
    assert labels is not None
    assert torch.equal(labels, Y)


def test_labels_beyond_the_classes_of_one_hot_rows_raise_an_error() -> None:
    torch.testing.assert_close(one_hot_rows(torch.tensor([0, 2]), 3), torch.tensor([[1, 0, 0], [0, 0, 1]]))
    with pytest.raises(ValueError, match="it takes 3 classes, got a label 3"):
        one_hot_rows(torch.tensor([0, 3]), 3)
