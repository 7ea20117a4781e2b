"""What a region is: every figure of a description against loops written from its definition."""

import math
from collections import Counter

import numpy as np
import polars as pl
import pytest
from featlas.analysis.correlations import Correlation
from featlas.analysis.parcellation import PATH_SCORES, Level, NotAPartition, Parcellation, SitePartition
from featlas.analysis.regions import BLOCKS, CONTEXTS, EXEMPLARS, PURPOSES, SITES, DescribeOptions, Description, describe
from featlas.queries.samples import SiteSamples
from scipy import sparse, stats
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.metrics import adjusted_mutual_info_score

N_SEQUENCES, LENGTH, D_SAE, D_IN = 24, 6, 12, 7
FEATURES = np.array([0, 1, 2, 4, 5, 7, 8, 10, 11])  # 3, 6 and 9 are dead
FINE, COARSE = np.array([0, 0, 0, 1, 1, 2, 2, 3, 0]), np.array([0, 0, 0, 1, 1, 1, 1, 1, 0])
TASKS = ("ioi", "agreement", "gender")


class Decoder:
    """A dictionary's decoder alone."""

    def __init__(self, W_dec: np.ndarray) -> None:
        self.W_dec = W_dec


def case(*, dense: bool = False, signed: bool = False, seed: int = 0) -> tuple[SiteSamples, np.ndarray, pl.DataFrame, pl.DataFrame]:
    """Samples (also as a dense array), sequences of three tasks and their tokens; the first half of the features is stronger on the first task."""
    random = np.random.default_rng(seed)
    n = N_SEQUENCES * LENGTH
    sequence, position = np.repeat(np.arange(N_SEQUENCES), LENGTH), np.tile(np.arange(2, 2 + LENGTH), N_SEQUENCES)
    values = np.maximum(random.normal(size=(n, D_SAE)), 0) * (random.random((n, D_SAE)) < 0.4)
    values[:, 1] += 0.7 * values[:, 0]
    values[:, 6] = values[:, 9] = values[:, 3] = 0.0
    values[np.ix_(sequence % 3 == 0, np.arange(6))] *= 3
    if signed:
        values *= random.choice([-1.0, 1.0], size=values.shape)
    values = values.astype(np.float32)
    tasks = [TASKS[i % 3] for i in range(N_SEQUENCES)]
    sequences = pl.DataFrame({"sequence": range(N_SEQUENCES), "key": [str(i) for i in range(N_SEQUENCES)], "task": tasks,
                              "label": [f"l{i % 4}" for i in range(N_SEQUENCES)], "text": ""})  # fmt: skip
    tokens = pl.DataFrame({"sequence": sequence, "position": position, "text": [f" s{s}p{p}" for s, p in zip(sequence, position)]})
    stored = values if dense else sparse.csr_matrix(values)
    return SiteSamples("resid_1", "dict", D_SAE, stored, sequence, position), values.astype(np.float64), sequences, tokens


def parcellation(basis: str = "activation", **changes: object) -> Parcellation:
    levels = (Level("fine", FINE), Level("coarse", COARSE))
    own = {"site": "resid_1", "dictionary": "dict", "d_sae": D_SAE, "features": FEATURES, "levels": levels, "chosen": 0,
           "scores": pl.DataFrame(schema=dict(PATH_SCORES)), **changes}  # fmt: skip
    return Parcellation("p1", "samples", "m@1", "ward", basis, {"resid_1": SitePartition(**own)})


def described(basis: str = "activation", *, seed: int = 0, **options: int) -> tuple[Description, np.ndarray, np.ndarray, SiteSamples]:
    samples, values, sequences, tokens = case(signed=basis == "attribution", seed=seed)
    decoder = np.random.default_rng(9).normal(size=(D_SAE, D_IN))
    found = describe(parcellation(basis), lambda site: samples, sequences, tokens, dictionaries={"resid_1": Decoder(decoder)},
                     options=DescribeOptions(**options))  # fmt: skip
    return found, values, decoder, samples


def block_rows(found: Description, level: int) -> list[dict[str, object]]:
    return found.blocks.filter(pl.col("level") == level).sort("block").to_dicts()


@pytest.mark.parametrize(("level", "labels"), [(0, FINE), (1, COARSE)])
def test_correlations_and_cosines_inside_and_outside_are_means_over_pairs(level: int, labels: np.ndarray) -> None:
    found, values, decoder, _ = described()
    r = np.corrcoef(values[:, FEATURES].T)
    unit = decoder[FEATURES] / np.linalg.norm(decoder[FEATURES], axis=1, keepdims=True)
    rows = block_rows(found, level)
    for name, matrix in (("correlation", r), ("cosine", unit @ unit.T)):
        inside_all, outside_all = [], []
        for b, row in enumerate(rows):
            own = [i for i in range(len(labels)) if labels[i] == b]
            inside = [matrix[i, j] for i in own for j in own if i != j]
            outside = [matrix[i, j] for i in own for j in range(len(labels)) if labels[j] != b]
            assert row["size"] == len(own)
            assert row[f"mean_{name}"] == (pytest.approx(np.mean(inside), abs=1e-9) if inside else None)
            assert row[f"mean_{name}_outside"] == pytest.approx(np.mean(outside), abs=1e-9)
            inside_all += inside
            outside_all += outside
        site = found.sites.filter(pl.col("level") == level).row(0, named=True)
        assert site[f"mean_{name}"] == pytest.approx(np.mean(inside_all), abs=1e-9)
        assert site[f"mean_{name}_outside"] == pytest.approx(np.mean(outside_all), abs=1e-9)


@pytest.mark.parametrize("basis", ["activation", "attribution"])
def test_activity_is_counted_token_by_token(basis: str) -> None:
    found, values, _, _ = described(basis)
    for b, row in enumerate(block_rows(found, 0)):
        own = FEATURES[b == FINE]
        assert row["frequency"] == pytest.approx(np.mean([any(token[f] != 0 for f in own) for token in values]))
        assert row["member_frequency"] == pytest.approx(np.mean([[token[f] != 0 for f in own] for token in values]))
        assert row["mean_activation"] == pytest.approx(np.mean([[abs(token[f]) for f in own] for token in values]))


@pytest.mark.parametrize("basis", ["activation", "attribution"])
def test_a_block_is_for_the_task_on_which_its_members_are_greatest(basis: str) -> None:
    found, values, _, samples = described(basis)
    task_of = [TASKS[s % 3] for s in samples.sequence]
    mean = {}  # of all live features too, as block −1
    for b in (-1, *range(4)):
        own = FEATURES if b < 0 else FEATURES[b == FINE]
        for task in TASKS:
            total = sum(abs(values[t, f]) for t in range(len(values)) if task_of[t] == task for f in own)
            mean[b, task] = total / (N_SEQUENCES / 3 if basis == "attribution" else sum(name == task for name in task_of))
    share = {(b, task): value / sum(mean[b, other] for other in TASKS) for (b, task), value in mean.items()}
    for b, row in enumerate(block_rows(found, 0)):
        best = max(TASKS, key=lambda task: share[b, task])
        apart = max(TASKS, key=lambda task: share[b, task] / share[-1, task])
        assert (row["task"], row["distinctive_task"]) == (best, apart)
        assert row["task_share"] == pytest.approx(share[b, best])
        assert row["distinctive_lift"] == pytest.approx(share[b, apart] / share[-1, apart])
        assert row["task_entropy"] == pytest.approx(-sum(share[b, t] * math.log(share[b, t]) for t in TASKS))
    own = found.purposes.filter((pl.col("level") == 0) & (pl.col("by") == "task"))
    for row in own.iter_rows(named=True):
        assert row["value"] == pytest.approx(mean[row["block"], row["name"]])
        assert row["lift"] == pytest.approx(share[row["block"], row["name"]] / share[-1, row["name"]])
    assert set(found.purposes.filter(pl.col("by") == "class")["name"]) == {"l0", "l1", "l2", "l3"}


def test_classes_stand_in_where_there_is_one_task_and_nothing_where_there_is_none() -> None:
    samples, _, sequences, tokens = case()
    one = describe(parcellation(), lambda site: samples, sequences.with_columns(task=pl.lit("ioi")), tokens)
    assert set(one.blocks["task"]) <= {"l0", "l1", "l2", "l3"}
    corpus = sequences.with_columns(task=pl.lit(None, dtype=pl.String), label=pl.lit(None, dtype=pl.String))
    none = describe(parcellation(), lambda site: samples, corpus, tokens)
    assert none.purposes.is_empty()
    for name in ("task", "task_share", "task_entropy", "distinctive_task", "distinctive_lift", "mean_cosine"):
        assert none.blocks[name].null_count() == none.blocks.height


@pytest.mark.parametrize("basis", ["activation", "attribution"])
def test_exemplars_and_contexts_are_the_greatest(basis: str) -> None:
    found, values, _, samples = described(basis, n_exemplars=2, n_contexts=3, before=2, after=1)
    r = np.corrcoef(values[:, FEATURES].T)
    for b in range(4):
        own = [i for i in range(len(FINE)) if FINE[i] == b]
        mean = {FEATURES[i]: np.mean([r[i, j] for j in own if j != i]) for i in own} if len(own) > 1 else {}
        shown = found.exemplars.filter((pl.col("level") == 0) & (pl.col("block") == b)).sort("rank")
        if not mean:
            assert shown.select("feature", "mean_correlation").rows() == [(FEATURES[own[0]], None)]
        else:
            expected = sorted(mean.items(), key=lambda item: (-item[1], item[0]))[:2]
            assert shown["feature"].to_list() == [feature for feature, _ in expected]
            assert shown["mean_correlation"].to_list() == pytest.approx([value for _, value in expected])
        summed = values[:, FEATURES[b == FINE]].sum(axis=1)
        places: dict[int, int] = {}
        for t in np.argsort(-np.abs(summed), kind="stable"):
            places.setdefault(int(samples.sequence[t]), int(t))
        expected_rows = [t for t in list(places.values())[:3] if summed[t] != 0]
        contexts = found.contexts.filter((pl.col("level") == 0) & (pl.col("block") == b)).sort("rank")
        assert contexts["value"].to_list() == pytest.approx([summed[t] for t in expected_rows])
        for row, t in zip(contexts.iter_rows(named=True), expected_rows, strict=True):
            s, p = int(samples.sequence[t]), int(samples.position[t])
            assert (row["sequence"], row["position"], row["token"], row["task"]) == (s, p, f" s{s}p{p}", TASKS[s % 3])
            assert row["before"] == [f" s{s}p{q}" for q in range(max(2, p - 2), p)]
            assert row["after"] == [f" s{s}p{q}" for q in range(p + 1, min(2 + LENGTH, p + 2))]


def test_are_blocks_a_smaller_dictionary() -> None:
    found, values, decoder, _ = described()
    r = np.corrcoef(values[:, FEATURES].T)
    unit = decoder[FEATURES] / np.linalg.norm(decoder[FEATURES], axis=1, keepdims=True)
    i, j = np.triu_indices(len(FEATURES), 1)
    for level, labels in ((0, FINE), (1, COARSE)):
        row = found.sites.filter(pl.col("level") == level).row(0, named=True)
        assert row["rank_correlation"] == pytest.approx(stats.spearmanr(r[i, j], (unit @ unit.T)[i, j]).statistic)
        ward = fcluster(linkage(unit, "ward"), labels.max() + 1, criterion="maxclust")
        assert row["cosine_ami"] == pytest.approx(adjusted_mutual_info_score(labels, ward))
        assert (row["n_live"], row["n_dead"], row["n_pairs"], row["n_blocks"]) == (9, 3, 36, labels.max() + 1)
    assert found.sites["chosen"].to_list() == [True, False]


def test_blocks_that_are_the_decoders_clusters_agree_with_it_wholly() -> None:
    samples, _, sequences, tokens = case()
    decoder = np.zeros((D_SAE, D_IN))
    decoder[FEATURES] = np.eye(D_IN)[FINE] + 0.05 * np.random.default_rng(1).normal(size=(len(FINE), D_IN))
    found = describe(parcellation(), lambda site: samples, sequences, tokens, dictionaries={"resid_1": Decoder(decoder)})
    fine = found.sites.filter(pl.col("level") == 0).row(0, named=True)
    assert fine["cosine_ami"] == pytest.approx(1.0)
    assert fine["mean_cosine"] > 0.9 > 0.2 > fine["mean_cosine_outside"]


def test_orthogonal_decoders_have_no_likeness() -> None:
    samples, _, sequences, tokens = case()
    found = describe(parcellation(), lambda site: samples, sequences, tokens, dictionaries={"resid_1": Decoder(np.eye(D_SAE))})
    assert found.sites["rank_correlation"].null_count() == found.sites["cosine_ami"].null_count() == 2
    assert found.blocks["mean_cosine"].null_count() == found.blocks.height


def test_drawn_pairs_and_features_estimate_the_same() -> None:
    """More pairs than are wanted: a sample of them, by seed."""
    random = np.random.default_rng(3)
    n, n_tokens = 60, 400
    labels = np.sort(random.integers(0, 4, n))
    hidden = random.normal(size=(n_tokens, 4))
    values = (hidden[:, labels] + random.normal(size=(n_tokens, n))).astype(np.float32)
    decoder = np.eye(4)[labels] @ random.normal(size=(4, 16)) + 0.5 * random.normal(size=(n, 16))
    samples = SiteSamples("resid_1", "dict", n, values, np.repeat(np.arange(40), 10), np.tile(np.arange(10), 40))
    sequences = pl.DataFrame({"sequence": range(40), "task": ["a", "b"] * 20})
    own = parcellation(d_sae=n, features=np.arange(n), levels=(Level("given", labels),))
    whole, drawn = (
        describe(own, lambda site: samples, sequences, dictionaries={"resid_1": Decoder(decoder)}, options=options).sites.row(0, named=True)
        for options in (DescribeOptions(), DescribeOptions(n_pairs=1200, n_clustered=40))
    )
    assert (whole["n_pairs"], drawn["n_pairs"]) == (n * (n - 1) // 2, 1200)
    assert drawn["rank_correlation"] == pytest.approx(whole["rank_correlation"], abs=0.1)
    assert whole["rank_correlation"] > 0.4
    assert drawn["cosine_ami"] == pytest.approx(whole["cosine_ami"], abs=0.3)


def test_dense_samples_are_described_as_sparse_ones() -> None:
    dense, _, sequences, tokens = case(dense=True)
    found, _, decoder, _ = described()
    other = describe(parcellation(), lambda site: dense, sequences, tokens, dictionaries={"resid_1": Decoder(decoder)})
    for name in ("blocks", "exemplars", "contexts", "purposes", "sites"):
        one, two = getattr(found, name), getattr(other, name)
        assert one.schema == two.schema
        for column in one.columns:
            if one[column].dtype == pl.Float64:
                assert one[column].to_list() == pytest.approx(two[column].to_list(), abs=1e-9), (name, column)
            else:
                assert one[column].to_list() == two[column].to_list(), (name, column)


def test_frames_have_their_schemas_and_the_chosen_level_is_found() -> None:
    found, *_ = described()
    for name, schema in (("blocks", BLOCKS), ("exemplars", EXEMPLARS), ("contexts", CONTEXTS), ("purposes", PURPOSES), ("sites", SITES)):
        assert dict(getattr(found, name).schema) == dict(schema)
    assert found.chosen(found.blocks)["level"].unique().to_list() == [0]
    assert found.chosen(found.blocks).height == 4


def test_automatic_labels_say_task_and_tokens_and_what_people_say_stands_above() -> None:
    found, *_ = described()
    row = found.blocks.row(0, named=True)
    top = Counter(c["token"].strip() for c in found.contexts.filter((pl.col("level") == 0) & (pl.col("block") == 0)).to_dicts())
    assert row["automatic_label"].startswith(f"{row['task']} {round(100 * row['task_share'])} %")
    assert any(token in row["automatic_label"] for token in top)
    assert found.blocks["label"].null_count() == found.blocks.height
    labels = pl.DataFrame({"site": ["resid_1"], "level": [0], "block": [2], "label": ["names"]})
    named = found.with_labels(labels)
    assert named.blocks.filter(pl.col("label").is_not_null()).select("level", "block", "label").rows() == [(0, 2, "names")]
    assert named.blocks["automatic_label"].to_list() == found.blocks["automatic_label"].to_list()


def test_automatic_labels_take_the_names_of_exemplary_features() -> None:
    samples, _, sequences, tokens = case()
    corpus = sequences.with_columns(task=pl.lit(None, dtype=pl.String), label=pl.lit(None, dtype=pl.String))
    labels = pl.DataFrame({"site": ["resid_1"] * len(FEATURES), "feature": FEATURES, "label": [f"feature {f}" for f in FEATURES]})
    found = describe(parcellation(), lambda site: samples, corpus, tokens, feature_labels=labels)
    best = found.exemplars.filter((pl.col("level") == 0) & (pl.col("block") == 0)).sort("rank")["feature"].to_list()
    assert found.blocks["automatic_label"][0] == f"feature {best[0]}; feature {best[1]}"
    bare = describe(parcellation(), lambda site: samples, corpus)
    assert bare.blocks["automatic_label"].to_list()[:2] == ["block 0", "block 1"]


def test_what_is_correlated_is_what_the_parcellation_says() -> None:
    samples, values, sequences, _ = case()
    own = parcellation()
    ranked = Parcellation(own.key, own.samples, own.model, own.method, own.basis, own.sites, {"correlation": Correlation.SPEARMAN.value})
    found = describe(ranked, lambda site: samples, sequences).blocks
    r = stats.spearmanr(values[:, FEATURES]).statistic
    assert found["mean_correlation"][0] == pytest.approx(np.mean([r[i, j] for i in range(9) for j in range(9) if i != j and FINE[i] == FINE[j] == 0]))


def test_samples_and_dictionaries_must_be_those_of_the_partition() -> None:
    samples, _, sequences, _ = case()
    with pytest.raises(NotAPartition, match="samples of resid_1 are of dictionary dict, its partition is of other"):
        describe(parcellation(dictionary="other"), lambda site: samples, sequences)
    with pytest.raises(NotAPartition, match="has 5 features, its partition is of 12"):
        describe(parcellation(), lambda site: samples, sequences, dictionaries={"resid_1": Decoder(np.ones((5, 3)))})


def test_a_site_whose_features_are_all_dead_has_no_blocks() -> None:
    samples, _, sequences, _ = case()
    nothing = np.zeros(0, dtype=np.int64)
    found = describe(parcellation(features=nothing, levels=(Level("nothing", nothing),)), lambda site: samples, sequences)
    assert found.blocks.is_empty()
    assert dict(found.blocks.schema) == dict(BLOCKS)
