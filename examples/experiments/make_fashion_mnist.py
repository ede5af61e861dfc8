"""Fashion-MNIST's 60,000 training images at 14×14, as one .npz file that `feddiff split` takes.

    python examples/experiments/make_fashion_mnist.py /usr/share/datasets/fashion-mnist all.npz

Every pixel is the mean of four, rounded.
"""

import gzip
import sys
from pathlib import Path

import numpy as np

SIDE, IMAGES_HEADER, LABELS_HEADER = 28, 16, 8  # of MNIST's files, in bytes


def halved(images_NHW: np.ndarray) -> np.ndarray:
    """uint8 images of half the height and width: means over 2×2 pixels, halves up."""
    num_images, height, width = images_NHW.shape
    blocks = images_NHW.reshape(num_images, height // 2, 2, width // 2, 2).astype(np.uint16)
    return ((blocks.sum(axis=(2, 4)) + 2) // 4).astype(np.uint8)


def main(data: Path, out: Path) -> None:
    images = gzip.decompress((data / "train-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((data / "train-labels-idx1-ubyte.gz").read_bytes())
    images_NHW = np.frombuffer(images, np.uint8, offset=IMAGES_HEADER).reshape(-1, SIDE, SIDE)
    np.savez_compressed(out, images=halved(images_NHW), labels=np.frombuffer(labels, np.uint8, offset=LABELS_HEADER))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
