"""A baseline's stages as processes, in one folder: every network is trained, then every owner's figures are taken.

No plan and no ledger: nothing is released. What has a receipt is not done again; what was stopped goes on from its
checkpoint.
"""

import json
from collections.abc import Mapping, Sequence

from feddiff_protocol import layout
from feddiff_protocol.baselines import (
    AnyBaselineSpec,
    Baseline,
    MeasureBaselineSpec,
    OwnerRecords,
    TrainBaselineSpec,
)
from feddiff_protocol.errors import FINAL_EXIT_CODES, OUR_BUG, RETRIED_EXIT_CODES, InputMissing, Interrupted
from feddiff_protocol.plan import StageKey, StageObserved, StagePhase
from feddiff_protocol.stages import Receipt, job_reference

from .engine import Setting, num_threads
from .experiment_file import Unit
from .owner_stages import StageFailed, finished_sample_spec
from .processes import Attempt, stop_orphans
from .run_folder import RunFolder, store_uri

STORE = "not-private"  # of networks and figures, in the folder of a baseline

Groups = Mapping[str, Mapping[str, float | None]]  # by group of classes, then by measure


def run_baseline(
    unit: Unit, baseline: Baseline, folder: RunFolder, run: RunFolder | None, setting: Setting
) -> tuple[dict[str, Groups], dict[str, int], list[Receipt]]:
    """Every owner's figures, image-steps by network, and the receipts of all stages, whichever attempt earned them.
    `run` is the job's that the baseline takes, if it does.

    Raises Interrupted when stopped, StageFailed with a stage's own words and code.
    """
    stop_orphans(folder.path / "stages", setting.grace_seconds)
    receipts = _Stages(training_specs(unit, baseline, folder), folder, setting).run()
    receipts += _Stages(measuring_specs(unit, baseline, folder, run), folder, setting).run()
    owners = {client: measured(folder, uid_of(unit), client) for client in unit.job.datasets}
    return owners, image_steps(unit, baseline), receipts


def image_steps(unit: Unit, baseline: Baseline) -> dict[str, int]:
    """What every one of its networks sees, of fedavg each client's: as much as a personal denoiser of the job."""
    spec = unit.job.document.spec
    if baseline is Baseline.DRAWS:
        return {}
    if baseline is Baseline.ORACLE:
        return {"shared": spec.shared.images, "personal": spec.personal.images}
    return {"personal" if baseline.is_of_a_run else baseline.value: spec.personal.images}


def uid_of(unit: Unit) -> str:
    """Follows from what is asked for: something else never goes on where this was."""
    return unit.asked[:32]


def training_specs(unit: Unit, baseline: Baseline, folder: RunFolder) -> list[TrainBaselineSpec]:
    common = _common(unit, baseline, folder)
    return [TrainBaselineSpec(**{**common, "client": client}) for client in baseline.networks(unit.job.datasets)]


def measuring_specs(
    unit: Unit, baseline: Baseline, folder: RunFolder, run: RunFolder | None
) -> list[MeasureBaselineSpec]:
    common = _common(unit, baseline, folder)
    runs = {client: finished_sample_spec(run, client) if run is not None else None for client in unit.job.datasets}
    return [MeasureBaselineSpec(**{**common, "client": client, "run": of_client}) for client, of_client in runs.items()]


def _common(unit: Unit, baseline: Baseline, folder: RunFolder) -> dict[str, object]:
    owners = tuple(
        OwnerRecords(client=client, source=dataset.source, classes=dataset.document.spec.classes)
        for client, dataset in unit.job.datasets.items()
    )
    return {
        "job": job_reference(unit.job.document, uid_of(unit)),
        "attempt": 1,
        "seed": unit.seed,
        "baseline": baseline,
        "owners": owners,
        "image": unit.job.first_dataset.document.spec.image,
        "like": unit.job.document.spec,
        **({"rounds": unit.rounds} if unit.rounds is not None else {}),
        **({"noise_multiplicity": unit.noise_multiplicity} if unit.noise_multiplicity is not None else {}),
        "store": store_uri(folder.path / STORE),
    }


def measured(folder: RunFolder, uid: str, client: str) -> Groups:
    """One owner's figures. Raises InputMissing where a stage said that it left them and they are not there."""
    path = folder.path / STORE / layout.measured_baseline(uid, client)
    try:
        groups: Groups = json.loads(path.read_text())["quality"]["groups"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputMissing(
            f"{path}: expected the figures of a finished baseline, found none that can be read; delete {folder.path}"
            " and run again"
        ) from None
    return groups


class _Stages:
    """Stages that do not wait for each other, as many at a time as the setting has processes."""

    def __init__(self, specs: Sequence[AnyBaselineSpec], folder: RunFolder, setting: Setting) -> None:
        self.folder, self.setting = folder, setting
        self.done = {key_of(spec): receipt for spec in specs if (receipt := self._receipt(spec))}
        self.waiting = [spec for spec in specs if key_of(spec) not in self.done]
        self.running: dict[StageKey, Attempt] = {}
        self.order = [key_of(spec) for spec in specs]

    def run(self) -> list[Receipt]:
        try:
            while self.waiting or self.running:
                if self.setting.stop_requested():
                    raise Interrupted("stopped; run the same command again to go on")
                while self.waiting and len(self.running) < self.setting.num_processes:
                    self._start(self.waiting.pop(0))
                self._look_after_processes()
                self.setting.sleep(0.05)
        finally:
            self._stop()
        return [self.done[key] for key in self.order]

    def _receipt(self, spec: AnyBaselineSpec) -> Receipt | None:
        key = key_of(spec)
        return self.folder.receipt(key, self.folder.newest_attempt(key), spec.job.uid)

    def _start(self, spec: AnyBaselineSpec) -> None:
        key = key_of(spec)
        spec = spec.model_copy(update={"attempt": self.folder.newest_attempt(key) + 1})
        folder = self.folder.attempt_folder(key, spec.attempt)
        folder.mkdir(parents=True)
        (folder / "spec.json").write_text(spec.model_dump_json(by_alias=True, exclude_none=True, indent=2))
        slots = min(self.setting.num_processes, len(self.running) + 1 + len(self.waiting))
        threads, now = num_threads(self.setting.cores, slots), self.setting.clock()
        self.running[key] = self.setting.start_attempt(key, spec.attempt, folder, spec, 1, threads, now)
        self.setting.reporter.stage_started(key, spec.attempt)

    def _look_after_processes(self) -> None:
        for key, process in list(self.running.items()):
            ended = process.ended()
            self._tell_progress(process)
            if ended:
                del self.running[key]
                self._finish(key, process)

    def _tell_progress(self, process: Attempt) -> None:
        for event in process.progress():
            unit = str(event.get("unit", ""))
            self.setting.reporter.stage_progress(process.key, int(event["done"]), int(event["total"]), unit)

    def _finish(self, key: StageKey, process: Attempt) -> None:
        spec = json.loads((process.folder / "spec.json").read_text())
        receipt = self.folder.receipt(key, process.attempt, spec["job"]["uid"])
        code, words = process.exit_code(), process.message() or "ended without a receipt"
        failed = StagePhase.STOPPED if code == Interrupted.exit_code else StagePhase.FAILED
        phase = StagePhase.SUCCEEDED if receipt else failed
        self.setting.reporter.stage_ended(
            key, StageObserved(phase, process.attempt, exit_code=code, message=words, receipt=receipt)
        )
        if receipt is not None:
            self.done[key] = receipt
        elif phase is StagePhase.STOPPED:
            raise Interrupted("a stage was stopped; run the same command again to go on")
        else:
            code = code if code in FINAL_EXIT_CODES | RETRIED_EXIT_CODES else OUR_BUG
            raise StageFailed(f"{words}; its words are in {process.folder / 'stderr.log'}", code)

    def _stop(self) -> None:
        """No stage runs any more; each had its time to save its work."""
        asked_at = self.setting.clock()
        while left := [process for process in self.running.values() if not process.ended()]:
            for process in left:
                process.ask_to_stop(asked_at)
                if self.setting.stop_requested() > 1 or self.setting.clock() - asked_at > self.setting.grace_seconds:
                    process.kill()
            self.setting.sleep(0.05)


def key_of(spec: AnyBaselineSpec) -> StageKey:
    return spec.stage, spec.client
