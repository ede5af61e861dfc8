"""The documents with which a data owner lets the operator into a namespace: what `feddiff owner init` prints."""

import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from feddiff_protocol.api import NAME_PATTERN
from feddiff_protocol.errors import UsageInvalid
from feddiff_protocol.telemetry import METRICS_PORT

DEFAULT_PORTS = {"https": 443, "http": 80}

HEAD = """\
# What owner {namespace} applies, once the lines marked CHANGE are true:
#   feddiff owner init … > owner.yaml; edit it; kubectl apply -f owner.yaml
# It takes the rights of an administrator of the namespace, and the role feddiff-data-owner there.
"""

NAMESPACE = """\
---
# Nothing privileged runs here, whoever asks: the stages need no more than this.
apiVersion: v1
kind: Namespace
metadata:
  name: {namespace}
  labels:
    pod-security.kubernetes.io/enforce: restricted
    pod-security.kubernetes.io/enforce-version: latest
"""

OPERATOR = """\
---
# Lets the operator act here: make Jobs and ConfigMaps, read the dataset, write its ledger. Not read Secrets, not change
# the dataset, not delete an entry. Take it away, and nothing new starts. An installation with scope `namespaces` has
# made its own: leave this one out there.
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {{name: feddiff-owner-namespace, namespace: {namespace}}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: feddiff-owner-namespace}}
subjects:
  - {{kind: ServiceAccount, name: feddiff-operator, namespace: {operator_namespace}}}
"""

READERS = """\
---
# Lets researchers see what remains of the budget; no entries, no logs, no records. CHANGE the group, or leave it out.
# apiVersion: rbac.authorization.k8s.io/v1
# kind: RoleBinding
# metadata: {{name: feddiff-budget-reader, namespace: {namespace}}}
# roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: feddiff-budget-reader}}
# subjects:
#   - {{apiGroup: rbac.authorization.k8s.io, kind: Group, name: researchers}}
"""

NETWORK = """\
---
# The stages that see records reach DNS and the stores, nothing else. Only who is named below reaches them: on one port
# they tell their stage, step and percent, and nothing that depends on records. It holds only where the cluster's
# network enforces NetworkPolicies: ask.
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: feddiff-owner-stages, namespace: {namespace}}}
spec:
  podSelector:
    matchExpressions:
      - {{key: feddiff.dev/stage, operator: In, values: [release, train-personal, sample, evaluate]}}
  policyTypes: [Ingress, Egress]
  ingress:
    - from:  # leave the rule out, if you like: progress is then not shown, and everything else works
        - namespaceSelector: {{matchLabels: {{kubernetes.io/metadata.name: {operator_namespace}}}}}
          podSelector: {{matchLabels: {{app.kubernetes.io/name: feddiff, app.kubernetes.io/component: operator}}}}
{metrics_from}
      ports:
        - {{protocol: TCP, port: {metrics_port}}}
  egress:
    - to:
        - namespaceSelector: {{matchLabels: {{kubernetes.io/metadata.name: kube-system}}}}
          podSelector: {{matchLabels: {{k8s-app: kube-dns}}}}
      ports:
        - {{protocol: UDP, port: 53}}
        - {{protocol: TCP, port: 53}}
    - to:  # CHANGE to the stores' addresses: as it stands, every address is open on these ports
        - ipBlock: {{cidr: 0.0.0.0/0}}
        - ipBlock: {{cidr: "::/0"}}
      ports:  # of a store behind a Service, the port of its pods
{store_ports}
"""

SECRETS = """\
---
# The keys of both stores. Commented out, so that applying this file never overwrites real ones; make them from files
# that stay out of version control:
#   kubectl create secret generic own-store -n {namespace} --from-env-file=own-store.env
#   kubectl create secret generic federation-store -n {namespace} --from-env-file=federation-store.env
# The owner's own store: seals, the personal denoiser, samples. Nobody else's keys open it.
# apiVersion: v1
# kind: Secret
# metadata: {{name: own-store, namespace: {namespace}}}
# stringData:
#   AWS_ACCESS_KEY_ID: CHANGE
#   AWS_SECRET_ACCESS_KEY: CHANGE
#   AWS_ENDPOINT_URL: https://CHANGE
# ---
# The federation's store: this owner's keys write below its own prefix and read the rest.
# apiVersion: v1
# kind: Secret
# metadata: {{name: federation-store, namespace: {namespace}}}
# stringData:
#   AWS_ACCESS_KEY_ID: CHANGE
#   AWS_SECRET_ACCESS_KEY: CHANGE
#   AWS_ENDPOINT_URL: https://CHANGE
"""

DATASET = """\
---
# What {namespace} offers, and what it may cost.
apiVersion: feddiff.dev/v1alpha1
kind: PrivateDataset
metadata: {{name: {dataset}, namespace: {namespace}}}
spec:
  # CHANGE: the PersistentVolumeClaim with the records, and their path on it. npz: arrays `images` (N×H×W or N×H×W×C)
  # and `labels`. Also: idx, folder. holdoutPath is kept out of training; without it quality is not measured.
  source: {{format: npz, path: train.npz, holdoutPath: holdout.npz, volumeClaim: {dataset}}}
  # CHANGE: public facts. records is published, part of every average, and checked against the records.
  image: {{channels: 1, height: 28, width: 28}}
  classes: {{count: 2, records: [1000, 1000], names: [healthy, ill]}}
  # CHANGE: what may be spent on all releases together, ever, per image. epsilon may be raised at any time, never
  # lowered, so it begins low here; delta and unit can never change, nor pureEpsilon, a part of it set aside for
  # mechanism privunit, 0 unless it stands here.
  budget: {{epsilon: "1", delta: "1e-5", unit: image}}
  # Whose jobs may use it, each for at most this epsilon. Nobody may by default.
{access}
  # Images that may see the records, by digest; without it, whatever image the installation runs.
  # images: ["registry.example/feddiff-trainer@sha256:…"]
  # CHANGE: the owner's own store, and how this owner reaches the federation's.
  store: {{uri: "s3://{namespace}/feddiff", secretName: own-store}}
  federation: {{uri: "s3://federation/jobs", secretName: federation-store}}
  # Nodes, tolerations, resources, service account of this owner's pods.
  podTemplate: {{}}
"""


def owner_documents(
    namespace: str,
    operator_namespace: str,
    researchers: Sequence[str] = (),
    dataset: str = "images",
    namespace_exists: bool = False,
    endpoints: Sequence[str] = (),
    metrics_from: Sequence[str] = (),
) -> str:
    """YAML for `kubectl apply -f -`: Namespace, RoleBinding, NetworkPolicy and PrivateDataset, with comments to follow,
    and commented skeletons of Secrets and of a RoleBinding for researchers.

    `researchers` are the namespaces whose jobs may use the dataset; with `namespace_exists` the Namespace is left out.
    `endpoints` are the stores' servers, whose ports are opened, AWS's unless given; pods of the namespaces
    `metrics_from` may read the stages' metrics. Raises UsageInvalid for a name that Kubernetes would refuse, or an
    endpoint that is none.
    """
    for option, name in (
        ("--namespace", namespace),
        ("--operator-namespace", operator_namespace),
        ("--dataset", dataset),
        *(("--research", each) for each in researchers),
        *(("--metrics-from", each) for each in metrics_from),
    ):
        if not re.fullmatch(NAME_PATTERN, name):
            raise UsageInvalid(f"{option}: expected lower-case letters, digits and dashes, found {name!r}")
    parts = [HEAD, *([] if namespace_exists else [NAMESPACE]), OPERATOR, READERS, NETWORK, SECRETS, DATASET]
    return "".join(parts).format(
        namespace=namespace,
        operator_namespace=operator_namespace,
        dataset=dataset,
        access=_access(researchers),
        metrics_port=METRICS_PORT,
        metrics_from=_metrics_from(metrics_from),
        store_ports="\n".join(f"        - {{protocol: TCP, port: {port}}}" for port in _store_ports(endpoints)),
    )


def _metrics_from(namespaces: Sequence[str]) -> str:
    if not namespaces:
        return "        # - namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: monitoring}}"
    labels = (f"{{matchLabels: {{kubernetes.io/metadata.name: {each}}}}}" for each in dict.fromkeys(namespaces))
    return "\n".join(f"        - namespaceSelector: {each}" for each in labels)


def _store_ports(endpoints: Sequence[str]) -> list[int]:
    """The ports of the stores' servers, each once; that of AWS where none is named."""
    return sorted({_port(each) for each in endpoints}) or [DEFAULT_PORTS["https"]]


def _port(endpoint: str) -> int:
    try:
        parts = urlsplit(endpoint)
        default = DEFAULT_PORTS.get(parts.scheme)
        port = default if parts.port is None else parts.port
    except ValueError:
        default = port = None
    if not default or not port or not parts.hostname:
        raise UsageInvalid(f"--endpoint: expected http(s)://host or http(s)://host:port, found {endpoint!r}")
    return port


def _access(researchers: Sequence[str]) -> str:
    if not researchers:
        return '  access: []  # [{namespace: research, maxEpsilon: "1"}]'
    rules = (f'    - {{namespace: {each}, maxEpsilon: "1"}}' for each in dict.fromkeys(researchers))
    return "\n".join(["  access:", *rules])
