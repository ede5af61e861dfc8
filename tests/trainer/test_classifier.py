import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from feddiff_trainer.classifier import NUM_FEATURES, Classifier, train_classifier

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    order_N = np.random.default_rng(0).permutation(len(data.target))  # the last scans are other writers'
    return (data.images[order_N, None] / 8 - 1).astype(np.float32), data.target[order_N]


@pytest.fixture(scope="module")
def trained(digits):
    images_NCHW, labels_N = digits
    return train_classifier(images_NCHW[:1200], labels_N[:1200], 10, seed=0)


def two_tone(shape: tuple[int, int, int], num_images: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Dark images of class 0 and bright ones of class 1."""
    labels_N = np.arange(num_images) % 2
    noise_NCHW = 0.2 * np.random.default_rng(0).standard_normal((num_images, *shape))
    return noise_NCHW + np.where(labels_N == 1, 0.5, -0.5)[:, None, None, None], labels_N


def test_held_out_digits_are_recognised(digits, trained):
    images_NCHW, labels_N = digits
    assert (trained.predict(images_NCHW[1200:]) == labels_N[1200:]).mean() > 0.95


def test_shuffled_labels_teach_nothing(digits):
    images_NCHW, labels_N = digits
    shuffled_N = np.random.default_rng(0).permutation(labels_N[:1200])
    misled = train_classifier(images_NCHW[:1200], shuffled_N, 10, seed=0)
    assert (misled.predict(images_NCHW[1200:]) == labels_N[1200:]).mean() < 0.3


def test_same_seed_gives_the_same_bits_and_another_seed_does_not(digits):
    images_NCHW, labels_N = digits
    first, again, other = (train_classifier(images_NCHW, labels_N, 10, seed=seed, steps=40) for seed in (0, 0, 1))
    assert np.array_equal(again.features(images_NCHW), first.features(images_NCHW))
    assert not np.array_equal(other.features(images_NCHW), first.features(images_NCHW))


def test_global_random_state_is_neither_read_nor_changed():
    images_NCHW, labels_N = two_tone((1, 8, 8))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = train_classifier(images_NCHW, labels_N, 2, seed=0, steps=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    second = train_classifier(images_NCHW, labels_N, 2, seed=0, steps=5)
    assert np.array_equal(first.features(images_NCHW), second.features(images_NCHW))


def test_features_are_float64_of_mean_zero_and_variance_one_over_the_training_images(digits, trained):
    features_NF = trained.features(digits[0][:1200])
    assert features_NF.dtype == np.float64 and features_NF.shape == (1200, NUM_FEATURES)
    assert np.allclose(features_NF.mean(axis=0), 0, atol=1e-9) and np.allclose(features_NF.std(axis=0), 1)


def test_a_class_has_enough_images_for_a_covariance_of_its_features(digits, trained):
    images_NCHW, labels_N = digits
    features_NF = trained.features(images_NCHW[labels_N == 3][:55])
    assert np.linalg.matrix_rank(np.cov(features_NF, rowvar=False)) == NUM_FEATURES


def test_an_image_has_the_same_features_alone_and_among_others(digits, trained):
    images_NCHW = digits[0]
    assert np.allclose(trained.features(images_NCHW[1500:1501]), trained.features(images_NCHW)[1500:1501], atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 4, 4), (1, 5, 7), (3, 4, 40), (1, 28, 28), (3, 32, 32), (2, 40, 32)])
def test_grey_and_colour_images_of_any_size_are_told_apart(shape):
    images_NCHW, labels_N = two_tone(shape)
    classifier = train_classifier(images_NCHW, labels_N, 2, seed=0, steps=20)
    assert (classifier.predict(images_NCHW) == labels_N).all()


def test_a_class_without_images_is_allowed():
    images_NCHW, labels_N = two_tone((1, 8, 8))
    classifier = train_classifier(images_NCHW, labels_N, 3, seed=0, steps=20)
    assert classifier.num_classes == 3
    assert set(classifier.predict(images_NCHW)) == {0, 1}


def test_equal_images_have_finite_features():
    classifier = train_classifier(np.zeros((8, 1, 8, 8)), np.zeros(8, dtype=int), 2, seed=0, steps=2)
    assert np.isfinite(classifier.features(np.ones((1, 1, 8, 8)))).all()


def train(images_NCHW: np.ndarray, labels_N: np.ndarray) -> Classifier:
    return train_classifier(images_NCHW, labels_N, 2, seed=0, steps=2)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, y: (x[:0], y[:0]), "N ≥ 1"),
        (lambda x, y: (np.where(x > 0.9, np.nan, x), y), "finite"),
        (lambda x, y: (x[:, :, :3], y), "at least 4 × 4"),
        (lambda x, y: (x[:, 0], y), "expected images of shape"),
        (lambda x, y: (x, y[:-1]), "one label for each of 64"),
        (lambda x, y: (x, y + 1), r"labels 0\.\.1, found 1\.\.2"),
        (lambda x, y: (x, y - 1), r"labels 0\.\.1, found -1\.\.0"),
    ],
    ids=["no images", "NaN", "too small", "no channels", "label missing", "label too large", "label negative"],
)
def test_input_that_does_not_fit_is_refused(spoil, message):
    with pytest.raises(ValueError, match=message):
        train(*spoil(*two_tone((1, 8, 8))))


def test_images_of_another_shape_are_refused(trained):
    with pytest.raises(ValueError, match="expected images of shape"):
        trained.predict(np.zeros((1, 1, 9, 9)))
