"""Random partitions of a tiny model's nodes, and random sets of edges between their units."""

import random

import torch
from featlas.model.sites import OUTPUT
from featlas.model.units import UnitEdges, Units

from .ablation_cases import Case


def random_units(case: Case, rng: random.Random, most: int = 4) -> Units:
    """Each site's nodes in up to `most` units; the error node is with features, or alone."""
    labels = {}
    for site in case.graph.sites:
        if site != OUTPUT:
            drawn = torch.tensor([rng.randrange(most) for _ in range(case.d_sae[site] + 1)])
            if rng.random() < 0.4:
                drawn[-1] = most  # alone
            labels[site] = drawn.unique(return_inverse=True)[1]
    return Units.from_labels(case.graph, labels)


def random_unit_edges(units: Units, rng: random.Random, density: float, complement: bool = False) -> UnitEdges:
    """A share of the edges between units."""
    rows = [(u, v) for u, v in units.joined.nonzero().tolist() if rng.random() < density]
    made = UnitEdges.of(units, [u for u, _ in rows], [v for _, v in rows])
    return made.inverse() if complement else made
