"""What keeps a client from taking part, and that it is said before anything is charged."""

from typing import Any

import pytest

from batch_objects import SETTING, dataset, job
from feddiff_operator.clients import client_observed, misfit
from feddiff_protocol.ledger import Account, Charge, Entry, Refusal, reserve
from feddiff_protocol.plan import Hold, Reason


def client(hold: Hold = Hold.NONE, refusal: str = "", **of_dataset: Any) -> tuple[str, Reason]:
    seen = client_observed(job(), "a", dataset("a", **of_dataset), hold, refusal, SETTING)
    return seen.refusal, seen.reason


@pytest.mark.parametrize(
    ("of_dataset", "reason", "words"),
    [
        ({"access": []}, Reason.ACCESS_DENIED, "lets no job of namespace research"),
        ({"access": [{"namespace": "research", "maxEpsilon": "1"}]}, Reason.ACCESS_DENIED, "ask for ε ≤ 1"),
        (
            {"images": ["registry/trainer@sha256:1"]},
            Reason.IMAGE_NOT_ALLOWED,
            "the installation runs registry/trainer:1",
        ),
        ({"store": None}, Reason.INVALID_SPEC, "dataset clinic-a/scans: spec.store"),
        ({"source": {"format": "npz", "path": "../b.npz"}}, Reason.INVALID_SPEC, "relative to the volume"),
        ({"podTemplate": {"spec": {"hostNetwork": True}}}, Reason.INVALID_POD_TEMPLATE, "hostNetwork"),
    ],
)
def test_what_can_be_refused_is_refused_before_the_budget_is_charged(
    of_dataset: dict[str, Any], reason: Reason, words: str
) -> None:
    refusal, found = client(**of_dataset)
    assert (found, words in refusal) == (reason, True), refusal


def test_a_client_in_order_is_not_refused_and_a_missing_dataset_is_named() -> None:
    assert client()[0] == ""
    missing = client_observed(job(), "a", None, Hold.NONE, "", SETTING)
    assert (missing.reason, "clinic-a/scans" in missing.refusal) == (Reason.DATASET_MISSING, True)


def test_a_ledger_that_contradicts_itself_is_told_from_a_budget_that_is_spent() -> None:
    own = dataset("a")
    entry = Entry("prl-x", "u", "n", "j", "uid", "a", "gaussian", "image", job().spec.privacy.epsilon,
                  job().spec.privacy.delta, Charge(), "")  # fmt: skip
    refused = reserve(own.spec.budget, Account(num_entries=1), [], entry)
    assert isinstance(refused, Refusal)
    assert client(refusal=refused.message)[1] is Reason.LEDGER_MISMATCH
    assert client(refusal="spent so far")[1] is Reason.PRIVACY_BUDGET_EXCEEDED


def test_datasets_that_do_not_fit_together_are_named() -> None:
    other = dataset("b", image={"channels": 3, "height": 8, "width": 8})
    assert misfit(job(), {"a": dataset("a"), "b": dataset("b")}) == ""
    assert "must agree on image" in misfit(job(), {"a": dataset("a"), "b": other})
