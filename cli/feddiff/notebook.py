"""The `feddiff` command's answers as typed values, for a notebook or a script: `import feddiff` gives what is here.

Nothing is decided here: every function calls what the command of its name calls. What the command refuses raises the
error whose exit code the command ends with (docs/exit-codes.md).
"""

import base64
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from feddiff_protocol.errors import FeddiffError, Interrupted, PrivacyRefusal

from .documents import LocalDataset, LocalJob, load_documents, load_job
from .engine import Outcome, Setting, carriers, run_job
from .owner_stages import StageFailed, draw_samples
from .plan_report import Budget as Budget
from .plan_report import ClientPlan as ClientPlan
from .plan_report import OnePixel as OnePixel
from .plan_report import PlanReport, plan_report
from .processes import stop_requests
from .progress import display, silence
from .run_folder import RunFolder
from .views import Ledger, Report, RunStatus, ledger_of, report_of, run_status
from .views import OwnerReport as OwnerReport
from .views import RunCondition as RunCondition
from .views import StageStatus as StageStatus

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Pixels = npt.NDArray[np.uint8]
    Labels = npt.NDArray[np.int64]

SHOWN_PER_CLASS = 16
SHOWN_PIXELS = 32  # of the screen, for the height of an image


def load(*files: str | Path) -> LocalJob:
    """The one job that is in YAML `files`, with the dataset of each of its clients.

    Relative paths in a document count from the file that holds it; the records need not be there. Documents of other
    groups, such as a Namespace for `kubectl apply`, are passed over. Raises SpecInvalid, naming file and field, for a
    document that is invalid or a job whose datasets are missing or do not agree, InputMissing for a file that cannot
    be read.
    """
    return load_job([Path(file) for file in files])


def datasets(*files: str | Path) -> dict[str, LocalDataset]:
    """The datasets in YAML `files` by namespace/name, for an owner without a job. Raises as `load` does."""
    return {dataset.key: dataset for dataset in load_documents([Path(file) for file in files]).datasets}


def ledger(dataset: LocalDataset) -> Ledger:
    """Every release of a dataset, what they add up to in ε at the budget's δ, and what is left. Writes nothing.

    An empty one where no run has begun it. Raises PrivacyRefusal where there are releases and their ledger is gone,
    SpecInvalid where the budget is less than it once was.
    """
    return ledger_of(dataset)


def plan(job: LocalJob) -> PlanReport:
    """What one more release would promise, and what it would cost each owner's budget. Starts and writes nothing.

    Where an owner does not admit the job the answer is whole and its `refusals` say why: `run` would raise.
    """
    return plan_report(job)


def run(
    job: LocalJob,
    folder: str | Path,
    *,
    engine: Literal["local", "ray"] = "local",
    processes: int | None = None,
    address: str | None = None,
    gpu_share: float | None = None,
    progress: bool = True,
) -> "Run":
    """The complete run of a job in `folder`, carried on from wherever it stands; complete, nothing is done again.

    This is where privacy is spent: a new folder is a new release of every owner, charged before it starts, and
    deleting the folder forgets no charge. Owners' ledgers and private results lie beside their records, in `feddiff/`.

    `processes` at a time are started, one per core unless given. With engine "ray", `address` names a cluster to join
    and `gpu_share`, above 0 and at most 1, is each training's part of a GPU. `progress` shows a line per event on
    standard error, bars on a terminal. Interrupting the kernel lets stages save their work;
    twice, they are killed.

    Raises PrivacyRefusal where a budget or an access rule does not admit the job, or going on could break the promise,
    Interrupted after a stop (the same call goes on), SpecInvalid where the folder holds a run of another job or
    promise, UsageInvalid for arguments that do not fit, and StageFailed, with exit code and log, where a stage failed.
    """
    run_folder = RunFolder(Path(folder))
    with (
        carriers(engine, processes, address, gpu_share) as given,
        display(as_json=False) if progress else silence() as shown,
        stop_requests() as stop,
    ):
        outcome = run_job(job, run_folder, Setting(reporter=shown, stop_requested=stop, **given))
    if outcome.exit_code:
        raise _failure(outcome)
    return Run(run_folder.path)


def _failure(outcome: Outcome) -> FeddiffError:
    """What the command would say, and end with."""
    log = f"\nits words are in {outcome.log}" if outcome.log is not None else ""
    kinds = {kind.exit_code: kind for kind in (PrivacyRefusal, Interrupted)}
    if kind := kinds.get(outcome.exit_code):
        return kind(outcome.message + log)
    return StageFailed(outcome.message + log, outcome.exit_code)


class Run:
    """A run's folder, whatever has become of it. Raises InputMissing where there is none.

    `feddiff.Run("runs/first")` opens again what an earlier kernel, or the command, began.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = RunFolder(Path(folder))
        self._job = self._folder.job()

    @property
    def folder(self) -> Path:
        """Where it lies, absolute."""
        return self._folder.path

    @property
    def job(self) -> LocalJob:
        """The job, with its datasets, as it was when the run was opened."""
        return self._job

    def status(self) -> RunStatus:
        """Where the run stands, while an engine is at work on it and afterwards."""
        return run_status(self._folder)

    def report(self) -> Report:
        """The job report, which may be shared, and each owner's, which may not. Raises InputMissing before the end."""
        return report_of(self._folder)

    def sample(self, client: str, images_per_class: int) -> "Samples":
        """Further images, drawn with the finished run's denoisers for the owner of `client`; new ones at every call.

        NOT private: a personal denoiser had a part in them. They are for that owner alone; passing them on is what
        `feddiff export` is for. Reads no records and releases nothing, so it costs nothing. `images_per_class` is 1 to
        100,000. Raises UsageInvalid for a client that the run does not have, InputMissing before its own samples are
        drawn, SpecInvalid for a number out of range.
        """
        import numpy as np

        with tempfile.TemporaryDirectory(prefix="feddiff-") as temporary:
            out = Path(temporary) / "samples.npz"
            draw_samples(self._folder, client, images_per_class, out)
            with np.load(out) as arrays:
                return Samples(client, *(arrays[name] for name in ("both", "shared", "personal", "labels")))

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"


@dataclass(frozen=True, eq=False)
class Samples:
    """Images of one owner, the same number N/K of each of K classes, in the order of the labels. NOT private: for that
    owner alone. A notebook shows `both`, a row per class.
    """

    client: str  # the owner's, who alone may see them
    both: "Pixels"  # N×C×H×W uint8: shared denoiser above the split, personal denoiser below
    shared: "Pixels"  # the same from the same noise, by the shared denoiser alone
    personal: "Pixels"  # the same by the personal denoiser alone
    labels: "Labels"  # N int64, 0 to K - 1

    def _repr_html_(self) -> str:
        import numpy as np
        from PIL import Image

        rows = [self.both[self.labels == label][:SHOWN_PER_CLASS] for label in np.unique(self.labels)]
        sheet_CHW = np.concatenate([np.concatenate(list(row), axis=2) for row in rows], axis=1)
        sheet = Image.fromarray(sheet_CHW[0] if len(sheet_CHW) == 1 else np.moveaxis(sheet_CHW, 0, -1))
        file = io.BytesIO()
        sheet.save(file, format="PNG")
        said = f"not private, for the owner of client {self.client} only"
        height = SHOWN_PIXELS * len(rows)
        return (
            f'<figure><img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}" alt="{said}"'
            f' height="{height}" style="image-rendering: pixelated"><figcaption>{said}</figcaption></figure>'
        )
