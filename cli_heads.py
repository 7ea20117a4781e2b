"""The command that says which attention head each feature belongs to, and whether regions of interest are heads."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import console
from .cli_ablation import Gallery, save_page
from .errors import UserError
from .options import (
    DEFAULT_ATLAS,
    DEMO_DICTIONARIES,
    DEMO_MODEL,
    Atlas,
    BatchSize,
    Bos,
    Device,
    Dictionaries,
    Dtype,
    Json,
    Limit,
    Memory,
    Metric,
    Model,
    Seed,
    Sites,
    SkipInvalid,
    Steps,
    Task,
    analyze_app,
    load_named,
    memory_bytes,
    open_statistics,
    split_names,
)

if TYPE_CHECKING:
    from .analysis.heads import Alluvial, HeadShares, Overlap
    from .ingest.head_attribution import HeadSums
    from .model.binding import Binding
    from .model.dictionaries import Dictionary
    from .model.sites import Site
    from .model.tasks import PairBatch

METHODS = ("membership", "effective", "encoder", "decoder", "structural")



class NoParcellations(UserError):
    """A parcellation is named where none is kept."""


class NotOfThisSite(UserError):
    """A parcellation has no partition of the site, or one of another dictionary."""


class BadOutput(UserError):
    """An output's name says no format that is known."""


@analyze_app.command("heads")
def analyze_heads_command(
    site: Annotated[str, typer.Option("--site", help="The site whose features are asked for their heads: attn_L or resid_L.")],
    model: Model = DEMO_MODEL,
    dictionaries: Dictionaries = DEMO_DICTIONARIES,
    sites: Sites = None,
    method: Annotated[
        Literal["membership", "effective", "encoder", "decoder", "structural"] | None,
        typer.Option(
            "--method",
            help="What a head's share in a feature is of: membership (identity-heads: a neuron is of one head), effective (attribution from the "
            "heads of the layers that write resid_L), encoder (what the encoder reads of each head, attn_L), decoder (its norm in each head's "
            "slice, a dictionary on hook_z), structural (the weights). Unless given: the first of these that the site has.",
        ),
    ] = None,
    parcellation: Annotated[
        str | None, typer.Option("--parcellation", help="Compare with its blocks: a parcellation's key or the beginning of it, or latest.")
    ] = None,
    level: Annotated[int | None, typer.Option("--level", help="The parcellation's level, 0 the finest; the chosen one unless given.")] = None,
    draws: Annotated[int, typer.Option("--draws", min=1, help="Permutations of the features' heads that the overlap is compared with.")] = 1000,
    task: Task = "agreement",
    limit: Limit = 16,
    metric: Metric = "logit_diff",
    baseline: Annotated[
        Literal["counterfactual", "zero"], typer.Option("--baseline", help="What the heads' outputs are measured from: the corrupted prompt's, or 0.")
    ] = "counterfactual",
    steps: Steps = 1,
    bos: Bos = "auto",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    memory: Memory = "2GB",
    batch_size: BatchSize = 8,
    skip_invalid: SkipInvalid = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save every feature's head, as .parquet or .csv.")] = None,
    gallery: Gallery = None,
    atlas: Atlas = DEFAULT_ATLAS,
    as_json: Json = False,
) -> None:
    """Which attention head each feature of a site belongs to, how clearly, and whether the blocks of a parcellation are heads."""
    from .analysis.heads import alluvial, overlap
    from .analysis.region_gallery import heads_page
    from .ingest.head_attribution import writing_layers
    from .ingest.ranges import check_numbers
    from .model.binding import bind
    from .model.dictionary_sources import IDENTITY, IDENTITY_HEADS
    from .model.sites import parse_site
    from .show_heads import show_heads

    check_numbers(steps=steps, memory=memory_bytes(memory), limit=limit, batch_size=batch_size)
    if output is not None and output.suffix not in (".parquet", ".csv"):
        raise BadOutput(f"--output {output} is neither .parquet nor .csv")
    if gallery is not None and parcellation is None:
        raise NoParcellations("--gallery draws regions beside heads: name regions by --parcellation, latest for those found last")
    at = parse_site(site)
    named = {*split_names(sites or ""), at.name} if sites or dictionaries in (IDENTITY, IDENTITY_HEADS) else None
    loaded, found = load_named(model, dictionaries, ",".join(sorted(named)) if named else None, device, dtype, bos)
    blocks = None if parcellation is None else _blocks(atlas, parcellation, level, loaded.key, at.name, found[at].id)
    binding = bind(loaded)
    chosen = method or _first_method(found[at], at)
    if chosen in ("effective", "structural"):
        writing_layers(binding, tuple(found), at)  # a site without heads is said before the task is read
    batches: Sequence[PairBatch] = ()
    if chosen in ("effective", "encoder"):
        batches = _batches(task, loaded, limit, seed, skip_invalid, batch_size)
    options = {"metric": metric, "baseline": baseline, "steps": steps, "memory": memory_bytes(memory)}
    shares = _shares(binding, found[at], at, chosen, batches, tuple(found), options)
    compared = None if blocks is None else overlap(blocks, shares, draws=draws, seed=seed)
    flows = None if blocks is None else alluvial(blocks, shares)
    features = shares.features()
    if blocks is not None:
        import polars as pl

        features = features.with_columns(block=pl.Series(blocks[features["feature"].to_numpy()]))
    if output is not None:
        console.save_frame(features, output)
    if blocks is not None and compared is not None:
        regions, drawn = blocks, compared
        settings = [("model", loaded.key), ("dictionary", found[at].id), ("method", chosen), ("permutations", f"{draws:,}"), ("seed", str(seed))]
        save_page(gallery, lambda: heads_page(regions, shares, drawn, settings=settings))
    if as_json:
        console.say_json(_as_json(shares, compared, flows))
    else:
        show_heads(shares, compared, sum(len(batch.pairs) for batch in batches))


def _blocks(atlas: Path, name: str, level: int | None, model: str, site: str, dictionary: str) -> Any:
    """The blocks of a site's features, (d_sae,), in a parcellation that is kept; −1 for dead ones."""
    from .analysis.regions_store import read_parcellation

    statistics = open_statistics(atlas)
    if statistics is None:
        raise NoParcellations(f"{atlas} has no statistics, hence no parcellation: find regions first, or name another atlas")
    with statistics:
        found = read_parcellation(statistics, None if name == "latest" else name, model=model)
    own = found.sites.get(site)
    if own is None:
        raise NotOfThisSite(f"parcellation {found.key} has no partition of {site}: it has {', '.join(found.sites)}")
    if own.dictionary != dictionary:
        raise NotOfThisSite(f"parcellation {found.key} is of dictionary {own.dictionary} at {site}, not {dictionary}: name its dictionaries")
    return own.labels_of(level)


def _first_method(dictionary: "Dictionary", site: "Site") -> str:
    from .model.dictionaries import Kind
    from .model.sites import Basis, SiteKind

    if dictionary.basis is Basis.HEADS and dictionary.kind is Kind.IDENTITY:
        return "membership"
    return "encoder" if site.kind is SiteKind.ATTN else "effective"


def _batches(task: str, loaded: Any, limit: int, seed: int, skip_invalid: bool, batch_size: int) -> "Sequence[PairBatch]":
    from .cli import _pairs
    from .model.tasks import batches

    pairs = _pairs(task, loaded.tokenizer, limit, seed, skip_invalid)
    return list(batches(pairs, loaded.tokenizer, batch_size=batch_size))


def _shares(
    binding: "Binding", dictionary: "Dictionary", site: "Site", method: str, batches: "Sequence[PairBatch]", sites: "Sequence[Site]",
    options: dict[str, Any],
) -> "HeadShares":  # fmt: skip
    """Shares by a method; raises a `UserError` where the site or its dictionary has none of the kind."""
    from .analysis.heads import HeadShares, decoder_shares, membership
    from .cli import _edge_settings
    from .ingest.head_attribution import effective_sums, encoder_sums, structural_sums, writing_layers
    from .model.baselines import Baseline

    if method == "membership":
        return membership(dictionary, site, binding.n_heads)
    if method == "decoder":
        return decoder_shares(dictionary, site, binding.n_heads)
    sums: HeadSums
    if method == "structural":
        sums = structural_sums(binding, dictionary, site, sites)
    elif method == "encoder":
        sums = encoder_sums(binding, dictionary, site, batches, baseline=Baseline(options["baseline"]), memory=options["memory"])
    else:
        layers = writing_layers(binding, sites, site)
        settings = _edge_settings(**options)
        sums = effective_sums(binding, dictionary, site, layers, batches, settings)
    return HeadShares.of(site, dictionary, method, sums.heads, sums.magnitude)


def _as_json(shares: "HeadShares", compared: "Overlap | None", flows: "Alluvial | None") -> dict[str, Any]:
    touched = shares.touched
    said: dict[str, Any] = {
        "site": shares.site, "dictionary": shares.dictionary, "method": shares.method, "features": len(touched), "d_sae": len(shares.labels),
        "ambiguity": float(shares.ambiguity[touched].mean()) if len(touched) else None,
        "entropy": float(shares.entropy[touched].mean()) if len(touched) else None, "heads": shares.table().to_dicts(),
    }  # fmt: skip
    if compared is not None and flows is not None:
        said["overlap"] = {
            "features": compared.n, "n_blocks": compared.n_blocks, "n_heads": compared.n_heads, "ami": compared.ami, "vi": compared.vi,
            "purity": compared.purity, "null_ami_mean": float(compared.null_ami.mean()), "null_ami_max": float(compared.null_ami.max()),
            "p": compared.p, "draws": len(compared.null_ami), "contingency": compared.contingency.to_dicts(),
        }  # fmt: skip
        said["alluvial"] = {"flows": flows.frame.to_dicts(), "left_order": flows.left_order, "right_order": flows.right_order}
    return said
