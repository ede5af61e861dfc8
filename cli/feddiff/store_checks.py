"""`feddiff store check`: which stores to ask about and as whom, the trainer's answers in words, least policies."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feddiff_protocol.access import Role, aws_policy, least_access, seaweedfs_actions
from feddiff_protocol.errors import PrivacyRefusal, SpecInvalid, UsageInvalid

from .documents import load_documents
from .owner_stages import run_module

MODULE = "feddiff_trainer.store_check"
MARKS = {"fine": "✓", "warning": "!", "failed": "✗"}


@dataclass(frozen=True)
class StoreToCheck:
    """One store as one party sees it; `neighbours` are other clients, `closed` stores that must not open to it."""

    uri: str
    whose: str | None = None
    role: Role | None = None
    client: str | None = None
    neighbours: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        seen = f", as {self.role} sees it" if self.role else ""
        return f"{self.uri}{seen}{f', client {self.client}' if self.client else ''}"


@dataclass(frozen=True)
class NamedStores:
    """The stores that documents name, and the clients of their job."""

    federation: str | None
    owners: Mapping[str, str]  # by client; by dataset where no job says whose client it is
    clients: tuple[str, ...]


def named_stores(files: Sequence[Path]) -> NamedStores:
    """The stores in `files`. Raises UsageInvalid if there are none, SpecInvalid for two jobs."""
    documents = load_documents(files)
    if len(documents.jobs) > 1:
        raise SpecInvalid(f"{', '.join(map(str, files))}: expected one job, found {len(documents.jobs)}; name one")
    owned = {each.key: store.uri for each in documents.datasets if (store := each.document.spec.store) is not None}
    if not documents.jobs:
        named = NamedStores(None, owned, ())
    else:
        spec = documents.jobs[0].spec
        of = {client.name: f"{client.dataset.namespace}/{client.dataset.name}" for client in spec.clients}
        owners = {client: owned[key] for client, key in of.items() if key in owned}
        named = NamedStores(spec.store.uri if spec.store else None, owners, tuple(of))
    if named.federation is None and not named.owners:
        listed = ", ".join(map(str, files))
        raise UsageInvalid(f"{listed}: expected spec.store of a job or dataset, found none; a local run needs none")
    return named


def stores_to_check(named: NamedStores, role: Role | None, clients: Sequence[str]) -> list[StoreToCheck]:
    """Each store once as its administrator sees it, or the one that the keys of one party open."""
    if role is None:
        _refuse_clients(clients)
        every = [("federation", named.federation), *(("owner", uri) for uri in named.owners.values())]
        return list(dict.fromkeys(StoreToCheck(uri, whose) for whose, uri in every if uri is not None))
    found = parties_of(named, role, clients)
    if len(found) > 1:
        raise UsageInvalid(f"--role {role}: expected the one client whose keys are used; add --client NAME")
    return found


def parties_of(named: NamedStores, role: Role | None, clients: Sequence[str]) -> list[StoreToCheck]:
    """All who hold keys, with the store that each uses; of one role or some clients, if those are named."""
    if unknown := [each for each in clients if each not in named.clients]:
        known = ", ".join(named.clients) or "a job's, which is not there"
        raise UsageInvalid(f"--client: expected one of {known}, found {unknown[0]}")
    found = []
    if role in (None, Role.TRAINER) and named.federation and not clients:
        found.append(_trainer(named.federation, named.clients, tuple(named.owners.values())))
    for client in clients or named.clients:
        private = tuple(uri for name, uri in named.owners.items() if name != client)
        others = [name for name in named.clients if name != client]
        if role in (None, Role.OWNER) and client in named.owners:
            found.append(StoreToCheck(named.owners[client], "owner", Role.OWNER, client, (), private))
        if role in (None, Role.FEDERATION) and named.federation:
            found.append(_client(named.federation, client, others, private))
    if not found:
        raise UsageInvalid(f"expected a store of {role or 'a job'} in the documents, found none; name another file")
    return found


def store_at(uri: str, role: Role | None, clients: Sequence[str]) -> StoreToCheck:
    """The store at an address that was named by itself; the first of `clients` is whose keys are used."""
    if role is None:
        _refuse_clients(clients)
        return StoreToCheck(uri)
    if role is Role.FEDERATION:
        if not clients:
            raise UsageInvalid("--role federation: expected the client whose keys are used; add --client NAME")
        return _client(uri, clients[0], clients[1:], ())
    if role is Role.TRAINER:
        return _trainer(uri, clients, ())
    return StoreToCheck(uri, "owner", role, next(iter(clients), None))


def parties_at(uri: str, role: Role | None, clients: Sequence[str]) -> list[StoreToCheck]:
    """All who hold keys to the store at an address."""
    if role is None:
        raise UsageInvalid("--print-policy: expected whose; add --role, or name the job's files with --file")
    if role is Role.FEDERATION and clients:
        return [store_at(uri, role, [client]) for client in clients]
    return [store_at(uri, role, clients)]


def _refuse_clients(clients: Sequence[str]) -> None:
    if clients:
        raise UsageInvalid("--client: says whose keys are used, which goes with a role; add --role")


def _client(uri: str, client: str, others: Sequence[str], closed: tuple[str, ...]) -> StoreToCheck:
    longer = f"{client[:62]}0"  # a name that begins with another's is what careless prefixes mix up
    return StoreToCheck(uri, "federation", Role.FEDERATION, client, (*others, longer), closed)


def _trainer(uri: str, clients: Sequence[str], closed: tuple[str, ...]) -> StoreToCheck:
    return StoreToCheck(uri, "federation", Role.TRAINER, None, tuple(clients) or ("client",), closed)


def findings_of(store: StoreToCheck, endpoint: str | None) -> list[dict[str, Any]]:
    """What the store answered; see the trainer's store_check."""
    spec = {
        "uri": store.uri,
        "whose": store.whose,
        "role": store.role,
        "client": store.client,
        "neighbours": store.neighbours,
        "closed": store.closed,
        "endpoint": endpoint,
    }
    with tempfile.TemporaryDirectory(prefix="feddiff-") as folder:
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps(spec))
        answer: dict[str, Any] = json.loads(run_module(MODULE, path))
    return list(answer["findings"])


def finding_line(finding: dict[str, Any]) -> str:
    """`✗ name: expected …, found …; what to do`, or `✓ name: what was found`."""
    head = f"{MARKS[finding['state']]} {finding['check']}: "
    if not finding["expected"]:
        return f"{head}{finding['found']}"
    return f"{head}expected {finding['expected']}, found {finding['found']}; {finding['advice']}"


def exit_code_of(findings: Sequence[dict[str, Any]]) -> int:
    """0 if nothing failed; a refusal for the promise's sake comes before everything else, then what failed first."""
    codes = [each["exitCode"] for each in findings if each["exitCode"]]
    return PrivacyRefusal.exit_code if PrivacyRefusal.exit_code in codes else next(iter(codes), 0)


def policies_of(parties: Sequence[StoreToCheck]) -> list[dict[str, Any]]:
    """The least policy of each party, as AWS IAM and as SeaweedFS's list of actions."""
    return [_policy(each, each.role) for each in parties if each.role is not None]


def _policy(store: StoreToCheck, role: Role) -> dict[str, Any]:
    access = least_access(role, store.client or "")
    return {
        "store": store.uri,
        "role": role.value,
        "client": store.client,
        "awsIam": aws_policy(access, store.uri),
        "seaweedfsActions": seaweedfs_actions(access, store.uri),
    }


def policy_lines(policy: dict[str, Any]) -> list[str]:
    """Both forms, each below a line that says whose it is."""
    whose = f"{policy['role']}{' ' + policy['client'] if policy['client'] else ''}"
    return [
        f"# {whose} at {policy['store']}: AWS IAM",
        json.dumps(policy["awsIam"], indent=2),
        f"# {whose} at {policy['store']}: SeaweedFS, actions of the identity",
        json.dumps(policy["seaweedfsActions"], indent=2),
    ]
