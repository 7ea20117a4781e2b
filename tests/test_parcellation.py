"""Paths, levels and partitions: what they refuse, and their units against the labels they came from."""

from types import SimpleNamespace

import numpy as np
import pytest
from featlas.analysis.parcellation import Level, NotAPartition, PartitionPath, by_size, unit_labels, units_of
from featlas.model.dictionaries import identity
from featlas.model.sites import OUTPUT, parse_site
from featlas.model.units import whole_site

from .region_cases import DICTIONARIES, GRAPH, small_parcellation


def test_a_path_is_nested_and_knows_its_levels() -> None:
    path = PartitionPath("ward", np.array([[0, 1, 2, 3, 3], [0, 0, 1, 2, 2], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]))
    assert len(path) == 4
    assert path.n_blocks.tolist() == [4, 3, 2, 1]
    assert [path.with_blocks(n) for n in (9, 4, 3, 1)] == [0, 0, 1, 3]
    gap = PartitionPath("ward", np.array([[0, 1, 2, 3, 4], [0, 0, 1, 2, 2], [0, 0, 0, 0, 0]]))
    assert (gap.with_blocks(4), gap.with_blocks(2)) == (1, 2)  # the coarser of two equally near
    with pytest.raises(NotAPartition, match="no coarsening"):
        PartitionPath("ward", np.array([[0, 0, 1], [0, 1, 1]]))
    for wrong in (np.zeros(3, dtype=np.int64), np.zeros((0, 3), dtype=np.int64)):
        with pytest.raises(NotAPartition, match="levels × things"):
            PartitionPath("ward", wrong)


@pytest.mark.parametrize("seed", range(6))
def test_random_merges_are_paths_and_random_labels_are_not(seed) -> None:
    random = np.random.default_rng(seed)
    fine = random.permutation(np.arange(30) % 9)
    coarse = random.integers(3, size=9)[fine]
    coarse = np.unique(coarse, return_inverse=True)[1]
    PartitionPath("x", np.stack([fine, coarse]))
    # one feature moved to another coarse block, away from those that it shares a fine block with
    moved = coarse.copy()
    moved[0] = (moved[0] + 1) % 3
    with pytest.raises(NotAPartition):
        PartitionPath("x", np.stack([fine, moved]))


def test_larger_blocks_come_first() -> None:
    assert by_size([5, 5, 2, 2, 2, 9]).tolist() == [1, 1, 0, 0, 0, 2]
    assert by_size(["b", "a", "b", "a"]).tolist() == [0, 1, 0, 1]  # ties by their first member
    random = np.random.default_rng(0)
    labels = random.integers(20, size=200)
    ordered = by_size(labels)
    sizes = np.bincount(ordered)
    assert (np.diff(sizes) <= 0).all()
    same = labels[:, None] == labels[None, :]
    assert np.array_equal(ordered[:, None] == ordered[None, :], same)
    assert Level("given", ordered).n_blocks == len(sizes)


def test_labels_of_a_site_are_those_of_its_level() -> None:
    own = small_parcellation().sites["resid_0"]  # features 0, 1, 2, 4, 5, of which the fine blocks are 0, 0, 1, 2, 1
    assert own.labels_of().tolist() == own.labels_of(0).tolist() == [0, 0, 1, -1, 2, 1]
    assert own.labels_of(1).tolist() == [0, 0, 1, -1, 1, 1]
    for level in (2, -1):
        with pytest.raises(NotAPartition, match=f"levels 0 to 1, not {level}"):
            own.labels_of(level)


def test_units_of_a_site_are_its_blocks_the_dead_and_the_error() -> None:
    labels, names = unit_labels("resid_0", np.array([1, -1, 0, 0, -1]))
    assert labels.tolist() == [1, 2, 0, 0, 2, 3]
    assert names == ["resid_0/block 0", "resid_0/block 1", "resid_0/dead", "resid_0/error"]
    labels, names = unit_labels("resid_0", np.array([0, 0, 1]))  # nothing is dead
    assert (labels.tolist(), names[2:]) == ([0, 0, 1, 2], ["resid_0/error"])
    labels, names = unit_labels("resid_0", np.array([-1, -1]))  # everything is
    assert (labels.tolist(), names) == ([0, 0, 1], ["resid_0/dead", "resid_0/error"])
    labels, names = whole_site(identity(3), parse_site("mlp_1"))
    assert (labels.tolist(), names) == ([0, 0, 0, 1], ["mlp_1/all", "mlp_1/error"])


@pytest.mark.parametrize("level", [None, 0, 1])
def test_units_are_a_partition_of_every_node(level) -> None:
    parcellation = small_parcellation()
    units = parcellation.units(GRAPH, DICTIONARIES, level)
    for site in GRAPH.sites:
        if site == OUTPUT:
            continue
        own = parcellation.sites.get(site.name)
        wanted = np.zeros(6, dtype=np.int64) if own is None else own.labels_of(level)
        for i, j in np.ndindex(6, 6):
            assert (units.of[site][i] == units.of[site][j]) == (wanted[i] == wanted[j])
        for feature in range(6):
            name = units.names[int(units.of[site][feature])]
            assert name == f"{site.name}/" + ("all" if own is None else "dead" if wanted[feature] < 0 else f"block {wanted[feature]}")
        assert units.members(int(units.of[site][-1])).tolist() == [-1]  # the error node alone
    assert len(units_of(GRAPH, DICTIONARIES, {})) == 6  # no blocks: all features and the error node of three sites


def test_units_are_refused_for_another_dictionary() -> None:
    others = {**DICTIONARIES, GRAPH.sites[1]: SimpleNamespace(id="other", d_sae=6)}
    with pytest.raises(NotAPartition, match="the partition of resid_1 is of dictionary d1, not other: find regions anew"):
        small_parcellation().units(GRAPH, others)
