"""What each arm gains on digits: five seeds, three owners, every arm with equal network, image-steps and sampler.

    python benchmarks/digits_quality.py OUT.jsonl [--seeds 5 6 7 8 9] [--images 250000]

Each seed splits scikit-learn's digits anew (112 scans of a class at one owner, 5 at each of the other two, the rest
held out), draws its own releases from the operating system's entropy, trains and samples. One row per seed, owner and
arm; rows that OUT already holds are not computed again. `--table OUT.jsonl` prints mean ± standard deviation over seeds
of the mean over owners.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

from feddiff_protocol.api import DiffusionSpec, PrivacySpec, SamplingSpec
from feddiff_protocol.promise import promise_of, schedule_of
from feddiff_trainer.batches import Batch, Source, filling_draws, loss_of, mixed, noised_images, pool_draws, records
from feddiff_trainer.classifier import train_classifier
from feddiff_trainer.clipped_gaussian import ClippedGaussian
from feddiff_trainer.denoising import ClassGaussian, log_normal_sigmas
from feddiff_trainer.drawing import draw_alone, draw_both, drawing_of, labels_of, to_pixels
from feddiff_trainer.mechanisms import release_gaussian, release_summary
from feddiff_trainer.metrics import frechet_distance, measure_quality
from feddiff_trainer.network import UNCLIPPED, Denoiser, NetworkConfig
from feddiff_trainer.noise import os_entropy_normals
from feddiff_trainer.pooling import OwnerSummary, exact_summary, pool
from feddiff_trainer.training import World, train

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "digits"))
from make_digits import OWNERS, split_digits

SHAPE, CLASSES, PER_CLASS = (1, 8, 8), 10, 100
MINORITY_BELOW = 20  # records of a class
WORLD = World(0, 1, torch.device("cpu"))
COMMON = {"epsilon": "10", "delta": "1e-5", "clipNorm": "4.25"}
SUMMARY = PrivacySpec.model_validate({"mechanism": "summary", "momentClipNorm": "1.75", **COMMON})
GAUSSIAN = PrivacySpec.model_validate({"mechanism": "gaussian", **COMMON})
FILLING_SHARE = 0.57  # draws fill six classes of 5 up to 112, beside 478 records
GAUSSIAN_SHARE = 1 / 3
SAMPLING = SamplingSpec(images_per_class=PER_CLASS, steps=50, sampler="ddpm")  # chosen on seed 2, for every arm


class Seed:
    """One seed's owners, releases and trained denoisers, each made when first asked for."""

    def __init__(self, seed: int, num_images: int, split_sigma: str, base_width: int, release_sigma: float) -> None:
        self.seed, self.num_images, self.release_sigma = seed, num_images, release_sigma
        self.base_width = base_width
        digits = load_digits()
        self.pixels_ND = (digits.images / 16).reshape(-1, 64)
        self.labels_N = digits.target
        self.owners, self.held_out = split_digits(seed)
        self.diffusion = DiffusionSpec.model_validate({"splitSigma": split_sigma})
        self.sigmas = schedule_of(self.diffusion).sigmas
        self.made: dict[str, Any] = {}

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def images(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.from_numpy(2 * self.pixels_ND[indices] - 1).float().view(-1, *SHAPE)
        return images, torch.from_numpy(self.labels_N[indices])

    def everybody(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images(np.concatenate(list(self.owners.values())))

    def summaries(self) -> list[OwnerSummary]:
        """What every owner releases."""
        promise = promise_of(SUMMARY, self.diffusion)
        released = []
        for indices in self.owners.values():
            s = release_summary(
                self.pixels_ND[indices],
                self.labels_N[indices],
                num_classes=CLASSES,
                mean_clip_norm=float(SUMMARY.clip_norm),
                moment_clip_norm=float(SUMMARY.moment_clip_norm),
                centre=float(SUMMARY.centre_or_default),
                mean_std=promise.mean_std,
                moment_std=promise.moment_std,
                normals=os_entropy_normals(),
            )
            released.append(
                OwnerSummary(
                    *(torch.from_numpy(a) for a in (s.mean_sums_KD, s.moment_sums_KM, s.counts_K)),
                    mean_std=promise.mean_std,
                    moment_std=promise.moment_std,
                    moment_clip_norm=float(SUMMARY.moment_clip_norm),
                    centre=float(SUMMARY.centre_or_default),
                )
            )
        return released

    def pool(self, owner: str | None = None) -> ClassGaussian:
        """The public pool, or the one that an owner has at home, its own sums exact."""
        summaries, at_home = self.once("summaries", self.summaries), {}
        if owner is not None:
            position, indices = list(self.owners).index(owner), self.owners[owner]
            own = torch.from_numpy(self.pixels_ND[indices]), torch.from_numpy(self.labels_N[indices])
            at_home = {position: exact_summary(*own, summaries[position])}
        return ClassGaussian(*pool(summaries, float(SUMMARY.variance_guess_or_default), at_home=at_home))

    def noised(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """y = x̃/α of all owners, labels, and the split's σ, by the paper's mechanism."""
        promise, schedule = promise_of(GAUSSIAN, DiffusionSpec()), schedule_of(DiffusionSpec())
        alpha, s = schedule.alpha(promise.split_step), schedule.s(promise.split_step)
        noised = [
            release_gaussian(
                self.pixels_ND[indices],
                clip_norm=float(GAUSSIAN.clip_norm),
                non_negative=True,
                alpha=alpha,
                s=s,
                normals=os_entropy_normals(),
            )
            for indices in self.owners.values()
        ]
        images = torch.from_numpy(np.concatenate(noised) / alpha).float().view(-1, *SHAPE)
        return images, self.everybody()[1], promise.split_sigma

    def train(self, source: Source) -> Denoiser:
        torch.manual_seed(self.seed)
        network = NetworkConfig(*SHAPE, num_classes=CLASSES, base_width=self.base_width)
        return train(
            Denoiser(network),
            loss_of(source, network.sigma_data),
            world=WORLD,
            num_images=self.num_images,
            batch=BATCH,
            learning_rate=LEARNING_RATE,
            ema_width=0.1,
            seed=self.seed,
            on_progress=lambda progress: None,
        )

    def own(self, owner: str) -> Source:
        return records(*self.images(self.owners[owner]), (self.sigmas[0], self.sigmas[-1]))

    def released(self, arm: str, lowest: float) -> Source:
        highest = self.sigmas[-1]
        if arm == "summary":
            return pool_draws(self.once("pool", self.pool), SHAPE, (lowest, highest))
        if arm == "gaussian":
            images, labels, sigma = self.once("noised", self.noised)
            return noised_images(images, labels, sigma, highest)
        return records(*self.everybody(), (lowest, highest))

    def shared(self, arm: str) -> Denoiser:
        split = promise_of(SUMMARY, self.diffusion).split_sigma
        return self.once(f"shared/{arm}", lambda: self.train(self.released(arm, split)))

    def personal(self, arm: str, owner: str) -> Denoiser:
        if arm == "local":
            return self.once(f"local/{owner}", lambda: self.train(self.own(owner)))
        counts_K = torch.bincount(self.images(self.owners[owner])[1], minlength=CLASSES)
        sigmas = self.release_sigma, self.sigmas[-1]
        if arm == "summary":
            source = mixed(self.own(owner), filling_draws(self.pool(owner), SHAPE, sigmas, counts_K), FILLING_SHARE)
        elif arm == "oracle":
            source = mixed(self.own(owner), filling_records(*self.everybody(), sigmas, counts_K), FILLING_SHARE)
        else:
            source = mixed(self.own(owner), self.released(arm, self.release_sigma), GAUSSIAN_SHARE)
        return self.once(f"{arm}/{owner}", lambda: self.train(source))

    def sample(self, arm: str, owner: str) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 images and labels of one arm."""
        generator = torch.Generator().manual_seed(1000 + self.seed)
        label_N = labels_of(CLASSES, PER_CLASS)
        noise = torch.randn(len(label_N), *SHAPE, generator=generator)
        privacy, diffusion = (GAUSSIAN, DiffusionSpec()) if arm == "gaussian" else (SUMMARY, self.diffusion)
        drawing = drawing_of(privacy, diffusion, SAMPLING)
        if arm == "pool draws":
            pooled = ClippedGaussian(self.once("pool", self.pool))
            drawn = pooled.draw(label_N, SHAPE, generator).float()
        elif arm in ("local", "summary, personal alone"):
            denoiser = self.personal("local" if arm == "local" else "summary", owner)
            drawn = draw_alone(drawing, denoiser, noise, label_N, generator)
        elif arm == "summary, closed form":
            pooled = self.once("pool", self.pool)
            drawn = draw_both(drawing, pooled, self.personal("summary", owner), noise, label_N, generator)
        else:
            drawn = draw_both(drawing, self.shared(arm), self.personal(arm, owner), noise, label_N, generator)
        return to_pixels(drawn), label_N


def filling_records(
    x0_NCHW: torch.Tensor, label_N: torch.Tensor, sigmas: tuple[float, float], counts_K: torch.Tensor
) -> Source:
    """What filling_draws is, with real images in place of draws."""
    weight_N = (counts_K.max() - counts_K)[label_N].double()

    def draw(count: int, generator: torch.Generator) -> Batch:
        index_B = torch.multinomial(weight_N, count, replacement=True, generator=generator)
        sigma_B = log_normal_sigmas(count, *sigmas, generator)
        zero_B = torch.zeros_like(sigma_B)
        return Batch(x0_NCHW[index_B], zero_B, sigma_B, label_N[index_B], torch.full_like(index_B, UNCLIPPED))

    return draw


ARMS = (
    "local", "gaussian", "summary", "summary, closed form", "summary, personal alone", "pool draws", "oracle"
)  # fmt: skip
BATCH, LEARNING_RATE = 64, 3e-3  # at 256 these few images are too few steps for every arm, the oracle included


def measure(seed: Seed, arm: str, owner: str, classifier: Any) -> dict[str, Any]:
    images, labels = seed.sample(arm, owner)
    own, own_labels = seed.images(seed.owners[owner])
    held, held_labels = seed.images(seed.held_out)
    counts = np.bincount(own_labels.numpy(), minlength=CLASSES)
    minority = frozenset(int(k) for k in np.flatnonzero(counts < MINORITY_BELOW))
    quality = measure_quality(
        (images.float() / 127.5 - 1).numpy(),
        labels.numpy(),
        held.numpy(),
        held_labels.numpy(),
        own.numpy(),
        own_labels.numpy(),
        feature_classifier=classifier,
        majority=frozenset(range(CLASSES)) - minority,
        minority=minority,
        seed=seed.seed,
    )
    measured = asdict(quality)
    del measured["classes"]  # a hundred figures more a row
    return measured | principal_frechet(images.float() / 127.5 - 1, labels, held, held_labels)


def principal_frechet(
    images: torch.Tensor, labels: torch.Tensor, held: torch.Tensor, held_labels: torch.Tensor, components: int = 20
) -> dict[str, float]:
    """Fréchet distance, pooled and mean over classes, in the first principal components of held-out pixels."""
    held_ND, images_ND = held.flatten(1).double().numpy(), images.flatten(1).double().numpy()
    _, _, axes = np.linalg.svd(held_ND - held_ND.mean(axis=0), full_matrices=False)
    real, made = held_ND @ axes[:components].T, images_ND @ axes[:components].T
    by_class = [frechet_distance(made[labels.numpy() == k], real[held_labels.numpy() == k]) for k in range(CLASSES)]
    return {"frechet_pca": frechet_distance(made, real), "frechet_pca_classes": float(np.mean(by_class))}


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    out = Path(args.out)
    done = {(r["seed"], r["owner"], r["arm"]) for r in map(json.loads, out.open())} if out.exists() else set()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    settings = {"commit": commit, "images": args.images, "batch": BATCH, "split": args.split}
    settings["release_sigma"] = args.release_sigma
    for number in args.seeds:
        seed = Seed(number, args.images, args.split, args.width, args.release_sigma)
        held, held_labels = seed.images(seed.held_out)
        classifier = train_classifier(held.numpy(), held_labels.numpy(), CLASSES, seed=number)
        for arm in args.arms:
            for owner in OWNERS:
                if (number, owner, arm) in done:
                    continue
                began = time.monotonic()
                quality = measure(seed, arm, owner, classifier)
                row = settings | {"seed": number, "owner": owner, "arm": arm, "quality": quality}
                row["seconds"] = round(time.monotonic() - began, 1)
                with out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(number, owner, arm, row["seconds"], flush=True)


COLUMNS: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "recall, minority": lambda q: q["minority"]["recall"],
    "recall, majority": lambda q: q["majority"]["recall"],
    "Fréchet, pooled": lambda q: q["frechet"],
    "Fréchet, per class": lambda q: q["overall"]["frechet"],
    "Fréchet PCA-20, pooled": lambda q: q["frechet_pca"],
    "Fréchet PCA-20, per class": lambda q: q["frechet_pca_classes"],
    "coverage": lambda q: q["coverage"],
    "density": lambda q: q["density"],
    "told apart": lambda q: q["two_sample_accuracy"],
    "copies ½, minority": lambda q: q["minority"]["copies_half"],
}


def table(out: Path) -> str:
    """Markdown: per arm and measure the mean over owners, then mean ± standard deviation over seeds."""
    rows = [json.loads(line) for line in out.open()]
    lines = ["| arm | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for arm in ARMS:
        cells = []
        for measure_of in COLUMNS.values():
            by_seed: dict[int, list[float]] = {}
            for row in rows:
                if row["arm"] == arm and (value := measure_of(row["quality"])) is not None:
                    by_seed.setdefault(row["seed"], []).append(value)
            means = [mean(values) for values in by_seed.values()]
            cells.append(f"{mean(means):.3f} ± {stdev(means):.3f}" if len(means) > 1 else "–")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[5, 6, 7, 8, 9], help="0 to 4 served to choose settings"
    )
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--images", type=int, default=250_000, help="image-steps of every training")
    parser.add_argument("--split", default="2", help="σ of the hand-over for summary and oracle")
    parser.add_argument("--width", type=int, default=16, help="base width of every network")
    parser.add_argument("--release-sigma", type=float, default=0.1, help="lowest σ of draws in personal training")
    parser.add_argument("--table", action="store_true", help="print the table of OUT instead of computing rows")
    return parser.parse_args()


if __name__ == "__main__":
    args = arguments()
    if args.table:
        print(table(Path(args.out)))
    else:
        run(args)
