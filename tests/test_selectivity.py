"""Selectivity of what blocks break, where a task has no effect that could be lost, or few sequences."""

import numpy as np
import polars as pl
import pytest
from featlas.analysis.faithfulness import VALUES, Bootstrap
from featlas.analysis.region_study import REGIONS, SELECTIVITY, selectivity

FEW = Bootstrap(resamples=60)


def values_of(lost: np.ndarray, effect: np.ndarray) -> pl.DataFrame:
    """Values of removals: lost (blocks, tasks, sequences) in units of the metric, effect (tasks, sequences) m(M) − m(∅)."""
    rows = [
        {
            "method": REGIONS, "ablation": "node", "part": "circuit", "size": block, "draw": 0, "metric": "logit_diff", "baseline": "zero",
            "split": "held-out", "sequence": f"{task}/{i}", "task": f"t{task}", "value": effect[task, i] - lost[block, task, i],
            "full": effect[task, i], "empty": 0.0,
        }
        for block, task, i in np.ndindex(lost.shape)
    ]  # fmt: skip
    return pl.DataFrame(rows, schema=dict(VALUES))


@pytest.mark.parametrize("whole", [0.0, 0.05])
def test_a_task_without_an_effect_is_none_that_a_block_leaves_alone(whole) -> None:
    random = np.random.default_rng(0)
    effect = np.stack([np.ones(20), np.ones(20), whole * random.normal(size=20)])
    lost = np.full((6, 3, 20), 0.5)
    lost[:, 2] = 0.0 if whole == 0 else random.normal(size=(6, 20))  # shares of next to nothing would be large
    row = selectivity(values_of(lost, effect), bootstrap=FEW).row(0, named=True)
    assert row["value"] == pytest.approx(0)  # the two tasks that there are, alike
    assert row["impact"] == pytest.approx(0.5)
    assert row["low"] == pytest.approx(0)
    assert row["high"] == pytest.approx(0)


def test_of_one_task_with_an_effect_nothing_can_be_said() -> None:
    effect = np.stack([np.ones(20), np.zeros(20)])
    for given in (effect, np.zeros((2, 20))):
        table = selectivity(values_of(np.full((4, 2, 20), 0.5), given), bootstrap=FEW)
        assert dict(table.schema) == SELECTIVITY
        assert table.select(pl.col(pl.Float64)).null_count().sum_horizontal().item() == 9


def test_few_sequences_have_no_interval() -> None:
    random = np.random.default_rng(1)
    for n, none in ((2, True), (3, True), (4, False)):
        lost = np.zeros((4, 2, n))
        lost[:2, 0], lost[2:, 1] = 0.5, 0.5
        row = selectivity(values_of(lost + 0.1 * random.random(lost.shape), np.ones((2, n))), bootstrap=FEW).row(0, named=True)
        assert 0.3 < row["value"] < 1
        assert (row["low"] is None, row["high"] is None, row["impact_low"] is None) == (none,) * 3
