"""What a running stage may tell of itself, over one port: Prometheus' metrics, and how far it is.

A stage that touches records tells its name, its step and its share of the work, in whole percents: a loss, a speed or
an age would be an unaccounted release of what the records are like. The shared training sees released data alone and
may tell more. `told_by` is the whole list; whoever shows a metric asks it first.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .api import Wire
from .stages import Stage

METRICS_PORT = 9464
METRICS_PORT_NAME = "metrics"
METRICS_PORT_VARIABLE = "FEDDIFF_METRICS_PORT"  # a stage opens a port only where this names one
PROGRESS_PATH = "/progress"
PROGRESS_BYTES = 1024


@dataclass(frozen=True)
class Metric:
    """One of a stage's metrics, as Prometheus shows it."""

    name: str
    kind: Literal["counter", "gauge"]
    text: str
    labels: tuple[str, ...] = ()


STAGE_INFO = Metric(
    "feddiff_stage_info",
    "gauge",
    "1; whose stage runs in the pod is in the labels",
    ("stage", "job_namespace", "job_name", "client", "attempt"),
)
STAGE_PROGRESS = Metric(
    "feddiff_stage_progress_ratio", "gauge", "Share of the stage's work that is done, in whole percents", ("stage",)
)
STAGE_STEP = Metric(
    "feddiff_stage_step",
    "gauge",
    "Images (evaluate: arms) that the stage is through with; where records are touched rounded down to a whole percent",
    ("stage",),
)

STEPS = Metric(
    "feddiff_trainer_steps_total", "counter", "Steps of the shared training, those of earlier attempts included"
)
IMAGES = Metric(
    "feddiff_trainer_images_total", "counter", "Images that the shared training has seen, earlier attempts included"
)
LOSS = Metric("feddiff_trainer_loss", "gauge", "Mean loss of the shared training since its last report")
PROGRESS = Metric("feddiff_trainer_progress_ratio", "gauge", "Share of the shared training that is done")
CHECKPOINT = Metric(
    "feddiff_trainer_checkpoint_timestamp_seconds", "gauge", "When this attempt last saved a checkpoint"
)
DATA_WAIT = Metric(
    "feddiff_trainer_data_wait_seconds_total", "counter", "Time that this pod's first process has waited for data"
)
GPU_MEMORY = Metric(
    "feddiff_trainer_gpu_memory_bytes", "gauge", "GPU memory that this pod's first process holds; absent without a GPU"
)

OF_EVERY_STAGE = (STAGE_INFO, STAGE_PROGRESS, STAGE_STEP)
OF_SHARED_TRAINING = (STEPS, IMAGES, LOSS, PROGRESS, CHECKPOINT, DATA_WAIT, GPU_MEMORY)


def told_by(stage: Stage) -> tuple[Metric, ...]:
    """Every metric that a pod of `stage` may show."""
    return (*OF_EVERY_STAGE, *OF_SHARED_TRAINING) if stage is Stage.TRAIN_SHARED else OF_EVERY_STAGE


Count = Annotated[int, Field(strict=True, ge=0, le=2**53)]


class StageProgress(Wire):
    """How far a stage is, in images (evaluate: arms): the answer to GET /progress, read from pods that may lie."""

    stage: Stage
    done: Count
    total: Annotated[Count, Field(ge=1)]

    @model_validator(mode="after")
    def _done_is_part_of_total(self) -> "StageProgress":
        if self.done > self.total:
            raise ValueError(f"done: expected at most total, {self.total}, found {self.done}")
        return self

    @property
    def percent(self) -> int:
        return 100 * self.done // self.total


def shown_progress(stage: Stage, done: int, total: int) -> StageProgress:
    """What may be told of `done` of `total`: where records are touched, how long one image takes is nobody's business,
    so the count is rounded down to the smallest of its whole percent."""
    exact = StageProgress(stage=stage, done=done, total=total)
    if stage is Stage.TRAIN_SHARED:
        return exact
    return StageProgress(stage=stage, done=-(-exact.percent * total // 100), total=total)
