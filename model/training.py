"""Training of small dictionaries: many sites from one pass over a corpus.

1. `plan_training` checks the options and writes them down, so that a later call can only continue the same work.
2. `capture_activations` runs the model once and stores the activations of every site in shards on disk.
3. `train_site` trains one dictionary with sae_lens's trainer on the shards, and saves it in sae_lens's inference format.
4. `train_dictionaries` does all of it; shards and sites that are finished are skipped when it is called again.

Sequences come from blocks of running text and, if given, from prompts that each start at position 0, as a task's do.
Every `HELDOUT_STRIDE`-th sequence is kept out of the training. Position 0 is dropped, and so is a position whose norm is more than
`OUTLIER_RATIO` times the median: language models park a massive activation there, which would be all that a squared error sees.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.sae_trainer import SAETrainer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import FeatlasError, UserError
from ..files import whole, write_text
from .binding import Binding, bind, capture_sites
from .corpus import prompt_tokens, read_texts, token_blocks
from .loading import LoadedModel
from .sites import Basis, Site, SiteKind, parse_site

HELDOUT_STRIDE = 50
OUTLIER_RATIO = 10.0
SHARD_SEQUENCES = 128
BUFFER_SHARDS = 32  # shards mixed in memory at a time while training
CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
_HOOKS = {SiteKind.EMBED: "hook_embed", SiteKind.ATTN: "hook_attn_out", SiteKind.MLP: "hook_mlp_out", SiteKind.RESID: "hook_resid_post"}


class OtherTraining(UserError):
    """The folder holds work begun with other options."""


class BadTrainingOption(UserError):
    """An option of the training makes no sense."""


class CorpusTooSmall(UserError):
    """The corpus has too few tokens to train on."""


class TrainingDiverged(FeatlasError):
    """A loss is no longer a finite number."""


class Architecture(StrEnum):
    """Kinds of dictionaries that can be trained; BatchTopK is saved as JumpReLU, as sae_lens does."""

    STANDARD = "standard"
    GATED = "gated"
    TOPK = "topk"
    BATCHTOPK = "batchtopk"
    JUMPRELU = "jumprelu"


@dataclass(frozen=True)
class TrainingOptions:
    """What to train, and on how much.

    width: features per site. k: active features per token (topk, batchtopk). sparsity: coefficient of the sparsity loss (the
    other kinds). tokens: tokens read in all, `prompt_share` of them from prompts. context: tokens in a block of text.
    sequences: sequences in one run of the model. batch: activations in one training step. heads: read attention sites
    before the output projection (`hook_z`). autocast: bfloat16 products in training. save_dtype: of the saved weights.
    """

    sites: tuple[Site, ...]
    architecture: Architecture = Architecture.TOPK
    width: int = 2048
    k: int = 32
    sparsity: float = 1.0
    tokens: int = 500_000
    prompt_share: float = 0.2
    context: int = 128
    sequences: int = 16
    epochs: int = 3
    batch: int = 1024
    learning_rate: float = 1e-3
    heads: bool = False
    autocast: bool = False
    save_dtype: str = "float16"
    seed: int = 0

    def basis(self, site: Site) -> Basis:
        """The basis in which a site is read."""
        return Basis.HEADS if self.heads and site.kind is SiteKind.ATTN else Basis.RESIDUAL


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the work is: `stage` is `capture` or the name of the site in training."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class TrainedSite:
    """A finished dictionary; `steps` and `seconds` are 0 where it was finished by an earlier call."""

    site: Site
    folder: Path
    steps: int
    seconds: float


Report = Callable[[Progress], None]


def train_dictionaries(
    model: LoadedModel,
    corpus: str | Path,
    folder: Path,
    options: TrainingOptions,
    *,
    prompts: Sequence[str] = (),
    progress: Report | None = None,
    work: Path | None = None,
) -> tuple[TrainedSite, ...]:
    """Train one dictionary for every site of `options` and save each under `folder/<site>/`.

    corpus: what `read_texts` takes. prompts: texts that are each a sequence of their own. work: where the activations go
    (default `folder/.activations`); it is removed when every site is finished. Called again after an interruption it goes on
    where it stopped; raises `OtherTraining` where `folder` was begun with other options, model or texts.
    """
    work = work or folder / ".activations"
    plan_training(model, corpus, options, prompts, folder)
    report = progress or (lambda _: None)
    pending = [site for site in options.sites if not _is_finished(folder / site.name)]
    if pending:
        capture_activations(model, _sequences(model, corpus, prompts, options), work, options, report)
    trained = []
    for site in options.sites:
        if site in pending:
            trained.append(train_site(model, site, work, folder / site.name, options, report))
        else:
            trained.append(TrainedSite(site, folder / site.name, steps=0, seconds=0.0))
    shutil.rmtree(work, ignore_errors=True)
    return tuple(trained)


# --- 1. The plan -----------------------------------------------------------------------------------------------------


def plan_training(model: LoadedModel, corpus: str | Path, options: TrainingOptions, prompts: Sequence[str], folder: Path) -> None:
    """Check the options and record them in `folder/training.json`, or compare with what stands there."""
    _check(options)
    plan = {
        **asdict(options),
        "sites": [site.name for site in options.sites],
        "model": model.key,
        "capture_dtype": str(model.dtype).removeprefix("torch."),
        "corpus": corpus_digest(corpus),
        "prompts": hashlib.sha256("\0".join(prompts).encode()).hexdigest()[:12],
    }
    path = folder / "training.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(plan, indent=1) + "\n")
        return
    begun = json.loads(path.read_text(encoding="utf-8"))
    different = sorted(key for key in plan if begun.get(key) != plan[key])
    if different:
        key = different[0]
        raise OtherTraining(f"{folder} was begun with {key} = {begun.get(key)!r}, not {plan[key]!r}: name another folder, or remove this one")


def _check(options: TrainingOptions) -> None:
    positive = ("width", "k", "tokens", "sequences", "epochs", "batch", "learning_rate", "sparsity")
    for name in positive:
        if getattr(options, name) <= 0:
            raise BadTrainingOption(f"{name} is {getattr(options, name)}: it must be above 0")
    if not options.sites:
        raise BadTrainingOption("no site to train: name at least one, for example resid_5")
    if len(set(options.sites)) < len(options.sites):
        raise BadTrainingOption(f"a site is named twice: {', '.join(s.name for s in options.sites)}")
    if options.k > options.width:
        raise BadTrainingOption(f"k is {options.k}: no more than the {options.width} features of a dictionary can be active")
    if not 0 <= options.prompt_share <= 1:
        raise BadTrainingOption(f"prompt_share is {options.prompt_share}: it is a share, between 0 and 1")
    if options.save_dtype not in _DTYPES:
        raise BadTrainingOption(f"save_dtype is {options.save_dtype!r}: one of {', '.join(_DTYPES)}")


_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def corpus_digest(corpus: str | Path) -> str:
    """First 12 hex digits of the sha256 over a corpus's files, or the data set's name."""
    path = Path(corpus)
    if not path.exists():
        return str(corpus)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:12]


def _is_finished(folder: Path) -> bool:
    return (folder / CONFIG_FILE).exists() and (folder / WEIGHTS_FILE).exists()


# --- 2. Activations --------------------------------------------------------------------------------------------------


def _sequences(model: LoadedModel, corpus: str | Path, prompts: Sequence[str], options: TrainingOptions) -> Iterator[Tensor]:
    """Token sequences (pos,) from blocks and prompts, mixed by `prompt_share`, until there are `tokens` of them."""
    blocks = token_blocks(read_texts(corpus), model.tokenizer, options.context)
    singles = prompt_tokens(prompts, model.tokenizer, longest=options.context)
    total = of_prompts = 0
    while total < options.tokens:
        sequence = next(singles, None) if of_prompts < options.prompt_share * total else None
        if sequence is not None:
            of_prompts += len(sequence)
        else:
            sequence = next(blocks, None)
            if sequence is None:
                return
        total += len(sequence)
        yield sequence


def capture_activations(model: LoadedModel, sequences: Iterator[Tensor], work: Path, options: TrainingOptions, report: Report) -> None:
    """Store the activations of all sites, shard by shard; shards already there are not computed again.

    A shard holds `SHARD_SEQUENCES` sequences: per site the tensors `<site>` and `<site>.heldout`, (positions, width), in the
    model's own floating-point type.
    """
    if (work / "complete").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    binding = bind(model)
    number = done = 0
    while group := list(islice(sequences, SHARD_SEQUENCES)):
        path = work / f"{number:05d}.safetensors"
        if not path.exists():
            with whole(path) as part:
                save_file(_shard(binding, group, number * SHARD_SEQUENCES, options), part)
        number += 1
        done += sum(len(sequence) for sequence in group)
        report(Progress("capture", min(done, options.tokens), options.tokens))
    if done < 4 * options.batch:
        raise CorpusTooSmall(f"the corpus has {done} tokens: training in batches of {options.batch} needs at least {4 * options.batch}")
    (work / "complete").touch()


def _shard(binding: Binding, group: list[Tensor], first: int, options: TrainingOptions) -> dict[str, Tensor]:
    """Activations of one group of sequences; equal lengths run together."""
    bases = {site: options.basis(site) for site in options.sites}
    rows: dict[str, list[Tensor]] = {name: [] for site in options.sites for name in (site.name, f"{site.name}.heldout")}
    order = sorted(range(len(group)), key=lambda i: (len(group[i]), i))
    while order:
        alike = [i for i in order[: options.sequences] if len(group[i]) == len(group[order[0]])]
        order = order[len(alike) :]
        values = capture_sites(binding, torch.stack([group[i] for i in alike]).to(binding.device), bases)
        heldout = torch.tensor([(first + i) % HELDOUT_STRIDE == HELDOUT_STRIDE - 1 for i in alike])
        for site, value in values.items():
            kept = value[:, 1:].cpu()  # (batch, pos - 1, width)
            rows[site.name].append(kept[~heldout].flatten(0, 1))
            rows[f"{site.name}.heldout"].append(kept[heldout].flatten(0, 1))
    return {name: torch.cat(parts).contiguous() for name, parts in rows.items()}


def read_activations(paths: Sequence[Path], name: str) -> Tensor:
    """Rows of one tensor of the shards, (positions, width), without outliers of the norm."""
    parts = []
    for path in paths:
        with safe_open(path, framework="pt") as shard:
            parts.append(shard.get_tensor(name))
    return without_outliers(torch.cat(parts))


def without_outliers(rows: Tensor) -> Tensor:
    """The rows whose norm is at most `OUTLIER_RATIO` times the median, (n, width) → (m, width)."""
    norms = rows.float().norm(dim=-1)
    return rows[norms <= OUTLIER_RATIO * norms.median()] if len(rows) else rows


# --- 3. One site -----------------------------------------------------------------------------------------------------


def train_site(model: LoadedModel, site: Site, work: Path, folder: Path, options: TrainingOptions, report: Report) -> TrainedSite:
    """Train the dictionary of one site on the shards in `work` and save it; the global random state is left as it was."""
    begin = time.monotonic()
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(_site_seed(options.seed, site))
        sae, steps = _fit(site, work, options, model.device, report)
    sae.cfg.metadata = _metadata(model, site, options, sae.cfg.metadata)
    _save(sae, folder, _DTYPES[options.save_dtype])
    return TrainedSite(site, folder, steps=steps, seconds=time.monotonic() - begin)


def _site_seed(seed: int, site: Site) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{site.name}".encode()).digest()[:4], "big")


def _fit(site: Site, work: Path, options: TrainingOptions, device: torch.device, report: Report) -> tuple[Any, int]:
    shards = sorted(work.glob("*.safetensors"))
    sample = read_activations(shards[:: max(1, len(shards) // BUFFER_SHARDS)], site.name).float()
    # sae_lens's own normalisation would estimate this scale from a thousand batches; the mean is a start for b_dec.
    scale = float(math.sqrt(sample.shape[1]) / sample.norm(dim=-1).mean())
    samples = options.epochs * _count_rows(shards, site.name)
    steps = max(1, samples // options.batch)
    sae = _new_sae(options, options.basis(site), sample.shape[1], str(device))
    with torch.no_grad():
        sae.b_dec.copy_(scale * sample.mean(0))
    trainer = SAETrainer(cfg=_trainer_config(options, steps, str(device)), sae=sae, data_provider=_batches(shards, site, options, scale))
    for step in range(steps):
        output = trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1
        if step % 20 == 0 or step == steps - 1:
            if not math.isfinite(output.loss.item()):
                raise TrainingDiverged(
                    f"the loss at {site.name} is {output.loss.item()} in step {step}: lower the learning rate of {options.learning_rate}"
                )
            report(Progress(site.name, step + 1, steps))
    sae.fold_activation_norm_scaling_factor(scale)
    return sae, steps


def _count_rows(shards: Sequence[Path], name: str) -> int:
    total = 0
    for path in shards:
        with safe_open(path, framework="pt") as shard:
            total += shard.get_slice(name).get_shape()[0]
    return total


def _batches(shards: Sequence[Path], site: Site, options: TrainingOptions, scale: float) -> Iterator[Tensor]:
    """Scaled batches (batch, width) without end: in each epoch the shards in a new order, some mixed in memory at a time."""
    generator = torch.Generator().manual_seed(_site_seed(options.seed + 1, site))
    while True:
        order = [shards[i] for i in torch.randperm(len(shards), generator=generator).tolist()]
        for begin in range(0, len(order), BUFFER_SHARDS):
            rows = read_activations(order[begin : begin + BUFFER_SHARDS], site.name)
            mixed = torch.randperm(len(rows), generator=generator)
            # A small corpus may have fewer rows than a batch in memory: then the batch is that much smaller.
            for chosen in mixed.split(options.batch)[: max(1, len(rows) // options.batch)]:
                yield rows[chosen].float() * scale


def _trainer_config(options: TrainingOptions, steps: int, device: str) -> SAETrainerConfig:
    return SAETrainerConfig(
        total_training_samples=steps * options.batch,
        train_batch_size_samples=options.batch,
        lr=options.learning_rate,
        lr_end=options.learning_rate,  # the rate is constant until it decays to 0 over the last third
        lr_warm_up_steps=max(2, steps // 20),
        lr_decay_steps=max(1, steps // 3),
        device=device,
        autocast=options.autocast,
        # A feature that was silent for a twentieth of the training gets help from the auxiliary loss.
        dead_feature_window=max(10, steps // 20),
    )


def _new_sae(options: TrainingOptions, basis: Basis, d_in: int, device: str) -> Any:
    """A training SAE of sae_lens of the chosen architecture, freshly initialised."""
    common: dict[str, Any] = {"d_in": d_in, "d_sae": options.width, "device": device, "normalize_activations": "none"}
    if basis is Basis.HEADS:
        common["reshape_activations"] = "hook_z"  # for sae_lens's own use later: in training both of us flatten the heads
    match options.architecture:
        case Architecture.STANDARD:
            return StandardTrainingSAE(StandardTrainingSAEConfig(**common, l1_coefficient=options.sparsity))
        case Architecture.GATED:
            return GatedTrainingSAE(GatedTrainingSAEConfig(**common, l1_coefficient=options.sparsity))
        case Architecture.TOPK:
            return TopKTrainingSAE(TopKTrainingSAEConfig(**common, k=options.k))
        case Architecture.BATCHTOPK:
            # The threshold that replaces the batch's k follows the batches ten times faster than by default: short trainings need it.
            return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**common, k=options.k, topk_threshold_lr=0.1))
        case Architecture.JUMPRELU:
            return JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**common, l0_coefficient=options.sparsity))


def _metadata(model: LoadedModel, site: Site, options: TrainingOptions, trained: SAEMetadata) -> SAEMetadata:
    """What sae_lens keeps beside the weights: where the dictionary belongs and how it was made."""
    return SAEMetadata(
        **{
            **trained.to_dict(),
            "model_name": model.name,
            "model_revision": model.revision,
            "hook_name": hook_name(site, options.basis(site)),
            "context_size": options.context,
            "prepend_bos": False,
            "training_tokens": options.tokens,
            "training_seed": options.seed,
        }
    )


def hook_name(site: Site, basis: Basis) -> str:
    """TransformerLens's name of a site, which sae_lens's configurations use."""
    if site.kind is SiteKind.EMBED:
        return "blocks.0.hook_resid_pre"
    return f"blocks.{site.layer}.{'attn.hook_z' if basis is Basis.HEADS else _HOOKS[site.kind]}"


def _save(sae: Any, folder: Path, dtype: torch.dtype) -> None:
    """Save for inference in `dtype`; the folder appears whole or not at all."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    sae.save_inference_model(partial)
    weights = {name: tensor.to(dtype).contiguous() for name, tensor in load_file(partial / WEIGHTS_FILE).items()}
    save_file(weights, partial / WEIGHTS_FILE)
    config = json.loads((partial / CONFIG_FILE).read_text(encoding="utf-8"))
    config |= {"dtype": str(dtype).removeprefix("torch."), "device": "cpu"}
    (partial / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    partial.rename(folder)


def sites_of(names: Sequence[str]) -> tuple[Site, ...]:
    """Sites from their names, as an option of the command line gives them."""
    return tuple(parse_site(name) for name in names)
