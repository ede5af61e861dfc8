"""Writes charts/feddiff/dashboards/*.json, the Grafana dashboards: `python charts/dashboards.py`.

A panel is one call below, so that all have a unit, a description, the same legends and the same colours. The
operator's replicas all tell the same states, so states are taken by max; what happens is told by one alone, so counters
are summed. What a stage's pod tells belongs to the job that its feddiff_stage_info names, in the namespace that the pod
runs in: a pod can say what it likes, but not from elsewhere.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "feddiff/dashboards"
Object = dict[str, Any]

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24  # Grafana's columns
GREEN, YELLOW, ORANGE, RED, BLUE, GREY = "green", "yellow", "orange", "red", "blue", "text"
PHASE_COLOURS = {
    **{phase: BLUE for phase in ("Reserving", "Releasing", "Training", "Sampling", "Evaluating")},
    "Pending": YELLOW,
    "Suspended": GREY,
    "Complete": GREEN,
    "Failed": RED,
}

# ---- panels ----------------------------------------------------------------------------------------------------

Query = tuple[str, str]  # expression and legend


def panel(kind: str, title: str, description: str, unit: str, *queries: Query, **more: Any) -> Object:
    """One panel; `more` overrides what Grafana shows by default: steps, decimals, minimum, maximum, options, custom."""
    defaults: Object = {"unit": unit, "thresholds": {"mode": "absolute", "steps": _steps(more.get("steps", {}))}}
    for key, name in (("minimum", "min"), ("maximum", "max"), ("decimals", "decimals"), ("mappings", "mappings")):
        if key in more:
            defaults[name] = more[key]
    defaults["color"] = {"mode": "thresholds" if kind != "timeseries" else "palette-classic"}
    defaults["noValue"] = more.get("nothing", "–")
    defaults["custom"] = more.get("custom", {})
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "targets": list(_targets(queries, instant=kind in ("stat", "table", "bargauge"), table=kind == "table")),
        "fieldConfig": {"defaults": defaults, "overrides": more.get("overrides", [])},
        "options": more.get("options", {}),
        **({"transformations": more["transformations"]} if "transformations" in more else {}),
    }


def _steps(steps: dict[float, str]) -> list[Object]:
    first = {"color": steps.get(float("-inf"), GREEN), "value": None}
    return [first, *({"color": colour, "value": at} for at, colour in steps.items() if at != float("-inf"))]


def _targets(queries: tuple[Query, ...], instant: bool, table: bool) -> Iterator[Object]:
    for letter, (expression, legend) in zip("ABCDEFGH", queries, strict=False):
        yield {
            "refId": letter,
            "datasource": DATASOURCE,
            "expr": expression,
            "legendFormat": legend,
            "instant": instant,
            "range": not instant,
            **({"format": "table"} if table else {}),
        }


def number(title: str, description: str, unit: str, *queries: Query, **more: Any) -> Object:
    """The present value, large."""
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": more.pop("fields", ""), "values": False},
        "colorMode": "value",
        "graphMode": "none",
        "textMode": more.pop("text", "auto"),
    }
    return panel("stat", title, description, unit, *queries, options=options, **more)


def course(title: str, description: str, unit: str, *queries: Query, **more: Any) -> Object:
    """How it went over time. `stacked` adds up, `stairs` holds each value until the next."""
    stacked, stairs = more.pop("stacked", False), more.pop("stairs", False)
    custom = {
        "lineWidth": 1,
        "fillOpacity": 40 if stacked else 10,
        "showPoints": "never",
        "lineInterpolation": "stepAfter" if stairs else "linear",
        "stacking": {"mode": "normal" if stacked else "none"},
        "thresholdsStyle": {"mode": "dashed" if "steps" in more else "off"},
    }
    options = {
        "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return panel("timeseries", title, description, unit, *queries, minimum=0, custom=custom, options=options, **more)


def bars(title: str, description: str, unit: str, *queries: Query, **more: Any) -> Object:
    """One bar for each series."""
    options = {
        "displayMode": "basic",
        "orientation": "horizontal",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    }
    return panel("bargauge", title, description, unit, *queries, options=options, **more)


def states(title: str, description: str, unit: str, *queries: Query, **more: Any) -> Object:
    """Coloured stretches of time, one line for each series."""
    options = {"showValue": "never", "mergeValues": True, "legend": {"displayMode": "list", "placement": "bottom"}}
    return panel("state-timeline", title, description, unit, *queries, options=options, **more)


def table(title: str, description: str, unit: str, columns: dict[str, str], *queries: Query, **more: Any) -> Object:
    """One row for each set of labels; `columns` says which are shown, in order, and how they are called."""
    places = {name: place for place, name in enumerate(columns)}
    transformations = [
        {"id": "merge", "options": {}},
        {"id": "filterFieldsByName", "options": {"include": {"names": list(columns)}}},
        {"id": "organize", "options": {"indexByName": places, "renameByName": columns}},
    ]
    return panel("table", title, description, unit, *queries, transformations=transformations, **more)


def column(name: str, **properties: Any) -> Object:
    """How one column of a table is shown: its unit, its links, its colours."""
    return {
        "matcher": {"id": "byName", "options": name},
        "properties": [{"id": key.replace("__", "."), "value": value} for key, value in properties.items()],
    }


def coloured(colours: dict[str, str]) -> list[Object]:
    return [{"type": "value", "options": {text: {"color": colour} for text, colour in colours.items()}}]


def yes_or_no(yes: str, no: str, good: bool) -> list[Object]:
    """1 and 0 in words; `good` says whether 1 is."""
    colours = (GREEN, RED) if good else (RED, GREEN)
    words = {"1": {"text": yes, "color": colours[0]}, "0": {"text": no, "color": colours[1]}}
    return [{"type": "value", "options": words}]


def link(title: str, dashboard: str, **variables: str) -> list[Object]:
    """A link to another dashboard about what the row shows; its time goes along."""
    chosen = "&".join(f"var-{name}=${{__data.fields.{field}}}" for name, field in variables.items())
    return [{"title": title, "url": f"/d/{dashboard}?{chosen}&${{__url_time_range}}"}]


# ---- dashboards ------------------------------------------------------------------------------------------------


def dashboard(
    uid: str, title: str, description: str, variables: list[Object], *rows: tuple[int, list[Object]]
) -> Object:
    """A dashboard of rows, each with a height and panels that share its width."""
    return {
        "uid": uid,
        "title": f"feddiff / {title}",
        "description": description,
        "tags": ["feddiff"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "links": [
            {
                "type": "dashboards",
                "title": "feddiff",
                "tags": ["feddiff"],
                "asDropdown": False,
                "includeVars": True,
                "keepTime": True,
            }
        ],
        "annotations": {"list": [_alerts_fired()]},
        "templating": {"list": [_datasource(), *variables]},
        "panels": list(_placed(rows)),
    }


def _placed(rows: tuple[tuple[int, list[Object]], ...]) -> Iterator[Object]:
    number, top = 0, 0
    for height, panels in rows:
        width = WIDTH // len(panels)
        for place, each in enumerate(panels):
            number += 1
            yield {"id": number, "gridPos": {"x": place * width, "y": top, "w": width, "h": height}, **each}
        top += height


def _alerts_fired() -> Object:
    return {
        "name": "Alerts",
        "enable": True,
        "iconColor": RED,
        "datasource": DATASOURCE,
        "expr": FIRING,
        "titleFormat": "{{alertname}}",
        "textFormat": "{{namespace}} {{name}}",
    }


def _datasource() -> Object:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def choice(name: str, label: str, metric: str, of: str, all_of_them: bool = True) -> Object:
    """A variable whose values are those of one label."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": f"label_values({metric}, {of})", "refId": name},
        "refresh": 2,  # whenever the time range changes
        "sort": 1,
        **(
            {"includeAll": True, "multi": True, "allValue": ".+", "current": {"value": "$__all"}} if all_of_them else {}
        ),
    }


FIRING = 'ALERTS{alertname=~"Feddiff.+", alertstate="firing"}'

# ---- fleet: the platform engineer's first look -----------------------------------------------------------------

IN_FLIGHT = "Reserving|Releasing|Training|Sampling|Evaluating"


def _jobs(phases: str) -> str:
    chosen = f'feddiff_jobs{{namespace=~"$namespace", phase=~"{phases}"}}'
    return f"sum(max by (namespace, phase) ({chosen})) or vector(0)"


FLEET = dashboard(
    "feddiff-fleet",
    "Fleet",
    "Every job: what runs, what waits, what has failed, and how long stages take. Start here.",
    [choice("namespace", "Namespace", "feddiff_jobs", "namespace")],
    (
        4,
        [
            number(
                "Alerts firing",
                "Alerts of feddiff that fire now, of all namespaces. The table below names them; each has a runbook"
                " page.",
                "none",
                (f"count({FIRING}) or vector(0)", "alerts"),
                steps={1: RED},
            ),
            number(
                "In flight",
                "Jobs that reserve budget, release, train, sample or evaluate now.",
                "none",
                (_jobs(IN_FLIGHT), "jobs"),
                steps={float("-inf"): BLUE},
            ),
            number(
                "Pending",
                "Jobs that were created and have not begun: they wait for a dataset, a ledger or the operator. A"
                " number that stays is worth a look: FeddiffJobStuck.",
                "none",
                (_jobs("Pending"), "jobs"),
                steps={1: YELLOW},
            ),
            number(
                "Suspended",
                "Jobs that somebody or a queue has stopped for a while.",
                "none",
                (_jobs("Suspended"), "jobs"),
                steps={float("-inf"): GREY},
            ),
            number(
                "Failed",
                "Jobs that ended with a reason other than Complete and were not deleted yet. What they were charged"
                " stays.",
                "none",
                (_jobs("Failed"), "jobs"),
                steps={1: RED},
            ),
            number("Complete", "Jobs that ended well and were not deleted yet.", "none", (_jobs("Complete"), "jobs")),
        ],
    ),
    (
        8,
        [
            course(
                "Jobs by phase",
                "How many jobs were in each phase. A band of Pending or Reserving that grows means that jobs come"
                " faster than they begin.",
                "none",
                (
                    'sum by (phase) (max by (namespace, phase) (feddiff_jobs{namespace=~"$namespace"}))',
                    "{{phase}}",
                ),
                stacked=True,
                decimals=0,
            ),
            table(
                "Jobs",
                "Every job with its phase and, while it is in flight, how far its shared training is. The name leads"
                " to the job's own dashboard.",
                "none",
                {
                    "namespace": "namespace",
                    "name": "name",
                    "phase": "phase",
                    "mechanism": "mechanism",
                    "Value #B": "trained",
                },
                (
                    'max by (namespace, name, phase, mechanism) (feddiff_job_info{namespace=~"$namespace"})',
                    "{{name}}",
                ),
                (
                    'max by (namespace, name) (feddiff_progress_ratio{namespace=~"$namespace", stage="train-shared"})',
                    "{{name}}",
                ),
                overrides=[
                    column("name", links=link("The job", "feddiff-job", namespace="namespace", job="name")),
                    column("phase", mappings=coloured(PHASE_COLOURS), custom__cellOptions={"type": "color-text"}),
                    column("trained", unit="percentunit", min=0, max=1, custom__cellOptions={"type": "gauge"}),
                ],
            ),
        ],
    ),
    (
        8,
        [
            course(
                "Stages, how long they ran (median)",
                "Median duration of the attempts of each stage that ended within the last hour, from its pods' start"
                " to its end. Longer than a day counts as a day.",
                "s",
                (
                    "histogram_quantile(0.5, sum by (stage, le) (rate(feddiff_stage_duration_seconds_bucket[1h])))",
                    "{{stage}}",
                ),
            ),
            course(
                "Stages, how long they waited (90 %)",
                "Nine of ten attempts that ended within the last hour had waited less than this from their creation"
                " to their pods' start: for the queue, a node, a GPU, an image.",
                "s",
                (
                    "histogram_quantile(0.9, sum by (stage, le) (rate(feddiff_queue_wait_seconds_bucket[1h])))",
                    "{{stage}}",
                ),
            ),
            course(
                "Stages, how they ended",
                "Attempts per hour by stage and result. stopped: interrupted or lost with its node, continued for"
                " free; failed: held against backoffLimit.",
                "none",
                (
                    "sum by (stage, result) (increase(feddiff_stage_duration_seconds_count[1h]))",
                    "{{stage}} {{result}}",
                ),
            ),
        ],
    ),
    (
        7,
        [
            course(
                "Images per second, all jobs",
                "Images that the shared trainings of all jobs see per second: what the GPUs are worth at the moment.",
                "suffix: images/s",
                (
                    "sum by (namespace) (max by (namespace, job_name) (rate(feddiff_trainer_images_total"
                    "[$__rate_interval]) * on (instance) group_left (job_name)"
                    ' feddiff_stage_info{namespace=~"$namespace", stage="train-shared"}))',
                    "{{namespace}}",
                ),
                stacked=True,
            ),
            table(
                "Firing now",
                "Alerts of feddiff that fire; empty is good. What to do is in docs/runbooks under the alert's name.",
                "none",
                {
                    "alertname": "alert",
                    "severity": "severity",
                    "namespace": "namespace",
                    "name": "job",
                    "dataset": "dataset",
                },
                (FIRING, "{{alertname}}"),
                nothing="none",
                overrides=[
                    column(
                        "severity",
                        mappings=coloured({"critical": RED, "warning": ORANGE, "info": BLUE}),
                        custom__cellOptions={"type": "color-text"},
                    )
                ],
            ),
        ],
    ),
)

# ---- one job: the researcher's ---------------------------------------------------------------------------------

OF_JOB = '{namespace="$namespace", name="$job"}'
RANKS = 'feddiff_stage_info{namespace="$namespace", job_namespace="$namespace", job_name="$job", stage="train-shared"}'
OF_PODS = f"on (instance) group_left () {RANKS}"


def _of_job(stage: str) -> str:
    return f'{{namespace="$namespace", name="$job", stage="{stage}"}}'


JOB = dashboard(
    "feddiff-job",
    "One job",
    "How far one job is, how fast it trains, and whether it could be interrupted now.",
    [
        choice("namespace", "Namespace", "feddiff_job_info", "namespace", all_of_them=False),
        choice("job", "Job", 'feddiff_job_info{namespace="$namespace"}', "name", all_of_them=False),
    ],
    (
        4,
        [
            number(
                "Phase",
                "What the job is at. Why it waits or failed: kubectl feddiff why JOB.",
                "none",
                (f"max by (phase) (feddiff_job_info{OF_JOB})", "{{phase}}"),
                text="name",
                steps={float("-inf"): BLUE},
                overrides=[
                    column(phase, color={"mode": "fixed", "fixedColor": colour})
                    for phase, colour in PHASE_COLOURS.items()
                ],
            ),
            number(
                "Shared training",
                "Share of spec.shared.images that the shared denoiser has seen, in whole percents.",
                "percentunit",
                (f"max(feddiff_progress_ratio{_of_job('train-shared')})", "done"),
                steps={float("-inf"): BLUE, 1: GREEN},
                nothing="not begun, or over",
            ),
            number(
                "Time left",
                "Until the shared training ends at the pace of the last ten minutes.",
                "s",
                (
                    f"max((1 - feddiff_trainer_progress_ratio) * {OF_PODS})"
                    f" / (max(deriv(feddiff_trainer_progress_ratio[10m]) * {OF_PODS}) > 0)",
                    "left",
                ),
                steps={float("-inf"): BLUE},
                nothing="not training",
            ),
            number(
                "Checkpoint",
                "Age of the newest checkpoint: what would be trained again if a pod went now. One is due every minute.",
                "s",
                (f"time() - max(feddiff_trainer_checkpoint_timestamp_seconds * {OF_PODS})", "age"),
                steps={180: YELLOW, 900: RED},
                decimals=0,
                nothing="not training",
            ),
            number(
                "Ranks' pods",
                "Pods of the shared training that Prometheus reaches.",
                "none",
                (f"count({RANKS})", "pods"),
                steps={float("-inf"): BLUE},
                nothing="not training",
            ),
            number(
                "Clients",
                "Owners whose releases are in, are waited for, or were dropped. A dropped one stays charged.",
                "none",
                (f"max by (state) (feddiff_clients{OF_JOB})", "{{state}}"),
                steps={float("-inf"): BLUE},
                nothing="over",
            ),
        ],
    ),
    (
        8,
        [
            course(
                "Progress by stage",
                "Share of each stage that is done, of all its clients together, in whole percents. Owners' stages"
                " tell nothing more than this.",
                "percentunit",
                (f"max by (stage) (feddiff_progress_ratio{OF_JOB})", "{{stage}}"),
                maximum=1,
            ),
            course(
                "Loss",
                "Mean loss of the shared training on released, already noised images. It costs no privacy to look at.",
                "none",
                (f"max(feddiff_trainer_loss * {OF_PODS})", "loss"),
            ),
        ],
    ),
    (
        8,
        [
            course(
                "Images per second",
                "Images that all ranks together see per second.",
                "suffix: images/s",
                (f"max(rate(feddiff_trainer_images_total[$__rate_interval]) * {OF_PODS})", "images"),
            ),
            course(
                "Steps per second",
                "Steps of the optimizer per second; all ranks make the same ones.",
                "suffix: steps/s",
                (f"max(rate(feddiff_trainer_steps_total[$__rate_interval]) * {OF_PODS})", "steps"),
            ),
            course(
                "Waiting for data",
                "Share of its time that each pod's first process waits for data. More than a few percent: the volume"
                " or the processor, not the GPU, sets the pace.",
                "percentunit",
                (
                    f"sum by (instance) (rate(feddiff_trainer_data_wait_seconds_total[$__rate_interval]) * {OF_PODS})",
                    "{{instance}}",
                ),
                steps={0.05: YELLOW},
            ),
            course(
                "GPU memory",
                "What each pod's first process holds of its GPU; nothing where training runs on processors.",
                "bytes",
                (f"sum by (instance) (feddiff_trainer_gpu_memory_bytes * {OF_PODS})", "{{instance}}"),
                nothing="no GPU",
            ),
        ],
    ),
    (
        6,
        [
            states(
                "Phases",
                "When the job was in which phase.",
                "none",
                (f"max by (phase) (feddiff_job_info{OF_JOB})", "{{phase}}"),
                steps={float("-inf"): BLUE},
            ),
            states(
                "Attempts",
                "Which attempt of which stage and client had a pod that Prometheus reached. More than one attempt of"
                " the shared training: a rank was lost, and all went on from the newest checkpoint.",
                "none",
                (
                    'max by (stage, client, attempt) (feddiff_stage_info{job_namespace="$namespace", job_name="$job"})',
                    "{{stage}} {{client}} #{{attempt}}",
                ),
                steps={float("-inf"): BLUE},
            ),
        ],
    ),
)

# ---- privacy budgets: the data owner's -------------------------------------------------------------------------

OF_OWNER = '{namespace=~"$owner", dataset=~"$dataset"}'
BY_DATASET = "max by (namespace, dataset, unit, delta)"
SPENT_AND_RESERVED = f"(feddiff_privacy_epsilon_spent{OF_OWNER} + feddiff_privacy_epsilon_reserved{OF_OWNER})"
EPSILON = "prefix:ε "

BUDGETS = dashboard(
    "feddiff-budgets",
    "Privacy budgets",
    "What every dataset has promised, spent and left. Spent budget never comes back, whatever became of the job.",
    [
        choice("owner", "Owner's namespace", "feddiff_privacy_epsilon_limit", "namespace"),
        choice("dataset", "Dataset", 'feddiff_privacy_epsilon_limit{namespace=~"$owner"}', "dataset"),
    ],
    (
        8,
        [
            table(
                "Budgets",
                "ε of every dataset, for the unit and the δ in its row. Spent: charged to releases. Reserved: held"
                " for jobs that have not released yet. Left: the largest ε that one more release can have, which is"
                " more than the difference, since privacy loss adds up slower than ε does.",
                EPSILON,
                {
                    "namespace": "owner",
                    "dataset": "dataset",
                    "unit": "protects one",
                    "delta": "δ",
                    "Value #A": "limit",
                    "Value #B": "spent",
                    "Value #C": "reserved",
                    "Value #D": "left",
                    "Value #E": "used",
                },
                (f"{BY_DATASET} (feddiff_privacy_epsilon_limit{OF_OWNER})", "limit"),
                (f"{BY_DATASET} (feddiff_privacy_epsilon_spent{OF_OWNER})", "spent"),
                (f"{BY_DATASET} (feddiff_privacy_epsilon_reserved{OF_OWNER})", "reserved"),
                (f"{BY_DATASET} (feddiff_privacy_epsilon_remaining{OF_OWNER})", "left"),
                (
                    f"{BY_DATASET} ({SPENT_AND_RESERVED}) / {BY_DATASET} (feddiff_privacy_epsilon_limit{OF_OWNER})",
                    "used",
                ),
                decimals=2,
                overrides=[
                    column(
                        "used",
                        unit="percentunit",
                        min=0,
                        max=1,
                        decimals=0,
                        thresholds={"mode": "absolute", "steps": _steps({0.8: ORANGE, 1: RED})},
                        custom__cellOptions={"type": "gauge"},
                    )
                ],
            ),
        ],
    ),
    (
        8,
        [
            bars(
                "Used",
                "Spent and reserved together, as a share of the limit. From 80 % on FeddiffBudgetNearLimit fires.",
                "percentunit",
                (
                    f"{BY_DATASET} ({SPENT_AND_RESERVED}) / {BY_DATASET} (feddiff_privacy_epsilon_limit{OF_OWNER})",
                    "{{namespace}}/{{dataset}}",
                ),
                minimum=0,
                maximum=1,
                steps={0.8: ORANGE, 1: RED},
            ),
            course(
                "Spent, and when",
                "Every stair is a release that was charged. It never goes down.",
                EPSILON,
                (f"{BY_DATASET} (feddiff_privacy_epsilon_spent{OF_OWNER})", "{{namespace}}/{{dataset}} spent"),
                (f"{BY_DATASET} (feddiff_privacy_epsilon_limit{OF_OWNER})", "{{namespace}}/{{dataset}} limit"),
                stairs=True,
                decimals=2,
            ),
            course(
                "Reserved",
                "ε held for jobs that have not begun their release. A reservation becomes a charge or comes back; one"
                " that stays belongs to a job that waits.",
                EPSILON,
                (f"{BY_DATASET} (feddiff_privacy_epsilon_reserved{OF_OWNER})", "{{namespace}}/{{dataset}}"),
                stairs=True,
                decimals=2,
            ),
        ],
    ),
    (
        7,
        [
            course(
                "Releases charged",
                "Releases per hour that were charged to any owner's budget, on the whole installation.",
                "none",
                ("sum(increase(feddiff_privacy_releases_total[1h]))", "releases"),
            ),
            course(
                "Refusals",
                "Jobs per hour that were refused before any of their pods existed, by reason, on the whole"
                " installation. Nothing was released for them.",
                "none",
                ("sum by (reason) (increase(feddiff_privacy_refusals_total[1h]))", "{{reason}}"),
            ),
            states(
                "Ledgers",
                "Whether each ledger agrees with itself. While it does not, nothing new is admitted:"
                " FeddiffLedgerMismatch.",
                "none",
                (f"max by (namespace, dataset) (feddiff_ledger_mismatch{OF_OWNER})", "{{namespace}}/{{dataset}}"),
                mappings=yes_or_no("contradicts itself", "consistent", good=False),
            ),
        ],
    ),
)

# ---- operator: the platform engineer's, when the fleet stands still --------------------------------------------

API = "feddiff_api_requests_total"
FAILING = '{code=~"429|5..|none"}'

OPERATOR = dashboard(
    "feddiff-operator",
    "Operator",
    "Whether the operator leads, sees, works and is answered, in this order: the first red one is the cause.",
    [],
    (
        4,
        [
            number(
                "Leads",
                "Replicas that lead: exactly one. None: no job goes on. Two for a moment while one steps down.",
                "none",
                ("count(max by (instance) (feddiff_leader) == 1) or vector(0)", "leaders"),
                steps={float("-inf"): RED, 1: GREEN, 2: ORANGE},
            ),
            number(
                "Replicas",
                "Replicas that Prometheus reaches, and what they run.",
                "none",
                ("count by (version) (max by (instance, version) (feddiff_build_info))", "{{version}}"),
                steps={float("-inf"): RED, 1: GREEN},
            ),
            number(
                "Longest silence",
                "Of the quietest watch. A bookmark comes every minute, so two minutes are too long, and at"
                " operator.livenessSeconds the pod is started again.",
                "s",
                ("max(feddiff_watch_silent_seconds)", "silent"),
                steps={120: YELLOW, 150: RED},
                decimals=0,
            ),
            number(
                "Last success",
                "Since a job or a dataset was last looked at with success. Everything is due once in"
                " operator.resyncSeconds.",
                "s",
                (
                    "time() - max by (kind) (feddiff_last_successful_reconcile_timestamp_seconds)",
                    "{{kind}}",
                ),
                steps={900: YELLOW, 1800: RED},
                decimals=0,
            ),
            number(
                "Longest wait",
                "How long the first object in the queue has been due and found no worker.",
                "s",
                ("max(feddiff_reconcile_queue_oldest_seconds)", "waits"),
                steps={30: YELLOW, 120: RED},
                decimals=1,
            ),
            number(
                "Requests that fail",
                "Share of the requests to the API server within five minutes that were throttled, failed or got no"
                " answer.",
                "percentunit",
                (f"(sum(rate({API}{FAILING}[5m])) or vector(0)) / sum(rate({API}[5m]))", "fail"),
                steps={0.01: YELLOW, 0.05: RED},
                decimals=1,
            ),
        ],
    ),
    (
        8,
        [
            states(
                "Leadership",
                "Which replica led when. A change costs a few seconds; many changes mean that renewals fail.",
                "none",
                ("max by (instance) (feddiff_leader)", "{{instance}}"),
                mappings=[
                    {
                        "type": "value",
                        "options": {"1": {"text": "leads", "color": GREEN}, "0": {"text": "stands by", "color": GREY}},
                    }
                ],
            ),
            course(
                "Silence of watches",
                "Seconds since each kind of watch brought anything, a bookmark included: a saw below one minute is"
                " well.",
                "s",
                ("max by (resource) (feddiff_watch_silent_seconds)", "{{resource}}"),
                steps={150: RED},
            ),
            course(
                "Watches opened again",
                "Per hour and kind, and what they bring: each opens again every few minutes; a burst means that the"
                " API server went away.",
                "none",
                ("sum by (resource) (increase(feddiff_watch_restarts_total[1h]))", "{{resource}}"),
            ),
            course(
                "Events",
                "What the watches bring per second, by kind.",
                "suffix: events/s",
                ("sum by (kind) (rate(feddiff_watch_events_total[$__rate_interval]))", "{{kind}}"),
            ),
        ],
    ),
    (
        8,
        [
            course(
                "Looks at jobs and datasets",
                "Per second, by how they ended. conflict: somebody was faster, and it is looked at again; error: a"
                " bug.",
                "suffix: looks/s",
                (
                    "sum by (result) (rate(feddiff_reconcile_duration_seconds_count[$__rate_interval]))",
                    "{{result}}",
                ),
                stacked=True,
            ),
            course(
                "Duration of a look",
                "Median and 99 %, by kind; the wait for the API server and for our own rate limit are part of it.",
                "s",
                *(
                    (
                        f"histogram_quantile({share}, sum by (kind, le)"
                        " (rate(feddiff_reconcile_duration_seconds_bucket[$__rate_interval])))",
                        f"{{{{kind}}}} {percent}",
                    )
                    for share, percent in ((0.5, "50 %"), (0.99, "99 %"))
                ),
            ),
            course(
                "Queue",
                "Objects that are due and wait for a worker.",
                "none",
                ("max(feddiff_reconcile_queue_depth)", "waiting"),
                decimals=0,
            ),
        ],
    ),
    (
        8,
        [
            course(
                "Requests to the API server",
                "Per second, by verb and resource.",
                "reqps",
                (f"sum by (verb, resource) (rate({API}[$__rate_interval]))", "{{verb}} {{resource}}"),
                stacked=True,
            ),
            course(
                "Answers",
                "Per second, by code. 409: somebody was faster; 429: the API server throttles; none: no answer came.",
                "reqps",
                (f"sum by (code) (rate({API}[$__rate_interval]))", "{{code}}"),
            ),
            course(
                "Duration of a request (99 %)",
                "Until its answer began, by verb; our own rate limit is part of it. Of a watch: until it was open.",
                "s",
                (
                    "histogram_quantile(0.99, sum by (verb, le)"
                    " (rate(feddiff_api_request_duration_seconds_bucket[$__rate_interval])))",
                    "{{verb}}",
                ),
            ),
        ],
    ),
)

DASHBOARDS = {"fleet": FLEET, "job": JOB, "budgets": BUDGETS, "operator": OPERATOR}


def text(each: Object) -> str:
    return json.dumps(each, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, each in DASHBOARDS.items():
        (FOLDER / f"{name}.json").write_text(text(each))
