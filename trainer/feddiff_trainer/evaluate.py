"""The stage `evaluate`: how good each arm's images are, and the owner report that shows them beside real ones.

Both depend on the owner's records and go to the owner's store alone.

Shapes: N images, C channels, H height, W width, K classes, D = C·H·W.
"""

import base64
import hashlib
import sys
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError

from feddiff_protocol import layout
from feddiff_protocol.api import ClassesSpec, ImageSpec, SourceSpec
from feddiff_protocol.errors import DataInvalid, FeddiffError
from feddiff_protocol.promise import CENTRED_FROM, Promise, promise_of, released_image
from feddiff_protocol.stages import EvaluateSpec

from .classifier import train_classifier
from .evaluation import ARMS, MEASURES, REAL, WITH_INCEPTION, ArmQuality, Evaluation, Measured, PictureRow, Values
from .findings import Audit, Export
from .inception import Inception, inception_distances, read_inception
from .metrics import Found, ImageSet, Measures, Quality, measure_quality, minority_classes
from .owner_page import Gallery, OwnerReport, owner_page
from .pictures import LabelledImages, Pixels, grid, read_samples, to_pixels
from .pooling import OwnerSummary, mapped, project_keeping_trace, unmapped, unpacked
from .records import Records, digest_records, over_blocks, read_holdout, read_source
from .released import GaussianRelease, PrivunitRelease, Release, Terms, read_releases
from .report import class_name
from .stage import report_progress, run_stage
from .stores import Store, open_store

SEED = 0  # of draws for pictures: nothing is protected by it
MEASURES_BY_KEY = {measure.key: measure for measure in MEASURES}
COPIES = ("copies_half", "copies_third")  # of real training records, all would be
PICTURED = 8  # images per class and column
EARLIER_JOBS = 12  # the newest ones that are shown beside this one
LARGEST_DRAWN = 1024  # values of an image up to which a covariance is decomposed for a picture


def body(spec: EvaluateSpec) -> dict[str, str]:
    """evaluation.json and the owner report are in the owner's store; nothing about them is public."""
    owner_store = open_store(spec.owner_store, "owner")
    promise = promise_of(spec.privacy, spec.diffusion)
    records = read_source(spec.source, spec.image, spec.classes)
    key = layout.samples(spec.job.uid, spec.client)
    samples = read_samples(owner_store.get(key), key, ARMS, spec.image, spec.classes.count)
    evaluation = evaluate(spec, promise, records, samples)
    write_report(spec, owner_store, records, samples, evaluation)
    owner_store.put(layout.evaluation(spec.job.uid, spec.client), evaluation.model_dump_json(by_alias=True).encode())
    return {}


def write_report(
    spec: EvaluateSpec, owner_store: Store, records: Records, samples: LabelledImages, evaluation: Evaluation
) -> None:
    """The owner report is in the owner's store, with the audit if there is one."""
    report = OwnerReport(
        spec=spec,
        promise=promise_of(spec.privacy, spec.diffusion),
        evaluation=evaluation,
        others=other_evaluations(owner_store, evaluation),
        minority=minority_of(spec),
        gallery=gallery_of(spec, records, samples, own_release(open_store(spec.federation_store, "federation"), spec)),
        audit=read_audit(owner_store, spec),
        exports=read_exports(owner_store, spec),
    )
    owner_store.put(layout.owner_report(spec.job.uid, spec.client), owner_page(report))


def rewrite_report(spec: EvaluateSpec, owner_store: Store, records: Records) -> None:
    """The owner report anew, with what was added since the evaluation. Raises InputMissing before there is one."""
    key = layout.evaluation(spec.job.uid, spec.client)
    evaluation = Evaluation.model_validate_json(owner_store.get(key))
    key = layout.samples(spec.job.uid, spec.client)
    samples = read_samples(owner_store.get(key), key, ARMS, spec.image, spec.classes.count)
    write_report(spec, owner_store, records, samples, evaluation)


def read_audit(owner_store: Store, spec: EvaluateSpec) -> Audit | None:
    """The audit of what lies in the store; None where there is none, only one of samples before it, or another
    version's."""
    key = layout.audit(spec.job.uid, spec.client)
    if not owner_store.exists(key):
        return None
    try:
        audit = Audit.model_validate_json(owner_store.get(key))
    except ValidationError:
        return None
    samples = owner_store.get(layout.samples(spec.job.uid, spec.client))
    return audit if audit.samples_sha256 == hashlib.sha256(samples).hexdigest() else None


def read_exports(owner_store: Store, spec: EvaluateSpec) -> list[Export]:
    """What was passed on of this job, oldest first."""
    keys = owner_store.list(layout.exports_prefix(spec.job.uid, spec.client))
    found = [Export.model_validate_json(owner_store.get(key)) for key in keys]
    return sorted(found, key=lambda export: export.exported_at)


def evaluate(spec: EvaluateSpec, promise: Promise, records: Records, samples: LabelledImages) -> Evaluation:
    """The figures of every arm, or none where the dataset names no hold-out."""
    holdout = read_holdout(spec.source, spec.image, spec.classes)
    inception = inception_of(spec.source, spec.image)
    measured, arms = (None, {}) if holdout is None else measure(spec, records, samples, holdout, inception)
    both = [samples.images["both"][samples.labels_N == label][:1] for label in range(spec.classes.count)]
    row = grid(np.concatenate(both), spec.classes.count)
    return Evaluation(
        job=spec.job,
        client=spec.client,
        records_sha256=digest_records(records),
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        mechanism=spec.privacy.mechanism,
        epsilon=spec.privacy.epsilon,
        delta=spec.privacy.delta_or_zero,
        mu_squared=promise.charge.mu_squared,
        pure_epsilon=promise.charge.pure_epsilon,
        split_step=promise.split_step,
        split_sigma=promise.split_sigma,
        timeline=spec.diffusion.timeline.value if spec.diffusion.timeline else None,
        measured=measured,
        arms=arms,
        picture=PictureRow(png_base64=base64.b64encode(row.png).decode(), width=row.width, height=row.height),
    )


def own_release(store: Store, spec: EvaluateSpec) -> Release:
    """What everybody else saw of this owner. Raises DataInvalid if its release is not among those that count."""
    for reference in spec.releases:
        if reference.client == spec.client:
            terms = Terms(spec.job.uid, spec.image, spec.classes.count, spec.privacy, spec.diffusion)
            (release,) = read_releases(store, [reference], terms)
            return release
    raise DataInvalid(f"releases: expected one of client {spec.client}, found none; evaluate only clients that count")


def other_evaluations(store: Store, this: Evaluation) -> list[Evaluation]:
    """Evaluations of the same records under other jobs, oldest first; at most EARLIER_JOBS, the newest ones.

    One that cannot be read (another version's, or damaged) is left out: it belongs to that job, not to this page.
    """
    found = []
    for key in store.list("jobs/"):
        if not key.endswith("/evaluation.json"):
            continue
        try:
            other = Evaluation.model_validate_json(store.get(key))
        except ValidationError:
            continue
        if other.records_sha256 == this.records_sha256 and other.job.uid != this.job.uid:
            found.append(other)
    return sorted(found, key=lambda other: other.finished_at)[-EARLIER_JOBS:]


# ---- Figures ---------------------------------------------------------------------------------------------------


class Measuring(Protocol):
    """What a spec says of the images that are measured."""

    @property
    def image(self) -> ImageSpec: ...
    @property
    def classes(self) -> ClassesSpec: ...
    @property
    def seed_or_zero(self) -> int: ...


def minority_of(spec: Measuring) -> list[int]:
    """Classes of which this owner declares few records."""
    return sorted(minority_classes(spec.classes.records))


def inception_of(source: SourceSpec, image: ImageSpec) -> Inception | str | None:
    """The network for FID and KID, or why it cannot be had; None where the dataset names none.

    No error: a file that only measures must not end a job whose budget is spent. `feddiff check` ends with it.
    """
    try:
        return read_inception(source, image)
    except FeddiffError as error:
        return str(error)


def measure(
    spec: Measuring,
    records: Records,
    samples: LabelledImages,
    holdout: Records,
    inception: Inception | str | None,
    real: bool = True,
) -> tuple[Measured, dict[str, ArmQuality]]:
    """Every arm, and if `real` the owner's own records, against the held-out ones: by one classifier, trained on
    those, and by `inception` where there is one; a string says why there is none.

    One classifier for all keeps arms comparable. It knows the held-out images, which makes all distances to them a
    little larger than they are for images that it never saw, for every arm alike.
    """
    held_out, own = image_set(holdout, spec), image_set(records, spec)
    classifier = train_classifier(held_out.images_NCHW, held_out.labels_N, spec.classes.count, spec.seed_or_zero)
    minority = frozenset(minority_of(spec))
    sets = {arm: ImageSet(to_model_units(images), samples.labels_N) for arm, images in samples.images.items()}
    if real:
        sets[REAL] = own
    distances: Mapping[str, Found] = {}
    if inception is not None:
        pixels = {**samples.images, REAL: pixels_of(records, spec)} if real else samples.images
        distances = _inception_distances(inception, pixels, pixels_of(holdout, spec), spec.seed_or_zero)
    arms, quality = {}, None
    for arm, images in sets.items():
        quality = measure_quality(
            images.images_NCHW,
            images.labels_N,
            held_out.images_NCHW,
            held_out.labels_N,
            own.images_NCHW,
            own.labels_N,
            feature_classifier=classifier,
            majority=frozenset(range(spec.classes.count)) - minority,
            minority=minority,
            seed=spec.seed_or_zero,
        )
        left_out = COPIES if arm == REAL else ()
        arms[arm] = with_distances(arm_quality(quality, spec.classes, left_out), distances.get(arm, {}))
        report_progress(len(arms), len(sets), "arms")
    assert quality is not None
    measured = Measured(
        num_samples=len(samples.labels_N),
        num_train=len(records),
        num_holdout=len(holdout),
        nearest_neighbours=quality.nearest_neighbours,
        seed=spec.seed_or_zero,
        extractor=f"{quality.feature_space}, trained on the held-out records",
        inception=inception.described if isinstance(inception, Inception) else None,
    )
    return measured, arms


def _inception_distances(
    inception: Inception | str, pixels: Mapping[str, Pixels], held_out_NCHW: Pixels, seed: int
) -> dict[str, Found]:
    """FID and KID of every arm, or why there is none."""
    if not isinstance(inception, str):
        try:
            held_out_NF = inception.features(held_out_NCHW)
            return {
                arm: inception_distances(inception.features(x_NCHW), held_out_NF, seed)
                for arm, x_NCHW in pixels.items()
            }
        except DataInvalid as error:
            inception = str(error)
    return {arm: dict.fromkeys(WITH_INCEPTION, inception) for arm in pixels}


def pixels_of(records: Records, spec: Measuring) -> Pixels:
    """Records as uint8 images N×C×H×W, as samples are."""
    return to_pixels(records[:]).reshape(-1, spec.image.channels, spec.image.height, spec.image.width)


def image_set(records: Records, spec: Measuring) -> ImageSet:
    """Records as images in [-1, 1] units."""
    shape_CHW = (spec.image.channels, spec.image.height, spec.image.width)
    return ImageSet((2 * records[:] - 1).astype(np.float32).reshape(-1, *shape_CHW), records.labels_N)


def to_model_units(pixels_NCHW: Pixels) -> npt.NDArray[np.float32]:
    """uint8 pixels as values in [-1, 1]."""
    return (pixels_NCHW / 127.5 - 1).astype(np.float32)


def arm_quality(quality: Quality, classes: ClassesSpec, left_out: Collection[str]) -> ArmQuality:
    """The figures that the report shows, without the measures `left_out`."""
    groups: dict[str, Quality | Measures] = {"pooled": quality, "all": quality.overall}
    groups |= {"majority": quality.majority, "minority": quality.minority}
    shown = {name: _values_of(measures, left_out) for name, measures in groups.items()}
    per_class = tuple(_values_of(one, left_out) for one in quality.classes)
    return ArmQuality(groups=shown, per_class=per_class, missing=_missing(quality, classes, left_out))


def with_distances(arm: ArmQuality, distances: Found) -> ArmQuality:
    """The figures with FID and KID, if they were measured, among those of all images together."""
    values = {key: None if isinstance(found, str) else found for key, found in distances.items()}
    reasons = [f"{MEASURES_BY_KEY[key].title}: {found}" for key, found in distances.items() if isinstance(found, str)]
    groups = {**arm.groups, "pooled": {**arm.groups["pooled"], **values}}
    return arm.model_copy(update={"groups": groups, "missing": (*reasons, *arm.missing)})


def _missing(quality: Quality, classes: ClassesSpec, left_out: Collection[str]) -> tuple[str, ...]:
    """Every reason for a missing figure of a class, once, with the classes it holds for."""
    classes_of: dict[tuple[str, str], list[str]] = {}
    for one in quality.classes:
        for key, reason in one.missing.items():
            if key not in left_out:
                classes_of.setdefault((MEASURES_BY_KEY[key].title, reason), []).append(class_name(classes, one.label))
    return tuple(f"{title} {reason} ({', '.join(labels)})" for (title, reason), labels in classes_of.items())


def _values_of(measures: Quality | Measures, left_out: Collection[str]) -> Values:
    """By measure, those that there are for such a set of images."""
    return {key: getattr(measures, key) for key in MEASURES_BY_KEY if hasattr(measures, key) and key not in left_out}


# ---- Pictures --------------------------------------------------------------------------------------------------


def gallery_of(spec: EvaluateSpec, records: Records, samples: LabelledImages, release: Release) -> Gallery:
    """The first images of every class and column."""
    whole_CHW, released_CHW = (
        (image.channels, image.height, image.width) for image in (spec.image, released_image(spec.privacy, spec.image))
    )
    labels = range(spec.classes.count)
    released, note = released_pictures(release, released_CHW, spec.classes.count)
    columns: dict[str, Sequence[Pixels]] = {
        "real": [_first_real(records, label, whole_CHW) for label in labels],
        "released": [over_blocks(pictures, spec.privacy.block_side_or_one) for pictures in released],
    }
    for arm in ("shared", "personal", "both"):
        columns[arm] = [samples.images[arm][samples.labels_N == label][:PICTURED] for label in labels]
    return Gallery(columns, note)


def _first_real(records: Records, label: int, shape_CHW: tuple[int, int, int]) -> Pixels:
    rows = np.flatnonzero(records.labels_N == label)[:PICTURED]
    return to_pixels(records[rows]).reshape(-1, *shape_CHW)


def released_pictures(release: Release, shape_CHW: tuple[int, int, int], num_classes: int) -> tuple[list[Pixels], str]:
    """What the server saw of each class as pictures, and a sentence that says what they are."""
    if isinstance(release, GaussianRelease):
        labels_N = release.labels_N.numpy()
        images_NCHW = (release.images_NCHW.numpy() + 1) / 2
        pictures = [to_pixels(images_NCHW[labels_N == label][:PICTURED]) for label in range(num_classes)]
        return pictures, (
            "“Released” is what everybody else saw: your images with their noise, not in the order of your records. "
            f"The noise has σ = {release.split_sigma:.3g} where black to white is 2; what lies beyond black or white "
            "is cut off for display."
        )
    if isinstance(release, PrivunitRelease):
        return [_privunit_pictures(release, label) for label in range(num_classes)], (
            "“Released” is what everybody else saw: your images with their noise, not in the order of your records; "
            "the first picture of a class is the mean of them all. The noise has a standard deviation of "
            f"{release.noise_std:.3g} where black to white is 1; what lies beyond these is cut off for display."
        )
    generator = torch.Generator().manual_seed(SEED)
    pictures = [_summary_pictures(release, label, shape_CHW, generator) for label in range(len(release.counts_K))]
    return pictures, (
        "“Released” is what everybody else saw: the first picture of a class is its noisy mean, the others are draws "
        "from the noisy Gaussian that your release alone describes, cut off at black and white. None of them is one of "
        "your images."
    )


def _privunit_pictures(release: PrivunitRelease, label: int) -> Pixels:
    """The mean of one class's released images, then some of them; none without records."""
    images_NCHW = release.images_NCHW[release.labels_N == label]
    if len(images_NCHW):
        images_NCHW = torch.cat([images_NCHW.mean(dim=0, keepdim=True), images_NCHW[: PICTURED - 1]])
    return to_pixels(images_NCHW.numpy())


def _summary_pictures(
    release: OwnerSummary, label: int, shape_CHW: tuple[int, int, int], generator: torch.Generator
) -> Pixels:
    """The noisy mean of one class, then draws from N(S1/n, Σ) with Σ what S2/n leaves of it; none without records."""
    count = float(release.counts_K[label])
    if count == 0:
        return np.empty((0, *shape_CHW), np.uint8)
    mean_D = release.mean_sums_KD[label] / count
    drawn_ND = mean_D[None]
    if len(mean_D) <= LARGEST_DRAWN:
        covariance_DD = project_keeping_trace(noisy_covariance(release, label), floor=1e-6 * len(mean_D))
        covariance_DD = unmapped(covariance_DD, release.map_DD)
        values_D, vectors_DD = torch.linalg.eigh(covariance_DD)
        noise_ND = torch.randn(PICTURED - 1, len(mean_D), dtype=torch.float64, generator=generator)
        draws_ND = mean_D + (noise_ND * values_D.clamp(min=0).sqrt()) @ vectors_DD.T
        drawn_ND = torch.cat([drawn_ND, draws_ND])
    return to_pixels(drawn_ND.numpy()).reshape(-1, *shape_CHW)


def noisy_covariance(release: OwnerSummary, label: int) -> torch.Tensor:
    """S2/n, less the offset of the noisy mean from the centre that the moment is about; as noisy, and as mapped, as it
    was released."""
    count = float(release.counts_K[label])
    mean_D = release.mean_sums_KD[label] / count
    centre_D = mean_D.clamp(0, 1) if count >= CENTRED_FROM else torch.full_like(mean_D, release.centre)
    offset_D = mapped((mean_D - centre_D)[None], release.map_DD)[0]
    return unpacked(release.moment_sums_KM[label] / count, len(mean_D)) - torch.outer(offset_D, offset_D)


if __name__ == "__main__":
    sys.exit(run_stage(EvaluateSpec, body))
