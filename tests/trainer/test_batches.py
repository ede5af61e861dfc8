"""Sources draw what they say, from the generator alone, at the noise levels they are allowed."""

import pytest
import torch

from feddiff_trainer.batches import (
    Batch,
    Source,
    clip_mixed,
    filling_draws,
    loss_of,
    mixed,
    noised_images,
    pool_draws,
    records,
)
from feddiff_trainer.denoising import ClassGaussian, ambient_loss, denoising_loss
from feddiff_trainer.network import CLIPPED

SPLIT, HIGHEST = 0.5, 80.0


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def own_records() -> Source:
    x0 = torch.arange(6.0)[:, None, None, None].expand(6, 1, 4, 4)
    return records(x0, torch.tensor([0, 0, 0, 0, 0, 1]), (0.01, HIGHEST))


def pool() -> ClassGaussian:
    return ClassGaussian(torch.tensor([[0.0] * 16, [-0.7] * 16]), 0.2 * torch.eye(16).expand(2, 16, 16))


def noised() -> Source:
    return noised_images(torch.ones(4, 1, 4, 4), torch.tensor([0, 1, 0, 1]), SPLIT, HIGHEST)


def fields(batch: Batch) -> list[torch.Tensor]:
    return [batch.y0_BCHW, batch.sigma0_B, batch.sigma_B, batch.label_B, batch.flag_B]


@pytest.mark.parametrize(
    "source",
    [own_records(), noised(), pool_draws(pool(), (1, 4, 4), (SPLIT, HIGHEST)), mixed(own_records(), noised(), 0.5)],
)
def test_a_batch_depends_on_the_generator_alone(source: Source) -> None:
    once, again, other = source(32, generator(1)), source(32, generator(1)), source(32, generator(2))
    assert all(torch.equal(a, b) for a, b in zip(fields(once), fields(again), strict=True))
    assert not torch.equal(once.sigma_B, other.sigma_B)


def test_records_come_as_they_are_with_their_labels_and_at_every_noise_level() -> None:
    batch = own_records()(6000, generator())
    share_of_the_rare_class = (batch.label_B == 1).float().mean()
    assert share_of_the_rare_class == pytest.approx(1 / 6, abs=0.02)  # not balanced
    assert torch.equal(batch.y0_BCHW[:, 0, 0, 0] == 5, batch.label_B == 1)
    assert batch.sigma_B.min() < 0.02 and batch.sigma_B.max() > 5 and (batch.sigma0_B == 0).all()


def test_releases_are_never_asked_about_noise_below_the_split() -> None:
    for source in (noised(), pool_draws(pool(), (1, 4, 4), (SPLIT, HIGHEST))):
        assert source(5000, generator()).sigma_B.min() >= SPLIT
    assert (noised()(8, generator()).sigma0_B == SPLIT).all()


def test_draws_have_uniform_classes_and_the_pools_moments() -> None:
    batch = pool_draws(pool(), (1, 4, 4), (SPLIT, HIGHEST))(20_000, generator())
    assert (batch.label_B == 1).float().mean() == pytest.approx(0.5, abs=0.02)
    of_one = batch.y0_BCHW[batch.label_B == 1]
    assert of_one.mean() == pytest.approx(-0.7, abs=0.01) and of_one.var() == pytest.approx(0.2, abs=0.01)
    assert of_one.min() == -1 and of_one.max() == 1
    cut_off = pool().draw(batch.label_B, (1, 4, 4), generator()).clamp(-1, 1)[batch.label_B == 1]
    assert cut_off.mean() > -0.7 + 0.05  # mutant: the Gaussian itself, cut off


def test_draws_fill_classes_by_what_they_are_short_of() -> None:
    def share_of_one(*counts: int) -> float:
        source = filling_draws(pool(), (1, 4, 4), (SPLIT, HIGHEST), torch.tensor(counts))
        return float((source(5000, generator()).label_B == 1).float().mean())

    assert share_of_one(112, 5) == 1  # what is most frequent needs none
    assert share_of_one(5, 112) == 0
    assert share_of_one(30, 30) == pytest.approx(0.5, abs=0.03)
    batch = filling_draws(pool(), (1, 4, 4), (SPLIT, HIGHEST), torch.tensor([112, 5]))(5000, generator())
    assert batch.sigma_B.min() >= SPLIT and (batch.sigma0_B == 0).all()
    assert batch.y0_BCHW.mean() == pytest.approx(-0.7, abs=0.01)


def test_a_mixture_keeps_its_share_in_every_batch() -> None:
    batch = mixed(own_records(), noised(), 0.25)(64, generator())
    assert (batch.sigma0_B == SPLIT).sum() == 16
    assert (batch.sigma_B[batch.sigma0_B == SPLIT] >= SPLIT).all()


def test_a_share_too_small_for_one_image_of_a_batch_asks_for_none() -> None:
    draws = filling_draws(pool(), (1, 4, 4), (SPLIT, HIGHEST), torch.tensor([1, 1]))
    batch, plain = mixed(own_records(), draws, 0.005)(64, generator(3)), own_records()(64, generator(3))
    assert all(torch.equal(a, b) for a, b in zip(fields(batch), fields(plain), strict=True))


def test_the_clip_mix_clips_every_other_image_and_flags_it() -> None:
    batch = clip_mixed(own_records(), lambda x: x / 2)(8, generator(3))
    plain = own_records()(8, generator(3))
    clipped = batch.flag_B == CLIPPED
    assert clipped.sum() == 4
    assert torch.equal(batch.y0_BCHW[clipped], plain.y0_BCHW[clipped] / 2)
    assert torch.equal(batch.y0_BCHW[~clipped], plain.y0_BCHW[~clipped])


def test_ranks_see_the_slices_of_one_and_the_same_batch() -> None:
    seen: list[torch.Tensor] = []

    class Recorder(torch.nn.Module):
        def forward(
            self, y: torch.Tensor, sigma: torch.Tensor, label: torch.Tensor, flag: torch.Tensor
        ) -> torch.Tensor:
            seen.append(y)
            return torch.zeros_like(y)

    loss = loss_of(mixed(own_records(), noised(), 0.5), 0.5)
    for mine in (slice(0, 16), slice(0, 8), slice(8, 16)):
        loss(Recorder(), generator(), 16, mine)
    assert torch.equal(seen[0], torch.cat(seen[1:]))


def test_for_clean_images_the_ambient_loss_is_the_ordinary_one() -> None:
    batch = own_records()(32, generator())
    noise = torch.randn(batch.y0_BCHW.shape, generator=generator(9))

    def denoise(y: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return 0.3 * y

    ambient = ambient_loss(denoise, batch.y0_BCHW, batch.sigma0_B, batch.sigma_B, batch.label_B, batch.flag_B, noise)
    ordinary = denoising_loss(denoise, batch.y0_BCHW, batch.sigma_B, batch.label_B, batch.flag_B, noise)
    torch.testing.assert_close(ambient, ordinary, rtol=1e-4, atol=1e-4)
