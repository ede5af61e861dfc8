"""What attacks find in one owner's run: in its upload, the shared denoiser, the personal one, and both together.

    python -m feddiff_trainer.audit SPEC.json      (the spec with which the run drew its samples)

It reads the owner's records, so its answer stays with the owner: on stdout, in the owner's store, in the owner report.
No receipt, nothing in the federation's store, no telemetry.

Members are training records, others are held-out ones, as many of each class: labels are public, and an attack that
told classes apart would look like one that finds members. Which of a class are taken is chance, with a fixed seed.

Shapes: N records, C channels, H height, W width.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from feddiff_protocol import layout
from feddiff_protocol.api import Mechanism, Timeline
from feddiff_protocol.errors import DataInvalid
from feddiff_protocol.promise import Promise, promise_of, schedule_of
from feddiff_protocol.schedule import Schedule
from feddiff_protocol.stages import EvaluateSpec, ReleaseSpec, SampleSpec

from .answering import answered
from .attacks import loss_scores, nearest_scores, pia_scores, secmi_scores
from .batches import loss_of
from .batches import records as record_batches
from .denoisers import denoiser_from_bytes
from .denoising import ClassGaussian, Denoise, log_normal_sigmas
from .drawing import draw_alone, drawing_of
from .evaluate import image_set, minority_of, rewrite_report, to_model_units
from .evaluation import ARMS
from .findings import Audit, Copies, Estimate, Finding, Reconstruction, Target, export_refusals
from .metrics import ImageSet, nearest_distance
from .noise import Float64, Normals, os_entropy_normals
from .one_run import one_run_of_shared, one_run_of_upload
from .pictures import LabelledImages, read_samples
from .reconstruction import gain_db, nearer_bound, prior_of, reconstructed, structural_similarity
from .records import Records, digest_records, read_holdout, read_source
from .sample import network_of, read_shared
from .sampler import hand_over
from .stores import Store, open_store
from .train_personal import initial_denoiser
from .train_shared import EMA_WIDTH, SIGMA_DATA, image_shape
from .training import distributed, train
from .trials import LARGEST_RELEASE, MOST_VALUES, parts_of, trials, without_privacy
from .verdicts import (
    Measured,
    area_interval,
    area_under_curve,
    bound_of,
    finding_of,
    judge,
    share_interval,
)

SEED = 0  # of who is compared, and of the attacks' own noise: nothing is protected by it
MOST_PAIRS = 2000  # members, and as many others
FEWEST_PAIRS = 10  # of a group that is shown on its own
LEVELS, DRAWS = 8, 8  # of the loss
MEMORISED = 12  # records of the models' control
CONTROL_IMAGES, CONTROL_BATCH = 16_000, 64  # seen by it: every record more than a thousand times
CONTROL_SAMPLES = 20  # of it, for each of its records
LARGEST_PRIOR = 1024  # values of an image up to which a covariance is decomposed to reconstruct it
NEAREST, SECMI = "nearest neighbour", "SecMI"
MODELS = (Target.SHARED, Target.PERSONAL, Target.BOTH)

Scores = Callable[[Denoise, Tensor, Tensor], Float64]  # (denoise, x0_NCHW, label_N) to scores_N
Report = Callable[[float], None]  # told the share of the work that is done
Mask: TypeAlias = npt.NDArray[np.bool_]
Rows: TypeAlias = npt.NDArray[np.int64]


def body(spec: SampleSpec, report: Report) -> Audit:
    """The audit, which is now in the owner's store and in the owner report."""
    owner_store = open_store(spec.owner_store, "owner")
    records = read_source(spec.source, spec.image, spec.classes)
    found = audit(spec, owner_store, records, os_entropy_normals(), report)
    owner_store.put(layout.audit(spec.job.uid, spec.client), found.model_dump_json(by_alias=True).encode())
    rewrite_report(evaluate_spec_of(spec), owner_store, records)
    return found


def audit(spec: SampleSpec, owner_store: Store, records: Records, normals: Normals, report: Report) -> Audit:
    """Every attack on the four targets; without held-out records on the upload alone."""
    personal_key, samples_key = (at(spec.job.uid, spec.client) for at in (layout.personal_denoiser, layout.samples))
    personal, sampled = owner_store.get(personal_key), owner_store.get(samples_key)
    released = release_spec_of(spec)
    findings, copied, notes = upload_findings(released, normals), list[Copies](), list[str]()
    runs = one_run_of_upload(released, normals)
    runs += one_run_of_shared(spec, released, normals, lambda share: report(0.1 + 0.3 * share))
    blind, rebuilt, holdout = None, None, read_holdout(spec.source, spec.image, spec.classes)
    if holdout is None:
        notes.append(
            "The dataset names no held-out records (spec.source.holdoutPath), so nothing can be told from what was "
            "trained on: no denoiser was attacked."
        )
    else:
        compared, notes = compare(spec, records, holdout)
        models = Models(
            shared=read_shared(spec),
            personal=denoiser_from_bytes(personal, personal_key, network_of(spec, SIGMA_DATA)),
            samples=read_samples(sampled, samples_key, ARMS, spec.image, spec.classes.count),
        )
        if reconstructs(spec):
            prior = prior_of(image_set(holdout, evaluate_spec_of(spec)), spec.classes.count)
            rebuilt = reconstruct(spec, compared, prior, normals)
        control = memorised(spec, compared.few(), lambda share: report(0.4 + 0.5 * share))
        findings += model_findings(spec, compared, models, control)
        copied = [copies_of(target, models.samples, records, holdout, spec) for target in MODELS]
        blind = blind_area(spec, compared)
    report(1.0)
    return Audit(
        job=spec.job,
        client=spec.client,
        records_sha256=digest_records(records),
        personal_sha256=hashlib.sha256(personal).hexdigest(),
        samples_sha256=hashlib.sha256(sampled).hexdigest(),
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        findings=tuple(findings),
        one_run=tuple(runs),
        reconstruction=rebuilt,
        copies=tuple(copied),
        blind=blind,
        notes=tuple(notes),
    )


# ---- The upload ------------------------------------------------------------------------------------------------


def upload_findings(released: ReleaseSpec, normals: Normals) -> list[Finding]:
    """The best test on fresh releases of made-up images at the worst pair: the promise, as this code keeps it."""
    promise = promise_of(released.privacy, released.diffusion)
    findings, (careless, share) = [], without_privacy(released, promise)
    for part, control in zip(parts_of(released), parts_of(careless), strict=True):
        control_auc = area_under_curve(*trials(careless, control, lambda shape: share * normals(shape)))
        scores = trials(released, part, normals)
        findings.append(finding_of(Target.UPLOAD, part.attack, *scores, part.bound(promise), control_auc))
    return findings


def reconstructs(spec: SampleSpec) -> bool:
    return spec.image.dimensions <= LARGEST_PRIOR and spec.privacy.block_side is None


def reconstruct(spec: SampleSpec, compared: "Compared", prior: ClassGaussian, normals: Normals) -> Reconstruction:
    """Members as they come back from a release of theirs alone, which is kept nowhere; each beside another member, of
    which the prior knows as little."""
    promise, released = promise_of(spec.privacy, spec.diffusion), release_spec_of(spec)
    values = 1 if promise.mechanism is not Mechanism.SUMMARY else (spec.image.dimensions + 1) // 2
    size = max(min(len(compared), LARGEST_RELEASE, MOST_VALUES // (values * spec.image.dimensions)), 2)
    images = compared.at(np.unique(np.linspace(0, len(compared) - 1, size).round().astype(np.int64))).members
    x_ND, other_ND = images.pixels_ND, images.pixels_ND[next_of_class(images.labels_N)]
    guess_ND = prior.means_KD[torch.from_numpy(images.labels_N)].numpy()

    def alike(estimate_ND: Float64) -> float:
        return structural_similarity(*(v_ND.reshape(images.images_NCHW.shape) for v_ND in (estimate_ND, x_ND)))

    def attack(asked: ReleaseSpec, share: float) -> tuple[Estimate, float, float]:
        released_ND, estimate_ND = reconstructed(asked, prior, images, normals, share)
        nearer_N = np.linalg.norm(released_ND - x_ND, axis=1) < np.linalg.norm(released_ND - other_ND, axis=1)
        nearer = share_interval(int(nearer_N.sum()), len(nearer_N))
        return nearer, gain_db(estimate_ND, guess_ND, x_ND), alike(estimate_ND)

    always = share_interval(len(images), len(images)).low
    nearer, gain, ssim = attack(released, 1.0)
    control, control_gain, control_ssim = attack(*without_privacy(released, promise, mu=1000, epsilon=100))
    bound = nearer_bound(released, promise)
    return Reconstruction(
        records=len(images),
        nearer=nearer,
        nearer_bound=bound,
        gain_db=gain,
        ssim=ssim,
        guess_ssim=alike(guess_ND),
        control_nearer=control.value,
        control_gain_db=control_gain,
        control_ssim=control_ssim,
        verdict=judge([Measured(nearer.low, always, bound)], control.value),
    )


def release_spec_of(spec: SampleSpec) -> ReleaseSpec:
    """The spec of this run's release, under a name that no ledger knows: its trials are never written anywhere."""
    shared = ReleaseSpec.model_fields.keys() & SampleSpec.model_fields.keys() - {"stage"}
    return ReleaseSpec(**{name: getattr(spec, name) for name in shared}, release=f"prl-{'0' * 40}")


def next_of_class(labels_N: npt.NDArray[np.integer[Any]]) -> Rows:
    """For every image the row of another one of its class, each in turn; its own where it is the only one."""
    rows_N = np.arange(len(labels_N))
    for label in np.unique(labels_N):
        rows_N[labels_N == label] = np.roll(np.flatnonzero(labels_N == label), 1)
    return rows_N


# ---- Members and others ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """Members and as many others, row by row of one class; `minority_N`: whether it is one of the owner's rare ones."""

    members: ImageSet
    others: ImageSet
    minority_N: Mask

    def __len__(self) -> int:
        return len(self.minority_N)

    @property
    def images(self) -> Tensor:
        """x0_NCHW of members, then of others."""
        return torch.from_numpy(np.concatenate([self.members.images_NCHW, self.others.images_NCHW]))

    @property
    def labels(self) -> Tensor:
        return torch.from_numpy(np.concatenate([self.members.labels_N, self.others.labels_N]))

    def few(self) -> "Compared":
        """The control's: at most MEMORISED pairs, spread over the classes."""
        rows = np.unique(np.linspace(0, len(self) - 1, MEMORISED).round().astype(np.int64))
        return self.at(rows)

    def at(self, rows: Rows) -> "Compared":
        return Compared(picked(self.members, rows), picked(self.others, rows), self.minority_N[rows])


def compare(spec: SampleSpec, records: Records, holdout: Records) -> tuple[Compared, list[str]]:
    """Who is compared, and what is to be said of it. Raises DataInvalid where no class has both kinds."""
    told = evaluate_spec_of(spec)
    own, held_out = image_set(records, told), image_set(holdout, told)
    fresh_N = ~copied_rows(held_out, own)
    notes = [
        "Of both together an attack asks whichever denoiser has the noise level: where all of its levels lie below the "
        "split, it finds what it finds in the personal denoiser alone."
    ]
    if Target.SHARED not in asked_for_noise(spec):
        notes = ["On the timeline restarted the shared denoiser was attacked through its samples only."]
    if not reconstructs(spec):
        notes.append(
            f"Images of more than {LARGEST_PRIOR:,} values, and those of which the means of squares are released, were"
            " not reconstructed from the upload."
        )
    if known := int((~fresh_N).sum()):
        notes.append(f"{known} held-out records are training records too and were left out.")
    rng, pairs = np.random.default_rng(SEED), []
    for label in range(spec.classes.count):
        inside, outside = np.flatnonzero(own.labels_N == label), np.flatnonzero((held_out.labels_N == label) & fresh_N)
        size = min(len(inside), len(outside))
        pairs.append(np.stack([rng.permutation(inside)[:size], rng.permutation(outside)[:size]]))
    both_2N = np.concatenate(pairs, axis=1)
    if both_2N.shape[1] < FEWEST_PAIRS:
        raise DataInvalid(
            f"spec.source.holdoutPath: expected {FEWEST_PAIRS} records or more of the classes that the owner has, found"
            f" {both_2N.shape[1]} to compare with; hold more out"
        )
    if both_2N.shape[1] > MOST_PAIRS:
        both_2N = both_2N[:, np.sort(rng.permutation(both_2N.shape[1])[:MOST_PAIRS])]
    members, others = picked(own, both_2N[0]), picked(held_out, both_2N[1])
    return Compared(members, others, np.isin(members.labels_N, minority_of(told))), notes


def picked(images: ImageSet, rows: Rows) -> ImageSet:
    return ImageSet(images.images_NCHW[rows], images.labels_N[rows])


def copied_rows(images: ImageSet, among: ImageSet) -> Mask:
    """Whether each image is, value by value, one of the others."""
    known = {x_CHW.tobytes() for x_CHW in among.images_NCHW}
    return np.array([x_CHW.tobytes() in known for x_CHW in images.images_NCHW], np.bool_)


def evaluate_spec_of(spec: SampleSpec) -> EvaluateSpec:
    """What the run's evaluation was told."""
    return EvaluateSpec(**{name: getattr(spec, name) for name in EvaluateSpec.model_fields if name != "stage"})


# ---- The models ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Models:
    """What is attacked beside the upload."""

    shared: Denoise
    personal: Denoise
    samples: LabelledImages

    def of(self, target: Target, split_sigma: float) -> Denoise:
        whole = {Target.SHARED: self.shared, Target.PERSONAL: self.personal}
        return whole.get(target) or hand_over(self.shared, self.personal, split_sigma)


def model_findings(spec: SampleSpec, compared: Compared, models: Models, control: "Control") -> list[Finding]:
    """Every attack on every model, on all classes together and on the minority's."""
    promise, schedule = promise_of(spec.privacy, spec.diffusion), schedule_of(spec.diffusion)
    findings, targets = list[Finding](), asked_for_noise(spec)
    for target in MODELS:
        first_step = promise.split_step if target is Target.SHARED else 1
        attacks = attacks_from(first_step, schedule) if target in targets else {}
        for name, scores in attacks.items():
            name, scores, control_area = turned_by(control, name, scores)
            scores_N = scores(models.of(target, promise.split_sigma), compared.images, compared.labels)
            findings += both_groups(target, name, compared, scores_N, promise, control_area)
        arm = models.samples.images[target.value]
        scores_N = nearest_to(compared, ImageSet(to_model_units(arm), models.samples.labels_N))
        findings += both_groups(target, NEAREST, compared, scores_N, promise, control.nearest_area())
    return findings


def turned_by(control: "Control", name: str, scores: Scores) -> tuple[str, Scores, float]:
    """The attack and its area on the control; SecMI with the sign that finds the control's members, as whoever tries it
    on a model of their own would have it.

    Far above the records' distance from each other, a denoiser that knows them by heart bends most at the records
    themselves: there the larger t-error is theirs.
    """
    area = control.area(scores)
    if name != SECMI or area >= 0.5:
        return name, scores, area
    return f"{name}, reversed", lambda denoise, x, label: -scores(denoise, x, label), 1 - area


def asked_for_noise(spec: SampleSpec) -> tuple[Target, ...]:
    """Whose noise predictions are attacked. On the paper's timeline the shared denoiser makes noised images by a
    schedule of its own, so it has none for an image, alone or with the personal one: there samples alone are attacked.
    """
    return (Target.PERSONAL,) if spec.diffusion.timeline is Timeline.RESTARTED else MODELS


def attacks_from(first_step: int, schedule: Schedule) -> dict[str, Scores]:
    """The attacks on a denoiser that begins at this step, from which the papers' steps, of a thousand, count.

    PIA's t = 200 and SecMI's k = 10 are the papers'; t_SEC = 50 is half of theirs, above which a denoiser that begins
    at a split gives no control away.
    """
    sigmas, first = schedule.sigmas, min(first_step, schedule.steps - 2)  # SecMI needs a step above the judged one

    def later(steps: int) -> int:
        return min(first + round(steps * schedule.steps / 1000), schedule.steps)

    losses = training_levels(sigmas[first - 1], sigmas[-1])
    climb = [sigmas[step - 1] for step in sorted(set(map(later, range(0, 61, 10))))]
    proximal = sigmas[later(200) - 1]
    return {
        "loss threshold": lambda denoise, x, label: loss_scores(denoise, x, label, losses, DRAWS, SEED),
        "PIA": lambda denoise, x, label: pia_scores(denoise, x, label, sigmas[first - 1], proximal),
        SECMI: lambda denoise, x, label: secmi_scores(denoise, x, label, climb),
    }


def training_levels(low: float, high: float) -> list[float]:
    """The middles of LEVELS equally likely ranges of the noise levels that a personal denoiser is trained on."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = log_normal_sigmas(10_000, low, high, generator).double()
    return [float(level) for level in drawn.quantile((torch.arange(LEVELS).double() + 0.5) / LEVELS)]


def both_groups(
    target: Target, attack: str, compared: Compared, scores_N: Float64, promise: Promise, control_auc: float
) -> list[Finding]:
    """One finding of all classes, and one of the minority's where it has records enough."""
    members_N, others_N = scores_N[: len(compared)], scores_N[len(compared) :]
    bound, rare_N = bound_of(promise), compared.minority_N
    findings = [finding_of(target, attack, members_N, others_N, bound, control_auc)]
    if FEWEST_PAIRS <= rare_N.sum() < len(compared):
        findings.append(finding_of(target, attack, members_N[rare_N], others_N[rare_N], bound, control_auc, "minority"))
    return findings


def nearest_to(compared: Compared, samples: ImageSet) -> Float64:
    labels_N = np.concatenate([compared.members.labels_N, compared.others.labels_N])
    pixels_ND = np.concatenate([compared.members.pixels_ND, compared.others.pixels_ND])
    return nearest_scores(pixels_ND, labels_N, samples.pixels_ND, samples.labels_N)


def copies_of(target: Target, samples: LabelledImages, records: Records, holdout: Records, spec: SampleSpec) -> Copies:
    """Of one target: a sample is a copy where an own record is nearer than ⅓ (or ½) of the way to any held-out one."""
    told = evaluate_spec_of(spec)
    own, held_out = image_set(records, told), image_set(holdout, told)
    drawn = ImageSet(to_model_units(samples.images[target.value]), samples.labels_N)
    ratios = []
    for label in range(spec.classes.count):
        parts = [each.pixels_ND[each.labels_N == label] for each in (drawn, own, held_out)]
        if all(len(part) for part in parts):
            ratios.append(nearest_distance(parts[0], parts[1]) / nearest_distance(parts[0], parts[2]))
    ratio_N = np.concatenate(ratios)
    third, half = (share_interval(int((ratio_N < limit).sum()), len(ratio_N)) for limit in (1 / 3, 1 / 2))
    return Copies(target=target, third=third, half=half)


# ---- The controls ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Control:
    """A denoiser of the job's network that memorised `compared.members`, and its samples: not private on purpose."""

    denoiser: Denoise
    samples: ImageSet
    compared: Compared

    def area(self, scores: Scores) -> float:
        return self._area(scores(self.denoiser, self.compared.images, self.compared.labels))

    def nearest_area(self) -> float:
        return self._area(nearest_to(self.compared, self.samples))

    def _area(self, scores_N: Float64) -> float:
        return area_under_curve(scores_N[: len(self.compared)], scores_N[len(self.compared) :])


def memorised(spec: SampleSpec, compared: Compared, report: Report) -> Control:
    """Trained long on a few of the owner's records, at every noise level; it exists in memory alone."""
    x0_NCHW, label_N = (torch.from_numpy(part) for part in (compared.members.images_NCHW, compared.members.labels_N))
    sigmas = schedule_of(spec.diffusion).sigmas
    with distributed() as world:
        source = record_batches(x0_NCHW.to(world.device), label_N.to(world.device), (sigmas[0], sigmas[-1]))
        denoiser = train(
            initial_denoiser(spec),
            loss_of(source, SIGMA_DATA),
            world=world,
            num_images=CONTROL_IMAGES,
            batch=CONTROL_BATCH,
            learning_rate=float(spec.personal.learning_rate),
            ema_width=EMA_WIDTH,
            seed=SEED,
            on_progress=lambda progress: report(progress.images / progress.num_images),
        ).cpu()
    generator = torch.Generator().manual_seed(SEED)
    labels_S = label_N.repeat(CONTROL_SAMPLES)
    noise_SCHW = torch.randn(len(labels_S), *image_shape(spec.image), generator=generator)
    drawing = drawing_of(spec.privacy, spec.diffusion, spec.sampling)
    drawn_SCHW = draw_alone(drawing, denoiser, noise_SCHW, labels_S, generator)
    return Control(denoiser, ImageSet(drawn_SCHW.float().numpy(), labels_S.numpy()), compared)


def blind_area(spec: SampleSpec, compared: Compared) -> Estimate:
    """The area of the loss under a denoiser that was trained on nothing: by what members and others differ anyway."""
    levels = training_levels(schedule_of(spec.diffusion).sigma(1), schedule_of(spec.diffusion).sigmas[-1])
    untrained = initial_denoiser(spec).eval().requires_grad_(False)
    scores_N = loss_scores(untrained, compared.images, compared.labels, levels, DRAWS, SEED)
    area = area_under_curve(scores_N[: len(compared)], scores_N[len(compared) :])
    return area_interval(area, len(compared), len(compared))


# ---- The process -----------------------------------------------------------------------------------------------


def tell_progress(share: float) -> None:
    """One line on stderr, as stages write them; nothing in it depends on the records."""
    print(json.dumps({"event": "progress", "done": round(100 * share), "total": 100}), file=sys.stderr, flush=True)


def main() -> int:
    return answered(SampleSpec, _answer)


def _answer(spec: SampleSpec) -> dict[str, Any]:
    found = body(spec, tell_progress)
    return found.to_wire() | {"exportRefusals": export_refusals(found)}


if __name__ == "__main__":
    sys.exit(main())
