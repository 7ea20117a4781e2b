"""The edge-ingest job: what it writes, that it is idempotent, and that a kill loses and doubles nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch
from featlas.errors import UserError
from featlas.ingest import pipeline, writing
from featlas.ingest.effective import Baseline, EdgeSettings, Positions, attribute, prepare
from featlas.ingest.pipeline import EdgeOptions, aggregate, finish_run, ingest_edges, plan_run
from featlas.ingest.statistics import StatisticsOptions, measure_statistics, pair_corpus
from featlas.model.sites import Basis, parse_site
from featlas.model.tasks import batches
from featlas.queries import runs
from featlas.queries.statistics import StatisticsStore
from featlas.queries.store import StoreUnreachable, open_graph
from polars.testing import assert_frame_equal
from safetensors.torch import save_file

from .micro import save_tiny, word_tokenizer

ROOT = Path(__file__).parents[1]
N_PAIRS = 14


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny model's folder and a JSONL task for it."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder / "model", "llama", seed=1, n_layers=2)
    lines = []
    for i in range(N_PAIRS):
        length = 5 if i % 3 else 6  # two lengths, hence batches of two shapes
        words = [f"w{(7 * i + 3 * k) % 40}" for k in range(length)]
        other = words.copy()
        other[1] = f"w{(7 * i + 11) % 40}"
        pair = {"clean": " ".join(words), "corrupt": " ".join(other), "answer": " w1", "wrong_answer": " w2", "task": "even" if i % 2 else "odd"}
        lines.append(json.dumps(pair))
    (folder / "task.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(params=["embedded", pytest.param("server", marks=pytest.mark.neo4j)])
def graph(request, tmp_path, monkeypatch):
    """Where the graph goes: None for the embedded one in the atlas, or a real server's URI with its credentials in the environment."""
    if request.param == "embedded":
        return None
    server = request.getfixturevalue("clean_neo4j")
    monkeypatch.setenv("NEO4J_USERNAME", server.username)
    monkeypatch.setenv("NEO4J_PASSWORD", server.password)
    return server.uri


def options(tiny, atlas, graph=None, **changes) -> EdgeOptions:
    base = EdgeOptions(
        model=str(tiny / "model"), dictionaries="identity", task=str(tiny / "task.jsonl"), atlas=Path(atlas), graph=graph,
        sites=("resid_0", "mlp_1", "resid_1"), batch_size=4,
    )  # fmt: skip
    return replace(base, **changes)


def snapshot(atlas, graph, run) -> dict[str, pl.DataFrame]:
    """Everything that a run left in the graph, in a fixed order."""
    with open_graph(graph or atlas) as store:
        tables = {name: store.read_edges(name, run=run) for name in ("ATTRIBUTES", "INFLUENCES")}
        tables["ON_SEQUENCE"] = store.read_edges("ON_SEQUENCE")
        tables["nodes"] = store.query("MATCH (f:Feature) RETURN f.key AS key, f.site AS site, f.kind AS kind, f.`index` AS number ORDER BY key")
        tables["runs"] = store.query("MATCH (r:Run) RETURN r.key AS key, r.status AS status, r.n_edges AS edges, r.n_sequences AS sequences")
    return tables


def assert_same(a: dict[str, pl.DataFrame], b: dict[str, pl.DataFrame]) -> None:
    for name in a:
        assert a[name].equals(b[name]), f"{name} differs:\n{a[name]}\n{b[name]}"


@pytest.mark.slow
def test_a_run_writes_the_engines_edges(tiny, tmp_path, graph):
    chosen = options(tiny, tmp_path, graph)
    seen = []
    summary = ingest_edges(chosen, progress=seen.append)
    assert (summary.n_sequences, summary.n_skipped) == (N_PAIRS, 0)
    assert [p.done for p in seen][-1] == N_PAIRS
    tables = snapshot(tmp_path, graph, summary.run)
    plan = plan_run(chosen)
    total = 0.0
    count = 0
    for batch in batches(plan.pairs, plan.model.tokenizer, batch_size=4):
        for block in attribute(prepare(plan.binding, plan.dictionaries, batch, chosen.settings)):
            total += float(block.weight.sum())
            count += len(block.weight)
    assert len(tables["ATTRIBUTES"]) == summary.n_edges == count
    assert tables["ATTRIBUTES"]["weight"].sum() == pytest.approx(total, rel=1e-9)
    assert tables["runs"].rows() == [(summary.run, "done", count, N_PAIRS)]
    assert tables["ON_SEQUENCE"]["n_edges"].sum() == count
    assert len(tables["INFLUENCES"]) == summary.n_influences
    assert set(tables["nodes"]["kind"]) == {"feature", "output"}  # identity dictionaries leave no error


@pytest.mark.slow
def test_the_same_run_twice_changes_nothing(tiny, tmp_path, graph):
    chosen = options(tiny, tmp_path, graph)
    first = ingest_edges(chosen)
    before = snapshot(tmp_path, graph, first.run)
    again = ingest_edges(chosen)
    assert (again.run, again.n_skipped, again.n_edges) == (first.run, N_PAIRS, 0)
    assert_same(before, snapshot(tmp_path, graph, first.run))
    with open_graph(graph or tmp_path) as store:
        finish_run(store, first.run)
    assert_same(before, snapshot(tmp_path, graph, first.run))


@pytest.mark.parametrize("kill_after", [1, 2])
@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_graph(tiny, tmp_path, graph, kill_after):
    whole = ingest_edges(options(tiny, tmp_path / "whole"))
    reference = snapshot(tmp_path / "whole", None, whole.run)
    described = {
        "model": str(tiny / "model"), "dictionaries": "identity", "task": str(tiny / "task.jsonl"), "atlas": str(tmp_path / "killed"),
        "graph": graph, "sites": ["resid_0", "mlp_1", "resid_1"], "batch_size": 4,
    }  # fmt: skip
    (tmp_path / "options.json").write_text(json.dumps(described))
    command = [sys.executable, "-m", "tests.ingest_child", str(tmp_path / "options.json")]
    # The child stops by itself after so many batches, so that the kill always comes in the middle.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "STOP_AFTER": str(kill_after)}
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    for _ in range(kill_after):
        assert child.stdout.readline().strip().isdigit()
    child.send_signal(signal.SIGKILL)
    rest = child.stdout.read()
    assert child.wait() == -signal.SIGKILL
    assert "finished" not in rest
    with open_graph(graph or tmp_path / "killed") as store:
        done = len(store.read_edges("ON_SEQUENCE"))
        assert 0 < done < N_PAIRS
        # Finishing early derives what there is, and does not call the run done.
        (run,) = store.query("MATCH (r:Run) RETURN r.key AS key")["key"]
        finish_run(store, run)
        assert store.query("MATCH (r:Run) RETURN r.status AS status, r.n_sequences AS n").rows() == [("running", done)]
    resumed = ingest_edges(options(tiny, tmp_path / "killed", graph))
    assert resumed.n_skipped == done
    assert_same(reference, snapshot(tmp_path / "killed", graph, resumed.run))


@pytest.mark.slow
def test_positions_kept_are_stored_and_their_sum_is_the_default(tiny, tmp_path):
    kept = ingest_edges(options(tiny, tmp_path, settings=EdgeSettings(positions=Positions.KEEP)))
    summed = ingest_edges(options(tiny, tmp_path))
    assert kept.run != summed.run
    with open_graph(tmp_path) as store:
        fine, coarse = (store.read_edges("ATTRIBUTES", run=r.run) for r in (kept, summed))
        means = [store.read_edges("INFLUENCES", run=r.run).drop("run") for r in (kept, summed)]
    assert fine["src_pos"].min() >= 1
    assert set(coarse["src_pos"]) == {-1}
    merged = fine.group_by("sequence", "source", "target").agg(pl.col("weight").sum()).sort("sequence", "source", "target")
    coarse = coarse.sort("sequence", "source", "target")
    assert merged.select("sequence", "source", "target").equals(coarse.select("sequence", "source", "target"))
    assert (merged["weight"] - coarse["weight"]).abs().max() < 1e-6
    assert (means[0]["weight"] - means[1]["weight"]).abs().max() < 1e-6


def test_aggregation_by_hand():
    """Three sequences done, the edge kept in two of them, with positions: 1 + 2 and −5."""
    rows = [("a", "b", "s1", 1, 2, 1.0), ("a", "b", "s1", 1, 3, 2.0), ("a", "b", "s2", 1, 2, -5.0), ("a", "c", "s1", 0, 0, 0.5)]
    edges = pl.DataFrame(rows, schema=["source", "target", "sequence", "src_pos", "dest_pos", "weight"], orient="row")
    first, second = aggregate(edges, 3).sort("target").to_dicts()
    assert first == {
        "source": "a", "target": "b", "weight": pytest.approx(-2 / 3), "abs_weight": pytest.approx(8 / 3), "max_weight": -5.0,
        "variance": pytest.approx((9 + 25 + 0) / 3 - 4 / 9), "n": 2,
    }  # fmt: skip
    assert (second["weight"], second["n"]) == (pytest.approx(0.5 / 3), 1)


@pytest.mark.slow
def test_edges_are_aggregated_in_blocks_to_the_same_numbers(tmp_path, graph, monkeypatch):
    """A hub with more edges than a block, single edges with more sequences than a block, and many small sources."""
    generator = torch.Generator().manual_seed(2)
    keys = [f"f{i:02}" for i in range(14)]
    sequences = [f"s{i}" for i in range(12)]
    with open_graph(graph or tmp_path) as store:
        store.merge_nodes("Feature", pl.DataFrame({"key": keys}))
        store.merge_nodes("Run", pl.DataFrame({"key": ["r", "other"], "n_planned": [len(sequences)] * 2}))
        store.merge_nodes("Sequence", pl.DataFrame({"key": sequences}))
        for sequence in sequences:
            chosen = [(u, v) for u in range(14) for v in range(14) if u in (7, 8) or torch.rand(1, generator=generator) < 0.1]
            weight = torch.randn(len(chosen), generator=generator, dtype=torch.float64).tolist()
            edges = pl.DataFrame({"source": [keys[u] for u, _ in chosen], "target": [keys[v] for _, v in chosen], "weight": weight})
            store.commit_sequence("r", sequence, edges, {})
            store.commit_sequence("other", sequence, edges.with_columns(pl.lit(9.0).alias("weight"))[:3], {})
        whole = store.read_edges("ATTRIBUTES", run="r")
        size = 10 if graph is None else 60  # a server answers every block in its own time
        monkeypatch.setattr(pipeline, "EDGES_PER_BLOCK", size)
        blocks = [frame.select("source", "target").unique() for frame in runs.edge_blocks(store, "r", size)]
        assert len(blocks) > 336 // (2 * size)  # the two hubs alone have 28 targets of twelve edges each
        assert pl.concat(blocks).is_duplicated().sum() == 0
        expected = aggregate(whole, len(sequences))
        assert finish_run(store, "r") == len(expected)
        assert_frame_equal(store.read_edges("INFLUENCES").select(expected.columns), expected, check_exact=True)
        in_order = pl.concat([aggregate(frame, len(sequences)) for frame in runs.edge_blocks(store, "r", size)])
        assert_frame_equal(in_order, expected, check_exact=True)
        assert list(runs.edge_blocks(store, "nobody", size)) == []


@pytest.mark.slow
def test_what_cannot_be_run_is_refused_before_anything_is_written(tiny, tmp_path):
    atlas = tmp_path / "new"
    for changes, message in [
        ({"limit": 0}, "--limit 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"settings": EdgeSettings(steps=0)}, "--steps 0"),
        ({"sites": ("resid_0", "nonsense")}, "unknown site 'nonsense'"),
        ({"sites": ("resid_7",)}, "resid_7"),
        ({"dictionaries": str(tmp_path / "none")}, "none"),
    ]:
        with pytest.raises(UserError, match=message):
            ingest_edges(options(tiny, atlas, **changes))
    assert not atlas.exists()


def test_a_store_that_is_down_is_said_in_one_line(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("NEO4J_USERNAME", "neo4j")
    monkeypatch.setenv("NEO4J_PASSWORD", "secret-word")
    with pytest.raises(StoreUnreachable) as caught:
        ingest_edges(options(tiny, tmp_path, "bolt://127.0.0.1:1"))
    assert "bolt://127.0.0.1:1" in str(caught.value)
    assert "secret-word" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_an_error_of_the_writer_stops_the_run_and_leaves_whole_sequences(tiny, tmp_path, monkeypatch):
    original = writing.NodeTable.unseen
    calls = []

    def failing(self, blocks):
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("disk on fire")
        return original(self, blocks)

    monkeypatch.setattr(writing.NodeTable, "unseen", failing)
    with pytest.raises(pipeline.WriterFailed, match="disk on fire"):
        ingest_edges(options(tiny, tmp_path / "broken"))
    monkeypatch.undo()
    resumed = ingest_edges(options(tiny, tmp_path / "broken"))
    assert resumed.n_skipped == 8
    whole = ingest_edges(options(tiny, tmp_path / "whole"))
    assert_same(snapshot(tmp_path / "whole", None, whole.run), snapshot(tmp_path / "broken", None, whole.run))


@pytest.mark.slow
def test_the_same_pairs_in_other_words_are_the_same_run(tiny, tmp_path):
    """A file's pairs do not depend on the seed: the run keeps what was said of it first."""
    first = ingest_edges(options(tiny, tmp_path))
    again = ingest_edges(options(tiny, tmp_path, seed=99))
    assert again.run == first.run
    with open_graph(tmp_path) as store:
        assert store.query("MATCH (r:Run) RETURN r.seed AS seed").rows() == [(0,)]


def test_left_out_lines_are_told(tiny, tmp_path):
    task = tmp_path / "pairs.jsonl"
    lines = (tiny / "task.jsonl").read_text().splitlines()
    task.write_text("\n".join([*lines[:3], '{"clean": "w1"}']) + "\n")
    told = []
    summary = ingest_edges(options(tiny, tmp_path, task=str(task), skip_invalid=True), report=lambda path, refusal: told.append(refusal.line))
    assert (summary.n_sequences, told) == (3, [4])


def measured(plan, atlas, by_position=False):
    """Statistics of the plan's prompts, clean and corrupted."""
    statistics_options = StatisticsOptions(second_moments=False, by_position=by_position)
    corpus = pair_corpus("tiny", plan.pairs, plan.model.tokenizer, statistics_options)
    with StatisticsStore(atlas) as statistics:
        return measure_statistics(statistics, plan.model, plan.dictionaries, corpus, statistics_options)


@pytest.mark.slow
def test_the_mean_baseline_takes_a_statistics_runs_means(tiny, tmp_path):
    chosen = options(tiny, tmp_path, settings=EdgeSettings(positions=Positions.KEEP, baseline=Baseline.MEAN), limit=3)
    plan = plan_run(options(tiny, tmp_path, limit=3))
    record = measured(plan, tmp_path)
    with pytest.raises(UserError, match="--statistics-run"):
        ingest_edges(chosen)
    chosen = replace(chosen, statistics_run=record.run)
    means = plan_run(chosen).means
    assert plan_run(replace(chosen, statistics_run=record.run[:8])).run == plan_run(chosen).run
    texts = [text for pair in plan.pairs for text in (pair.clean, pair.corrupt)]
    site = parse_site("resid_1")
    values = torch.cat(
        [plan.binding.forward(plan.model.tokenizer(t, return_tensors="pt")["input_ids"], {site: Basis.RESIDUAL}).values[site][0] for t in texts]
    )
    torch.testing.assert_close(means[site].features.float(), values.mean(0), rtol=1e-4, atol=1e-5)
    assert ingest_edges(chosen).n_edges > 0
    with pytest.raises(UserError, match=r"per position were not measured at resid_0.*--by-position"):
        plan_run(replace(chosen, settings=replace(chosen.settings, per_position=True)))


@pytest.mark.slow
def test_noise_and_means_per_position_give_the_edges_of_their_moments(tiny, tmp_path):
    """With identity dictionaries and one step an effect on y is gradient · (clean − baseline): the baseline comes back out of the stored edges."""
    plan = plan_run(options(tiny, tmp_path, limit=3, sites=("resid_1",)))
    run = measured(plan, tmp_path, by_position=True).run
    keep = EdgeSettings(steps=1, positions=Positions.KEEP)
    chosen = options(tiny, tmp_path, limit=3, sites=("resid_1",), statistics_run=run)
    choices = [replace(keep, baseline=Baseline.MEAN, per_position=True), replace(keep, baseline=Baseline.MEAN)]
    choices += [replace(keep, baseline=Baseline.NOISE, noise_seed=seed, noise_scale=scale) for seed, scale in ((0, 1.0), (1, 1.0), (0, 2.0))]
    summaries = [ingest_edges(replace(chosen, settings=settings)) for settings in choices]
    assert len({summary.run for summary in summaries}) == len(choices)
    site = parse_site("resid_1")
    with StatisticsStore(tmp_path, read_only=True) as statistics:
        moments = statistics.baseline_means(run, "resid_1")
    pair = plan.pairs[0]
    with torch.no_grad():
        tokens = plan.model.tokenizer(pair.clean, return_tensors="pt")["input_ids"]
        clean = plan.binding.forward(tokens, {site: Basis.RESIDUAL}).values[site][0]
    with open_graph(tmp_path) as store:
        effects = []
        for summary in summaries:
            edges = store.read_edges("ATTRIBUTES", run=summary.run, sequence=pair.key)
            assert (edges["dest_pos"].unique().to_list(), edges["src_pos"].n_unique()) == ([len(clean) - 1], 1), "y reads the last position alone"
            index = edges["source"].str.split("|").list.last()
            weight = dict(zip(index, edges["weight"]))
            effects.append(torch.tensor([weight[str(i)] for i in range(len(clean[0]))]))
    by_position, overall, *noisy = effects
    last = clean[-1].double()
    gradient = overall / (last - torch.tensor(moments.features))  # what the effects on y have in common
    expected = gradient * (last - torch.tensor(moments.position_features[len(clean) - 1]))
    torch.testing.assert_close(by_position.double(), expected.double(), rtol=1e-3, atol=1e-6)
    draws = [-effect / (gradient * torch.tensor(moments.features_std)) for effect in noisy]
    torch.testing.assert_close(2 * draws[0], draws[2], rtol=1e-3, atol=1e-4)
    assert all(0.4 < draw.std() < 1.7 for draw in draws[:2]), "16 numbers of N(0, 1)"
    assert not torch.allclose(draws[0], draws[1], atol=0.1)


def test_settings_of_other_baselines_are_no_part_of_a_run():
    plain = EdgeSettings()
    assert replace(plain, noise_scale=2.0, noise_seed=4).identity == plain.identity
    assert not plain.identity.keys() & {"noise_scale", "noise_seed", "per_position"}
    noise, mean = replace(plain, baseline=Baseline.NOISE), replace(plain, baseline=Baseline.MEAN)
    assert noise.identity != replace(noise, noise_seed=1).identity != replace(noise, noise_scale=2.0).identity
    assert mean.identity != replace(mean, per_position=True).identity
    with pytest.raises(UserError, match="per position are of baseline mean, not of noise"):
        replace(noise, per_position=True).check()


def test_a_features_target_has_the_effects_that_backward_gives(tiny, tmp_path):
    """y is the third number of resid_1 at the last position but one; with identity dictionaries an effect on it is gradient times change."""
    chosen = options(tiny, tmp_path, sites=("resid_0", "mlp_1"), target="resid_1/3@-2", settings=EdgeSettings(steps=1))
    summary = ingest_edges(chosen)
    plan = plan_run(chosen)
    assert summary.sites == ("resid_0", "mlp_1")
    here, source = parse_site("resid_1"), parse_site("resid_0")
    expected = {}
    for pair in plan.pairs:
        clean, corrupt = (plan.model.tokenizer(text, return_tensors="pt")["input_ids"] for text in (pair.clean, pair.corrupt))
        bases = {source: Basis.RESIDUAL, parse_site("mlp_1"): Basis.RESIDUAL}
        leaf = lambda x: x.detach().requires_grad_()
        # The effect of resid_0 past mlp_1, which is a site of its own: mlp_1 is held.
        with torch.enable_grad():
            run = plan.binding.forward(clean, bases | {here: Basis.RESIDUAL}, patches={source: leaf, parse_site("mlp_1"): torch.Tensor.detach})
            (gradient,) = torch.autograd.grad(run.values[here][0, -2, 3], run.values[source])
        change = run.values[source].detach() - plan.binding.forward(corrupt, bases).values[source]
        for index, effect in enumerate((gradient * change)[0].sum(0).tolist()):
            expected[pair.key, index] = effect
    with open_graph(tmp_path) as store:
        edges = store.read_edges("ATTRIBUTES", run=summary.run)
        nodes = store.query("MATCH (f:Feature) WHERE f.kind = 'output' RETURN f.key AS key, f.label AS label")
        index = store.query("MATCH (f:Feature) WHERE f.site = 'resid_0' RETURN f.key AS source, f.`index` AS number")
        (run,) = store.query("MATCH (r:Run) RETURN r.metric AS metric, r.method AS method, r.settings AS settings").rows()
    assert nodes.rows() == [(f"{plan.model.key}|-|y|feature resid_1/3@-2|identity", "feature resid_1/3@-2")]
    assert run[:2] == ("feature resid_1/3@-2", "attribution patching")
    assert json.loads(run[2])["target"] == {"kind": "feature", "site": "resid_1", "dictionary": "identity", "index": 3, "position": -2}
    direct = edges.filter(pl.col("target") == nodes["key"][0]).join(index, on="source")
    found = {(sequence, number): weight for sequence, number, weight in direct.select("sequence", "number", "weight").iter_rows()}
    assert len(found) > 100
    for key, effect in expected.items():
        assert found.get(key, 0.0) == pytest.approx(effect, rel=1e-3, abs=2e-6)


@pytest.mark.slow
def test_targets_are_runs_of_their_own_and_mistakes_come_first(tiny, tmp_path):
    probe = tmp_path / "probe.safetensors"
    save_file({"weight": torch.linspace(-1, 1, 16)}, probe, metadata={"site": "resid_1", "name": "slope"})
    base = options(tiny, tmp_path / "atlas", limit=3)
    runs_found = {text: ingest_edges(replace(base, target=text)).run for text in (None, "resid_1/3", "resid_1/4", "mlp_1/3", str(probe))}
    assert len(set(runs_found.values())) == 5
    with open_graph(tmp_path / "atlas") as store:
        metrics = dict(store.query("MATCH (r:Run) RETURN r.key AS run, r.metric AS metric").rows())
        outputs = store.query("MATCH (f:Feature) WHERE f.kind = 'output' RETURN count(f) AS n")["n"][0]
    assert (metrics[runs_found[None]], metrics[runs_found[str(probe)]], outputs) == ("logit_diff", "probe slope", 5)
    for changes, message in [
        ({"target": "resid_1/99"}, "features 0 to 15"), ({"target": "resid_0/1", "sites": ("mlp_1",)}, "target resid_0 reads none"),
        ({"target": "resid_1/1@5"}, "position 5, and a sequence has 5 tokens"), ({"target": "resid_9/1"}, "resid_9"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            ingest_edges(options(tiny, tmp_path / "none", **changes))
    assert not (tmp_path / "none").exists()


def test_a_feature_that_is_inactive_has_no_edges(tiny, tmp_path):
    """A dictionary whose feature 1 never fires: its run ends well, with nothing in it."""
    folder = tmp_path / "dictionaries" / "resid_1"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    weights = {"W_enc": torch.randn(16, 2), "W_dec": torch.randn(2, 16), "b_enc": torch.tensor([50.0, -1000.0]), "b_dec": torch.zeros(16)}
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"architecture": "standard", "d_in": 16, "d_sae": 2, "metadata": {}}))
    shutil.copytree(folder, folder.parent / "resid_0")
    base = options(tiny, tmp_path / "atlas", dictionaries=str(folder.parent), sites=("resid_0",), limit=3)
    active, inactive = (ingest_edges(replace(base, target=f"resid_1/{i}")) for i in (0, 1))
    assert (active.n_edges > 0, inactive.n_edges, inactive.n_sequences) == (True, 0, 3)


@pytest.mark.slow
def test_resampling_is_a_counterfactual_with_the_donors_prompt(tiny, tmp_path):
    chosen = options(tiny, tmp_path, settings=EdgeSettings(steps=1, baseline=Baseline.RESAMPLE), seed=3)
    plan = plan_run(chosen)
    lines = []
    for batch in plan.batches():
        for pair, donor in zip(batch.pairs, batch.donor, strict=True):
            answers = {"answer": pair.answer, "wrong_answer": pair.wrong_answer}
            lines.append({"clean": pair.clean, "corrupt": plan.model.tokenizer.decode(donor), **answers})
    task = tmp_path / "donors.jsonl"
    task.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    first = ingest_edges(chosen)
    explicit = ingest_edges(options(tiny, tmp_path, task=str(task), settings=EdgeSettings(steps=1)))
    assert plan_run(replace(chosen, batch_size=3)).run == first.run
    assert plan_run(replace(chosen, seed=4)).run != first.run
    with open_graph(tmp_path) as store:
        clean = store.query("MATCH (s:Sequence) RETURN s.key AS sequence, s.clean AS clean")
        tables = [
            store.read_edges("ATTRIBUTES", run=summary.run).join(clean, on="sequence").sort("clean", "source", "target")
            for summary in (first, explicit)
        ]
    shown = [table.select("clean", "source", "target", "weight") for table in tables]
    assert_frame_equal(*shown, check_exact=False, rel_tol=1e-3, abs_tol=1e-6)
    assert shown[0].height > 500


@pytest.mark.slow
def test_prompts_begin_as_the_dictionaries_or_the_user_say(tiny, tmp_path):
    """With the token put in front, edges are those of prompts that spell it."""
    model = tmp_path / "model"
    shutil.copytree(tiny / "model", model)
    tokenizer = word_tokenizer()
    tokenizer.bos_token = "w46"
    tokenizer.save_pretrained(model)
    spelt = tmp_path / "task.jsonl"
    lines = [json.loads(line) for line in (tiny / "task.jsonl").read_text().splitlines()]
    spelt.write_text("\n".join(json.dumps({**line, **{name: f"w46 {line[name]}" for name in ("clean", "corrupt")}}) for line in lines) + "\n")
    base = options(tiny, tmp_path / "atlas", model=str(model), limit=5, settings=EdgeSettings(steps=1, positions=Positions.KEEP))
    summaries = [ingest_edges(replace(base, bos=True)), ingest_edges(replace(base, task=str(spelt))), ingest_edges(base)]
    assert len({summary.run for summary in summaries}) == 3
    with open_graph(tmp_path / "atlas") as store:
        begin, spelled, bare = (store.read_edges("ATTRIBUTES", run=summary.run) for summary in summaries)
        stated = {run: json.loads(settings)["bos"] for run, settings in store.query("MATCH (r:Run) RETURN r.key AS r, r.settings AS s").rows()}
    assert [stated[summary.run] for summary in summaries] == [True, False, False]
    order = ["source", "target", "src_pos", "dest_pos", "weight"]
    assert_frame_equal(begin.select(order).sort(order), spelled.select(order).sort(order), check_exact=False, rel_tol=1e-4, abs_tol=1e-7)
    assert (begin["dest_pos"].max(), bare["dest_pos"].max()) == (6, 5)
    with pytest.raises(UserError, match="--bos yes wants"):
        ingest_edges(options(tiny, tmp_path / "none", bos=True))


@pytest.mark.slow
def test_the_manifest_says_how_the_run_was_made(tiny, tmp_path):
    summary = ingest_edges(options(tiny, tmp_path))
    manifest = json.loads((tmp_path / "runs" / f"{summary.run}.json").read_text())
    assert manifest["status"] == "done"
    assert manifest["summary"]["n_edges"] == summary.n_edges
    assert {"torch", "featlas", "python"} <= manifest["versions"].keys()
    assert manifest["device"] == "cpu"
    assert manifest["dictionaries"] == {"resid_0": "identity", "mlp_1": "identity", "resid_1": "identity"}
