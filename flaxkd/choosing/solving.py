"""The cheapest set of units for a budget: a 0-1 program with linear rules, solved exactly (HiGHS, by scipy)."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from flaxkd.choosing.units import ATTENTION, Unit
from flaxkd.models.unet import UNetConfig
from flaxkd.students.pairs import stages


class Rule(NamedTuple):
    """low <= sum of the weights of the removed units <= high. weights: float64[units]."""

    weights: np.ndarray
    low: float
    high: float

    def holds(self, removed: np.ndarray) -> bool:
        """removed: bool[units]."""
        return bool(self.low <= self.weights @ removed <= self.high)


def rules(units: list[Unit], teacher_config: dict) -> Iterator[Rule]:
    """What every student of a teacher obeys, as diffusers' configuration can express it."""
    unet = UNetConfig.from_dict(teacher_config)
    which = lambda holds: np.array([float(holds(unit)) for unit in units])
    inside = lambda module: which(lambda unit: unit.inside(module))
    gone = lambda module: which(lambda unit: unit.removes(module))
    for block, stage in stages(unet).items():
        if not block.startswith("up"):  # one layer stays in a down block; the mid block goes in one way
            layers = [gone(f"{block}.resnets.{i}") for i in range(2)]
            yield Rule(np.maximum(*layers), 0, 1)
        for i, depth in enumerate(stage.depths):  # one transformer block stays in an attention that stays
            most, attention = (depth or 1) - 1, f"{block}.attentions.{i}"
            if most:
                yield Rule(inside(attention) + most * gone(attention), 0, most)
    yield from _mid_depth(unet, inside, gone)


def _mid_depth(unet: UNetConfig, inside, gone) -> Iterator[Rule]:
    """diffusers has one number for the depth of the mid block and that of the first layer in the last down block."""
    last = f"down_blocks.{len(unet.down) - 1}.attentions"
    depths = unet.down[-1].depths
    if not unet.mid.depths or depths[0] is None:
        return
    [depth] = unet.mid.depths
    other = gone(f"{last}.0")
    for i, sign in ((0, 1), (1, -1)):  # whether layer 0 stays, or layer 1 is the first; else the rule is loose
        more, loose = depth - depths[i], 2 * max(depth, *depths)
        difference, free = inside(ATTENTION) - inside(f"{last}.{i}"), loose * (gone(ATTENTION) + sign * other)
        yield Rule(difference + free, more - loose * i, np.inf)
        yield Rule(difference - free, -np.inf, more + loose * i)


def solve(errors: np.ndarray, prices: np.ndarray, least: float, obeyed: list[Rule]) -> np.ndarray:
    """The set of units with the least sum of errors among those whose prices add up to at least `least`: bool[units].

    errors: float[units], not negative; prices: whole numbers [units]. Raises ValueError if no set that obeys the rules
    is worth that much."""
    removed = _best(errors, Rule(prices, least, np.inf), obeyed)
    if removed is None:
        most = prices @ _best(-prices, Rule(prices, 0, np.inf), obeyed)
        raise ValueError(f"units worth {most:,.0f} at most can be removed together, and {least:,.0f} are to go")
    return removed


def _best(errors, budget: Rule, obeyed: list[Rule]) -> np.ndarray | None:
    from scipy import optimize  # half a second of import

    if not len(errors):
        return np.zeros(0, bool) if budget.low <= 0 else None
    # HiGHS stops at gaps and tolerances that are absolute: with large errors and whole prices, those mean nothing.
    step = float(np.gcd.reduce(np.asarray(budget.weights, np.int64))) or 1.0
    budget = Rule(budget.weights / step, np.ceil(budget.low / step), np.inf)
    weights, low, high = (np.array(column) for column in zip(budget, *obeyed, strict=True))
    scale = 1e6 / max(np.abs(errors).max(), 1e-300)
    found = optimize.milp(
        errors * scale,
        integrality=np.ones(len(errors)),
        bounds=optimize.Bounds(0, 1),
        constraints=optimize.LinearConstraint(weights, low, high),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        return None
    removed = found.x > 0.5
    assert all(rule.holds(removed) for rule in (budget, *obeyed)), "HiGHS returned a set that breaks a rule"
    return removed
