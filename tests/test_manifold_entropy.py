from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gendiag import (
    ManifoldEntropy,
    decoder_gram,
    manifold_cross_information,
    manifold_entropy,
)
from lightning_gendiag.diagnostics.manifold_entropy.functional import latent_correlation
from lightning_gendiag.functional.jacobian import active_dims, check_derivative
from tests.helpers.cases import Case

NORMAL = 0.5 * (1 + math.log(2 * math.pi))


def orthogonal(n: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q


def jacobians(n: int, x: int, latent: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, x, latent, generator=generator, dtype=torch.float64)


def close(a: Any, b: Any, tolerance: float = 1e-10) -> None:
    a, b = (x if isinstance(x, tuple) else torch.as_tensor(x) for x in (a, b))
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, check_dtype=False, equal_nan=True)


class TestClosedForms:
    def test_a_scaled_rotation(self, generator: torch.Generator) -> None:
        sigma = torch.tensor([5.0, 2.0, 1.0, 0.1], dtype=torch.float64)
        jacobian = (orthogonal(6, generator)[:, :4] * sigma).expand(3, -1, -1)
        result = manifold_entropy(jacobian)
        close(result.entropy, NORMAL + sigma.log())
        close(result.spectrum, NORMAL + sigma.log())
        close(result.total, 4 * NORMAL + sigma.log().sum())
        close(result.total_correlation, 0.0)
        close(result.mutual_information, torch.zeros(4, 4))
        close(result.core, (NORMAL + sigma.log()).cumsum(0))
        close(result.shared, torch.zeros(3))
        assert not result.dead.any()
        assert float(result.singular) == 0

    def test_a_linear_map_has_the_entropies_of_gaussians(self, generator: torch.Generator) -> None:
        # the data of a linear decoder are Gaussian with covariance A A'; here H is that of A z itself
        a = torch.randn(4, 4, generator=generator, dtype=torch.float64)
        result = manifold_entropy(a[None])
        normal = torch.distributions.MultivariateNormal(torch.zeros(4, dtype=torch.float64), a @ a.T)
        close(result.total, normal.entropy())
        gram = a.T @ a
        for i, j in [(0, 1), (2, 3), (3, 0)]:
            pair = gram[[i, j]][:, [i, j]]
            expected = result.entropy[i] + result.entropy[j] - (2 * NORMAL + 0.5 * pair.logdet())
            close(result.mutual_information[i, j], expected)

    def test_a_rotated_torus_of_twenty_dimensions(self, generator: torch.Generator) -> None:
        """The data are (r_0 + s z_r) (cos, sin)(w z_a), rotated, so that the columns of the Jacobian are orthogonal."""
        spin = orthogonal(20, generator)
        angle = torch.linspace(0.05, 0.5, 10, dtype=torch.float64)
        spread = torch.linspace(0.02, 0.2, 10, dtype=torch.float64)

        def decode(z: Tensor) -> Tensor:
            radius, phi = 1 + spread * z[:, :10], angle * z[:, 10:]
            return torch.cat([radius * phi.cos(), radius * phi.sin()], 1) @ spin

        z = torch.randn(400, 20, generator=generator, dtype=torch.float64)
        metric = ManifoldEntropy(20)
        metric.update(decoder_gram(decode, z))
        result = metric.compute()
        # |dx / dz_r| = s, exactly; |dx / dz_a| = w r, in the mean w E r up to its sampling error
        close(result.entropy[:10], NORMAL + spread.log())
        moved = (1 + spread * z[:, :10]).abs().log()
        close(result.entropy[10:], NORMAL + angle.log() + moved.mean(0))
        error = moved.std(0) / math.sqrt(400)
        limit = 5 * error + spread.square()
        assert ((result.entropy[10:] - NORMAL - angle.log()).abs() < limit).all()
        assert float(result.mutual_information.max()) < 1e-6
        assert abs(float(result.total_correlation)) < 1e-6

    def test_scales_of_latents_and_data(self, generator: torch.Generator) -> None:
        j = jacobians(5, 7, 3, generator)
        columns = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
        rows = torch.rand(7, generator=generator, dtype=torch.float64) + 0.5
        scaled = manifold_entropy(j, latent_scale=columns, data_scale=rows)
        close(scaled, manifold_entropy(j * rows[:, None] * columns))
        close(manifold_entropy(j, latent_scale=columns).entropy, manifold_entropy(j).entropy + columns.log())

    def test_the_volume_of_a_flow_gives_the_same_total(self) -> None:
        import zuko

        torch.manual_seed(0)
        flow = zuko.flows.NICE(4, transforms=3, hidden_features=(16,)).double()
        z = torch.randn(50, 4, dtype=torch.float64)
        transform = flow().transform.inv
        with torch.no_grad():
            log_volume = transform.call_and_ladj(z)[1]
        metric, other = ManifoldEntropy(4), ManifoldEntropy(4)
        gram = decoder_gram(transform, z)
        metric.update(gram, log_volume)
        other.update(gram)
        close(metric.compute().total, other.compute().total)


class TestLaws:
    @pytest.mark.parametrize("partition", [None, [[0], [1], [2], [3], [4]], [[0, 3], [1, 2, 4]], [[0, 1, 2, 3, 4]]])
    def test_total_correlation_is_not_negative(self, partition: Any, generator: torch.Generator) -> None:
        result = manifold_entropy(jacobians(20, 8, 5, generator), partition=partition)
        assert float(result.total_correlation) >= -1e-12
        if partition is not None and len(partition) == 1:
            close(result.total_correlation, 0.0)
        if partition is None or len(partition) == 5:
            close(result.total_correlation, result.entropy.sum() - result.total)

    def test_total_correlation_is_not_negative_for_singular_jacobians(self, generator: torch.Generator) -> None:
        j = jacobians(20, 8, 5, generator)
        j[:, :, 2] = 0
        j[:, :, 4] = j[:, :, 1] * 3
        for partition in (None, [[0, 1], [2, 3, 4]], [[4, 1, 2], [0, 3]]):
            assert float(manifold_entropy(j, partition=partition).total_correlation) >= -1e-9

    def test_an_orthogonal_map_of_data_space_changes_nothing(self, generator: torch.Generator) -> None:
        j = jacobians(20, 8, 5, generator)
        close(manifold_entropy(orthogonal(8, generator) @ j), manifold_entropy(j), 1e-9)

    def test_a_permutation_of_latents_permutes_the_result(self, generator: torch.Generator) -> None:
        j = jacobians(20, 8, 5, generator)
        p = torch.randperm(5, generator=generator)
        one, two = manifold_entropy(j), manifold_entropy(j[:, :, p])
        close(two.entropy, one.entropy[p])
        close(two.mutual_information, one.mutual_information[p][:, p])
        close(two.total, one.total)
        close(two.core, one.core)

    def test_core_detail_and_shared_information_add_up(self, generator: torch.Generator) -> None:
        j = jacobians(30, 9, 4, generator)
        result = manifold_entropy(j)
        gram = j.mT @ j
        for m in range(1, 4):
            s, t = result.order[:m], result.order[m:]

            def entropy(dims: Tensor) -> Tensor:
                return len(dims) * NORMAL + 0.5 * gram[:, dims][:, :, dims].logdet().mean()

            close(result.core[m - 1], entropy(s))
            close(result.detail[m], entropy(t))
            close(result.shared[m - 1], entropy(s) + entropy(t) - result.total)
            assert float(result.shared[m - 1]) >= 0

    def test_batches_give_the_result_of_all_rows(self, generator: torch.Generator) -> None:
        j = jacobians(30, 9, 4, generator)
        labels = torch.arange(30) % 3
        whole = manifold_entropy(j, labels=labels, num_classes=4, partition=[[0, 2], [1, 3]])
        metric = ManifoldEntropy(4, order=whole.order, partition=[[0, 2], [1, 3]], num_classes=4)
        for part in torch.arange(30).split(7):
            metric.update((j.mT @ j)[part], labels=labels[part])
        torch.testing.assert_close(metric.compute(), whole, rtol=1e-10, atol=1e-10, equal_nan=True)
        for k in range(3):
            close(whole.classes[k], manifold_entropy(j[labels == k]).entropy)
        assert whole.classes[3].isnan().all()

    def test_cross_information_with_itself_is_mutual_information(self, generator: torch.Generator) -> None:
        j = jacobians(30, 9, 4, generator)
        cross = manifold_cross_information(j, j)
        off = ~torch.eye(4, dtype=torch.bool)
        close(cross[off], manifold_entropy(j).mutual_information[off])
        # the permutation of a model with permuted and scaled columns is recovered
        p = torch.tensor([2, 0, 3, 1])
        assert torch.equal(manifold_cross_information(j, j[:, :, p] * 5).argmax(1)[p], torch.arange(4))
        with pytest.raises(ValueError, match="jacobian_b must be"):
            manifold_cross_information(j, j[:3])

    def test_correlation_equals_that_of_numpy(self, generator: torch.Generator) -> None:
        import numpy as np

        a = torch.randn(40, 3, generator=generator, dtype=torch.float64)
        b = a.roll(1, 1) + torch.randn(40, 3, generator=generator, dtype=torch.float64)
        close(latent_correlation(a, b), np.corrcoef(a.T, b.T)[:3, 3:])
        assert (latent_correlation(torch.ones(5, 2), a[:5]) == 0).all()


class TestDegenerate:
    def test_a_dead_dimension_is_finite_and_reported(self, generator: torch.Generator) -> None:
        j = jacobians(20, 8, 4, generator)
        j[:, :, 2] = 0
        result = manifold_entropy(j)
        assert result.dead.tolist() == [False, False, True, False]
        assert float(result.singular) == 1
        assert all(value.isfinite().all() for value in (result.entropy, result.total, result.mutual_information))
        assert float(result.effective_dimensions) < 3.01
        close(result.entropy[[0, 1, 3]], manifold_entropy(j[:, :, [0, 1, 3]]).entropy)

    def test_two_dimensions_with_the_same_effect_are_finite_and_named(self, generator: torch.Generator) -> None:
        j = jacobians(20, 8, 4, generator)
        j[:, :, 3] = 2 * j[:, :, 1]
        result = manifold_entropy(j)
        assert result.strongest_pair == (1, 3)
        assert 5 < float(result.mutual_information[1, 3]) < 30
        assert float(result.singular) == 1
        assert result.total.isfinite()

    def test_a_constant_decoder_is_finite_and_flagged(self) -> None:
        result = manifold_entropy(torch.zeros(3, 5, 2))
        assert result.entropy.isfinite().all()
        assert float(result.singular) == 1

    def test_fewer_outputs_than_latents(self, generator: torch.Generator) -> None:
        result = manifold_entropy(jacobians(10, 3, 5, generator))
        assert float(result.singular) == 1
        assert result.total.isfinite()
        assert float(result.total_correlation) > 10

    def test_latents_with_nan_are_left_out(self, generator: torch.Generator) -> None:
        gram = jacobians(10, 8, 3, generator)
        gram = gram.mT @ gram
        broken = gram.clone()
        broken[2] = math.nan
        metric, clean = ManifoldEntropy(3), ManifoldEntropy(3)
        metric.update(broken)
        clean.update(gram[[0, 1, 3, 4, 5, 6, 7, 8, 9]])
        torch.testing.assert_close(metric.compute(), clean.compute(), equal_nan=True)
        assert float(metric.left_out) == 1
        metric.reset()
        metric.update(gram * math.nan)
        assert metric.compute().entropy.isnan().all()

    def test_invalid_arguments_raise_errors(self) -> None:
        with pytest.raises(ValueError, match=r"gram must be \(N, 3, 3\)"):
            ManifoldEntropy(3).update(torch.zeros(2, 4, 4))
        with pytest.raises(ValueError, match="partition must hold each of the dimensions 0 to 2 once"):
            ManifoldEntropy(3, partition=[[0, 1]])
        with pytest.raises(ValueError, match="log_volume must be"):
            ManifoldEntropy(1).update(torch.ones(2, 1, 1), torch.zeros(3))
        with pytest.raises(ValueError, match="labels must be"):
            ManifoldEntropy(1, num_classes=2).update(torch.ones(2, 1, 1))
        with pytest.raises(ValueError, match="jacobian must be finite"):
            manifold_entropy(torch.full((1, 2, 2), math.nan))
        with pytest.raises(ValueError, match="latent_dim must be at least 1"):
            ManifoldEntropy(0)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class Unfriendly(torch.autograd.Function):
    """An operation without a forward derivative."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].cos()

    generate_vmap_rule = True


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Unfriendly.apply(x)


class Counted(torch.autograd.Function):
    """An operation without a forward derivative that counts its backward passes, as custom operations of GANs are."""

    passes = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        Counted.passes += 1
        return grad * ctx.saved_tensors[0].cos()


class Once(Counted):
    """The same, whose backward pass cannot be differentiated."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        Counted.passes += 1
        return grad * ctx.saved_tensors[0].cos()


class Hidden(Counted):
    """The same, whose backward pass hides from differentiation what it computes."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.detach() * ctx.saved_tensors[0].cos()


def custom(operation: Any, outputs: int) -> Any:
    """Returns a decoder from three latents that is not linear, with a custom operation in one of two branches."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(outputs, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    return lambda z: operation.apply(z @ a.T) + z @ b.T


def decoders() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    convolutions = nn.Sequential(
        nn.Linear(6, 32), nn.Unflatten(1, (8, 2, 2)), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(4, 3, 3, padding=1), nn.Tanh(),
    )  # fmt: skip
    attention = nn.Sequential(nn.Linear(6, 32), nn.Unflatten(1, (4, 8)), nn.LayerNorm(8), Attention(), nn.Flatten(1))
    return {
        "convolutions": convolutions.double().eval(),
        "attention": attention.double().eval(),
        "unfriendly": nn.Sequential(nn.Linear(6, 9), Sine(), nn.Linear(9, 12)).double(),
    }


def slow_gram(decode: Any, z: Tensor) -> Tensor:
    """Computes one Jacobian at a time, by reverse mode."""
    grams = []
    for one in z:
        j = torch.autograd.functional.jacobian(lambda x: decode(x[None])[0].flatten(), one)
        grams.append(j.T @ j)
    return torch.stack(grams)


class TestDecoderGram:
    @pytest.mark.parametrize("name", ["convolutions", "attention", "unfriendly"])
    @pytest.mark.parametrize("max_bytes", [1, 1 << 28])
    def test_the_gram_matrix_equals_that_of_the_jacobian(
        self, name: str, max_bytes: int, generator: torch.Generator
    ) -> None:
        decode = decoders()[name]
        z = torch.randn(5, 6, generator=generator, dtype=torch.float64)
        expected = slow_gram(decode, z)
        close(decoder_gram(decode, z, max_bytes=max_bytes), expected)
        close(decoder_gram(decode, z, mode="reverse", max_bytes=max_bytes), expected)
        close(decoder_gram(decode, z, dims=torch.tensor([4, 1])), expected[:, [4, 1]][:, :, [4, 1]])
        scale = torch.linspace(0.5, 2, 6, dtype=torch.float64)
        close(decoder_gram(decode, z, latent_scale=scale), expected * scale * scale[:, None])
        close(decoder_gram(decode, z, data_scale=3.0), expected * 9)

    def test_each_pixel_may_have_a_scale(self, generator: torch.Generator) -> None:
        decode = decoders()["convolutions"]
        z = torch.randn(2, 6, generator=generator, dtype=torch.float64)
        scale = torch.rand(3, 8, 8, generator=generator, dtype=torch.float64)
        expected = slow_gram(lambda x: decode(x) * scale, z)
        close(decoder_gram(decode, z, data_scale=scale), expected)
        close(decoder_gram(decode, z, data_scale=scale, mode="reverse"), expected)

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_the_gradient_mode_does_not_matter(self, context: Any, generator: torch.Generator) -> None:
        decode = decoders()["convolutions"]
        z = torch.randn(2, 6, generator=generator, dtype=torch.float64)
        expected = slow_gram(decode, z)
        with context():
            close(decoder_gram(decode, z), expected)
            close(decoder_gram(decode, z, mode="reverse"), expected)
        assert all(parameter.grad is None for parameter in decode.parameters())

    @pytest.mark.parametrize("operation", [Counted, Once, Hidden])
    def test_custom_operations_give_the_gram_matrix_of_the_jacobian(
        self, operation: Any, generator: torch.Generator
    ) -> None:
        decode = custom(operation, 20)
        z = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        expected, scale = slow_gram(decode, z), torch.linspace(0.5, 2, 20, dtype=torch.float64)
        for mode in ("auto", "reverse"):
            close(decoder_gram(decode, z, mode=mode), expected)  # type: ignore[arg-type]
        close(decoder_gram(decode, z, max_bytes=1), expected)
        close(decoder_gram(decode, z, data_scale=scale), slow_gram(lambda z: decode(z) * scale, z))
        check_derivative(decode, z)

    def test_the_number_of_backward_passes_does_not_grow_with_that_of_outputs(self) -> None:
        z = torch.zeros(2, 3, dtype=torch.float64)
        passes = {}
        for outputs in (10, 10_000):
            Counted.passes = 0
            check_derivative(custom(Counted, outputs), z)
            checked, Counted.passes = Counted.passes, 0
            decoder_gram(custom(Counted, outputs), z)
            passes[outputs] = checked, Counted.passes
        assert passes[10] == passes[10_000]
        assert max(passes[10_000]) <= 5

    def test_one_backward_pass_for_each_of_many_outputs_must_be_asked_for(self) -> None:
        decode, z = custom(Once, 4100), torch.zeros(1, 3, dtype=torch.float64)
        Counted.passes = 0
        for refused in (check_derivative, decoder_gram):
            with pytest.raises(
                RuntimeError, match=r"twice where it has more than 4,096 outputs .* To fix this, remove"
            ):
                refused(decode, z)
        check_derivative(decode, z, mode="reverse")
        assert Counted.passes < 10
        expected = decoder_gram(custom(Counted, 4100), z)
        close(decoder_gram(decode, z, mode="reverse"), expected)

    @pytest.mark.parametrize("decode", [lambda z: z.detach() * 2, torch.no_grad()(lambda z: z * 2)])
    def test_a_decoder_without_derivatives_is_refused(self, decode: Any) -> None:
        for refused in (check_derivative, decoder_gram):
            with pytest.raises(RuntimeError, match="decode must be differentiable"):
                refused(decode, torch.zeros(1, 3), mode="reverse")

    def test_the_layer_without_a_forward_derivative_is_named(self) -> None:
        with pytest.raises(RuntimeError, match=r"but they are not in 1 \(Sine\): .* To fix this, use mode='auto'"):
            decoder_gram(decoders()["unfriendly"], torch.randn(2, 6, dtype=torch.float64), mode="forward")

    def test_distributions_and_tuples_are_read(self) -> None:
        z = torch.randn(2, 3)
        plain = decoder_gram(lambda z: z * 2, z)
        close(decoder_gram(lambda z: (z * 2, None), z), plain)
        close(decoder_gram(lambda z: torch.distributions.Normal(z * 2, 1), z), plain)

    def test_the_most_active_dimensions_are_found(self, generator: torch.Generator) -> None:
        a = torch.randn(30, 50, generator=generator)
        strong = torch.tensor([3, 17, 18, 40])
        a[:, strong] *= 10
        assert torch.equal(active_dims(lambda z: z @ a.T, torch.randn(4, 50, generator=generator), 4), strong)

    def test_invalid_arguments_raise_errors(self) -> None:
        with pytest.raises(ValueError, match=r"z must be \(N, L\) in float32 or float64"):
            decoder_gram(lambda z: z, torch.zeros(3))
        with pytest.raises(ValueError, match="dims must be numbers of latent dimensions, 0 to 2"):
            decoder_gram(lambda z: z, torch.zeros(3, 3), dims=torch.tensor([3]))
        with pytest.raises(ValueError, match=r"decode must return \(1, ...\)"):
            decoder_gram(lambda z: z.sum(), torch.zeros(3, 3))
        assert decoder_gram(lambda z: z, torch.zeros(0, 3)).shape == (0, 3, 3)


def _updates() -> list[dict[str, Any]]:
    j = jacobians(48, 9, 4, torch.Generator().manual_seed(0))
    gram, labels = j.mT @ j, torch.arange(48) % 3
    return [{"gram": gram[p], "log_volume": gram[p].logdet(), "labels": labels[p]} for p in torch.arange(48).split(5)]


CASE = Case(lambda: ManifoldEntropy(4, order=torch.arange(4), num_classes=3), _updates(), 1e-10)
