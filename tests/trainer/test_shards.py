import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from feddiff_protocol.api import DiffusionSpec, ImageSpec, Mechanism, PrivacySpec
from feddiff_protocol.errors import DataInvalid
from feddiff_protocol.promise import promise_of, schedule_of
from feddiff_trainer import shards
from feddiff_trainer.noise import grid_step
from feddiff_trainer.shards import decode, encode, grid_steps, layouts, num_shards

IMAGE = ImageSpec(channels=1, height=28, width=28)


@given(counts=st.lists(st.integers(0, 10**6), min_size=1, max_size=5).filter(lambda counts: sum(counts) > 1))
def test_shards_hold_every_image_once_and_stay_below_their_size(counts: list[int]) -> None:
    found = layouts(Mechanism.GAUSSIAN, IMAGE, counts)
    assert sum(layout.tensors["labels"][1][0] for layout in found) == sum(counts)
    assert all(0 < layout.values_bytes <= shards.SHARD_BYTES for layout in found)
    assert len(found) == num_shards(Mechanism.GAUSSIAN, IMAGE, counts)


def test_largest_image_fits_into_a_shard() -> None:
    assert shards.images_per_shard(ImageSpec(channels=4, height=512, width=512)) >= 1


def test_summary_is_one_shard_of_every_classes_sums() -> None:
    (layout,) = layouts(Mechanism.SUMMARY, IMAGE, [5] * 10)
    assert {name: shape for name, (_, shape) in layout.tensors.items()} == {
        "mean_sums": (10, 784),
        "moment_sums": (10, 784 * 785 // 2),
    }
    assert num_shards(Mechanism.SUMMARY, IMAGE, [5] * 10) == 1


@pytest.mark.parametrize("mechanism", list(Mechanism))
def test_what_is_written_is_read_back_and_equal_tensors_are_equal_bytes(mechanism: Mechanism) -> None:
    image, generator = ImageSpec(channels=2, height=4, width=5), np.random.default_rng(0)
    (layout,) = layouts(mechanism, image, [3, 4])
    tensors = {
        name: generator.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype, endpoint=True)
        for name, (dtype, shape) in layout.tensors.items()
    }
    data = encode(layout, tensors)
    assert data == encode(layout, dict(reversed(tensors.items())))
    for read in (decode(layout, data, "shard"), safetensors.numpy.load(data)):
        assert set(read) == set(tensors)
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(read[name], tensor, strict=True)


@given(data=st.binary(max_size=400))
def test_any_bytes_are_refused_in_one_line(data: bytes) -> None:
    (layout,) = layouts(Mechanism.GAUSSIAN, ImageSpec(channels=1, height=4, width=4), [2])
    with pytest.raises(DataInvalid, match=r"^shard: expected ") as refusal:
        decode(layout, data, "shard")
    assert "\n" not in str(refusal.value)


@given(index=st.integers(0, 300), byte=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_a_changed_value(index: int, byte: int) -> None:
    (layout,) = layouts(Mechanism.GAUSSIAN, ImageSpec(channels=1, height=4, width=4), [2])
    tensors = {name: np.ones(shape, dtype) for name, (dtype, shape) in layout.tensors.items()}
    data = bytearray(encode(layout, tensors))
    data[index % len(data)] = byte
    try:
        read = decode(layout, bytes(data), "shard")
    except DataInvalid:
        return
    assert {name: (tensor.dtype.type, tensor.shape) for name, tensor in read.items()} == dict(layout.tensors)


def test_grids_follow_from_the_noise_alone() -> None:
    privacy = PrivacySpec.model_validate(
        {"mechanism": "summary", "epsilon": "10", "delta": "1e-5", "clipNorm": "4.25", "momentClipNorm": "3"}
    )
    diffusion = DiffusionSpec.model_validate({"splitSigma": "0.25"})
    promise = promise_of(privacy, diffusion)
    steps = grid_steps(promise, schedule_of(diffusion))
    assert promise.mean_std is not None and steps.mean_sums is not None
    assert promise.moment_std is not None and steps.moment_sums is not None
    assert 2.0**steps.mean_sums == grid_step(promise.mean_std)
    assert 2.0**steps.moment_sums == grid_step(promise.moment_std)
    assert steps.images is None and steps.directions is None


def test_the_grid_of_directions_is_a_constant() -> None:
    diffusion = DiffusionSpec.model_validate({"splitSigma": "0.25"})
    for epsilon in ("0.001", "10", "100"):
        privacy = PrivacySpec.model_validate({"mechanism": "privunit", "epsilon": epsilon, "clipNorm": "4.25"})
        steps = grid_steps(promise_of(privacy, diffusion), schedule_of(diffusion))
        assert steps.to_wire() == {"directions": -14}
