"""Where another method stands in for the one that was asked for, it is kept with the partition, and said."""

import numpy as np
import pytest
from featlas.analysis import partitioning
from featlas.analysis.finding import FindingOptions, find_partition
from featlas.analysis.graph_tool import GraphToolTimeout
from featlas.analysis.levels import Rule
from featlas.analysis.partitioning import PartitionMethod, partition
from featlas.analysis.planted import planted
from featlas.queries.samples import SiteSamples
from featlas.show_regions import stood_in

OPTIONS = FindingOptions(method=PartitionMethod.NESTED_SBM, rule=Rule.GIVEN, n_blocks=4, nulls=3)


@pytest.fixture(scope="module")
def samples() -> SiteSamples:
    values = planted("gauss", 32, seed=0, samples=600, noise_share=0.0, n_blocks=4).samples
    return SiteSamples("resid_0", "d", 32, values, np.arange(600) // 10, np.arange(600) % 10)


@pytest.mark.slow
@pytest.mark.parametrize("in_time", [0, 1, 100])
def test_what_stood_in_for_graph_tool_is_said(samples, monkeypatch, in_time) -> None:
    calls = []

    def slow(correlation, **options):
        calls.append(correlation)
        if len(calls) > in_time:
            raise GraphToolTimeout("graph-tool was stopped after 1 s")
        return partition(PartitionMethod.WARD, correlation)

    monkeypatch.setattr(partitioning, "nested_block_model", slow)
    own = find_partition(samples, OPTIONS)
    assert len(calls) == 1 + 2 + 2 * 3
    assert ("instead_of" in own.notes, own.notes.get("refits_instead_of")) == {0: (True, None), 1: (False, 8), 100: (False, None)}[in_time]
    said = stood_in([own])
    if in_time == 100:
        assert said == []
    else:
        assert len(said) == 1
        assert said[0].startswith("resid_0: ")
        assert "dense block model" in said[0]
        assert "stopped after 1 s" in said[0]
