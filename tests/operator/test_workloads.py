"""The objects of one attempt: what they contain, what an overlay may change, and that a real API server takes them."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_objects import SETTING, UID, dataset, job, manifests, stage_spec
from cluster.kubernetes import ControlPlane
from feddiff_operator.workloads import (
    InvalidPodTemplate,
    check_overlay,
    child_name,
    laid_over,
    places,
    stage_objects,
)
from feddiff_protocol.api import FederatedDiffusionJob, SourceSpec
from feddiff_protocol.errors import SpecInvalid
from feddiff_protocol.stages import Stage, TrainSharedSpec
from feddiff_protocol.telemetry import METRICS_PORT, METRICS_PORT_VARIABLE

Object = dict[str, Any]
WHOLE_JOB = (Stage.TRAIN_SHARED, Stage.REPORT)
ATTEMPTS = [(stage, "" if stage in WHOLE_JOB else "a") for stage in Stage]


def batch(stage: Stage, client: str = "", asked: FederatedDiffusionJob | None = None, **of_dataset: Any) -> Object:
    return manifests(asked or job(), stage, client, **of_dataset)[-1]


def pod_spec(stage: Stage, client: str = "", **more: Any) -> Object:
    spec: Object = batch(stage, client, **more)["spec"]["template"]["spec"]
    return spec


def container(stage: Stage, client: str = "", **more: Any) -> Object:
    (only,) = pod_spec(stage, client, **more)["containers"]
    return only


def environment(stage: Stage, **more: Any) -> dict[str, Any]:
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container(stage, **more)["env"]}


# ---- Names and places --------------------------------------------------------------------------------------------


def test_a_name_follows_from_what_it_names_and_nothing_else() -> None:
    names = {
        child_name(uid, stage, client, attempt)
        for uid in (UID, "other") for stage in Stage for client in ("a", "b", "") for attempt in (1, 2)
    }  # fmt: skip
    assert len(names) == 2 * len(Stage) * 3 * 2
    assert child_name(UID, Stage.RELEASE, "a", 1) == child_name(UID, Stage.RELEASE, "a", 1)
    longest = child_name(UID, Stage.TRAIN_PERSONAL, "x" * 63, 10**9)
    assert len(longest) <= 51, "the Job controller adds the index, the pod name six characters"


def test_the_same_attempt_has_the_same_objects() -> None:
    for stage, client in ATTEMPTS:
        assert manifests(job(), stage, client) == manifests(job(), stage, client)


@pytest.mark.parametrize(("stage", "client"), ATTEMPTS)
def test_what_touches_records_is_the_owners_and_everything_says_whose_it_is(stage: Stage, client: str) -> None:
    for each in manifests(job(), stage, client, attempt=3):
        metadata = each["metadata"]
        assert metadata["namespace"] == ("clinic-a" if client else "research")
        assert metadata["name"] == child_name(UID, stage, client, 3)
        labels = metadata["labels"]
        assert {key.removeprefix("feddiff.dev/"): value for key, value in labels.items()} == {
            "job-uid": UID,
            "job": "digits",
            "job-namespace": "research",
            "stage": stage.value,
            "attempt": "3",
            "app.kubernetes.io/managed-by": "feddiff",
            **({"client": client} if client else {}),
        }
    template = each["spec"]["template"]["metadata"]["labels"]
    assert template == labels


def test_the_spec_that_the_pod_reads_is_the_stages_spec() -> None:
    spec = stage_spec(job(), Stage.TRAIN_SHARED)
    config_map = stage_objects(SETTING, job(), UID, None, spec)[0]
    assert config_map["immutable"] is True
    assert TrainSharedSpec.model_validate_json(config_map["data"]["spec.json"]) == spec
    assert container(Stage.TRAIN_SHARED)["command"][-1] == "/etc/feddiff/spec.json"


def test_sources_are_resolved_below_the_volume_and_may_not_leave_it() -> None:
    where = places(job(), {"a": dataset("a"), "b": dataset("b")})
    assert where.sources["a"].path == "/data/train.npz"
    assert where.owner_stores["b"] == "s3://clinic-b/feddiff"
    assert where.federation_store == "s3://federation/jobs"
    for path in ("/etc/passwd", "../other/train.npz", "a/../../b"):
        with pytest.raises(SpecInvalid, match="relative to the volume"):
            places(job(), {"a": dataset("a", source={"format": "npz", "path": path})})


def test_every_path_of_a_source_is_resolved_below_the_volume() -> None:
    """Also one that a later version adds."""
    paths = {name: f"some/{name}" for name in SourceSpec.model_fields if name.endswith("path")}
    where = places(job(), {"a": dataset("a", source={"format": "folder", **paths})})
    assert {name: getattr(where.sources["a"], name) for name in paths} == {
        name: f"/data/{path}" for name, path in paths.items()
    }


def test_a_missing_store_is_named() -> None:
    with pytest.raises(SpecInvalid, match=r"job research/digits: spec\.store"):
        places(job(store=None), {})
    with pytest.raises(SpecInvalid, match=r"dataset clinic-a/scans: spec\.store"):
        places(job(), {"a": dataset("a", store=None)})


# ---- Pods --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "client"), ATTEMPTS)
def test_every_pod_is_restricted_and_knows_no_api_server(stage: Stage, client: str) -> None:
    spec, only = pod_spec(stage, client), container(stage, client)
    assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False
    assert spec["restartPolicy"] == "Never"
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert only["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert only["terminationMessagePolicy"] == "File"
    job_spec = batch(stage, client)["spec"]
    assert job_spec["backoffLimit"] == 0 and "ttlSecondsAfterFinished" not in job_spec


def test_an_owners_pod_has_two_stores_and_reads_its_records() -> None:
    only = container(Stage.RELEASE, "a")
    assert only["envFrom"] == [
        {"prefix": "OWNER_", "secretRef": {"name": "clinic-a-store"}},
        {"prefix": "FEDERATION_", "secretRef": {"name": "federation-clinic-a"}},
    ]
    assert {"name": "records", "mountPath": "/data", "readOnly": True} in only["volumeMounts"]
    claim = {"claimName": "scans", "readOnly": True}
    assert {"name": "records", "persistentVolumeClaim": claim} in pod_spec(Stage.RELEASE, "a")["volumes"]


@pytest.mark.parametrize("stage", WHOLE_JOB)
def test_a_pod_of_the_job_sees_no_owner(stage: Stage) -> None:
    assert container(stage)["envFrom"] == [{"prefix": "FEDERATION_", "secretRef": {"name": "federation-trainer"}}]
    text = json.dumps(manifests(job(), stage))
    for secret in ("clinic-a-store", "federation-clinic-a", "s3://clinic", "persistentVolumeClaim"):
        assert secret not in text


def test_ranks_find_each_other() -> None:
    _, service, child = manifests(job(), Stage.TRAIN_SHARED)
    name = child["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"].items() <= child["spec"]["template"]["metadata"]["labels"].items()
    assert (child["spec"]["completionMode"], child["spec"]["completions"], child["spec"]["parallelism"]) == (
        "Indexed", 2, 2,
    )  # fmt: skip
    assert child["spec"]["template"]["spec"]["subdomain"] == name
    seen = environment(Stage.TRAIN_SHARED)
    assert seen["MASTER_ADDR"] == f"{name}-0.{name}" and seen["WORLD_SIZE"] == "2"
    assert "job-completion-index" in seen["NODE_RANK"]["fieldRef"]["fieldPath"]


@pytest.mark.parametrize("stage", Stage)
def test_every_stage_has_a_first_process_that_hears_sigterm_while_it_imports(stage: Stage) -> None:
    client = "" if stage in (Stage.TRAIN_SHARED, Stage.REPORT) else "a"
    assert container(stage, client)["command"] == [
        "python", "-m", "feddiff_trainer.ranks", "1", stage.module, "/etc/feddiff/spec.json",
    ]  # fmt: skip


def test_several_processes_of_a_pod_are_started_by_one_that_says_what_they_said() -> None:
    asked = job(shared={"replicas": 2, "processesPerReplica": 4})
    command = container(Stage.TRAIN_SHARED, asked=asked)["command"]
    assert command[:4] == ["python", "-m", "feddiff_trainer.ranks", "4"]
    assert command[4:] == ["feddiff_trainer.train_shared", "/etc/feddiff/spec.json"]
    seen = environment(Stage.TRAIN_SHARED, asked=asked)
    assert seen["WORLD_SIZE"] == "8" and "RANK" not in seen and "LOCAL_RANK" not in seen
    assert "job-completion-index" in seen["NODE_RANK"]["fieldRef"]["fieldPath"]


@pytest.mark.parametrize("shared", [{"replicas": 1, "batch": 2}, {"denoiser": "closedForm"}])
def test_what_needs_one_process_has_neither_service_nor_ranks(shared: Object) -> None:
    asked = job(shared=shared, **SUMMARY) if "denoiser" in shared else job(shared=shared)
    _, child = manifests(asked, Stage.TRAIN_SHARED)
    assert child["spec"]["completions"] == 1
    assert set(environment(Stage.TRAIN_SHARED, asked=asked)) == {"HOME", METRICS_PORT_VARIABLE}


SUMMARY: Object = {
    "privacy": {
        "mechanism": "summary", "epsilon": "10", "delta": "1e-5", "clipNorm": "4", "momentClipNorm": "2",
    },
    "diffusion": {"splitSigma": "0.25"},
}  # fmt: skip


def test_gpus_are_for_training_the_shared_denoiser_only() -> None:
    asked = job(shared={"resources": {"limits": {"nvidia.com/gpu": 1}}})
    assert container(Stage.TRAIN_SHARED, asked=asked)["resources"] == {"limits": {"nvidia.com/gpu": 1}}
    assert container(Stage.REPORT, asked=asked)["resources"] == {}
    assert container(Stage.TRAIN_PERSONAL, "a", asked=asked)["resources"] == {}


def test_the_jobs_queue_is_for_the_jobs_namespace_and_an_owner_names_its_own() -> None:
    label = "kueue.x-k8s.io/queue-name"
    asked = job(queueName="gpus", priorityClassName="high")
    assert batch(Stage.TRAIN_SHARED, asked=asked)["metadata"]["labels"][label] == "gpus"
    assert label not in batch(Stage.RELEASE, "a", asked=asked)["metadata"]["labels"]
    own = {"metadata": {"labels": {label: "clinic"}}}
    child = batch(Stage.RELEASE, "a", asked=asked, podTemplate=own)
    assert child["metadata"]["labels"][label] == "clinic"
    assert label not in child["spec"]["template"]["metadata"]["labels"], "the Job queues, not its pods"


OWNER_STAGES = [each for each in Stage if each not in (Stage.TRAIN_SHARED, Stage.REPORT)]


def test_the_jobs_priority_is_for_the_jobs_own_pods_and_an_owner_names_its_own() -> None:
    asked = job(priorityClassName="high")
    for stage in (Stage.TRAIN_SHARED, Stage.REPORT):
        assert pod_spec(stage, asked=asked)["priorityClassName"] == "high"
    for stage in OWNER_STAGES:
        assert "priorityClassName" not in pod_spec(stage, "a", asked=asked)
        own = pod_spec(stage, "a", asked=asked, podTemplate={"spec": {"priorityClassName": "low"}})
        assert own["priorityClassName"] == "low"


@pytest.mark.parametrize("stage", OWNER_STAGES)
def test_no_word_of_the_researchers_that_schedules_pods_is_found_in_an_owners(stage: Stage) -> None:
    """Whatever the job says of its own pods, an owner's are what they would be without it."""
    shared = {"podTemplate": FULL, "resources": {"limits": {"nvidia.com/gpu": 1}}, "replicas": 3, "batch": 6}
    asked = job(priorityClassName="high", queueName="gpus", shared=shared)
    plain, child = batch(stage, "a"), batch(stage, "a", asked=asked)
    assert child["metadata"] == plain["metadata"]
    assert child["spec"] == plain["spec"]


# ---- Overlays ----------------------------------------------------------------------------------------------------

FULL: Object = {
    "metadata": {"labels": {"team": "radiology"}, "annotations": {"note": "x"}},
    "spec": {
        "serviceAccountName": "reader",
        "imagePullSecrets": [{"name": "registry"}],
        "nodeSelector": {"disk": "fast"},
        "affinity": {},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "topologySpreadConstraints": [],
        "priorityClassName": "low",
        "runtimeClassName": "gvisor",
        "schedulerName": "own",
        "schedulingGates": [{"name": "example.com/wait"}],
        "terminationGracePeriodSeconds": 5,
        "securityContext": {"fsGroup": 1000, "runAsUser": 1000, "runAsGroup": 1000, "supplementalGroups": [7]},
        "volumes": [{"name": "cache", "emptyDir": {}}],
        "containers": [
            {
                "name": "stage",
                "env": [{"name": "AWS_REGION", "value": "here"}],
                "envFrom": [{"configMapRef": {"name": "settings"}}],
                "volumeMounts": [{"name": "cache", "mountPath": "/cache"}],
                "resources": {"limits": {"memory": "4Gi"}},
            }
        ],
    },
}


def test_everything_on_the_list_is_laid_over_and_nothing_of_ours_is_lost() -> None:
    template = batch(Stage.RELEASE, "a", podTemplate=FULL)["spec"]["template"]
    plain = batch(Stage.RELEASE, "a")["spec"]["template"]
    spec, over = template["spec"], FULL["spec"]
    for field in over.keys() - {"securityContext", "volumes", "containers"}:
        assert spec[field] == over[field]
    assert spec["securityContext"] == {**plain["spec"]["securityContext"], **over["securityContext"]}
    assert template["metadata"]["labels"] == {**plain["metadata"]["labels"], "team": "radiology"}
    (ours,), (only,) = plain["spec"]["containers"], spec["containers"]
    for field in ("env", "envFrom", "volumeMounts"):
        assert only[field] == ours[field] + over["containers"][0][field]
    assert only["securityContext"] == ours["securityContext"]
    assert spec["volumes"] == plain["spec"]["volumes"] + over["volumes"]


def put(path: str, value: Any) -> Object:
    """An overlay with one field."""
    parts = path.split(".")
    overlay: Any = value
    for part in reversed(parts):
        overlay = [overlay] if part == "0" else {part: overlay}
    return dict(overlay)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("spec.hostNetwork", True, ".spec.hostNetwork"),
        ("spec.hostPID", True, ".spec.hostPID"),
        ("spec.automountServiceAccountToken", True, ".spec.automountServiceAccountToken"),
        ("spec.initContainers", [], ".spec.initContainers"),
        ("spec.ephemeralContainers", [], ".spec.ephemeralContainers"),
        ("spec.restartPolicy", "Always", ".spec.restartPolicy"),
        ("spec.securityContext.runAsNonRoot", False, ".spec.securityContext.runAsNonRoot"),
        ("spec.securityContext.seccompProfile", {"type": "Unconfined"}, ".spec.securityContext.seccompProfile"),
        ("spec.securityContext.runAsUser", 0, ".spec.securityContext.runAsUser"),
        ("spec.containers.0.image", "mine", ".spec.containers[0].image"),
        ("spec.containers.0.command", ["sh"], ".spec.containers[0].command"),
        ("spec.containers.0.args", ["x"], ".spec.containers[0].args"),
        ("spec.containers.0.securityContext", {"privileged": True}, ".spec.containers[0].securityContext"),
        ("spec.containers.0.lifecycle", {}, ".spec.containers[0].lifecycle"),
        ("spec.containers.0.name", "sidecar", ".spec.containers[0].name"),
        ("spec.containers", [{}, {}], ".spec.containers"),
        ("spec.containers", "stage", ".spec.containers"),
        ("spec.containers.0.env", [{"name": "HOME", "value": "/"}], ".spec.containers[0].env[0].name"),
        ("spec.containers.0.volumeMounts", [{"name": "records", "mountPath": "/x"}], "volumeMounts[0].name"),
        ("spec.containers.0.volumeMounts", [{"name": "x", "mountPath": "/etc/feddiff/"}], "/etc/feddiff"),
        ("spec.containers.0.volumeMounts", [{"name": "x", "mountPath": "/data"}], "/data"),
        ("spec.volumes", [{"name": "spec", "emptyDir": {}}], ".spec.volumes[0].name"),
        ("spec.volumes", {"name": "x"}, ".spec.volumes"),
        ("spec", [], ".spec"),
        ("metadata.name", "x", ".metadata.name"),
        ("metadata.namespace", "clinic-b", ".metadata.namespace"),
        ("metadata.labels", {"feddiff.dev/client": "b"}, "metadata.labels['feddiff.dev/client']"),
        ("metadata.labels", {"app.kubernetes.io/managed-by": "me"}, "metadata.labels['app.kubernetes.io/managed-by']"),
        ("metadata.annotations", {"feddiff.dev/receipt": "{}"}, "metadata.annotations['feddiff.dev/receipt']"),
        ("metadata.labels", {"a": 1}, "metadata.labels['a']"),
        ("status", {}, ".status"),
    ],
)
def test_anything_else_is_refused_by_its_path(path: str, value: Any, named: str) -> None:
    with pytest.raises(InvalidPodTemplate) as error:
        batch(Stage.RELEASE, "a", podTemplate=put(path, value))
    assert str(error.value).startswith("dataset clinic-a/scans: spec.podTemplate")
    assert named in str(error.value)


def test_a_volume_of_the_owners_own_stands_in_for_scratch_or_unclaimed_data() -> None:
    mounts = [{"name": "disk", "mountPath": path} for path in ("/tmp", "/data")]
    over = {
        "spec": {
            "volumes": [{"name": "disk", "persistentVolumeClaim": {"claimName": "disk"}}],
            "containers": [{"volumeMounts": mounts}],
        }
    }
    source = {"format": "npz", "path": "train.npz"}
    spec = pod_spec(Stage.TRAIN_PERSONAL, "a", podTemplate=over, source=source)
    assert [volume["name"] for volume in spec["volumes"]] == ["spec", "disk"]
    assert [mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]] == ["/etc/feddiff", "/tmp", "/data"]


def test_the_job_overlay_is_for_the_jobs_pods_only() -> None:
    asked = job(shared={"podTemplate": {"spec": {"nodeSelector": {"gpu": "yes"}}}})
    assert pod_spec(Stage.TRAIN_SHARED, asked=asked)["nodeSelector"] == {"gpu": "yes"}
    assert pod_spec(Stage.REPORT, asked=asked)["nodeSelector"] == {"gpu": "yes"}
    assert "nodeSelector" not in pod_spec(Stage.RELEASE, "a", asked=asked)
    with pytest.raises(InvalidPodTemplate, match=r"job research/digits: spec\.shared\.podTemplate"):
        batch(Stage.REPORT, asked=job(shared={"podTemplate": {"spec": {"hostIPC": True}}}))


KEYS = st.one_of(
    st.text(max_size=6),
    st.sampled_from(["metadata", "spec", "containers", "volumes", "name", "env", "labels", "securityContext",
                     "volumeMounts", "mountPath", "hostNetwork", "image", "resources"]),
)  # fmt: skip
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=8,
)


def trespasses(template: Object, plain: Object) -> list[str]:
    """What a template has that no overlay may have given it."""
    spec, only = template["spec"], template["spec"]["containers"][0]
    ours, own = plain["spec"], plain["spec"]["containers"][0]
    wrong = [field for field in ("restartPolicy", "automountServiceAccountToken") if spec[field] != ours[field]]
    wrong += [field for field in only if field not in own or (only[field] != own[field] and field in PROTECTED)]
    wrong += [field for field in spec if field.startswith("host") or field == "initContainers"]
    wrong += ["containers"] if len(spec["containers"]) != 1 else []
    wrong += [key for key, value in plain["metadata"]["labels"].items() if template["metadata"]["labels"][key] != value]
    context = spec["securityContext"]
    return wrong + [
        field for field in ("runAsNonRoot", "seccompProfile") if context[field] != ours["securityContext"][field]
    ]


PROTECTED = ("name", "image", "command", "securityContext", "terminationMessagePath", "terminationMessagePolicy")


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(KEYS, JSON, max_size=3))
def test_no_overlay_whatsoever_reaches_what_is_protected(overlay: Object) -> None:
    plain = batch(Stage.RELEASE, "a")["spec"]["template"]
    before = copy.deepcopy(plain)
    try:
        template = laid_over(plain, overlay, "overlay")
    except InvalidPodTemplate as error:
        assert str(error).startswith("overlay")
        with pytest.raises(InvalidPodTemplate):
            check_overlay(overlay, "overlay")
    else:
        assert trespasses(template, plain) == []
    assert plain == before


def test_an_overlay_without_a_list_would_be_caught() -> None:
    plain = batch(Stage.RELEASE, "a")["spec"]["template"]
    assert trespasses({**plain, "spec": {**plain["spec"], "hostNetwork": True}}, plain) == ["hostNetwork"]


def projected(*sources: Object) -> Object:
    volume = {"name": "identity", "projected": {"sources": list(sources)}}
    return {"spec": {"volumes": [{"name": "cache", "emptyDir": {}}, volume]}}


TOKEN: Object = {"serviceAccountToken": {"path": "token"}}
CERTIFICATE: Object = {"podCertificate": {"signerName": "example.com/any", "keyType": "ED25519"}}


@pytest.mark.parametrize("identity", [TOKEN, CERTIFICATE])
def test_a_jobs_overlay_lends_its_pods_no_service_accounts_identity(identity: Object) -> None:
    overlay = projected({"secret": {"name": "certificates"}}, identity)
    (kind,) = identity
    words = rf"spec\.shared\.podTemplate\.spec\.volumes\[1\]\.projected: {kind} would lend"
    with pytest.raises(InvalidPodTemplate, match=words):
        check_overlay(overlay, "spec.shared.podTemplate")
    for stage in (Stage.TRAIN_SHARED, Stage.REPORT):
        with pytest.raises(InvalidPodTemplate, match=words):
            batch(stage, asked=job(shared={"podTemplate": overlay}))


def test_other_projected_volumes_and_an_owners_own_token_are_as_they_were() -> None:
    harmless = projected({"secret": {"name": "certificates"}}, {"configMap": {"name": "settings"}})
    assert len(pod_spec(Stage.REPORT, asked=job(shared={"podTemplate": harmless}))["volumes"]) == 4
    for odd in (
        None,
        5,
        "serviceAccountToken",
        ["serviceAccountToken"],
        {"sources": 5},
    ):  # for the API server to refuse
        check_overlay({"spec": {"volumes": [{"name": "odd", "projected": odd}]}}, "overlay")
    volumes = pod_spec(Stage.RELEASE, "a", podTemplate=projected(TOKEN))["volumes"]
    assert volumes[-1]["projected"]["sources"] == [TOKEN]


# ---- A real API server -------------------------------------------------------------------------------------------

PATHS = {
    "ConfigMap": "/api/v1/namespaces/{}/configmaps",
    "Service": "/api/v1/namespaces/{}/services",
    "Job": "/apis/batch/v1/namespaces/{}/jobs",
    "Pod": "/api/v1/namespaces/{}/pods",
}
SHAPES: list[Object] = [
    {},
    {"shared": {"replicas": 2, "processesPerReplica": 2}, "priorityClassName": "system-node-critical"},
    {"shared": {"replicas": 1, "batch": 2, "resources": {"limits": {"cpu": "1"}}}, "queueName": "gpus"},
]


def restricted(control_plane: ControlPlane) -> str:
    name = control_plane.namespace("restricted")
    control_plane.kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
    return name


def dry_run(control_plane: ControlPlane, namespace: str, obj: Object) -> tuple[int, Any]:
    moved = {**obj, "metadata": {**obj["metadata"], "namespace": namespace}}
    path = PATHS[obj["kind"]].format(namespace) + "?dryRun=All&fieldValidation=Strict"
    return control_plane.request("POST", path, moved)


def pod_of(child: Object) -> Object:
    template = child["spec"]["template"]
    return {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {**template["metadata"], "name": "p"}}


def test_a_restricted_namespace_takes_every_object_and_every_pod(control_plane: ControlPlane) -> None:
    namespace = restricted(control_plane)
    over = copy.deepcopy(FULL)
    for field in ("priorityClassName", "runtimeClassName", "serviceAccountName"):  # the API server looks them up
        del over["spec"][field]
    for shape in SHAPES:
        for stage, client in ATTEMPTS:
            for of_dataset in ({}, {"podTemplate": over}) if client else ({},):
                objects = manifests(job(**shape), stage, client, **of_dataset)
                for obj in [*objects, pod_of(objects[-1])]:
                    if obj["kind"] == "Pod" and "priorityClassName" in obj["spec"]:
                        del obj["spec"]["priorityClassName"]
                    status, answer = dry_run(control_plane, namespace, obj)
                    assert status == 201, (stage, obj["kind"], answer)


def test_a_pod_that_trespasses_would_be_refused_there(control_plane: ControlPlane) -> None:
    bad = pod_of(batch(Stage.RELEASE, "a"))
    bad["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    status, answer = dry_run(control_plane, restricted(control_plane), bad)
    assert status == 403 and "allowPrivilegeEscalation" in answer["message"]


# ---- the port --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", Stage)
def test_every_stage_is_told_the_port_that_its_pod_declares_and_nothing_probes_it(stage: Stage) -> None:
    client = "" if stage in (Stage.TRAIN_SHARED, Stage.REPORT) else "a"
    (port,) = container(stage, client)["ports"]
    assert port == {"name": "metrics", "containerPort": METRICS_PORT, "protocol": "TCP"}
    assert environment(stage, client=client)[METRICS_PORT_VARIABLE] == str(METRICS_PORT)
    assert not [field for field in container(stage, client) if field.endswith("Probe")]
