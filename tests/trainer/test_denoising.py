"""The losses and the closed-form denoiser against a Gaussian of which everything is known."""

from math import log

import pytest
import torch
from torch import Tensor

from feddiff_trainer.denoising import (
    ClassGaussian,
    ambient_loss,
    ambient_weight,
    block_means,
    denoising_loss,
    edm_weight,
    in_blocks,
    log_normal_sigmas,
    log_uniform_sigmas,
)

SHAPE = (1, 2, 2)


def covariances() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    root_KDD = 0.25 * torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    return root_KDD @ root_KDD.transpose(1, 2) + 0.01 * torch.eye(4, dtype=torch.float64)


def means() -> Tensor:
    return torch.tensor([[0.3, -0.2, 0.5, 0.0], [-0.6, 0.1, 0.0, 0.4]], dtype=torch.float64)


def gaussian() -> ClassGaussian:
    return ClassGaussian(means(), covariances())


def brute_force_posterior_mean(y_D: Tensor, sigma: float, k: int) -> Tensor:
    """Bayes' rule by importance sampling: x from the prior, weighed by the likelihood of y."""
    x_ND = torch.distributions.MultivariateNormal(means()[k], covariances()[k]).sample((200_000,))
    weights_N = (-((y_D - x_ND) ** 2).sum(1) / (2 * sigma**2)).softmax(0)
    return weights_N @ x_ND


@pytest.mark.parametrize("sigma", [0.5, 1.0, 5.0])
def test_closed_form_equals_brute_force_bayes(sigma: float) -> None:
    torch.manual_seed(0)
    y_BCHW = torch.tensor([[0.1, 0.4, -0.3, 0.2], [0.5, -0.5, 0.1, 0.3]], dtype=torch.float64).view(2, *SHAPE)
    label_B = torch.tensor([1, 0])
    x0_BCHW = gaussian()(y_BCHW, torch.full((2,), sigma), label_B)
    for y, x0, k in zip(y_BCHW, x0_BCHW, label_B.tolist(), strict=True):
        torch.testing.assert_close(x0.flatten(), brute_force_posterior_mean(y.flatten(), sigma, k), atol=0.01, rtol=0)


def test_closed_form_equals_the_matrix_formula_at_mixed_levels_and_labels() -> None:
    generator = torch.Generator().manual_seed(2)
    y_BCHW = torch.randn(64, *SHAPE, generator=generator, dtype=torch.float64)
    sigma_B = log_uniform_sigmas(64, 0.01, 157, generator).double()
    label_B = torch.randint(2, (64,), generator=generator)
    m_BD, cov_BDD = means()[label_B], covariances()[label_B]
    total_BDD = cov_BDD + sigma_B.square()[:, None, None] * torch.eye(4, dtype=torch.float64)
    expected_BD = m_BD + (cov_BDD @ torch.linalg.solve(total_BDD, (y_BCHW.flatten(1) - m_BD)[..., None]))[..., 0]
    torch.testing.assert_close(gaussian()(y_BCHW, sigma_B, label_B).flatten(1), expected_BD)


def test_closed_form_of_squares_is_that_of_images_whose_squares_have_one_colour() -> None:
    """N(Um, UΣUᵀ) of all 16 pixels by the matrix formula, U a pixel's square."""
    spread_DD = torch.kron(torch.eye(2), torch.ones(2, 1)).double()
    spread_D4 = torch.kron(spread_DD, spread_DD)  # row (i, j) of 4×4 pixels has square (i//2, j//2) of 2×2
    generator = torch.Generator().manual_seed(5)
    y_BCHW = torch.randn(32, 1, 4, 4, generator=generator, dtype=torch.float64)
    sigma_B, label_B = log_uniform_sigmas(32, 0.01, 157, generator).double(), torch.arange(32) % 2
    m_BD = means()[label_B] @ spread_D4.T
    cov_BDD = spread_D4 @ covariances()[label_B] @ spread_D4.T
    total_BDD = cov_BDD + sigma_B.square()[:, None, None] * torch.eye(16, dtype=torch.float64)
    expected_BD = m_BD + (cov_BDD @ torch.linalg.solve(total_BDD, (y_BCHW.flatten(1) - m_BD)[..., None]))[..., 0]
    found_BCHW = ClassGaussian(means(), covariances(), block_side=2)(y_BCHW, sigma_B, label_B)
    torch.testing.assert_close(found_BCHW.flatten(1), expected_BD, atol=1e-9, rtol=1e-9)


def test_draws_of_squares_have_one_colour_in_each_and_the_moments_of_the_squares() -> None:
    x0_BCHW = ClassGaussian(means(), covariances(), block_side=2).draw(
        torch.zeros(100_000, dtype=torch.long), (1, 4, 4), torch.Generator().manual_seed(3)
    )
    squares_BD = block_means(x0_BCHW, 2).flatten(1)
    assert torch.equal(in_blocks(x0_BCHW[:, :, ::2, ::2], 2), x0_BCHW)
    torch.testing.assert_close(squares_BD.mean(0), means()[0], atol=0.01, rtol=0)
    torch.testing.assert_close(squares_BD.T.cov(), covariances()[0], atol=0.02, rtol=0)


def test_float32_closed_form_agrees_with_float64() -> None:
    y_BCHW, sigma_B, label_B = torch.randn(8, *SHAPE), torch.full((8,), 0.3), torch.zeros(8, dtype=torch.long)
    single = ClassGaussian(means().float(), covariances().float())
    expected = gaussian()(y_BCHW, sigma_B, label_B)
    torch.testing.assert_close(single(y_BCHW, sigma_B, label_B), expected, atol=1e-5, rtol=1e-4)
    assert expected.dtype == torch.float32


def test_draws_have_the_mean_and_covariance_of_their_class() -> None:
    generator = torch.Generator().manual_seed(3)
    label_B = torch.arange(2).repeat_interleave(100_000)
    x0_BD = gaussian().draw(label_B, SHAPE, generator).flatten(1)
    for k in range(2):
        torch.testing.assert_close(x0_BD[label_B == k].mean(0), means()[k], atol=0.01, rtol=0)
        torch.testing.assert_close(x0_BD[label_B == k].T.cov(), covariances()[k], atol=0.02, rtol=0)


def test_a_class_without_any_variance_is_denoised_to_its_mean() -> None:
    point = ClassGaussian(means(), torch.zeros(2, 4, 4, dtype=torch.float64))
    y_BCHW = torch.randn(2, *SHAPE, dtype=torch.float64)
    x0_BCHW = point(y_BCHW, torch.full((2,), 0.2), torch.arange(2))
    torch.testing.assert_close(x0_BCHW.flatten(1), means())


def test_loss_is_about_one_at_every_level_for_a_network_that_answers_nothing() -> None:
    """c_skip·y alone, on data of standard deviation sigma_data: that is what w(σ) normalises."""
    generator = torch.Generator().manual_seed(4)
    count = 200_000
    label_B = torch.zeros(count, dtype=torch.long)
    for sigma_data in (0.5, 1.0):
        x0_BCHW = sigma_data * torch.randn(count, 1, 1, 1, generator=generator)
        noise_BCHW = torch.randn(x0_BCHW.shape, generator=generator)
        for sigma, sigma0 in ((0.02, 0.0), (1.0, 0.0), (50.0, 0.0), (0.5, 0.4), (7.0, 6.4), (40.0, 6.4)):

            def skip(y_BCHW: Tensor, sigma_B: Tensor, *_: Tensor, s: float = sigma_data) -> Tensor:
                return s**2 / (s**2 + sigma_B[:, None, None, None].square()) * y_BCHW

            sigma_B, sigma0_B = torch.full((count,), sigma), torch.full((count,), sigma0)
            y0_BCHW = x0_BCHW + sigma0 * torch.randn(x0_BCHW.shape, generator=generator)
            loss_B = ambient_loss(skip, y0_BCHW, sigma0_B, sigma_B, label_B, label_B, noise_BCHW, sigma_data)
            assert loss_B.mean().item() == pytest.approx(1, abs=0.02)
            if sigma0 == 0:
                loss_B = denoising_loss(skip, x0_BCHW, sigma_B, label_B, label_B, noise_BCHW, sigma_data)
                assert loss_B.mean().item() == pytest.approx(1, abs=0.02)


def test_weights_are_the_published_ones() -> None:
    sigma_B = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    expected = torch.tensor([(0.01 + 0.25) / 0.05**2, 2 / 0.25, (4 + 0.25) / 1], dtype=torch.float64)
    torch.testing.assert_close(edm_weight(sigma_B), expected)
    torch.testing.assert_close(ambient_weight(torch.zeros(3, dtype=torch.float64), sigma_B), expected)
    # At σ = σ0 nothing of x0 can be learned, and the weight is that of the noise alone.
    torch.testing.assert_close(ambient_weight(sigma_B, sigma_B), 1 / sigma_B.square())
    # By hand: σ0 = 1, σ = 2: κ = 3/4, c_out² = 4·0.25/4.25.
    one = ambient_weight(torch.ones(1, dtype=torch.float64), torch.full((1,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(one, torch.tensor([1 / (0.75 * 4 * 0.25 / 4.25 + 1)], dtype=torch.float64))


def test_ambient_loss_from_clean_images_is_the_denoising_loss() -> None:
    generator = torch.Generator().manual_seed(5)
    x0_BCHW = torch.randn(16, *SHAPE, generator=generator, dtype=torch.float64)
    noise_BCHW = torch.randn(x0_BCHW.shape, generator=generator, dtype=torch.float64)
    sigma_B, label_B = log_uniform_sigmas(16, 0.05, 50, generator).double(), torch.zeros(16, dtype=torch.long)

    def denoise(y_BCHW: Tensor, *_: Tensor) -> Tensor:
        return y_BCHW / 2

    ambient_B = ambient_loss(denoise, x0_BCHW, torch.zeros_like(sigma_B), sigma_B, label_B, label_B, noise_BCHW)
    torch.testing.assert_close(ambient_B, denoising_loss(denoise, x0_BCHW, sigma_B, label_B, label_B, noise_BCHW))


@pytest.mark.parametrize("gap", [0.0, 1e-6, 1e-3])
def test_gradients_stay_bounded_as_the_level_meets_the_split(gap: float) -> None:
    """The network's own output F enters as c_out·F: its gradient must not grow as 1/√(σ - σ0)."""
    generator = torch.Generator().manual_seed(6)
    count, sigma0 = 64, 0.25
    f_BCHW = torch.zeros(count, *SHAPE, dtype=torch.float64, requires_grad=True)
    sigma_B = torch.full((count,), sigma0 + gap, dtype=torch.float64)
    c_out_B = edm_weight(sigma_B).rsqrt()

    def denoise(y_BCHW: Tensor, *_: Tensor) -> Tensor:
        return c_out_B[:, None, None, None] * f_BCHW

    y0_BCHW, noise_BCHW = torch.randn(2, count, *SHAPE, generator=generator, dtype=torch.float64)
    sigma0_B, label_B = torch.full_like(sigma_B, sigma0), torch.zeros(count, dtype=torch.long)
    loss_B = ambient_loss(denoise, y0_BCHW, sigma0_B, sigma_B, label_B, label_B, noise_BCHW)
    loss_B.sum().backward()
    assert torch.isfinite(loss_B).all()
    assert f_BCHW.grad is not None and f_BCHW.grad.abs().max() < 2 * 4 / f_BCHW[0].numel()


def least_squares_denoiser(sigma0: float, sigma: float, identity: bool) -> tuple[Tensor, Tensor]:
    """(A, b) of the best x̂0 = A·y + b under ambient_loss, or under ‖x̂0 - y0‖² without identity.

    The loss is quadratic in (A, b). With the identity its minimiser regresses (y0 - ρ·y)/κ on y; the regression is
    read off the loss itself by Newton's method, which is exact in one step for a quadratic.
    """
    torch.manual_seed(7)
    count = 100_000
    x0_BCHW = gaussian().draw(torch.zeros(count, dtype=torch.long), SHAPE, torch.Generator().manual_seed(8))
    y0_BCHW = x0_BCHW + sigma0 * torch.randn_like(x0_BCHW)
    noise_BCHW = torch.randn_like(x0_BCHW)
    label_B = torch.zeros(count, dtype=torch.long)
    sigma_B = torch.full((count,), sigma, dtype=torch.float64)
    sigma0_B = torch.full_like(sigma_B, sigma0)

    def loss(parameters: Tensor) -> Tensor:
        matrix_DD, offset_D = parameters[:16].view(4, 4), parameters[16:]

        def denoise(y_BCHW: Tensor, *_: Tensor) -> Tensor:
            return (y_BCHW.flatten(1) @ matrix_DD.T + offset_D).view_as(y_BCHW)

        if identity:
            return ambient_loss(denoise, y0_BCHW, sigma0_B, sigma_B, label_B, label_B, noise_BCHW).mean()
        y_BCHW = y0_BCHW + (sigma**2 - sigma0**2) ** 0.5 * noise_BCHW
        return (denoise(y_BCHW) - y0_BCHW).square().mean()

    start = torch.zeros(20, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(start), start)
    hessian = torch.autograd.functional.hessian(loss, start.detach())
    best = -torch.linalg.solve(hessian, gradient)
    return best[:16].view(4, 4), best[16:]


@pytest.mark.parametrize("sigma0, sigma", [(0.25, 0.4), (0.25, 0.6), (0.5, 1.0)])
def test_minimiser_of_the_ambient_loss_is_the_clean_denoiser(sigma0: float, sigma: float) -> None:
    matrix_DD, offset_D = least_squares_denoiser(sigma0, sigma, identity=True)
    assert distance_to_closed_form(matrix_DD, offset_D, sigma) < 0.015


@pytest.mark.parametrize("sigma0, sigma", [(0.25, 0.4), (0.25, 0.6), (0.5, 1.0)])
def test_without_the_identity_the_minimiser_is_another(sigma0: float, sigma: float) -> None:
    matrix_DD, offset_D = least_squares_denoiser(sigma0, sigma, identity=False)
    assert distance_to_closed_form(matrix_DD, offset_D, sigma) > 0.015


def distance_to_closed_form(matrix_DD: Tensor, offset_D: Tensor, sigma: float) -> float:
    """Largest deviation in any coefficient from A = Σ(Σ + σ²I)⁻¹, b = m - A·m of class 0."""
    covariance_DD, mean_D = covariances()[0], means()[0]
    exact_DD = covariance_DD @ torch.linalg.inv(covariance_DD + sigma**2 * torch.eye(4, dtype=torch.float64))
    exact_D = mean_D - exact_DD @ mean_D
    return max((matrix_DD - exact_DD).abs().max().item(), (offset_D - exact_D).abs().max().item())


def test_training_levels_are_log_uniform_between_their_bounds() -> None:
    sigma_B = log_uniform_sigmas(100_000, 0.25, 80, torch.Generator().manual_seed(9))
    assert sigma_B.min() >= 0.25 and sigma_B.max() <= 80
    uniform_B = (sigma_B.log() - log(0.25)) / (log(80) - log(0.25))
    assert uniform_B.mean().item() == pytest.approx(0.5, abs=0.005)
    assert uniform_B.var().item() == pytest.approx(1 / 12, abs=0.002)


def test_training_levels_are_log_normal_between_their_bounds() -> None:
    generator = torch.Generator().manual_seed(10)
    log_B = log_normal_sigmas(100_000, 1e-4, 1e4, generator).log()
    assert log_B.mean().item() == pytest.approx(-1.2, abs=0.015) and log_B.std().item() == pytest.approx(1.2, abs=0.01)
    cut_B = log_normal_sigmas(100_000, 0.25, 80, generator)
    assert cut_B.min() >= 0.25 and cut_B.max() <= 80
    kept_B = log_B[(log_B >= log(0.25)) & (log_B <= log(80))]
    assert cut_B.log().median().item() == pytest.approx(kept_B.median().item(), abs=0.02)
