"""Automatic labels: each rule on numbers worked out by hand, the logit lens against the model itself."""

import math

import numpy as np
import polars as pl
import pytest
import torch
from featlas.analysis.label_rules import (
    CLASSES,
    END,
    INSIDE,
    START,
    Occurrences,
    Rule,
    class_rule,
    classes_of,
    decoder_rule,
    empty,
    from_contexts,
    place_rule,
    quoted,
    region_rule,
    sampled,
    shown,
    summaries,
    task_rule,
    task_shares,
    token_shares,
    tokens_rule,
)
from featlas.analysis.notes import feature_notes, marked
from featlas.analysis.promoted import chance_z, direct_logits, promoted_tokens
from featlas.model.binding import Binding
from featlas.model.loading import load_model
from featlas.model.sites import Basis, parse_site
from featlas.model.weights import ModelWeights
from featlas.queries.labels import checked
from featlas.queries.places import BLOCKS, DRIVES
from featlas.queries.samples import SiteSamples
from scipy import sparse

from .micro import FAMILIES, save_tiny
from .micro_dictionaries import KINDS, tiny_dictionary

TEXTS = ["When", " Ann", " gave", " 7", ",", " Ann", "Who", " 12", "ny", " and"]  # two sequences of 6 and 4 tokens
SEQUENCE, POSITION = np.array([0] * 6 + [1] * 4), np.array([*range(6), *range(4)])


def seen(values: list[list[float]], features: list[int] | None = None) -> Occurrences:
    """Occurrences of features (columns of `values`, (10, n)) in the texts."""
    matrix = sparse.csr_matrix(np.array(values, dtype=np.float32))
    samples = SiteSamples("resid_1", "d", matrix.shape[1], matrix, SEQUENCE, POSITION)
    tokens = pl.DataFrame({"sequence": SEQUENCE, "position": POSITION, "text": TEXTS})
    chosen = list(range(matrix.shape[1])) if features is None else features
    return sampled(samples, tokens, np.array(chosen), [f"k{i}" for i in chosen], "samples s")


def columns(*of: dict[int, float]) -> list[list[float]]:
    """The matrix whose column j has these values at these rows."""
    whole = np.zeros((len(TEXTS), len(of)))
    for j, entries in enumerate(of):
        for row, value in entries.items():
            whole[row, j] = value
    return whole.tolist()


def one(rows: pl.DataFrame, key: str = "k0") -> dict[str, object]:
    return rows.filter(key=key).row(0, named=True)


# -- what it fires on ------------------------------------------------------------------------------------------


def test_tokens_have_their_shares_of_all_activation():
    found = seen(columns({1: 6.0, 5: 2.0, 2: 1.5, 4: -0.5}))
    shares = token_shares(found)
    assert shares.select("token", "share", "n", "n_token").rows() == [(" Ann", 0.8, 2, 2), (" gave", 0.15, 1, 1), (",", 0.05, 1, 1)]
    row = one(tokens_rule(found))
    assert row["label"] == "Ann · gave"  # the comma has less than a tenth
    assert row["confidence"] == pytest.approx(0.95 * 4 / 6)
    assert row["evidence"] == (
        "fires on ‘ Ann’ (80 % of its activation over 10 tokens, at 2 of its 2 occurrences), ‘ gave’ (15 %, at 1 of its 1 occurrences)"
    )
    assert row["source"] == "samples s"


def test_only_the_features_asked_for_are_named_and_silent_ones_have_no_label():
    values = columns({1: 1.0}, {2: 1.0}, {})
    assert tokens_rule(seen(values, [1, 2]))["key"].to_list() == ["k1"]
    assert seen(values).active_keys() == ["k0", "k1"]
    assert tokens_rule(seen(columns({}))).equals(empty())
    assert class_rule(seen(columns({}))).equals(empty())


def test_contexts_stand_in_for_samples():
    contexts = pl.DataFrame(
        [("a", 3.0, ["x"], " cat", ["z"]), ("a", 1.0, [], "Dog", [" is"]), ("b", 2.0, ["y"], "\n", [])],
        schema=["key", "value", "before", "token", "after"], orient="row",
    )  # fmt: skip
    found = from_contexts(contexts, "statistics r")
    rows = tokens_rule(found)
    assert one(rows, "a")["evidence"] == "fires on ‘ cat’ (75 % of its strongest contexts), ‘Dog’ (25 %)"
    assert one(rows, "b")["label"] == "⏎"
    assert found.tokens.rows() == [(" cat", False, False, False), ("Dog", True, False, False), ("\n", False, True, False)]


def test_classes_of_tokens():
    found = seen(columns({0: 1.0}))
    member = pl.DataFrame(classes_of(found.tokens), schema=list(CLASSES)).with_columns(token=pl.Series(TEXTS))
    of = lambda name: [i for i, value in enumerate(member[name]) if value]
    assert of("numbers") == [3, 7]
    assert of("punctuation and symbols") == [4]
    assert of("capitalised words") == [0, 1, 5, 6]
    assert of("relative words") == [0, 6]
    assert of("conjunctions") == [9]
    assert (of(START), of(END), of(INSIDE)) == ([0, 6], [5, 9], [8])


def test_without_blanks_in_tokens_nothing_is_said_to_continue_a_word():
    frame = pl.DataFrame({"text": ["a", "b"], "first": [True, False], "last": [False, True], "inside": [False, True]})
    assert classes_of(frame)[:, CLASSES.index(INSIDE)].tolist() == [0.0, 0.0]


def test_a_class_is_named_where_chance_does_not_explain_it():
    row = one(class_rule(seen(columns({3: 4.0, 7: 4.0, 2: 2.0}))))
    assert row["label"] == "numbers"
    assert row["evidence"] == "fires on numbers (80 % of its activation over 10 tokens; 20 % of all tokens are)"
    assert row["confidence"] == pytest.approx((0.8 - 0.2) / (1 - 0.2) * 3 / 5)
    # All of it is on capitalised words (4 of 10 tokens), at the start and on relative words (2 each): the rarer says more.
    assert one(class_rule(seen(columns({0: 1.0, 6: 1.0}))))["label"] == "relative words"
    assert class_rule(seen(columns({2: 1.0, 3: 0.9}))).is_empty()  # no class has half and more of what is named


def test_order_of_features_and_repetition_change_nothing():
    values = columns({1: 6.0, 5: 2.0}, {3: 1.0, 7: 1.0}, {4: 1.0})
    whole = pl.concat([tokens_rule(seen(values)), class_rule(seen(values))])
    again = pl.concat([tokens_rule(seen(values, [2, 0, 1])), class_rule(seen(values, [2, 0, 1]))])
    assert whole.equals(again)


# -- its decoder -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load_model(str(save_tiny(tmp_path_factory.mktemp("llama") / "model", "llama", words=("yes", "no"))))


@pytest.mark.parametrize("kind", KINDS)
def test_the_lens_is_the_models_own_norm_and_unembedding_with_its_scale_held(llama, kind):
    """Adding a feature's direction to a stream and keeping the norm's scale changes the logits by scale · lens, feature by feature."""
    binding = Binding(llama.module)
    basis = Basis.HEADS if kind == "per_head_linear" else Basis.RESIDUAL
    dictionary = tiny_dictionary(kind, binding.d_heads if basis is Basis.HEADS else binding.d_model, basis=basis)
    site = parse_site("attn_1")
    features = torch.tensor([dictionary.d_sae - 1, 0, 3])
    lens = torch.cat([logits for _, logits in direct_logits(ModelWeights(binding), dictionary, site, features)])
    x = torch.randn(binding.d_model, generator=torch.Generator().manual_seed(3))
    norm = binding.final_norm
    scale = torch.rsqrt(x.pow(2).mean() + norm.variance_epsilon)
    for i, feature in enumerate(features.tolist()):
        zero = torch.zeros(1, dictionary.d_in)
        unit = binding.written(site, dictionary.W_dec[feature][None], basis) - binding.written(site, zero, basis)
        frozen = lambda stream: binding.unembedding(stream * scale * norm.weight)
        torch.testing.assert_close(frozen(x + unit[0]) - frozen(x), scale * lens[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lens_orders_tokens_as_a_long_step_along_the_direction_does(tmp_path, family):
    """Far out along a direction the norm sees the direction alone: the model's own logits order tokens as the lens does, whatever the norm."""
    model = load_model(str(save_tiny(tmp_path / "model", family)))
    binding = Binding(model.module)
    dictionary = tiny_dictionary("relu", binding.d_model)
    site = parse_site("resid_2")
    found = promoted_tokens(model, {site: dictionary}, {"resid_2": [5, 2]}, n=3)
    assert found["feature"].unique().sort().to_list() == [2, 5]
    for feature in (2, 5):
        offset = binding.logits(torch.zeros(binding.d_model))  # a norm's bias, where there is one
        logits = (torch.atanh((binding.logits(1e4 * dictionary.W_dec[feature]) / 20).clamp(-1 + 1e-7, 1 - 1e-7)) if family == "gemma2" else
                  binding.logits(1e4 * dictionary.W_dec[feature]) - offset)  # fmt: skip
        order = logits.argsort(descending=True)
        names = [model.tokenizer.decode([i]) for i in order.tolist()]
        own = found.filter(feature=feature)
        assert own.filter("promotes")["token"].to_list() == names[:3]
        assert own.filter(~pl.col("promotes"))["token"].to_list() == names[::-1][:3]


def test_z_is_the_distance_from_the_mean_over_the_vocabulary(llama):
    site, dictionary = parse_site("resid_1"), tiny_dictionary("topk", 16)
    found = promoted_tokens(llama, {site: dictionary}, {"resid_1": [4]}, n=2)
    ((_, logits),) = direct_logits(ModelWeights(Binding(llama.module)), dictionary, site, torch.tensor([4]))
    values = logits[0].double().numpy()
    naive = sorted((values - values.mean()) / values.std())
    assert found["z"].to_list() == pytest.approx([naive[-1], naive[-2], naive[0], naive[1]], rel=1e-5)
    assert found["promotes"].to_list() == [True, True, False, False]
    assert promoted_tokens(llama, {site: dictionary}, {"resid_0": [1]}).is_empty()


def test_a_decoder_is_sure_from_twice_what_chance_gives():
    assert chance_z(1000) == pytest.approx(math.sqrt(2 * math.log(1000)))
    z = [1.5 * chance_z(1000), -2.0, 3 * chance_z(1000), -1.0]
    tokens = {"promotes": [True, False] * 2, "token": [" is", "\n", " are", "x"]}
    promoted = pl.DataFrame({"site": ["resid_1"] * 4, "feature": [0, 0, 1, 1], "rank": 0, "logit": 0.0, "z": z, **tokens})
    keys = pl.DataFrame({"site": ["resid_1"] * 2, "feature": [0, 1], "key": ["a", "b"]})
    rows = decoder_rule(promoted, keys, 1000, "decoders")
    assert rows["confidence"].to_list() == pytest.approx([0.5, 1.0])
    assert rows["label"].to_list() == ["→ is", "→ are"]
    assert "promotes ‘ is’ +5.6; suppresses ‘⏎’ −2.0" in rows["evidence"][0]


# -- its task --------------------------------------------------------------------------------------------------


def test_tasks_share_a_features_part_in_what_is_sent():
    # Sequences s1, s2 are of task a, s3 of b. k has 1/4 of s1 and nothing of s2: mean 1/8; 3/4 of s3: mean 3/4. Of both: 1/7 and 6/7.
    sent = pl.DataFrame(
        [("k", "a", "s1", 1.0), ("other", "a", "s1", 3.0), ("other", "a", "s2", 1.0), ("k", "b", "s3", 6.0), ("other", "b", "s3", 2.0)],
        schema=["key", "task", "sequence", "sent"], orient="row",
    ).with_columns(run=pl.lit("r"))  # fmt: skip
    tasks = pl.DataFrame({"run": ["r", "r"], "task": ["a", "b"], "n": [2, 1]})
    shares = task_shares(sent, tasks).filter(key="k")
    assert shares.select("task", "n", "n_task", "n_sent").rows() == [("b", 1, 1, 2), ("a", 1, 2, 2)]
    assert shares["share"].to_list() == pytest.approx([6 / 7, 1 / 7])
    row = one(task_rule(sent, tasks), "k")
    assert row["label"] == "for b"
    assert row["confidence"] == pytest.approx((6 / 7 - 1 / 2) / (1 / 2) * 2 / 4)
    assert row["evidence"] == "serves b (86 % of its part in the effects of 2 tasks; active in 1 of 1 sequences of it)"
    assert task_rule(sent, tasks.filter(task="a")).is_empty()


# -- its place -------------------------------------------------------------------------------------------------


def edge(source: str, target: str, weight: float, run: str = "r") -> dict[str, object]:
    end = lambda name: {"site": name.split("/")[0], "kind": {"e": "error", "y": "output"}.get(name.split("/")[1], "feature")}
    return {
        "run": run, "source": source, "target": target, "weight": weight, "abs_weight": abs(weight),
        **{f"source_{k}": v for k, v in end(source).items()}, **{f"target_{k}": v for k, v in end(target).items()},
    }  # fmt: skip


def placed(*edges: dict[str, object], n_layers: int = 6, names: dict[str, str] | None = None) -> pl.DataFrame:
    frame = pl.DataFrame(edges, schema={"run": pl.String(), **DRIVES})
    ends = sorted({str(e[name]) for e in edges for name in ("source", "target") if str(e[name]).split("/")[1].isdigit()})
    features = pl.DataFrame({"key": ends, "site": [k.split("/")[0] for k in ends], "feature": [int(k.split("/")[1]) for k in ends]})
    return place_rule(frame, features, n_layers, names or {})


def test_a_place_says_depth_what_is_read_and_what_is_driven():
    rows = placed(
        edge("embed/0", "resid_2/1", 3.0), edge("embed/e", "resid_2/1", -1.0), edge("resid_2/1", "resid_5/7", 6.0), edge("resid_2/1", "y/y", -3.0),
        edge("resid_2/1", "resid_5/e", 1.0), edge("resid_5/7", "y/y", 1.0), names={"resid_5/7": "cats"},
    )  # fmt: skip
    row = one(rows, "resid_2/1")
    assert row["label"] == "middle → resid_5/7 60 %"
    assert row["evidence"] == (
        "middle, layer 2 of 0 to 5: 5 edges; 75 % of what it reads is the embedding; 25 % of what it reads comes from error nodes; "
        "drives resid_5/7 “cats” (60 %) and the output (30 %); 10 % of its effect goes into error nodes"
    )
    assert row["confidence"] == pytest.approx(0.75)
    assert one(rows, "resid_5/7")["label"] == "late → the output 100 %"
    assert one(rows, "embed/0")["evidence"].startswith("early, at the embedding: 1 edge; drives resid_2/1")


def test_features_that_drive_nothing_or_errors_only_and_hubs_say_so():
    rows = placed(edge("resid_0/1", "resid_1/2", 1.0), edge("resid_0/3", "resid_1/e", 1.0))
    assert one(rows, "resid_1/2")["label"] == "early, drives nothing"
    assert one(rows, "resid_0/3")["label"] == "early → error nodes"
    star = placed(*(edge("resid_0/0", f"resid_1/{i}", 1.0 + i) for i in range(12)))
    assert one(star, "resid_0/0")["label"].startswith("early hub → resid_1/11")
    assert star.filter(pl.col("label").str.contains("hub")).height == 1


def test_runs_count_as_parts_of_their_sums():
    rows = placed(edge("resid_0/0", "resid_1/1", 100.0), edge("resid_0/0", "resid_1/2", 1.0, "q"), edge("resid_0/9", "resid_1/2", 3.0, "q"))
    assert one(rows, "resid_0/0")["label"] == "early → resid_1/1 80 %"  # 1 of r's, 1/4 of q's


# -- its region ------------------------------------------------------------------------------------------------


def test_regions_come_before_communities_and_the_newest_parcellation_first():
    block = {"site": "resid_1", "size": 4, "label": "x 50 %", "task": "ioi", "task_share": 0.5}
    rows = [
        {**block, "key": "a", "block": "b1", "parcellation": "old", "kind": "roi", "index": 1, "mean_correlation": 0.25},
        {**block, "key": "a", "block": "b2", "parcellation": "new", "kind": "roi", "index": 2, "mean_correlation": 0.5},
        {**block, "key": "a", "block": "b0", "parcellation": "c", "kind": "community", "index": 0, "mean_correlation": None},
        {**block, "key": "b", "block": "b0", "parcellation": "c", "kind": "community", "index": 0, "mean_correlation": None},
    ]
    found = region_rule(pl.DataFrame(rows, schema=BLOCKS), ["new", "old"])
    assert found.select("label", "confidence", "source").rows() == [("in region resid_1/2", 0.5, "new"), ("in community 0", None, "c")]
    assert found["evidence"][0] == "in region resid_1/2 “x 50 %” (4 features, mean correlation inside 0.5, 50 % for ioi)"
    assert region_rule(pl.DataFrame(schema=BLOCKS), []).is_empty()


# -- together --------------------------------------------------------------------------------------------------


def ruled(*rows: tuple[str, Rule, str, float | None]) -> pl.DataFrame:
    frame = [{"key": k, "rule": str(rule), "label": text, "evidence": f"because {text}", "confidence": c, "source": "s"} for k, rule, text, c in rows]
    return pl.DataFrame(frame, schema=empty().schema)


@pytest.mark.parametrize(
    ("parts", "label", "confidence"),
    [
        ([(Rule.TOKENS, "who", 0.9)], "who", 0.9),
        ([(Rule.TOKENS, "who", 0.9), (Rule.CLASS, "relative words", 0.8)], "who (relative words)", 0.9),
        ([(Rule.TOKENS, "7", 0.05), (Rule.CLASS, "numbers", 0.8)], "numbers", 0.8),
        ([(Rule.TOKENS, "7", 0.5), (Rule.CLASS, "numbers", 0.2)], "7", 0.5),
        ([(Rule.TOKENS, "who", 0.9), (Rule.DECODER, "→ is, was", 0.6), (Rule.TASK, "for ioi", 0.7)], "who → is, was [ioi]", 0.9),
        ([(Rule.TOKENS, "who", 0.9), (Rule.DECODER, "→ is", 0.1), (Rule.TASK, "for ioi", 0.1)], "who", 0.9),
        ([(Rule.PLACE, "late → the output 90 %", 0.9), (Rule.REGION, "in region a/1", None)], "in region a/1", None),
        ([(Rule.PLACE, "late → the output 90 %", 0.9), (Rule.DECODER, "→ is", 0.6)], "late → the output 90 % → is", 0.9),
        ([(Rule.DECODER, "→ is", 0.6)], "→ is", 0.6),
        ([(Rule.TOKENS, "x" * 200, 0.6)], "x" * 89 + "…", 0.6),
    ],
)
def test_summaries_join_what_is_sure(parts, label, confidence):
    row = one(summaries(ruled(*(("k", *part) for part in parts))), "k")
    assert (row["label"], row["confidence"]) == (label, confidence)
    assert row["source"] == ", ".join(rule for rule in Rule if rule in {part[0] for part in parts})


@pytest.mark.parametrize(
    ("tokens", "class_", "label"),
    [
        (("cat · dog", 0.2, "statistics r"), ("at the end of the text", 0.7, "samples s"), "cat · dog"),  # a place says nothing of the words
        (("cat · dog", 0.2, "statistics r"), ("numbers", 0.7, "samples s"), "numbers"),
        (("cat · dog", 0.1, "statistics r"), ("numbers", 0.2, "samples s"), "cat · dog"),
        (("cat · dog", 0.5, "statistics r"), ("at the end of the text", 0.7, "samples s"), "cat · dog"),  # of two texts
        (("cat · dog", 0.5, "statistics r"), ("numbers", 0.7, "statistics r"), "cat · dog (numbers)"),
        (("seems", 0.2, "samples s"), ("at the end of the text", 0.7, "samples s"), "at the end of the text"),
        (("seems", 0.2, "samples s"), None, "seems"),
    ],
)
def test_unsure_tokens_give_way_and_a_place_does_not_stand_for_contexts(tokens, class_, label):
    given = [(Rule.TOKENS, *tokens)] + ([(Rule.CLASS, *class_)] if class_ else [])
    rows = [{"key": "k", "rule": str(rule), "label": text, "evidence": text, "confidence": c, "source": source} for rule, text, c, source in given]
    row = one(summaries(pl.DataFrame(rows, schema=empty().schema)), "k")
    assert row["label"] == label
    assert row["evidence"] == (class_[0] if class_ and label == class_[0] else tokens[0])


def test_the_strongest_contexts_name_three_tokens_however_little_each_has():
    rows = [("a", 1.0 + 0.01 * i, ["x"], f" word{i}", ["z"]) for i in range(20)]
    found = from_contexts(pl.DataFrame(rows, schema=["key", "value", "before", "token", "after"], orient="row"), "statistics r")
    assert one(tokens_rule(found), "a")["label"] == "word19 · word18 · word17"


def test_a_feature_of_which_only_an_unsure_decoder_is_known_has_no_summary():
    assert summaries(ruled(("k", Rule.DECODER, "→ x", 0.29))).is_empty()
    assert summaries(empty()).is_empty()


def test_names_that_a_rule_gave_are_marked():
    features = pl.DataFrame(
        {"key": list("abcd"), "site": "resid_1", "kind": ["feature", "feature", "feature", "error"], "index": [1, 2, 3, -1], "frequency": 0.5,
         "label": ["mine", "who", None, "error of resid_1"], "label_kind": ["hand", "automatic", None, None]}
    )  # fmt: skip
    contexts = pl.DataFrame({"key": ["c"], "value": [1.0], "before": [["a"]], "token": [" cat"], "after": [["b"]]})
    notes = feature_notes(features, contexts)
    assert notes.select("name", "label_kind").rows() == [("mine", "hand"), ("who", "automatic"), ("cat", "automatic"), ("error of resid_1", None)]
    assert [marked(*row) for row in notes.select("name", "label_kind").rows()] == ["mine", "≈ who", "≈ cat", "error of resid_1"]


def test_control_characters_of_tokens_are_shown_as_pictures() -> None:
    tokens = pl.DataFrame({"t": [" a\x19b", "\r\n", "\x7f", "x\ty"]})
    names = tokens.select(shown(pl.col("t")))["t"].to_list()
    assert names == ["a␙b", "␍⏎", "␡", "x⇥y"]
    assert [checked(name) for name in names] == names
    assert tokens.select(quoted(pl.col("t")).alias("t"))["t"].to_list() == ["‘ a␙b’", "‘␍⏎’", "‘␡’", "‘x⇥y’"]
