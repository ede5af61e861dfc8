"""How long a request is tried again."""

import itertools

from feddiff_operator.watch import FIRST_PAUSES, FORBIDDEN_PAUSE_SECONDS, Patience, Watches


def test_only_what_an_owner_forbids_is_tried_for_ever() -> None:
    watches = Watches(lambda: 0.0, lambda *told: None)
    assert tuple(Patience(watches)) == FIRST_PAUSES
    watches.forbidden.add("/api/v1/namespaces/clinic/pods")
    many = list(itertools.islice(Patience(watches), 100))
    assert many[-1] == FORBIDDEN_PAUSE_SECONDS


def test_a_forbidden_watch_is_not_a_dead_one() -> None:
    assert Watches(lambda: 0.0, lambda *told: None).silent_seconds() == {}
