"""Memory and time of the engine against the length of prompts, on a made Llama of 9M parameters and TopK dictionaries at four sites.

    python benchmarks/long_prompts.py [--lengths 128,512,1024,2048] [--memory 512MB] [--json FILE]

Every measurement is a process of its own: its peak of resident memory, less what it held when model, dictionaries and prompts were there.
The pair differs in its last quarter's first token, as prompts of a long context with one question do; edges keep the 2,000 strongest per node.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from featlas.ingest.effective import EdgeSettings, FirstFactor, attribute, prepare
from featlas.ingest.statistics import site_nodes
from featlas.model.ablation import ablate_edges, clean_run
from featlas.model.baselines import Baseline, baseline_nodes
from featlas.model.binding import Binding, bind, capture_sites
from featlas.model.dictionaries import Dictionary, TopKDictionary
from featlas.model.masks import EdgeSet
from featlas.model.placement import parse_bytes
from featlas.model.sites import Basis, Site, parse_site
from featlas.model.tasks import Pair, PairBatch
from transformers import AutoModelForCausalLM
from transformers.models.llama import LlamaConfig

WIDTH, LAYERS, FEATURES, K, VOCAB = 256, 8, 2048, 24, 2048
SITES = ("resid_1", "resid_3", "resid_5", "resid_7")
JOBS = ("statistics", "edges-1", "edges-4-clean", "edges-4-exact", "ablation")


def model() -> tuple[Binding, dict[Site, Dictionary]]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=4096, tie_word_embeddings=True, initializer_range=0.08,
    )  # fmt: skip
    binding = bind(AutoModelForCausalLM.from_config(config).eval().requires_grad_(False))
    dictionaries: dict[Site, Dictionary] = {}
    for name in SITES:
        W_dec = torch.nn.functional.normalize(torch.randn(FEATURES, WIDTH), dim=-1)
        zeros = torch.zeros(FEATURES), torch.zeros(WIDTH)
        dictionaries[parse_site(name)] = TopKDictionary("made", Basis.RESIDUAL, W_dec, zeros[1], W_enc=W_dec.T.contiguous(), b_enc=zeros[0], k=K)
    return binding, dictionaries


def pair_of(length: int) -> PairBatch:
    clean = torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(length))
    corrupt = clean.clone()
    corrupt[0, 3 * length // 4] = (corrupt[0, 3 * length // 4] + 1) % VOCAB
    one = Pair(clean="clean", corrupt="corrupt", answer="a", wrong_answer="b", task="long")
    return PairBatch(pairs=(one,), clean=clean, corrupt=corrupt, answer=torch.tensor([5]), wrong_answer=torch.tensor([9]))


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(job: str, length: int, memory: int) -> dict[str, float]:
    binding, dictionaries = model()
    pairs = pair_of(length)
    with torch.no_grad():
        binding.forward(pairs.clean[:, :8], {})
    for dictionary in dictionaries.values():
        dictionary.encode(torch.zeros(1, WIDTH))
        _ = dictionary.encoder  # type: ignore[attr-defined]
    base, started, edges = peak(), time.perf_counter(), 0
    if job == "statistics":
        values = capture_sites(binding, pairs.clean, {site: d.basis for site, d in dictionaries.items()})
        edges = sum(len(site_nodes(dictionary, values[site]).value) for site, dictionary in dictionaries.items())
    elif job.startswith("edges"):
        _, steps, *how = job.split("-")
        factor = FirstFactor.EXACT if how == ["exact"] else FirstFactor.CLEAN
        settings = EdgeSettings(steps=int(steps), first_factor=factor, threshold=1e-3, max_edges=2000, memory=memory)
        for block in attribute(prepare(binding, dictionaries, pairs, settings)):
            edges += len(block.weight)
    else:
        clean = clean_run(binding, dictionaries, pairs)
        values = {site: clean.clean.values[site] for site in dictionaries} if hasattr(clean, "clean") else clean.values
        base_nodes = baseline_nodes(binding, dictionaries, pairs, {site: values[site] for site in dictionaries}, Baseline.COUNTERFACTUAL)
        graph = binding.graph(dictionaries)
        rows = [(a.name, n, b.name, n + 1, -1, -1) for b in graph.sites for a in graph.parents(b) if b.name != "y" for n in range(50)]
        rows += [(a.name, n, "y", 0, -1, -1) for a in graph.parents(graph.sites[-1]) for n in range(50)]
        chosen = EdgeSet.of(graph, *([row[i] for row in rows] for i in range(6)))
        ablate_edges(clean.with_baseline(base_nodes), [chosen], memory=memory)
        edges = len(rows)
    return {"seconds": time.perf_counter() - started, "MB": (peak() - base) / 2**20, "found": edges}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="128,512,1024,2048")
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--memory", default="512MB")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--limit", type=float, default=240, help="seconds that one measurement may take")
    parser.add_argument("--one", nargs=2, metavar=("JOB", "LENGTH"), help="one measurement, in this process")
    given = parser.parse_args()
    memory = parse_bytes(given.memory)
    assert memory is not None
    if given.one:
        sys.stdout.write(json.dumps(measure(given.one[0], int(given.one[1]), memory)) + "\n")
        return
    rows = []
    for job in given.jobs.split(","):
        for length in map(int, given.lengths.split(",")):
            command = [sys.executable, __file__, "--memory", given.memory, "--one", job, str(length)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=given.limit, check=False)
                found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.stderr[-300:]}
                row = {"job": job, "length": length, **found}
            except subprocess.TimeoutExpired:
                row = {"job": job, "length": length, "failed": f"more than {given.limit:.0f} s"}
            rows.append(row)
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
    if given.json:
        given.json.write_text(json.dumps({"memory": given.memory, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
