"""Attribution between units beside attribution between single nodes, on SmolLM2, in one process, interleaved.

    python -m benchmarks.units_attribution

Two cases: the demo's dictionaries at five residual sites, each in blocks of random features; and the neurons of the heads' outputs at four
attention sites, as heads. Both sides start from the same prepared batch of one pair and give the same sums, whose greatest difference
(relative to the greatest sum) is shown. Times are CPU seconds of this process, the median of the rounds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from featlas.ingest.effective import EdgeSettings, FirstFactor, Positions, Prepared, attribute, prepare
from featlas.ingest.unit_edges import attribute_units
from featlas.model.dictionaries import Basis, identity
from featlas.model.dictionary_sources import load_dictionaries
from featlas.model.loading import load_model
from featlas.model.sites import OUTPUT, parse_site
from featlas.model.units import Units, heads

from .effective import Setting, machine, peak, reset_peak

SETTINGS = {
    "S = 1": EdgeSettings(steps=1, positions=Positions.SUM),
    "S = 10, clean first factor": EdgeSettings(steps=10, positions=Positions.SUM, first_factor=FirstFactor.CLEAN),
}


def cases(setting: Setting, n_blocks: int) -> dict[str, tuple[Any, Callable[[Prepared], Units]]]:
    """Dictionaries of each case, and its units."""

    def blocks(prepared: Prepared) -> Units:
        generator = torch.Generator().manual_seed(0)
        labels = {}
        for site, dictionary in prepared.dictionaries.items():
            drawn = torch.arange(dictionary.d_sae)[torch.randperm(dictionary.d_sae, generator=generator)] % n_blocks
            labels[site] = torch.cat([drawn, torch.tensor([n_blocks])])
        return Units.from_labels(prepared.graph, labels)

    def of_heads(prepared: Prepared) -> Units:
        own = {site: heads(dictionary, site, setting.binding.n_heads) for site, dictionary in prepared.dictionaries.items()}
        return Units.from_labels(prepared.graph, {s: labels for s, (labels, _) in own.items()}, {s: names for s, (_, names) in own.items()})

    width = setting.binding.d_heads
    neurons = {parse_site(f"attn_{layer}"): identity(width, basis=Basis.HEADS) for layer in (11, 12, 13, 14)}
    demo = load_dictionaries("demo", load_model("smollm2"))
    return {
        f"five residual sites, {n_blocks} blocks each": (dict(demo), blocks),
        "neurons of four attention sites, 9 heads each": (neurons, of_heads),
    }


def sums(prepared: Prepared, units: Units) -> torch.Tensor:
    """Single edges, added by units as they come."""
    found = np.zeros((prepared.shape[0], len(units) + 1, len(units) + 1))
    of = [units.of[site].numpy() if site != OUTPUT else np.array([units.output]) for site in prepared.graph.sites]
    for block in attribute(prepared):
        source, target = (np.zeros(len(block.weight), dtype=np.int64) for _ in range(2))
        for i, own in enumerate(of):
            for ends, place, index in ((source, block.src_site, block.src_index), (target, block.dest_site, block.dest_index)):
                ends[place == i] = own[index[place == i]]
        np.add.at(found, (block.sequence, source, target), block.weight)
    return torch.from_numpy(found)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.device, arguments.width = "cpu", None
    described = machine(arguments)
    print(", ".join(f"{name} {value}" for name, value in described.items()))
    setting, found = Setting.load("cpu"), []
    print(f"{'case':46} {'settings':27} {'single s':>9} {'units s':>8} {'ratio':>6} {'difference':>10} {'single GB':>9} {'units GB':>8}")
    for case, (dictionaries, make) in cases(setting, arguments.blocks).items():
        for name, settings in SETTINGS.items():
            times: dict[str, list[float]] = {"single": [], "units": []}
            peaks, results = {}, {}
            for _ in range(arguments.rounds):
                for side, run in (("units", attribute_units), ("single", sums)):
                    prepared = prepare(setting.binding, dictionaries, setting.batch, settings)
                    units = make(prepared)
                    reset_peak()
                    start = time.process_time()
                    results[side] = run(prepared, units)
                    times[side].append(time.process_time() - start)
                    peaks[side] = peak()
            single, ours = (statistics.median(times[side]) for side in ("single", "units"))
            difference = float((results["single"] - results["units"]).abs().max() / results["single"].abs().max())
            found.append({"case": case, "settings": name, "single": single, "units": ours, "difference": difference, "peak": peaks})
            memory = f"{peaks['single']:9.2f} {peaks['units']:8.2f}"
            print(f"{case:46} {name:27} {single:9.2f} {ours:8.2f} {single / ours:6.1f} {difference:10.1e} {memory}", flush=True)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps({"machine": described, "figures": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
