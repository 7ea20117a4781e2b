"""Finding regions: known blocks recovered, no more than one where there is nothing, and everything that a user may choose."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from featlas.analysis import finding
from featlas.analysis.correlations import Correlation, Null
from featlas.analysis.finding import FindingOptions, NoSites, find_parcellation, find_partition, like, usual
from featlas.analysis.levels import NoSuchLevel, Rule, choose
from featlas.analysis.parcellation import PATH_SCORES, Parcellation, PartitionPath, SitePartition
from featlas.analysis.partitioning import PartitionMethod, ami
from featlas.analysis.planted import PlantedData, planted, unstructured
from featlas.errors import UserError
from featlas.queries.samples import SampleRun, SiteSamples

TOKENS = 10  # of each sequence
QUICK = FindingOptions(method=PartitionMethod.WARD, rule=Rule.GIVEN, n_blocks=6, nulls=0)


@functools.cache
def data(kind: str = "gauss", seed: int = 0, n: int = 48, n_blocks: int = 6) -> PlantedData:
    return planted(kind, n, seed=seed, samples=1500, noise_share=0.0, n_blocks=n_blocks)


def samples_of(values: np.ndarray, dead: int = 0, site: str = "resid_0") -> SiteSamples:
    """Values (T, n) as a site's samples in sequences of ten tokens, with dead features between the others, or after them."""
    n_tokens, n = values.shape
    wide = np.zeros((n_tokens, n + dead), dtype=np.float32)
    wide[:, live_places(n, dead)] = values
    return SiteSamples(site, f"d {site}", n + dead, wide, np.arange(n_tokens) // TOKENS, np.arange(n_tokens) % TOKENS)


def live_places(n: int, dead: int) -> np.ndarray:
    """Where the live ones are: as far as it goes, every second feature is dead."""
    between = np.minimum(2 * np.arange(dead), n + np.arange(dead))
    return np.setdiff1d(np.arange(n + dead), between)


def run_of(basis: str = "activation", key: str = "s1", sites: tuple[str, ...] = ("resid_0",)) -> SampleRun:
    sequences = pl.DataFrame({"sequence": range(150), "key": [str(i) for i in range(150)], "task": "ioi", "label": "x", "text": ""})
    return SampleRun(key, "tiny@1", basis, "ioi", {site: f"d {site}" for site in sites}, 150, 1500, {}, sequences)


@functools.cache
def found(kind: str, seed: int) -> SitePartition:
    return find_partition(samples_of(data(kind, seed).samples, dead=7), FindingOptions(n_heads=3))


# --- what is there is found -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "seed"), [("gauss", 0), ("sae", 1)])
def test_planted_blocks_are_recovered(kind, seed) -> None:
    own = found(kind, seed)
    assert ami(own.levels[own.chosen].labels, data(kind, seed).fine) > 0.9
    assert own.features.tolist() == live_places(48, 7).tolist()
    assert own.labels_of()[own.features].tolist() == own.levels[own.chosen].labels.tolist()
    assert (np.delete(own.labels_of(), own.features) == -1).all()  # the dead are in no block
    assert own.notes["significant"]
    assert own.notes["gain"] > max(own.notes["null_gains"])
    assert len(own.notes["null_gains"]) == 3
    assert (own.notes["n_live"], own.notes["n_dead"], own.notes["n_tokens"]) == (48, 7, 1500)


def test_what_is_kept_are_levels_of_the_path() -> None:
    own = found("gauss", 0)
    assert dict(own.scores.schema) == dict(PATH_SCORES)
    numbers = own.scores["n_blocks"].to_numpy()
    blocks = [level.n_blocks for level in own.levels]
    assert blocks == sorted(set(blocks), reverse=True)  # fine to coarse, none twice
    assert set(blocks) <= set(numbers.tolist())
    PartitionPath("kept", np.stack([level.labels for level in own.levels]))  # nested: raises where not
    assert "held-out likelihood" in own.levels[own.chosen].rule
    by_rule = {rule: level.n_blocks for level in own.levels for rule in level.rule.split(", ")}
    best = own.scores.sort("held_out", "n_blocks", descending=[True, False])["n_blocks"][0]
    assert by_rule["held-out likelihood"] == best
    assert by_rule["more blocks than heads"] == min(n for n in numbers if n > 3)
    stable = own.scores.filter(pl.col("n_blocks") > 1).sort("stability", descending=True, maintain_order=True)["n_blocks"][0]
    assert by_rule["stability between halves"] == stable


def test_a_start_that_stays_coarse_comes_to_an_end(monkeypatch) -> None:
    """The dense model may give fewer blocks than it began with, however many that were: the finest level may always be the best."""
    begun: list[int | None] = []
    halves = np.stack([np.arange(48) // 16, np.zeros(48, dtype=np.int64)])

    def three_blocks(method, correlation, options) -> PartitionPath:
        begun.append(options.n_blocks)
        return PartitionPath("dense-sbm", halves)

    monkeypatch.setattr(finding, "partition", three_blocks)
    monkeypatch.setattr(finding, "_starts_too_coarse", lambda *known: True)
    own = find_partition(samples_of(data().samples), FindingOptions(nulls=0))
    assert list(dict.fromkeys(begun)) == [None, 6, 12]
    assert {level.n_blocks for level in own.levels} <= {1, 3}


def test_the_same_whatever_the_order_of_features() -> None:
    order = np.random.default_rng(1).permutation(48)
    own, mixed = (find_partition(samples_of(values), QUICK) for values in (data().samples, data().samples[:, order]))
    assert ami(own.levels[0].labels[order], mixed.levels[0].labels) == pytest.approx(1)


# --- what is not there is not found -----------------------------------------------------------------------------------


def test_nothing_but_chance_is_one_block() -> None:
    own = find_partition(samples_of(unstructured("gauss", 30, seed=2, samples=1000).samples, dead=3), FindingOptions())
    assert [level.n_blocks for level in own.levels] == [1]
    assert own.chosen == 0
    assert sorted(set(own.labels_of().tolist())) == [-1, 0]
    assert own.notes["verdict"] == "one block by the rule “held-out likelihood”"
    assert own.levels[0].rule == "held-out likelihood"
    assert own.scores.height > 1  # what was looked at is kept


def test_single_features_agree_with_themselves_and_are_no_stable_level() -> None:
    own = find_partition(samples_of(unstructured("gauss", 30, seed=2, samples=1000).samples), FindingOptions(rule=Rule.STABILITY, nulls=0))
    assert own.scores.filter(pl.col("n_blocks") == 30)["stability"].to_list() == [pytest.approx(1)]
    assert 1 < own.levels[own.chosen].n_blocks < 30


def test_more_blocks_than_chance_are_asked_for_are_taken_back() -> None:
    """Ward cuts anything into six; shuffled samples say that there was nothing to cut."""
    values = unstructured("gauss", 30, seed=3, samples=1000).samples
    untested = find_partition(samples_of(values), QUICK)
    assert untested.levels[untested.chosen].n_blocks == 6
    own = find_partition(samples_of(values), replace(QUICK, nulls=3))
    assert own.levels[0].n_blocks == 1
    assert own.notes["verdict"] == "no more than in shuffled samples: one block"
    assert own.scores.height > 1  # what was looked at is kept
    assert 0 < own.notes["p"] <= 1


def test_given_blocks_such_as_heads_stay_what_they_are() -> None:
    """Blocks of all features, live or dead, by their numbers in the dictionary: of each what is live stays together."""
    samples = samples_of(data().samples, dead=7)
    heads = np.arange(samples.d_sae) // 5  # eleven slices of the features
    own = find_partition(samples, FindingOptions(method=PartitionMethod.HEADS, labels_of={"resid_0": heads}, nulls=0))
    labels = own.levels[own.chosen].labels
    assert ami(labels, heads[own.features]) == 1.0
    assert (own.levels[own.chosen].n_blocks, len(own.levels)) == (len(set(heads[own.features])), 1)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_too_few_live_features_are_one_block(n) -> None:
    own = find_partition(samples_of(data().samples[:, :n], dead=5), FindingOptions())
    assert (len(own.features), own.d_sae, len(own.levels)) == (n, n + 5, 1)
    assert own.notes["verdict"] == f"{n} live features are too few for a partition: one block"
    assert own.labels_of().tolist().count(-1) == 5
    assert own.scores.is_empty()


def test_rare_features_are_dead() -> None:
    values = np.zeros((1500, 8), dtype=np.float32)
    values[:, :5] = data().samples[:, :5]
    values[::20, 5] = np.arange(75) + 1  # in every other sequence
    values[:30, 6] = np.arange(30) + 1  # often enough, in three sequences
    values[:, 7] = 2.0  # always the same
    own = find_partition(samples_of(values), replace(QUICK, n_blocks=2))
    assert own.features.tolist() == [0, 1, 2, 3, 4, 5]
    assert find_partition(samples_of(values), replace(QUICK, n_blocks=2, min_count=60)).features.tolist() == [0, 1, 2, 3, 4]
    fewer = find_partition(samples_of(values), replace(QUICK, n_blocks=2, min_count=1, min_sequences=1))
    assert fewer.features.tolist() == [0, 1, 2, 3, 4, 5, 6]


# --- choices ----------------------------------------------------------------------------------------------------------


def test_a_given_number_of_blocks() -> None:
    for n in (2, 5, 9):
        own = find_partition(samples_of(data().samples), replace(QUICK, n_blocks=n))
        assert own.levels[own.chosen].n_blocks == n
        assert "number of blocks" in own.levels[own.chosen].rule
    own = find_partition(samples_of(data().samples), replace(QUICK, n_blocks=100))
    assert own.levels[own.chosen].n_blocks == 48  # as many as there are features, no more


@pytest.mark.parametrize("rule", [Rule.STABILITY, Rule.HEADS, Rule.DESCRIPTION_LENGTH])
def test_other_rules_choose_as_levels_do(rule) -> None:
    own = find_partition(samples_of(data().samples), FindingOptions(rule=rule, n_heads=3, nulls=0))
    blocks = own.scores["n_blocks"].to_numpy()
    path = SimpleNamespace(n_blocks=blocks)
    assert own.levels[own.chosen].n_blocks == blocks[choose(path, own.scores, rule, n_heads=3)]
    assert rule.value in own.levels[own.chosen].rule


def test_a_rule_without_its_ground_is_refused() -> None:
    with pytest.raises(NoSuchLevel, match="description_length was not measured"):
        find_partition(samples_of(data().samples), FindingOptions(method=PartitionMethod.WARD, rule=Rule.DESCRIPTION_LENGTH, nulls=0))
    with pytest.raises(NoSuchLevel, match="needs the number of heads"):
        find_partition(samples_of(data().samples), FindingOptions(method=PartitionMethod.WARD, rule=Rule.HEADS, nulls=0))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"min_count": 0}, "--min-count 0 is too small: give at least 1"),
        ({"min_sequences": 0}, "--min-sequences 0"),
        ({"nulls": -1}, "--nulls -1"),
        ({"nulls": 1}, "--nulls 1 is too small: give at least 3"),
        ({"nulls": 2}, "--nulls 2 is too small: give at least 3"),
        ({"rule": Rule.GIVEN, "n_blocks": None}, "--level 40"),
    ],
)
def test_options_out_of_range(changes, said) -> None:
    with pytest.raises(UserError, match=said):
        find_parcellation(run_of(), [samples_of(data().samples)], replace(QUICK, **changes))


def test_signs_that_follow_the_pair_are_left_out_of_attributions() -> None:
    """Blocks of features that matter at the same tokens, each with a sign of its own at every token: only magnitudes know of them."""
    random = np.random.default_rng(0)
    scale = np.exp(1.5 * random.normal(size=(1500, 4)))
    blocks = np.arange(24) % 4
    values = (scale[:, blocks] * random.choice([-1.0, 1.0], size=(1500, 24)) * random.uniform(0.7, 1.3, (1500, 24))).astype(np.float32)
    agreements = {}
    for basis in ("attribution", "activation"):
        parcellation = find_parcellation(run_of(basis), [samples_of(values)], replace(QUICK, n_blocks=4))
        assert parcellation.settings["correlation"] == usual(basis).value
        own = parcellation.sites["resid_0"]
        agreements[basis] = ami(own.levels[own.chosen].labels, blocks)
    assert agreements["attribution"] > 0.95 > 0.5 > agreements["activation"]


def test_given_labels_are_heads() -> None:
    labels = np.repeat([2, 0, 1, 5], 3)
    options = FindingOptions(method=PartitionMethod.HEADS, rule=Rule.GIVEN, n_blocks=4, nulls=0, labels_of={"resid_0": labels})
    own = find_partition(samples_of(data().samples[:, :9], dead=3), options)
    assert ami(own.levels[0].labels, labels[own.features]) == pytest.approx(1)
    assert own.levels[0].n_blocks == len(set(labels[own.features].tolist()))


# --- parcellations ----------------------------------------------------------------------------------------------------


def parcellation(options: FindingOptions = QUICK, key: str = "s1", sites: tuple[str, ...] = ("resid_0", "resid_1")) -> Parcellation:
    samples = (samples_of(data(seed=i).samples[:, : 48 - 8 * i], site=site) for i, site in enumerate(sites))
    return find_parcellation(run_of(key=key, sites=sites), samples, options)


def test_a_parcellation_says_where_it_is_from() -> None:
    told: list[str] = []
    own = find_parcellation(run_of(), [samples_of(data().samples)], QUICK, progress=told.append)
    assert (own.samples, own.model, own.method, own.basis) == ("s1", "tiny@1", "ward", "activation")
    assert list(own.sites) == ["resid_0"]
    assert own.settings["n_blocks"] == 6
    assert all(line.startswith("resid_0: ") for line in told)
    assert [line.partition(": ")[2] for line in told] == ["correlations of 48 features", "ward", "levels"]
    with pytest.raises(NoSites, match="samples s1 have no such site: they are of resid_0"):
        find_parcellation(run_of(), [], QUICK)


@pytest.mark.slow
def test_the_key_is_of_what_determines_the_partitions() -> None:
    own = parcellation()
    again = parcellation()
    assert again.key == own.key
    for name in own.sites:
        assert np.array_equal(again.sites[name].labels_of(), own.sites[name].labels_of())
    # Where it is computed, and how long it may take, is no part of it.
    assert parcellation(replace(QUICK, device="cpu", seconds=7.0)).key == own.key
    assert parcellation(replace(QUICK, correlation=Correlation.PEARSON)).key == own.key  # what activations have anyway
    changes = {
        "method": PartitionMethod.SPECTRAL, "rule": Rule.HELD_OUT, "n_blocks": 5, "n_heads": 2, "correlation": Correlation.SPEARMAN, "min_count": 11,
        "min_sequences": 6, "null": Null.PERMUTED, "neighbours": 5, "seed": 1, "blocks_of": {"resid_0": 3},
    }  # fmt: skip
    keys = {name: parcellation(replace(QUICK, **{name: value}), sites=("resid_0",)).key for name, value in changes.items()}
    keys |= {"samples": parcellation(key="s2", sites=("resid_0",)).key, "none": parcellation(sites=("resid_0",)).key, "sites": own.key}
    assert len(set(keys.values())) == len(keys)


@pytest.mark.slow
@pytest.mark.parametrize("method", [PartitionMethod.SPECTRAL, PartitionMethod.WARD, PartitionMethod.RANDOM, PartitionMethod.DENSE_SBM])
def test_others_like_it_have_as_many_blocks_at_every_site(method) -> None:
    own = parcellation(replace(QUICK, n_blocks=None, blocks_of={"resid_0": 7, "resid_1": 4}))
    assert [site.levels[site.chosen].n_blocks for site in own.sites.values()] == [7, 4]
    other = parcellation(like(QUICK, own, method))
    assert other.method == method.value
    assert [site.levels[site.chosen].n_blocks for site in other.sites.values()] == [7, 4]
    assert other.key != own.key or method is PartitionMethod.WARD
