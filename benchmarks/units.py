"""Ablation of units beside the same sets written out, on SmolLM2 with the demo's dictionaries, in one process, one thread.

    python -m benchmarks.units edges      circuits of 100 edges between blocks: units together against `ablate_edges` of the expanded set
    python -m benchmarks.units cuts       each set lacks one edge between blocks of the full model
    python -m benchmarks.units nodes      each set lacks one block of the full model, against one patched run of the whole model each

Five residual sites, each with random blocks of its features and a unit for its error node; sequences of the agreement task, baseline the
counterfactual. Times are CPU seconds of this process. With `--output FILE` the figures are written as JSON.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from featlas.model.ablation import AblationBatch, ablate_edges, ablate_nodes, clean_run
from featlas.model.baselines import Baseline, baseline_nodes
from featlas.model.binding import bind
from featlas.model.dictionary_sources import load_dictionaries
from featlas.model.loading import load_model
from featlas.model.sites import OUTPUT
from featlas.model.tasks import batches, load_task
from featlas.model.unit_ablation import ablate_units
from featlas.model.units import UnitEdges, Units

from .ablation import timed
from .effective import machine, peak, reset_peak


def prepared(arguments: argparse.Namespace) -> AblationBatch:
    """One batch of the agreement task with its counterfactual baseline."""
    model = load_model("smollm2", device=arguments.device)
    dictionaries = load_dictionaries("demo", model, device=arguments.device)
    binding = bind(model)
    pairs = load_task("agreement", model.tokenizer, n=4 * arguments.sequences, seed=0)
    pair_batch = next(batches(pairs, model.tokenizer, batch_size=arguments.sequences))
    clean = clean_run(binding, dictionaries, pair_batch)
    return clean.with_baseline(baseline_nodes(binding, clean.dictionaries, clean.pairs, clean.values, Baseline.COUNTERFACTUAL))


def random_blocks(batch: AblationBatch, n_blocks: int) -> Units:
    """Each site's features in blocks of about equal size, the error node in a unit of its own."""
    labels = {}
    for i, (site, dictionary) in enumerate(batch.clean.dictionaries.items()):
        order = torch.randperm(dictionary.d_sae, generator=torch.Generator().manual_seed(i))
        labels[site] = torch.cat([order % n_blocks, torch.tensor([n_blocks])])
    return Units.from_labels(batch.graph, labels)


def circuit(units: Units, per_site: int, n_edges: int, seed: int) -> UnitEdges:
    """Random edges among a few units of each site, the error units among them."""
    rng = random.Random(seed)
    kept = torch.zeros(len(units.names), dtype=torch.bool)
    for site in units.graph.sites:
        own = [units.output] if site == OUTPUT else [units.at(site)[-1], *rng.sample(units.at(site)[:-1], per_site - 1)]
        kept[own] = True
    rows = (units.joined & kept[:, None] & kept[None, :]).nonzero().tolist()
    chosen = rng.sample(rows, min(n_edges, len(rows)))
    return UnitEdges.of(units, [u for u, _ in chosen], [v for _, v in chosen])


def edges(batch: AblationBatch, units: Units, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Circuits one by one and together, with and without their complements."""
    sets = [circuit(units, 8, 100, seed) for seed in range(arguments.sets)]
    cases: dict[str, Sequence[UnitEdges]] = {
        "one": sets[:1],
        "one and its complement": [sets[0], sets[0].inverse()],
        "all": sets,
        "all, with complements": sets + [s.inverse() for s in sets],
    }
    found = []
    batch.clean.begins_late  # the clean keys and values, made once for a batch  # noqa: B018
    print(f"{'sets':24} {'n':>4} {'units s':>8} {'expanded s':>10} {'ratio':>7} {'largest':>8} {'peak GB':>7}")
    for name, chosen in cases.items():
        reset_peak()
        fast, ours = timed(ablate_units, batch, chosen)
        memory = peak()
        slow, theirs = timed(ablate_edges, batch, [one.expanded() for one in chosen]) if len(chosen) <= arguments.expand else (float("nan"), ours)
        off = float((ours - theirs).abs().max() / theirs.abs().max())
        found.append({"sets": name, "n": len(chosen), "units": fast, "expanded": slow, "ratio": slow / fast, "largest_error": off, "peak_gb": memory})
        print(f"{name:24} {len(chosen):4} {fast:8.2f} {slow:10.2f} {slow / fast:6.1f}x {off:8.1e} {memory:7.2f}", flush=True)
    return found


def cuts(batch: AblationBatch, units: Units, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One edge between units cut in the full model."""
    rows = units.joined.nonzero().tolist()
    chosen = random.Random(0).sample(rows, min(arguments.cuts, len(rows)))
    sets = [UnitEdges.of(units, [u], [v]).inverse() for u, v in chosen]
    reset_peak()
    fast, ours = timed(ablate_units, batch, sets)
    memory = peak()
    slow, theirs = timed(ablate_edges, batch, [one.expanded() for one in sets[: arguments.expand]])
    off = float((ours[: arguments.expand] - theirs).abs().max() / theirs.abs().max())
    each, apart = fast / len(sets), slow / len(theirs)
    result = {"sets": len(sets), "units": fast, "per_set": each, "expanded_per_set": apart, "ratio": apart / each}
    result |= {"largest_error": off, "peak_gb": memory}
    print(", ".join(f"{name} {value:.4g}" for name, value in result.items()))
    return [result]


def nodes(batch: AblationBatch, units: Units, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One block of the full model at its baseline."""
    sets = [units.nodes([u]).inverse() for u in random.Random(0).sample(range(len(units)), min(arguments.cuts, len(units)))]
    reset_peak()
    fast, ours = timed(ablate_nodes, batch, sets)
    memory = peak()
    slow, theirs = timed(patched_runs, batch, units, sets[: arguments.expand])
    off = float((ours[: arguments.expand] - theirs).abs().max() / theirs.abs().max())
    each = slow / len(theirs)
    result = {
        "sets": len(sets), "engine": fast, "per_set": fast / len(sets), "patched_run": each, "ratio": each * len(sets) / fast, "largest_error": off,
        "peak_gb": memory,
    }  # fmt: skip
    print(", ".join(f"{name} {value:.4g}" for name, value in result.items()))
    return [result]


@torch.no_grad()
def patched_runs(batch: AblationBatch, units: Units, sets: Sequence[Any]) -> torch.Tensor:
    """What y reads, (n, batch, width): one run of the whole model for each set, a hook at the one site where it lists nodes."""
    clean, found = batch.clean, []
    for one in sets:
        site = batch.graph.sites[int(one.rows[0, 0])]
        dictionary, base, listed = clean.dictionaries[site], batch.base[site], one.rows[:, 1]

        def cut(x: torch.Tensor, dictionary: Any = dictionary, base: Any = base, listed: torch.Tensor = listed) -> torch.Tensor:
            features = dictionary.encode(x)
            error = base.error if bool((listed < 0).any()) else x - dictionary.decode(features)
            features[..., listed[listed >= 0]] = base.features[..., listed[listed >= 0]]
            return dictionary.decode(features) + error

        run = clean.binding.forward(clean.pairs.clean, {clean.end: clean.target.basis}, patches={site: cut}, stop_early=True)
        found.append(run.values[clean.end][:, -1])
    return torch.stack(found)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("edges", "cuts", "nodes"))
    parser.add_argument("--blocks", type=int, default=40, help="blocks of each site")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--sets", type=int, default=10, help="circuits")
    parser.add_argument("--cuts", type=int, default=200, help="sets that lack one edge, or one block")
    parser.add_argument("--expand", type=int, default=2, help="as many sets are run the other way too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    batch = prepared(arguments)
    described = {**machine(argparse.Namespace(**vars(arguments), width=2048)), "tokens": batch.clean.length}
    print(", ".join(f"{name} {value}" for name, value in described.items()))
    measure = {"edges": edges, "cuts": cuts, "nodes": nodes}[arguments.what]
    figures = measure(batch, random_blocks(batch, arguments.blocks), arguments)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({"what": arguments.what, "machine": described, "figures": figures}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
