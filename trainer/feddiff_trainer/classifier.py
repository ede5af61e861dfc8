"""The small classifier behind two measures: its features are the space of the Fréchet and kernel distances, and
trained on synthetic images its recall on real ones says what they are worth.

It is no Inception network: say "Fréchet distance, classifier features", never "FID".

Shapes: N images of a set, B of a batch, C channels, H height, W width, F features, K classes.
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .training import adam_step

Images = npt.NDArray[np.floating]
Labels = npt.NDArray[np.integer]
Features = npt.NDArray[np.float64]

NUM_FEATURES = 16  # fewer than the held-out images of a class, or per-class covariances are all noise
WIDTH, DENSE_WIDTH = 32, 128
COARSEST_GRID = 4
STEPS = 250
BATCH = 64
LEARNING_RATE = 4e-3
NOISE = 0.1  # standard deviation, [-1, 1] units
SMALLEST_SIDE = 4
PREDICT_BATCH = 1024


class Classifier:
    """A trained network, with its features standardised over the images it was trained on.

    Without that, distances would depend on the scale that the network happened to choose.
    """

    def __init__(self, network: "ClassifierNetwork", images_NCHW: Images) -> None:
        self._network = network
        self.image_shape = images_NCHW.shape[1:]
        self.num_classes: int = network.head.out_features
        self.num_features: int = network.head.in_features
        raw_NF = self._apply(network.features, images_NCHW)
        spread_F = raw_NF.std(axis=0)
        self._mean_F = raw_NF.mean(axis=0)
        self._spread_F = np.where(spread_F > 0, spread_F, 1.0)  # images that are all equal have no spread

    def features(self, images_NCHW: Images) -> Features:
        """features_NF, float64, of mean 0 and variance 1 over the training images.

        Raises ValueError for images of another shape or with values that are not finite.
        """
        features_NF: Features = (self._apply(self._network.features, images_NCHW) - self._mean_F) / self._spread_F
        return features_NF

    def predict(self, images_NCHW: Images) -> npt.NDArray[np.int64]:
        """label_N, the likeliest class of every image; raises like `features`."""
        label_N: npt.NDArray[np.int64] = self._apply(self._network, images_NCHW).argmax(axis=1)
        return label_N

    def _apply(self, layers: Callable[[Tensor], Tensor], images_NCHW: Images) -> Features:
        check_images(images_NCHW, self.image_shape)
        with torch.no_grad():
            parts = [layers(x_BCHW) for x_BCHW in torch.split(as_tensor(images_NCHW), PREDICT_BATCH)]
        values: Features = torch.cat(parts).double().numpy()
        return values


def train_classifier(
    images_NCHW: Images, labels_N: Labels, num_classes: int, seed: int, *, steps: int = STEPS
) -> Classifier:
    """A classifier of these images ([-1, 1], sides of at least 4 pixels), trained on one CPU in seconds.

    The same arguments give the same bits on one machine with one number of threads; PyTorch's global random state is
    neither read nor changed. Cost depends on `steps`, not on the number of images. A class without images is allowed:
    it is then never predicted well. Raises ValueError for no images, values that are not finite, labels that are not
    0..num_classes-1.
    """
    check_images(images_NCHW, images_NCHW.shape[1:])
    check_labels(labels_N, len(images_NCHW), num_classes)
    generator = torch.Generator().manual_seed(seed)
    network = initialised_network(images_NCHW, num_classes, generator)
    fit(network, as_tensor(images_NCHW), torch.from_numpy(labels_N.astype(np.int64)), steps, generator)
    return Classifier(network, images_NCHW)


def fit(network: nn.Module, x_NCHW: Tensor, label_N: Tensor, steps: int, generator: torch.Generator) -> None:
    """Cross-entropy by Adam, learning rate falling to zero; batches drawn with replacement, classes as they come.

    Noise is the only augmentation: moving an 8×8 digit by a pixel costs two points of accuracy instead of gaining any.
    """
    weights: list[Tensor] = list(network.parameters())
    means, squares = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    for step in range(steps):
        index_B = torch.randint(len(x_NCHW), (BATCH,), generator=generator)
        x_BCHW = x_NCHW[index_B]
        noisy_BCHW = x_BCHW + NOISE * torch.randn(x_BCHW.shape, generator=generator)
        loss = F.cross_entropy(network(noisy_BCHW), label_N[index_B])
        torch.autograd.backward(loss)
        adam_step(weights, means, squares, step + 1, LEARNING_RATE * (1 - step / steps), beta2=0.999)


class ClassifierNetwork(nn.Module):
    """Convolutions that halve the grid until about 4 × 4 cells are left, a dense layer, F features, K logits.

    `centre` and `scale` are the pixel values' own: mostly dark images are far from zero, where training is slow.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, centre: float, scale: float) -> None:
        super().__init__()
        channels, *sides = image_shape
        halvings = max(1, math.ceil(math.log2(min(sides) / COARSEST_GRID)))
        inputs = [channels] + [WIDTH] * (halvings - 1)
        self.convolutions = nn.ModuleList(nn.Conv2d(width, WIDTH, 4, stride=2, padding=1) for width in inputs)
        self.dense = nn.Linear(WIDTH * COARSEST_GRID**2, DENSE_WIDTH)
        self.bottleneck = nn.Linear(DENSE_WIDTH, NUM_FEATURES)
        self.head = nn.Linear(NUM_FEATURES, num_classes)
        self.centre, self.scale = centre, scale

    def features(self, x_BCHW: Tensor) -> Tensor:
        """features_BF, before the last non-linearity: no feature can die, and a class looks more Gaussian there."""
        x_BCHW = (x_BCHW - self.centre) / self.scale
        for convolution in self.convolutions:
            x_BCHW = F.relu(convolution(x_BCHW))
        coarse_BD = F.adaptive_avg_pool2d(x_BCHW, COARSEST_GRID).flatten(1)
        features_BF: Tensor = self.bottleneck(F.relu(self.dense(coarse_BD)))
        return features_BF

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """logits_BK."""
        logits_BK: Tensor = self.head(F.gelu(self.features(x_BCHW)))
        return logits_BK


def initialised_network(images_NCHW: Images, num_classes: int, generator: torch.Generator) -> ClassifierNetwork:
    """A network for such images with He-normal weights and zero biases, drawn from `generator` alone."""
    _, channels, height, width = images_NCHW.shape
    centre, scale = float(images_NCHW.mean()), float(images_NCHW.std()) or 1.0
    with torch.random.fork_rng(devices=[]):  # PyTorch's own initialisation draws from the global generator
        network = ClassifierNetwork((channels, height, width), num_classes, centre, scale)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter, generator=generator)
        else:
            nn.init.zeros_(parameter)
    return network


def as_tensor(images_NCHW: Images) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images_NCHW, dtype=np.float32))


def check_images(images_NCHW: Images, image_shape: tuple[int, ...]) -> None:
    """Raises ValueError unless these are one or more finite images of that shape."""
    if images_NCHW.ndim != 4 or images_NCHW.shape[1:] != image_shape or len(images_NCHW) == 0:
        raise ValueError(f"expected images of shape (N ≥ 1, *{image_shape}), found {images_NCHW.shape}")
    if min(image_shape[1:]) < SMALLEST_SIDE:
        raise ValueError(f"expected images of at least {SMALLEST_SIDE} × {SMALLEST_SIDE}, found {image_shape[1:]}")
    if not np.isfinite(images_NCHW).all():
        raise ValueError("expected finite pixel values, found NaN or infinity: has a denoiser diverged?")


def check_labels(labels_N: Labels, num_images: int, num_classes: int) -> None:
    """Raises ValueError unless there is one label of 0..num_classes-1 per image."""
    if labels_N.shape != (num_images,):
        raise ValueError(f"expected one label for each of {num_images} images, found shape {labels_N.shape}")
    if num_images and not 0 <= labels_N.min() <= labels_N.max() < num_classes:
        raise ValueError(f"expected labels 0..{num_classes - 1}, found {labels_N.min()}..{labels_N.max()}")
