"""Noise: Gaussian to the last bit that a test can see, never the same twice, on a grid that the data cannot move."""

import inspect
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from feddiff_trainer import noise
from feddiff_trainer.noise import from_grid, grid_step, normals_from, os_entropy_normals, round_to_grid

NUM = 1_000_000
SAFE = 1e-7  # chance that a right generator would fail; the keystreams are fixed, so it either fails or never does


def fixed_keystream(seed: int) -> Callable[[memoryview], None]:
    generator = np.random.default_rng(seed)

    def keystream(into: memoryview) -> None:
        into[:] = generator.bytes(len(into))

    return keystream


def constant_keystream(byte: int) -> Callable[[memoryview], None]:
    def keystream(into: memoryview) -> None:
        into[:] = bytes([byte]) * len(into)

    return keystream


def departures(z: np.ndarray) -> list[str]:
    """What tells z from independent standard normals, at a false-alarm rate of SAFE per line."""
    found = []
    if stats.kstest(z, "norm").pvalue < SAFE:
        found.append("distribution")
    for threshold in (1.0, 2.0, 3.0, 4.0, 4.7):
        for tail, count in (("upper", (z > threshold).sum()), ("lower", (z < -threshold).sum())):
            if stats.binomtest(int(count), len(z), stats.norm.sf(threshold)).pvalue < SAFE:
                found.append(f"{tail} tail at {threshold}")
    for lag in (1, 2, noise.BLOCK // 2, noise.BLOCK):  # half a block apart stand the two of one pair
        for name, f in (("values", lambda v: v), ("squares", lambda v: (v * v - 1) / math.sqrt(2))):
            correlation = float(np.mean(f(z[lag:]) * f(z[:-lag]))) * math.sqrt(len(z) - lag)
            if abs(correlation) > stats.norm.isf(SAFE / 2) * 1.2:  # 1.2: products have heavier tails than a normal
                found.append(f"{name} at lag {lag}")
    return found


def test_normals_fit_the_gaussian_in_bulk_tails_and_neighbours() -> None:
    assert departures(normals_from(fixed_keystream(1))((NUM,))) == []


def test_noise_from_the_operating_system_has_the_right_scale() -> None:
    z = os_entropy_normals()((200, 1000))
    assert z.dtype == np.float64
    assert abs(z.mean()) * math.sqrt(z.size) < 6  # false alarm: 2e-9
    assert abs((z * z).mean() - 1) * math.sqrt(z.size / 2) < 6


@pytest.mark.parametrize(
    ("mutant", "sign"),
    [
        (lambda z: 0.99 * z, "upper tail at 2.0"),
        (lambda z: np.clip(z, -4, 4), "upper tail at 4.0"),
        (lambda z: np.where(np.arange(len(z)) % 2, np.roll(z, 1), z), "values at lag 1"),
        (lambda z: np.tile(z[: noise.BLOCK], len(z) // noise.BLOCK + 1)[: len(z)], f"values at lag {noise.BLOCK}"),
        (lambda z: z * np.exp(0.05 * np.roll(z, 1) ** 2), "squares at lag 1"),
    ],
    ids=[
        "1 % too small",
        "tails cut",
        "every second one repeated",
        "every block repeated",
        "size follows the one before",
    ],
)
def test_the_checks_see_bad_noise(mutant: Callable[[np.ndarray], np.ndarray], sign: str) -> None:
    assert sign in departures(mutant(normals_from(fixed_keystream(2))((NUM,))))


@pytest.mark.parametrize("byte", [0, 255, 0x80])
def test_no_keystream_gives_infinity_or_nan(byte: int) -> None:
    z = normals_from(constant_keystream(byte))((4,))
    assert np.isfinite(z).all()
    assert np.abs(z).max() <= math.sqrt(2 * 53 * math.log(2))


def test_the_pair_is_box_mullers() -> None:
    z = normals_from(fixed_keystream(3))((10,))
    bits = np.frombuffer(np.random.default_rng(3).bytes(80), np.uint64)
    u, v = (bits[:5] >> np.uint64(11)) * 2.0**-53 + 2.0**-53, (bits[5:] >> np.uint64(11)) * 2.0**-53
    radius = np.sqrt(-2 * np.log(u))
    np.testing.assert_allclose(
        z, np.concatenate([radius * np.cos(2 * np.pi * v), radius * np.sin(2 * np.pi * v)]), atol=1e-14
    )


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (noise.BLOCK + 1,), (7, 0, 2)])
def test_any_shape_comes_back_as_asked(shape: tuple[int, ...]) -> None:
    assert os_entropy_normals()(shape).shape == shape


def test_two_calls_and_two_sources_never_agree() -> None:
    first, second = os_entropy_normals(), os_entropy_normals()
    draws = [first((500,)), first((500,)), second((500,)), second((500,))]
    assert len(np.unique(np.concatenate(draws))) == 2000


def test_a_forked_process_does_not_repeat_its_parents_noise() -> None:
    program = """
import os
from feddiff_trainer.noise import os_entropy_normals
normals = os_entropy_normals()
normals((3,))
reader, writer = os.pipe()
if os.fork() == 0:
    os.write(writer, normals((4,)).tobytes())
    os._exit(0)
os.wait()
assert os.read(reader, 32) != normals((4,)).tobytes()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_another_process_takes_a_new_key_before_its_first_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = iter([bytes(32), bytes(16), b"\1" * 32, b"\1" * 16])
    monkeypatch.setattr(os, "urandom", lambda _: next(keys))
    keystream = noise.os_entropy_keystream()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    keystream(into := memoryview(bytearray(64)))
    assert next(keys, None) is None  # the second key was taken before the first byte
    assert bytes(into) != bytes(64)


def test_there_is_no_seed_to_give() -> None:
    assert not inspect.signature(os_entropy_normals).parameters
    assert not inspect.signature(noise.os_entropy_keystream).parameters
    assert "default_rng" not in Path(noise.__file__).read_text()


@pytest.mark.parametrize("std", [1e-3, 0.25, 1.0, 255.9, 256.0, 256.1, 4.25, 1e6])
def test_grid_step_is_the_largest_power_of_two_up_to_a_256th(std: float) -> None:
    step = grid_step(std)
    assert math.frexp(step)[0] == 0.5
    assert step <= std / 256 < 2 * step


@pytest.mark.parametrize("std", [0.0, -1.0, math.inf, math.nan])
def test_no_grid_without_noise(std: float) -> None:
    with pytest.raises(ValueError, match="positive finite"):
        grid_step(std)


@pytest.mark.parametrize("dtype", [np.int16, np.int32])
def test_rounding_moves_by_half_a_step_and_comes_back_exactly(dtype: type) -> None:
    x = np.random.default_rng(4).normal(size=1000)
    step = grid_step(1.0)
    cells = round_to_grid(x, step, dtype)
    assert cells.dtype == dtype
    back = from_grid(cells, step)
    assert np.abs(back - x).max() <= step / 2
    np.testing.assert_array_equal(round_to_grid(back.astype(np.float64), step, dtype), cells)


def test_int32_comes_back_in_float64_without_rounding() -> None:
    cells = np.array([2**31 - 1, -(2**31), 2**24 + 1], np.int32)
    np.testing.assert_array_equal(from_grid(cells, 2.0**-8) * 2.0**8, cells.astype(np.float64))


def test_what_exceeds_the_grid_ends_at_its_edge() -> None:
    cells = round_to_grid(np.array([1e9, -1e9, np.inf, -np.inf, 0.0]), 1.0)
    np.testing.assert_array_equal(cells, [32767, -32768, 32767, -32768, 0])


def test_nan_is_never_rounded() -> None:
    with pytest.raises(ValueError, match="NaN"):
        round_to_grid(np.array([0.0, np.nan]), 1.0)
