"""The attribution engine beside the naive definition, on SmolLM2, in one process, one thread, interleaved.

    python -m benchmarks.effective [--rounds 3] [--rows 4] [--threads 1] [--width 2048] [--cases seven-sites,…]

The naive loop does two whole-model runs and a backward pass for every downstream node; a few of its rows, drawn at random
over all sites and positions, are timed and scaled to the number of rows that the engine expanded. Both use random
TopK dictionaries (k = 32), whose features are as many as a trained one's, and every edge with an effect is kept.
"""

import argparse
import resource
import statistics
import time
from dataclasses import dataclass

import torch
from featlas.ingest.effective import EdgeSettings, Positions, Prepared, attribute, prepare
from featlas.model.binding import Binding, bind
from featlas.model.dictionaries import Basis, InputTransform, TopKDictionary
from featlas.model.loading import load_model
from featlas.model.sites import Site, parse_site
from featlas.model.tasks import Pair, PairBatch

from tests.naive import deltas, downstream_gradients

CASES = {
    "seven sites (resid_13 … resid_15)": ("resid_13", "attn_14", "mlp_14", "resid_14", "attn_15", "mlp_15", "resid_15"),
    "31 sites (embed, ten layers whole)": ("embed", *(f"{kind}_{layer}" for layer in range(10) for kind in ("attn", "mlp", "resid"))),
    "five residual sites (6 blocks apart)": ("resid_5", "resid_11", "resid_17", "resid_23", "resid_29"),
}
CLEAN = "When Mary and John went to the big store, John gave a drink to"
CORRUPT = "When Lisa and Paul went to the big store, Paul gave a drink to"


@dataclass(frozen=True)
class Timing:
    """Seconds of one round: the engine's whole graph, one naive row; what the engine found."""

    engine: float
    naive_row: float
    rows: int
    edges: int
    error: float


def dictionaries_for(binding: Binding, names: tuple[str, ...], tokens: torch.Tensor, width: int) -> dict[Site, TopKDictionary]:
    """Random TopK dictionaries around each site's mean activation."""
    sites = [parse_site(name) for name in names]
    values = binding.forward(tokens, dict.fromkeys(sites, Basis.RESIDUAL)).values
    made = {}
    for i, site in enumerate(sites):
        directions = torch.randn(width, binding.d_model, generator=torch.Generator().manual_seed(i))
        directions /= directions.norm(dim=-1, keepdim=True)
        made[site] = TopKDictionary(
            id="random", basis=Basis.RESIDUAL, W_dec=directions, b_dec=values[site][0, 1:].mean(0), W_enc=directions.T.contiguous(),
            b_enc=torch.zeros(width), k=32, input=InputTransform(subtract_b_dec=True),
        )  # fmt: skip
    return made


def measure(prepared: Prepared, batch: PairBatch, n_rows: int, seed: int) -> Timing:
    """One round: the engine on the full frontier, then `n_rows` naive rows of those that it expanded, compared and timed."""
    binding, dictionaries, settings = prepared.binding, prepared.dictionaries, prepared.settings
    start = time.perf_counter()
    blocks = list(attribute(prepare(binding, dictionaries, batch, settings)))
    engine = time.perf_counter() - start
    sites = prepared.graph.sites
    expanded = [(sites[int(b.dest_site[0])], p, j) for b in blocks for p, j in sorted(set(zip(b.dest_pos.tolist(), b.dest_index.tolist())))]
    generator = torch.Generator().manual_seed(seed)
    chosen = [expanded[i] for i in torch.randperm(len(expanded), generator=generator)[:n_rows].tolist()]
    errors, spent = [], 0.0
    for node in chosen:
        start = time.perf_counter()
        effects = naive_row(prepared, batch, node)
        spent += time.perf_counter() - start
        errors.append(row_error(effects, blocks, sites, node))
    return Timing(engine, spent / len(chosen), len(expanded), sum(len(b.weight) for b in blocks), max(errors))


def naive_row(prepared: Prepared, batch: PairBatch, node: tuple[Site, int, int]) -> dict[Site, torch.Tensor]:
    """Effects of every upstream node on one downstream node, by the definition: site → (pos, d_sae + 1)."""
    site, pos, index = node
    gradients = downstream_gradients(prepared.binding, prepared.dictionaries, batch, 0, prepared.settings, (site, pos, index), prepared.run)
    effects = {}
    for src, gradient in gradients.items():
        delta, error_delta = _deltas(prepared, batch, src)
        effects[src] = torch.cat([(gradient @ prepared.dictionaries[src].W_dec.T) * delta, (gradient * error_delta).sum(-1, keepdim=True)], -1)
    return effects


_DELTAS: dict[tuple[int, Site], tuple[torch.Tensor, torch.Tensor]] = {}


def _deltas(prepared: Prepared, batch: PairBatch, site: Site) -> tuple[torch.Tensor, torch.Tensor]:
    """Changes of a site's nodes; computed once, since the naive loop too would keep them."""
    key = (id(prepared), site)
    if key not in _DELTAS:
        dictionary = prepared.dictionaries[site]
        corrupt = prepared.binding.forward(batch.corrupt, {site: dictionary.basis}).values[site][0]
        first = int(batch.first_difference[0])
        _DELTAS[key] = deltas(dictionary, prepared.values[site][0], corrupt, prepared.settings.baseline, first, None)
    return _DELTAS[key]


def row_error(effects: dict[Site, torch.Tensor], blocks: list, sites: tuple[Site, ...], node: tuple[Site, int, int]) -> float:
    """Largest difference between the engine's and the naive row, relative to the row's largest effect."""
    site, pos, index = node
    block = next(b for b in blocks if sites[int(b.dest_site[0])] == site)
    mine = (block.dest_pos == pos) & (block.dest_index == index)
    worst = scale = 0.0
    for src, effect in effects.items():
        ours = torch.zeros_like(effect)
        here = mine & (block.src_site == sites.index(src))
        ours[torch.from_numpy(block.src_pos[here]), torch.from_numpy(block.src_index[here])] = torch.from_numpy(block.weight[here]).to(effect)
        worst = max(worst, float((ours - effect).abs().max()))
        scale = max(scale, float(effect.abs().max()))
    return worst / scale


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_model("smollm2", device=arguments.device)
    binding = bind(model)
    ids = lambda text: model.tokenizer(text, return_tensors="pt")["input_ids"]
    answers = [torch.tensor([model.tokenizer(word)["input_ids"][0]]) for word in (" Mary", " John")]
    pair = Pair(clean=CLEAN, corrupt=CORRUPT, answer=" Mary", wrong_answer=" John", task="ioi")
    batch = PairBatch(pairs=(pair,), clean=ids(CLEAN), corrupt=ids(CORRUPT), answer=answers[0], wrong_answer=answers[1])
    batch = batch.to(binding.device)
    n_pos = batch.clean.shape[1]
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), {arguments.device}, {n_pos} tokens, TopK 32 of {arguments.width}")
    print(f"{'sites':38} {'rows':>6} {'edges':>8} {'engine s':>9} {'edges/s':>9} {'naive s/row':>11} {'ratio':>7} {'error':>8} {'peak GB':>7}")
    for name, sites in CASES.items():
        dictionaries = {s: d.to(binding.device) for s, d in dictionaries_for(binding, sites, batch.clean, arguments.width).items()}
        prepared = prepare(binding, dictionaries, batch, EdgeSettings(positions=Positions.KEEP))
        rounds = [measure(prepared, batch, arguments.rows, seed) for seed in range(arguments.rounds)]
        engine = statistics.median(r.engine for r in rounds)
        naive = statistics.median(r.naive_row for r in rounds)
        ratio = statistics.median(r.naive_row * r.rows / r.engine for r in rounds)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{name:38} {rounds[0].rows:6} {rounds[0].edges:8} {engine:9.2f} {rounds[0].edges / engine:9.0f} {naive:11.3f} "
            f"{ratio:6.0f}x {max(r.error for r in rounds):8.1e} {peak:7.2f}",
            flush=True,
        )
        _DELTAS.clear()


if __name__ == "__main__":
    main()
