"""The filter against an adversary: releases composed as numbers on a grid, by whoever picks each next one after seeing
all earlier ones.

A release is the worst pair of its kind: N(0, 1) and N(μ, 1), or a coin that is right with probability e^ε/(1 + e^ε).
What an adversary knows is the privacy loss so far, l = ln(P/Q); δ(ε) = E[(1 - e^(ε - l))₊] under P of all that it saw.

Shapes: N losses on a grid.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache

import numpy as np
import pytest
from scipy import signal, special

from feddiff_protocol import accountant
from feddiff_protocol.accountant import Admission, Charge
from feddiff_protocol.api import BudgetSpec

STEP, FARTHEST = 0.02, 2000  # losses of -40 to 40; coins are right in multiples of the step
LOSSES_N = STEP * np.arange(-FARTHEST, FARTHEST + 1)
GRID = 1.01  # what the grid itself adds to δ at most, here
DELTA = Decimal("1e-5")


# ---- Worst pairs on a grid -----------------------------------------------------------------------------------------


def losses_of(charge: Charge) -> np.ndarray:
    """p_N, the probability under P of every loss on the grid, from one release at this charge."""
    if charge.pure_epsilon:
        return coin(float(charge.pure_epsilon))
    return gaussian(math.sqrt(charge.mu_squared))


@cache
def gaussian(mu: float) -> np.ndarray:
    """Between two neighbours of the grid, P and Q of the losses there are split so that both keep their mass: a pair
    that tells more than the Gaussian, by O(STEP²) (Doroshenko, Ghazi, Kamath, Kumar & Manurangsi 2022, "Connect the
    dots")."""
    p = np.diff(special.ndtr(LOSSES_N / mu - mu / 2))
    q = np.diff(special.ndtr(LOSSES_N / mu + mu / 2))
    upper = (p - q * np.exp(LOSSES_N[:-1])).clip(0) / -np.expm1(-STEP)  # of P, at the upper end
    p_N = np.zeros_like(LOSSES_N)
    p_N[1:] += upper
    p_N[:-1] += (p - upper).clip(0)
    return p_N


def coin(epsilon: float) -> np.ndarray:
    index = round(epsilon / STEP)
    assert math.isclose(index * STEP, epsilon)
    p_N = np.zeros_like(LOSSES_N)
    p_N[FARTHEST + index], p_N[FARTHEST - index] = special.expit(epsilon), special.expit(-epsilon)
    return p_N


def excess_over(epsilon: float) -> np.ndarray:
    """(1 - e^(ε - l))₊ of every loss: what it adds to δ."""
    return -np.expm1(np.minimum(epsilon - LOSSES_N, 0))


def expected(value_N: np.ndarray, p_N: np.ndarray) -> np.ndarray:
    """E[value(l + X)] of every l, X from p_N; beyond the grid all is lost above, and nothing is below."""
    padded = np.concatenate([np.zeros(FARTHEST), value_N, np.ones(FARTHEST)])
    return np.asarray(signal.fftconvolve(padded, p_N[::-1], mode="valid"))


def delta_of_all(charges: Sequence[Charge], epsilon: float) -> float:
    """δ at ε of releases that were fixed beforehand."""
    value_N = excess_over(epsilon)
    for charge in charges:
        value_N = expected(value_N, losses_of(charge))
    return float(value_N[FARTHEST])


def charge_of(epsilon: str, *, pure: bool = False) -> Charge:
    return Charge(pure_epsilon=Decimal(epsilon)) if pure else Charge(accountant.charge_mu_squared(epsilon, DELTA))


MENU = [
    *[charge_of(epsilon) for epsilon in ("1", "2", "4", "8")],
    *[charge_of(epsilon, pure=True) for epsilon in ("0.1", "0.5", "1", "3")],
]


def lists_of_charges(count: int, menu: Sequence[Charge]) -> Iterator[list[Charge]]:
    generator = np.random.default_rng(1)
    for _ in range(count):
        yield [menu[index] for index in generator.integers(len(menu), size=generator.integers(1, 9))]


def test_the_grid_composes_gaussians_as_one_gaussian() -> None:
    for charges in lists_of_charges(40, MENU[:4]):
        mu = math.sqrt(sum(charge.mu_squared for charge in charges))
        for epsilon in (1.0, mu * mu / 2 + 3 * mu):
            exact = special.ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon) * special.ndtr(-mu / 2 - epsilon / mu)
            assert exact * (1 - 1e-6) <= delta_of_all(charges, epsilon) <= exact * GRID


def test_what_was_spent_is_never_below_the_releases_composed_on_the_grid() -> None:
    for charges in lists_of_charges(150, MENU):
        assert delta_of_all(charges, accountant.spent_epsilon(charges, DELTA)) <= float(DELTA) * GRID


def test_what_gaussian_releases_spent_is_exact() -> None:
    for charges in lists_of_charges(40, MENU[:4]):
        assert delta_of_all(charges, 0.99 * accountant.spent_epsilon(charges, DELTA)) > float(DELTA) * GRID


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(
            lambda charges: max(accountant.spent_epsilon([each], DELTA) for each in charges), id="largest alone"
        ),
        pytest.param(
            lambda charges: (
                accountant.spent_epsilon([Charge(each.mu_squared) for each in charges], DELTA)
                + float(max(each.pure_epsilon for each in charges))
            ),
            id="pure ones count once",
        ),
        pytest.param(lambda charges: 0.98 * accountant.spent_epsilon(charges, DELTA), id="2 % less"),
    ],
)
def test_a_sum_that_is_too_small_is_caught_on_the_grid(mutant: Callable[[list[Charge]], float]) -> None:
    composed = [delta_of_all(charges, mutant(charges)) for charges in lists_of_charges(150, MENU)]
    assert max(composed) > float(DELTA) * GRID


# ---- The adversary ---------------------------------------------------------------------------------------------------

Filter = Callable[[Decimal, Decimal, Sequence[Charge], Charge], Admission]
MOST_RELEASES = 7  # a filter that admits for ever is not followed for ever


@dataclass
class Adversary:
    """Whoever sees everything and picks each next release, of up to seven, by the loss so far: all strategies at once.

    By dynamic programming: what it can still reach from here is, at each loss, the best of stopping and of whatever the
    filter admits next. That is the largest δ of any strategy, whose number is kept as a logarithm.
    """

    budget: BudgetSpec
    admits: Filter
    limit: Decimal
    log10_strategies: float = 0.0
    reached: dict[tuple[Charge, ...], np.ndarray] = field(default_factory=dict)

    @property
    def delta(self) -> float:
        return float(self.best(())[FARTHEST])

    def best(self, charges: tuple[Charge, ...]) -> np.ndarray:
        """δ_N at the budget's ε of the best strategy from here on, by the loss so far."""
        charges = tuple(sorted(charges, key=lambda each: (each.mu_squared, each.pure_epsilon)))
        if charges not in self.reached:
            choices = [excess_over(float(self.budget.epsilon))]
            for new in self.asks(charges):
                if (
                    len(charges) < MOST_RELEASES
                    and self.admits(self.limit, self.budget.pure_epsilon, charges, new).admitted
                ):
                    choices.append(expected(self.best((*charges, new)), losses_of(new)))
            self.log10_strategies += len(LOSSES_N) * math.log10(len(choices))
            self.reached[charges] = np.max(choices, axis=0)
        return self.reached[charges]

    def asks(self, charges: Sequence[Charge]) -> list[Charge]:
        """Small and large ones of both kinds, all that is left of the limit, and a little more than that."""
        left = self.limit - sum(each.mu_squared for each in charges)
        asked = [charge_of(epsilon) for epsilon in ("2", "4", "6")]
        asked += [charge_of(epsilon, pure=True) for epsilon in ("0.5", "1", "2")]
        return asked + ([Charge(left), Charge(left * Decimal("1.05"))] if left > 0 else [])


def adversary(pure: str, admits: Filter, limit_of: Callable[..., Decimal] = accountant.budget_mu_squared) -> Adversary:
    budget = BudgetSpec(epsilon=Decimal(8), delta=DELTA, pure_epsilon=Decimal(pure))
    return Adversary(budget, admits, limit_of(budget.epsilon, budget.delta, budget.pure_epsilon))


@pytest.mark.parametrize("pure", ["0", "1", "2", "8"])
def test_no_strategy_of_asking_by_what_was_seen_gets_past_delta(pure: str) -> None:
    found = adversary(pure, accountant.admits)
    assert found.delta <= float(DELTA) * GRID
    assert found.log10_strategies > 4
    assert pure != "0" or found.delta > 0.99 * float(DELTA), "all of δ can be had: the filter wastes nothing"


def counts_the_last_only(limit: Decimal, pure: Decimal, charges: Sequence[Charge], new: Charge) -> Admission:
    return accountant.admits(limit, pure, charges[-1:], new)


def forgets_pure_charges(limit: Decimal, pure: Decimal, charges: Sequence[Charge], new: Charge) -> Admission:
    return accountant.admits(limit, pure, [Charge(each.mu_squared) for each in charges], new)


def takes_coins_for_gaussians(limit: Decimal, pure: Decimal, charges: Sequence[Charge], new: Charge) -> Admission:
    """Pure ε is ε²/2-zCDP, as is a Gaussian of μ = ε; but a coin tells more than that Gaussian."""
    converted = [Charge(each.mu_squared + each.pure_epsilon**2) for each in (*charges, new)]
    return accountant.admits(limit, Decimal(0), converted[:-1], converted[-1])


def lets_five_percent_pass(limit: Decimal, pure: Decimal, charges: Sequence[Charge], new: Charge) -> Admission:
    return accountant.admits(limit * Decimal("1.05"), pure, charges, new)


@pytest.mark.parametrize(
    "mutant", [counts_the_last_only, forgets_pure_charges, takes_coins_for_gaussians, lets_five_percent_pass]
)
def test_a_wrong_filter_is_found_out_by_the_same_adversary(mutant: Filter) -> None:
    assert max(adversary(pure, mutant).delta for pure in ("0", "2", "8")) > float(DELTA) * GRID


def test_a_limit_that_forgets_what_is_set_aside_is_found_out() -> None:
    whole = adversary("2", accountant.admits, lambda epsilon, delta, pure: accountant.budget_mu_squared(epsilon, delta))
    assert whole.delta > float(DELTA) * GRID
