from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from lightning_gendiag import (
    CodebookUsage,
    CodebookUsageMonitor,
    CollapseStopping,
    CollapseWarning,
    DiagnosticWarning,
    GenerativeDiagnostics,
    ModelAdapter,
    codebook_usage,
)
from lightning_gendiag.diagnostics.codebook_usage import plots
from lightning_gendiag.model.quantizers import quantizers_in
from lightning_gendiag.tensorboard import records
from tests.helpers.cases import Case
from tests.helpers.codebooks import MovingAverage, Planted, Straight, Tokenizer, named_codes
from tests.helpers.logs import events
from tests.helpers.models import ScriptedGenerator, TinyGAN
from tests.helpers.running import attached, batches, loading, state_after_training, trainer
from tests.helpers.versions import needs_bfloat16


def updates(count: int = 10, n: int = 20) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    # the codes of a geometric distribution, some of which occur once
    draws = [torch.rand(n, 3, 2, generator=generator).log().mul(-4).long() for _ in range(count)]
    return [{"indices": draw, "before": draw.roll(1, 1)[:10]} for draw in draws]


CASE = Case(make=lambda: CodebookUsage([16, 32]), updates=updates(), tolerance=1e-10)


# ---- what the tab shows ----


@pytest.mark.parametrize("sizes", [[1], [60], [64], [65], [1000, 37], [3, 4, 5], [2] * 64, [5000] * 3, [7] * 100])
def test_the_rows_of_the_tab_have_every_code_once_and_are_bounded(sizes: list[int]) -> None:
    bins = plots.page_bins(sizes)
    assert len(bins) <= 64
    for q, size in enumerate(sizes[:64]):
        codes = [code for own, first, last in bins if own == q for code in range(first, last + 1)]
        assert codes == list(range(size))


def test_the_use_in_a_row_is_the_mean_of_that_of_its_codes(generator: torch.Generator) -> None:
    sizes = torch.tensor([200, 90])
    counts = torch.randint(0, 50, (2, 200), generator=generator)
    counts[1, 90:] = 0
    result = codebook_usage(counts, sizes)
    for (q, first, last), use in zip(plots.page_bins(sizes.tolist()), plots.page_use(result), strict=True):
        share = float(counts[q, first : last + 1].sum() / counts[q].sum())
        assert use == pytest.approx(share * int(sizes[q]) / (last + 1 - first), rel=0.06)
    group, arrays = plots.page_cells(result)
    assert (group, arrays["use"].shape) == (4, (2, 50))
    # the second codebook ends within the 23rd cell
    assert np.isnan(arrays["use"]).sum(1).tolist() == [0, 27]
    cell = counts[0, 8:12].sum() / counts[0].sum() * 200 / 4
    assert arrays["use"][0, 2] == pytest.approx(float(cell), rel=1e-2)


@pytest.mark.parametrize(
    ("codes", "group", "shape"), [(1, 1, (1, 1)), (60, 1, (8, 8)), (4096, 1, (64, 64)), (65_536, 16, (64, 64))]
)
def test_the_cells_of_one_codebook_are_a_square_with_the_codes_that_died(
    codes: int, group: int, shape: tuple[int, int]
) -> None:
    counts = torch.full((codes,), 10)
    counts[-1] = 0
    result = codebook_usage(counts)._replace(recent=torch.full((1, codes), 1.0))
    found, arrays = plots.page_cells(result)
    assert (found, arrays["use"].shape, arrays["died"].shape) == (group, shape, shape)
    last = (codes - 1) // group
    assert arrays["died"].flatten()[: last + 1].tolist() == [0] * last + [int(codes > 1)]
    assert np.isnan(arrays["use"].flatten()[last + 1 :].astype(float)).all()
    assert not arrays["died"].flatten()[last + 1 :].any()
    assert sum(array.nbytes for array in arrays.values()) <= 3 * 4096


def test_codes_that_nothing_chooses_have_no_use() -> None:
    result = codebook_usage(torch.zeros(8))
    assert all(math.isnan(use) for use in plots.page_use(result))
    assert np.isnan(plots.page_cells(result)[1]["use"]).all()


# ---- the numbers ----


@pytest.mark.parametrize("codes", [2, 64, 65_536])
def test_even_use_has_a_perplexity_of_all_codes(codes: int) -> None:
    result = codebook_usage(torch.full((codes,), 10))
    assert float(result.perplexity) == pytest.approx(codes, rel=1e-9)
    assert float(result.observed_perplexity) == pytest.approx(codes, rel=1e-9)
    assert float(result.usage) == float(result.estimated_usage) == 1
    assert float(result.nine_tenths) == pytest.approx(0.9, abs=1 / codes)
    assert not result.dead.any()
    assert not result.is_collapsed.any()


@pytest.mark.parametrize("n", [1, 2, 1000])
def test_one_code_has_a_perplexity_of_one(n: int) -> None:
    counts = torch.zeros(512)
    counts[7] = n
    result = codebook_usage(counts)
    assert float(result.perplexity) == float(result.observed_perplexity) == 1
    assert result.most_used(0) == [7]
    assert int(result.dead.sum()) == 511
    assert float(result.usage) == float(result.nine_tenths) == 1 / 512
    # one position says nothing about the others
    assert bool(result.is_collapsed) == (n > 1)


def slow(counts: np.ndarray[Any, Any]) -> dict[str, float]:
    """The same numbers by loops over the codes, from the definitions of the papers."""
    n, size = int(counts.sum()), len(counts)
    seen = [int(c) for c in counts if c > 0]
    f1, f2 = seen.count(1), seen.count(2)
    coverage = 1 - min(f1, n - 1) / n
    entropy = 0.0
    for c in seen:
        p = coverage * c / n
        entropy -= p * math.log(p) / (1 - (1 - p) ** n)
    carried, number = 0, 0
    for c in sorted(seen, reverse=True):
        if carried >= 0.9 * n:
            break
        carried, number = carried + c, number + 1
    return {
        "perplexity": min(math.exp(entropy), size),
        "usage": len(seen) / size,
        "estimated_usage": min(1, (len(seen) + (n - 1) / n * f1 * (f1 - 1) / (2 * (f2 + 1))) / size),
        "nine_tenths": number / size,
        "dead_codes": size - len(seen),
        "unseen_bound": 1 - 0.05 ** (1 / n),
    }


@pytest.mark.parametrize("n", [3, 50, 3000])
def test_the_numbers_equal_those_of_loops(n: int) -> None:
    generator = np.random.default_rng(n)
    shares = generator.dirichlet(np.full(300, 0.3))
    counts = np.bincount(generator.choice(300, n, p=shares), minlength=300)
    scalars = codebook_usage(torch.from_numpy(counts)).scalars()
    for name, expected in slow(counts).items():
        assert float(scalars[name]) == pytest.approx(expected, rel=1e-9), name


def test_corrections_come_closer_to_the_truth_where_few_positions_meet_many_codes() -> None:
    generator, shares = np.random.default_rng(0), np.random.default_rng(1).dirichlet(np.full(2000, 1.0))
    truth = math.exp(-(shares * np.log(shares)).sum())
    draws = [np.bincount(generator.choice(2000, 2000, p=shares), minlength=2000) for _ in range(20)]
    results = [codebook_usage(torch.from_numpy(draw)) for draw in draws]
    for corrected, plain, true, times in (
        ([r.perplexity for r in results], [r.observed_perplexity for r in results], truth, 3),
        # a lower bound, and still closer
        ([r.estimated_usage for r in results], [r.usage for r in results], 1.0, 2),
    ):
        error, bias = (abs(float(torch.cat(values).mean()) / true - 1) for values in (corrected, plain))
        assert error < bias / times


def test_the_bound_of_an_unseen_code_holds_as_often_as_stated() -> None:
    """A code with exactly the share of the bound stays unseen in one sample of twenty."""
    bound = float(codebook_usage(torch.tensor([200, 0])).unseen_bound)
    assert (1 - bound) ** 200 == pytest.approx(0.05, rel=1e-9)


def test_codes_beyond_a_codebook_are_invalid_and_left_out() -> None:
    metric = CodebookUsage([4, 2])
    metric.update([torch.tensor([[0, 1, -1, 4]]), torch.tensor([[0, 1, 2, 1]])])
    result = metric.compute()
    assert result.counts.tolist() == [[1, 1, 0, 0], [1, 2, 0, 0]]
    assert float(result.invalid) == pytest.approx(3 / 8)
    assert result.dead.tolist() == [[False, False, True, True], [False, False, False, False]]
    # a permutation of the positions of two codebooks in one tensor, as residual quantizers return
    again = CodebookUsage([4, 2])
    again.update(torch.tensor([[[0, 0], [1, 1], [-1, 2], [4, 1]]]))
    assert torch.equal(again.compute().counts, result.counts)


def test_drift_is_the_share_of_positions_with_another_code() -> None:
    metric = CodebookUsage(4)
    metric.update(torch.tensor([[0, 1], [2, 3], [3, 3]]), torch.tensor([[0, 1], [3, 3]]))
    assert float(metric.compute()["drift"]) == 0.25
    metric.reset()
    metric.update(torch.tensor([[0, 1]]))
    assert "drift" not in metric.compute().scalars()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: CodebookUsage(0), "num_codes must be at least 1 for each codebook, got 0"),
        (lambda: CodebookUsage([]), r"num_codes must be at least 1 for each codebook, got \[\]"),
        (lambda: CodebookUsage(4).update(torch.zeros(2, 3)), r"indices must be integers \(N, ...\) for each of 1"),
        (lambda: CodebookUsage([4, 4]).update([torch.zeros(2, 3).long()]), "for each of 2 codebooks, got torch.int64"),
        (lambda: CodebookUsage(4).update(torch.zeros(2, 3).long(), torch.zeros(3, 3).long()), r"before must be \(M, 3\)"),
        (lambda: codebook_usage(torch.zeros(0)), r"counts must be \(K,\) or \(Q, K\), got \(0,\)"),
        (lambda: codebook_usage(torch.zeros(2, 3), torch.ones(3)), r"sizes must be \(2,\)"),
        (lambda: CodebookUsageMonitor(patience=0), "patience must be at least 1, got 0"),
        (lambda: CodebookUsageMonitor(num_codes=-1), "num_codes must be at least 1"),
    ],
)  # fmt: skip
def test_invalid_arguments_raise_errors(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


# ---- quantizers as people write them ----


class WithoutIndices(Straight):
    """As in PyTorch-VAE: one-hot rows times the weights, and no indices in the output."""

    def forward(self, z: Tensor) -> Any:
        indices = torch.cdist(z.permute(0, 2, 3, 1).flatten(0, 2), self.embedding.weight).argmin(1)
        quantized = (F.one_hot(indices, self.n_e).to(z) @ self.embedding.weight).view(len(z), *z.shape[2:], -1)
        quantized = quantized.permute(0, 3, 1, 2)
        return z + (quantized - z).detach(), F.mse_loss(quantized, z.detach())


class OnlyVectors(MovingAverage):
    """Returns the vectors alone."""

    def forward(self, z: Tensor) -> Any:
        return super().forward(z)[0], torch.zeros(())


class Residual(nn.Module):
    """Each level quantizes what the levels before it leave; as in vector-quantize-pytorch, indices (n, h, w, Q)."""

    def __init__(self, levels: int = 3, kind: Any = Straight) -> None:
        super().__init__()
        self.levels = nn.ModuleList([kind() for _ in range(levels)])

    def forward(self, z: Tensor) -> Any:
        rest, total, loss = z, torch.zeros_like(z), torch.zeros(())
        for level in self.levels:
            quantized, level_loss, *_ = level(rest)
            rest, total, loss = rest - quantized.detach(), total + quantized, loss + level_loss
        return total, loss


class Levels(nn.Module):
    """Residual levels written by hand, with their vectors in a list of parameters, a plain list, or one tensor."""

    def __init__(self, held: str = "list", returns: str = "vectors", is_rows: bool = False) -> None:
        super().__init__()
        vectors = [nn.Parameter(torch.rand(24, 6) * 2 - 1) for _ in range(3)]
        embeddings = nn.ModuleList([nn.Embedding(24, 6) for _ in range(3)])
        self.returns, self.is_rows = returns, is_rows
        self.codebooks = {
            "list": lambda: nn.ParameterList(vectors),
            "plain": lambda: [vector.detach() for vector in vectors],
            "tensor": lambda: nn.Parameter(torch.stack([vector.detach() for vector in vectors])),
            "embeddings": lambda: embeddings,
        }[held]()

    @property
    def vectors(self) -> list[Tensor]:
        return [level.weight if isinstance(level, nn.Embedding) else level for level in self.codebooks]

    def forward(self, z: Tensor) -> Any:
        rows = z.permute(0, 2, 3, 1)
        rest, codes = rows, []
        for level in self.vectors:
            codes.append(torch.cdist(rest, level).argmin(-1))
            rest = rest - level[codes[-1]]
        quantized = z + (rows - rest - rows).permute(0, 3, 1, 2).detach()
        loss = (quantized.detach() - z).square().mean() + rest.square().mean()
        by_level = {"vectors": [], "first": [torch.stack(codes, 1)], "list": [codes]}[self.returns]
        return quantized, loss, *by_level


class OfOtherLevels(Levels):
    """Leaves a part of the last level out, so that only its integers show what was chosen."""

    def forward(self, z: Tensor) -> Any:
        quantized, loss, codes = super().forward(z)
        return quantized / 2, loss, torch.stack(codes, -1)


class LookupFree(nn.Module):
    """Signs of the latents, whose bits are numbered from the least or from the greatest; nothing states how many there are."""

    def __init__(self, is_reversed: bool = False, scale: float = 1.0) -> None:
        super().__init__()
        powers = 2 ** torch.arange(6)
        self.scale = scale
        self.register_buffer("powers", powers.flip(0) if is_reversed else powers)

    def forward(self, z: Tensor) -> Any:
        bits = z > 0
        quantized = (2.0 * bits - 1) * self.scale
        return z + (quantized - z).detach(), (bits * self.powers[:, None, None]).sum(1), z.square().mean()


class LFQTokenizer(Tokenizer):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        quantized, _, loss = self.quantizer(self.latents(batch[0]))
        return F.mse_loss(self.decoder(quantized), batch[0]) + loss


class Nested(nn.Module):
    """As in MONAI: a quantizer within a quantizer, of which the outer one returns no indices."""

    def __init__(self) -> None:
        super().__init__()
        self.quantizer = Straight()

    def forward(self, z: Tensor) -> Any:
        quantized, loss, _ = self.quantizer(z)
        return quantized, loss


class Encoding(Tokenizer):
    """Its encoder returns the vectors, the loss and the indices."""

    def encode(self, x: Tensor) -> Any:
        return self.quantizer(self.latents(x))


class WithItsOwnCodebook(Tokenizer):
    """The module itself holds the vectors, compares with them in a method, and encodes what is not quantized."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.codebook = nn.Parameter(torch.rand(24, 6) * 2 - 1)

    def encode(self, x: Tensor) -> Tensor:
        return self.latents(x)

    def forward(self, x: Tensor) -> Tensor:
        z = self.latents(x).permute(0, 2, 3, 1)
        return self.decoder(self.codebook[torch.cdist(z, self.codebook).argmin(-1)].permute(0, 3, 1, 2))


class VQVAE(Tokenizer):
    """The module itself holds an embedding with a common name, beside one of classes and one of times."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.embedding = nn.Embedding(24, 6)
        self.class_embedding, self.time_embed = nn.Embedding(10, 6), nn.Embedding(100, 6)

    def forward(self, x: Tensor) -> Tensor:
        z = self.latents(x).permute(0, 2, 3, 1)
        return self.decoder(self.embedding(torch.cdist(z, self.embedding.weight).argmin(-1)).permute(0, 3, 1, 2))


def view_of(module: LightningModule) -> Any:
    view = attached(module, ModelAdapter(reference=batches(16).dataset, num_reference=40), ())
    view.refresh()
    return view


def chosen(module: Any, images: Tensor, vectors: list[Tensor]) -> list[Tensor]:
    """The codes of images by the definition: the nearest vector at each position, level by level."""
    module.eval()
    rest = module.latents(images).permute(0, 2, 3, 1)
    codes = []
    for level in vectors:
        codes.append((rest[..., None, :] - level).square().sum(-1).argmin(-1).flatten(1))
        rest = rest - level[codes[-1]].view(rest.shape)
    return codes


MODELS: dict[str, tuple[Any, Any, str]] = {
    "gradient": (lambda: Tokenizer(Straight()), lambda m: [m.quantizer.embedding.weight], "output"),
    "average": (lambda: Tokenizer(MovingAverage()), lambda m: [m.quantizer.embed.T], "output"),
    "no indices": (lambda: Tokenizer(WithoutIndices()), lambda m: [m.quantizer.embedding.weight], "vectors"),
    "vectors": (lambda: Tokenizer(OnlyVectors()), lambda m: [m.quantizer.embed.T], "vectors"),
    "nested": (lambda: Tokenizer(Nested()), lambda m: [m.quantizer.quantizer.embedding.weight], "output"),
    "residual": (
        lambda: Tokenizer(Residual()), lambda m: [level.embedding.weight for level in m.quantizer.levels], "input",
    ),
    "encoder": (lambda: Encoding(MovingAverage()), lambda m: [m.quantizer.embed.T], "output"),
    "own parameter": (WithItsOwnCodebook, lambda m: [m.codebook], "vectors"),
    "own embedding": (VQVAE, lambda m: [m.embedding.weight], "input"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_codes_are_those_of_the_nearest_vectors(name: str) -> None:
    make, vectors, read = MODELS[name]
    seed_everything(0, verbose=False)
    module = make()
    view = view_of(module)
    reader = view.find_codebooks()
    assert {one.read for one in reader.codebooks} == {read}
    codes = view.codes(reader)
    images = view.local_reference().images
    with torch.no_grad():
        expected = chosen(module, images if reader.need == "encode" else images[1::2], vectors(module))
    assert reader.sizes == [24] * len(expected)
    for found, true in zip(codes, expected, strict=True):
        torch.testing.assert_close(found.long(), true)


@pytest.mark.parametrize("returns", ["vectors", "first", "list"])
@pytest.mark.parametrize("held", ["list", "plain", "tensor", "embeddings"])
def test_residual_levels_are_read_however_their_vectors_are_held(held: str, returns: str) -> None:
    seed_everything(0, verbose=False)
    module = Tokenizer(Levels(held, returns))
    view = view_of(module)
    reader = view.find_codebooks()
    assert [one.read for one in reader.codebooks] == ["residual"]
    assert reader.sizes == [24] * 3
    with torch.no_grad():
        expected = chosen(module, view.local_reference().images[1::2], module.quantizer.vectors)
    for found, true in zip(view.codes(reader), expected, strict=True):
        torch.testing.assert_close(found.long(), true)


def test_levels_whose_vectors_do_not_add_up_are_read_from_integers_or_not_at_all() -> None:
    seed_everything(0, verbose=False)
    reader = view_of(Tokenizer(OfOtherLevels(returns="list"))).find_codebooks()
    assert [(one.read, one.number) for one in reader.codebooks] == [("output", 3)]

    class Alone(OfOtherLevels):
        def forward(self, z: Tensor) -> Any:
            return super().forward(z)[:2]

    with pytest.raises(ValueError, match=r"of the codes of self.quantizer .* show none"):
        view_of(Tokenizer(Alone(returns="list"))).find_codebooks()


@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("is_reversed", [True, False])
def test_quantizers_without_a_codebook_show_their_number_of_codes(is_reversed: bool, scale: float) -> None:
    seed_everything(0, verbose=False)
    module = LFQTokenizer(LookupFree(is_reversed, scale))
    view = view_of(module)
    reader = view.find_codebooks()
    assert reader.sizes == [64]
    with torch.no_grad():
        bits = module.eval().latents(view.local_reference().images[1::2]) > 0
        expected = (bits * module.quantizer.powers[:, None, None]).sum(1).flatten(1)
    torch.testing.assert_close(view.codes(reader)[0].long(), expected)


def test_integers_that_number_nothing_need_a_stated_number_of_codes() -> None:
    class Rounding(LookupFree):
        def forward(self, z: Tensor) -> Any:
            levels = z.tanh().mul(2).round()
            return levels, (levels + 2).sum(1).long(), z.square().mean()

    module = LFQTokenizer(Rounding())
    with pytest.raises(ValueError, match="has no quantizer whose codebook or number of codes is known"):
        view_of(module).find_codebooks()
    assert view_of(module).find_codebooks("quantizer", 25).sizes == [25]


@pytest.mark.parametrize("quantizer", [Levels, LookupFree])
def test_training_is_bit_identical_with_quantizers_written_by_hand(quantizer: Any) -> None:
    def run(*callbacks: Any) -> Any:
        module = Tokenizer if quantizer is Levels else LFQTokenizer
        return state_after_training(*callbacks, module=lambda: module(quantizer()), size=16)

    torch.testing.assert_close(run(CodebookUsageMonitor(on_error="raise")), run(), rtol=0, atol=0)


def test_what_encodes_is_called_once_for_all_monitors() -> None:
    module = Encoding()
    view = view_of(module)
    reader = view.find_codebooks()
    calls = []
    view.module.encoder.register_forward_hook(lambda *_: calls.append(1))
    view.codes(reader)
    view.encoded()
    view.codes(reader)
    assert len(calls) == 1
    view.expire()
    view.encoded()
    view.codes(reader)
    assert len(calls) == 2


class Conditional(LightningModule):
    """A generator of classes, with embeddings of the names that codebooks have too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.embed, self.label_emb = nn.Embedding(10, 4), nn.Embedding(10, 4), nn.Embedding(10, 4)
        self.codes = nn.Linear(4, 64)


@pytest.mark.parametrize("make", [TinyGAN, Conditional, ScriptedGenerator])
def test_embeddings_of_classes_are_no_codebooks(make: Any) -> None:
    assert quantizers_in(make()) == []


def test_a_class_that_is_looked_up_in_something_called_a_quantizer_is_no_code() -> None:
    class VQGenerator(Tokenizer):
        def __init__(self) -> None:
            super().__init__(nn.Identity())
            self.embedding = nn.Embedding(10, 6)

        def forward(self, x: Tensor) -> Tensor:
            label = torch.zeros(len(x), dtype=torch.long)
            return self.decoder(self.latents(x) + self.embedding(label)[..., None, None])

    with pytest.raises(ValueError, match=r"indices must be known, but of the codes of self.embedding .* show none"):
        view_of(VQGenerator()).find_codebooks()


def test_only_the_quantizer_that_is_named_is_read() -> None:
    view = view_of(Tokenizer(Residual()))
    assert view.find_codebooks("quantizer.levels.1").name == "self.quantizer.levels.1"
    monitor = CodebookUsageMonitor("quantizer.levels.1", on_error="raise")
    trainer(monitor, max_epochs=1).fit(Tokenizer(Residual()), batches(16))
    assert monitor.metric.num_codes == [24]


class Rows(nn.Module):
    """Gives a quantizer of rows (N, P, D) the positions of images."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, z: Tensor) -> Any:
        quantized, indices, loss = self.quantizer(z.flatten(2).transpose(1, 2))
        return quantized.transpose(1, 2).reshape(z.shape), indices, loss.sum()


LIBRARY = {
    "VectorQuantize": ({"dim": 6, "codebook_size": 24, "accept_image_fmap": True}, 1),
    "ResidualVQ": ({"dim": 6, "codebook_size": 24, "num_quantizers": 3}, 3),
    "LFQ": ({"dim": 6, "codebook_size": 16}, 1),
    "FSQ": ({"levels": [3, 4], "dim": 6}, 1),
    "SimVQ": ({"dim": 6, "codebook_size": 24, "channel_first": True}, 1),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LIBRARY)
def test_quantizers_of_vector_quantize_pytorch_are_read(name: str) -> None:
    package = pytest.importorskip("vector_quantize_pytorch", reason="it is installed by the extra field only")
    options, levels = LIBRARY[name]
    seed_everything(0, verbose=False)
    quantizer = getattr(package, name)(**options)
    module = Tokenizer(Rows(quantizer) if levels > 1 else quantizer)
    view = view_of(module)
    codes = view.codes(view.find_codebooks())
    module.eval()
    with torch.no_grad():
        images = view.local_reference().images
        true = module.quantizer(module.latents(images if len(codes[0]) == len(images) else images[1::2]))[1]
    expected = true.reshape(len(true), -1, levels).unbind(-1)
    for found, level in zip(codes, expected, strict=True):
        torch.testing.assert_close(found.long(), level.long())


# ---- the monitor ----


def test_a_callable_of_the_users_gives_the_same_codes() -> None:
    def run(monitor: CodebookUsageMonitor, module: Any = Encoding) -> Any:
        seed_everything(0, verbose=False)
        trainer(monitor, max_epochs=2).fit(module(), batches(16))
        return monitor.result

    class WithMethod(Encoding):
        def tokens(self, images: Tensor) -> Tensor:
            return self.encode(images)[2][2].view(len(images), -1)

    found = run(CodebookUsageMonitor(on_error="raise"))
    given = run(CodebookUsageMonitor(lambda module, images: module.encode(images), num_codes=24, on_error="raise"))
    named = run(CodebookUsageMonitor("tokens", num_codes=24, on_error="raise"), WithMethod)
    for other in (given, named):
        for value, expected in zip(other, found, strict=True):
            assert torch.equal(value, expected)
    assert 0 < float(found["drift"]) <= 1


def test_a_module_without_a_quantizer_raises_an_error_before_training() -> None:
    for monitor, match in (
        (
            CodebookUsageMonitor(),
            r"indices must be known, but TinyGAN has no quantizer.*CodebookUsageMonitor\(indices=",
        ),
        (CodebookUsageMonitor("tokens"), "indices must be a callable or name a method or a quantizer of TinyGAN"),
    ):
        with pytest.raises(ValueError, match=match):
            trainer(monitor, max_epochs=1).fit(TinyGAN(), batches())
    with pytest.warns(DiagnosticWarning, match="num_codes must be given where indices is a callable"):
        trainer(CodebookUsageMonitor(lambda module, images: images.long()), max_epochs=1).fit(TinyGAN(), batches())


def test_it_is_attached_where_there_is_a_quantizer_and_left_out_elsewhere() -> None:
    diagnostics = GenerativeDiagnostics(adapter=ModelAdapter(num_reference=64), max_overhead=None, on_error="raise")
    trainer(diagnostics, max_epochs=1).fit(Tokenizer(), batches(16))
    assert "codebook" in diagnostics.attached
    assert diagnostics.monitors["codebook"].evaluations == 1
    other = GenerativeDiagnostics(adapter=ModelAdapter(num_samples=32, num_reference=64), max_overhead=None)
    trainer(other, max_epochs=1).fit(TinyGAN(), batches())
    assert "has no quantizer whose codebook" in other.left_out["codebook"]


class OfTokens(LightningModule):
    """A model of the tokens of a first stage, which is trained before or beside it."""

    def __init__(self, is_frozen: bool, quantizer: nn.Module) -> None:
        super().__init__()
        self.first_stage = Tokenizer(quantizer).requires_grad_(not is_frozen)
        self.transformer = nn.Linear(24, 24)

    def sample(self, n: int) -> Tensor:
        return torch.rand(n, 1, 16, 16)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.first_stage.training_step(batch, batch_idx)
        return loss + self.transformer.weight.square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([weight for weight in self.parameters() if weight.requires_grad], 1e-3)


@pytest.mark.parametrize("quantizer", [Straight, MovingAverage])
def test_a_codebook_that_is_not_trained_is_followed_only_where_it_is_named(quantizer: Any) -> None:
    def left_out(is_frozen: bool, *callbacks: Any) -> dict[str, str]:
        diagnostics = GenerativeDiagnostics("warn", num_reference=64, max_overhead=None)
        trainer(*callbacks, diagnostics, max_epochs=1).fit(OfTokens(is_frozen, quantizer()), batches(16))
        return diagnostics.left_out

    assert "first_stage.quantizer" in (reason := left_out(True)["codebook"])
    assert "are of a part that is not trained" in reason
    assert "codebook" not in left_out(False)
    named = CodebookUsageMonitor("first_stage.quantizer")
    assert "the trainer has a monitor of it" in left_out(True, named)["codebook"]
    assert named.evaluations == 1


@pytest.mark.parametrize("quantizer", [Straight, MovingAverage, Residual])
def test_training_is_bit_identical_with_and_without_the_monitor(quantizer: Any) -> None:
    def run(*callbacks: Any) -> Any:
        return state_after_training(*callbacks, module=lambda: Tokenizer(quantizer()), size=16)

    torch.testing.assert_close(run(CodebookUsageMonitor(on_error="raise")), run(), rtol=0, atol=0)


@pytest.mark.parametrize("precision", [pytest.param("bf16-true", marks=needs_bfloat16), "bf16-mixed", "64-true"])
def test_codes_are_read_in_every_precision(precision: str) -> None:
    monitor = CodebookUsageMonitor(on_error="raise")
    trainer(monitor, max_epochs=1, precision=precision).fit(Tokenizer(WithoutIndices()), batches(16))
    assert monitor.result is not None
    assert float(monitor.result.invalid) == 0
    assert 1 < float(monitor.result.perplexity) <= 24


def test_scalars_and_panels_are_logged(tmp_path: Any) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    monitor = CodebookUsageMonitor(on_error="raise")
    trainer(monitor, max_epochs=2, logger=logger).fit(Tokenizer(Residual()), batches(16))
    seen = events(logger.log_dir)
    assert {"perplexity", "usage", "dead_codes", "drift", "perplexity_2", "usage_2"} <= {
        tag.removeprefix("gendiag/codebook/") for tag in seen.Tags()["scalars"]
    }
    assert "gendiag/codebook/panel" in seen.Tags()["images"]

    def newest(tag: str) -> records.Record:
        return records.unpacked(list(seen.Tensors(tag)[-1].tensor_proto.string_val))

    (values,) = [tag for tag in seen.Tags()["tensors"] if tag.startswith("gendiag/tab/codebook/values")]
    sizes, result = monitor.metric.num_codes, monitor.result
    assert result is not None
    setup = newest(records.setup_tag("codebook")).fields
    assert setup["sizes"] == sizes
    assert {q for q, _, _ in setup["rows"]} == set(range(len(sizes)))
    extra = newest(values).fields["extra"]
    assert len(extra["use"]) == len(setup["rows"])
    assert extra["seen"] == result.seen.tolist()
    frame = newest(records.frame_tag("codebook", 2))
    assert frame.arrays["use"].shape == frame.arrays["died"].shape == (len(sizes), max(sizes))
    assert frame.fields["dead"] == int(result.dead.sum())


def test_a_codebook_of_65536_codes_has_few_series_and_panels_of_the_usual_size(tmp_path: Any) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    monitor = CodebookUsageMonitor(on_error="raise")
    trainer(monitor, CollapseStopping(), max_epochs=2, logger=logger).fit(Tokenizer(Straight(65_536)), batches(16))
    assert monitor.latest is not None
    assert [o.series.name for o in monitor.latest.observations] == ["the codebook", "usage", "codes in use"]
    picture = events(logger.log_dir).Images("gendiag/codebook/panel")[-1]
    assert picture.width < 600
    assert picture.height < 900


# ---- planted faults in real training ----


def fitted(fault: str, seed: int, epochs: int, **options: Any) -> tuple[CodebookUsageMonitor, CollapseStopping]:
    seed_everything(seed, verbose=False)
    monitor, stopping = CodebookUsageMonitor(on_error="raise"), CollapseStopping("warn")
    trainer(monitor, stopping, max_epochs=epochs).fit(Planted(fault, **options), batches(16, 256, batch_size=32))
    return monitor, stopping


@pytest.mark.filterwarnings("ignore::lightning_gendiag.CollapseWarning")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fault", ["point", "killed"])
def test_a_codebook_that_collapses_is_found_within_five_evaluations_and_its_codes_are_named(
    fault: str, seed: int
) -> None:
    monitor, stopping = fitted(fault, seed, 18)
    alarm = stopping.alarms[0]
    assert alarm.epoch in range(12, 17)
    assert alarm.diagnostic == "codebook"
    assert alarm.message.startswith("the codebook, of which codes ")
    assert "died, collapsed: perplexity " in alarm.message
    assert monitor.result is not None
    named = named_codes(alarm)
    assert named
    assert set(named) <= set(monitor.result.dead[0].nonzero()[:, 0].tolist())
    if fault == "killed":
        assert min(named) >= 2


@pytest.mark.parametrize("seed", range(3))
def test_a_codebook_that_lies_far_from_the_data_is_reported_after_patience(seed: int) -> None:
    with pytest.warns(CollapseWarning, match=r"the codebook collapsed: perplexity is .* of 24 codes have been in use"):
        _, stopping = fitted("far", seed, 12)
    assert stopping.alarms[0].rule
    assert stopping.alarms[0].stop == "alone"
    assert stopping.alarms[0].epoch < 10


@pytest.mark.parametrize("quantizer", [Straight, MovingAverage])
def test_a_healthy_run_raises_no_alarm(quantizer: Any) -> None:
    monitor, stopping = fitted("", 0, 25, quantizer=quantizer)
    assert stopping.alarms == []
    assert monitor.result is not None
    assert float(monitor.result.usage) > 0.2


def test_of_residual_levels_the_one_that_collapses_is_named() -> None:
    metric, monitor = CodebookUsage([64, 64]), CodebookUsageMonitor()
    codes = torch.arange(640).view(10, 64) % 64
    metric.update([codes, torch.zeros_like(codes)])
    result = metric.compute()
    observed = {o.series.name: o for o in monitor.observations(result)}
    assert observed["codes of codebook 1 in use"].severity == math.inf
    assert observed["codes of codebook 0 in use"].severity == observed["codes in use"].severity == 0
    # only the collapse of all stops a run by itself
    assert observed["codes of codebook 1 in use"].series.stop == "never"
    assert observed["codes in use"].series.stop == "alone"
    assert (
        "1 of 64 codes have been in use, nine tenths of the time 0, for"
        in observed["codes of codebook 1 in use"].message
    )
    assert observed["codebook 0"].value == pytest.approx(64)
    assert observed["the codebooks"].value == pytest.approx(8)
    before = {"codebook 0": 64.0, "codebook 1": 16.0}
    assert monitor.contributions(before, {"codebook 0": 64.0, "codebook 1": 1.0}) == {"codebook 0": 0, "codebook 1": 1}


def test_what_is_remembered_of_a_code_fades() -> None:
    """The shares that decide which codes died are those of the newest evaluations, whatever is repeated at a step."""
    monitor = CodebookUsageMonitor()
    results = [codebook_usage(torch.tensor(counts)) for counts in ([50, 50, 0], [100, 0, 0], [100, 0, 0], [100, 0, 0])]
    recent = []
    for step, result in enumerate(results):
        monitor.last_step = step
        for _ in range(2):
            done = monitor.postprocess(None, result)  # type: ignore[arg-type]  # it needs no view
        recent.append(done.recent[0, 1].item())
    assert recent[0] == 0
    assert all(after == pytest.approx(0.8 * before) for before, after in pairwise(recent[1:]))
    assert recent[1] == 0.5
    assert done.died_codes(0) == [1]


def test_a_resumed_run_remembers_which_codes_were_in_use(tmp_path: Any) -> None:
    own = trainer(CodebookUsageMonitor(on_error="raise"), max_epochs=2)
    own.fit(Tokenizer(), batches(16))
    own.save_checkpoint(tmp_path / "run.ckpt")
    monitor = CodebookUsageMonitor(on_error="raise")
    trainer(monitor, max_epochs=3).fit(Tokenizer(), batches(16), ckpt_path=tmp_path / "run.ckpt", **loading())
    assert monitor.evaluations == 3
    assert monitor.result is not None
    assert float(monitor.result.recent.sum()) >= 1
    # codes of single positions are not kept
    assert "drift" not in monitor.result.scalars()


def test_positions_without_codes_are_nan_and_no_collapse() -> None:
    metric, monitor = CodebookUsage(8), CodebookUsageMonitor(patience=1)
    metric.update(torch.full((5, 2), -1))
    result = metric.compute()
    assert float(result.invalid) == 1
    severity = {o.series.name: o.severity for o in monitor.observations(result)}
    assert math.isnan(severity["the codebook"])
    assert severity["codes in use"] == 0
