"""Small transformers trained here on the project's own tasks, with checkpoints: a series whose whole history is known, in minutes on a processor.

1. `tasks_tokenizer`: every word of the tasks' sentences is one token (a byte-level tokenizer's pre-tokens as a vocabulary), so that all pairs fit.
2. Texts are the tasks' clean prompts with their answers and the corrupt ones with theirs, drawn anew for each step. A tenth of all prompts, by a hash
   of the text, is never trained on; `held_out_pairs` are pairs of two such prompts.
3. `train_small_model` trains on the next token of everything, and saves the model at the steps asked for: at 0, at doublings and evenly (as the
   Pythia suite does: Biderman et al. 2023, arXiv 2304.01373). Folders are as transformers saves models, and `series.json` lists them.
"""

import hashlib
import json
import math
import random
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.gpt2 import GPT2Config
from transformers.models.gpt_neox import GPTNeoXConfig
from transformers.models.llama import LlamaConfig

from ..errors import FeatlasError, UserError
from .loading import quiet
from .pairs import Pair, encode_pairs, write_pairs
from .task_templates import Space
from .tasks import TASKS, UnknownTask, interleave
from .words import Vocabulary

LISTING = "series.json"
HELD_OUT_FILE = "held_out.jsonl"
HELD_OUT_PAIRS = 64
"""Pairs of each task in that file."""
TEXTS_FILE = "texts.jsonl"
N_TEXTS = 4096
"""Sentences of the training in that file, for what needs text of the same kind: dictionaries."""
HELD_OUT_TENTHS = 1
"""Of ten prompts, so many are never trained on."""
CONTEXT = 64
END = "<|end|>"
UNKNOWN = "<|unknown|>"
_VOCABULARY_DRAWS = 4000  # pairs of each label that are read for words: every word of every list occurs in far fewer
_IGNORED = -100


class BadSmallModel(UserError):
    """An option makes no model, or no training."""


class OtherSeries(UserError):
    """The folder holds a series made with other options."""


class TrainingFailed(FeatlasError):
    """The loss is no longer a finite number."""


@dataclass(frozen=True, kw_only=True)
class SmallModelOptions:
    """What to train, and how. tasks: by name; their sentences are the whole text. family: llama, gpt_neox or gpt2. steps: of AdamW, on `batch` texts.

    first, evenly: the model is saved at step 0, at `first` and its doublings, and at so many equal distances up to the last step. seed: of weights
    and texts.
    """

    tasks: tuple[str, ...] = ("agreement", "agreement_rc", "pronoun", "ioi")
    family: str = "llama"
    n_layers: int = 3
    d_model: int = 64
    n_heads: int = 4
    steps: int = 3000
    batch: int = 64
    learning_rate: float = 3e-3
    first: int = 32
    evenly: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise UnknownTask(f"there is no task {unknown[0]!r}: choose from {', '.join(TASKS)}" if unknown else "a series needs at least one task")
        if self.family not in CONFIGS:
            raise BadSmallModel(f"no small model of family {self.family!r} can be made: choose from {', '.join(CONFIGS)}")
        for name in ("n_layers", "d_model", "n_heads", "steps", "batch", "first"):
            if getattr(self, name) < 1:
                raise BadSmallModel(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.d_model % (2 * self.n_heads):
            raise BadSmallModel(f"d_model {self.d_model} must be a multiple of twice the heads ({self.n_heads}): each head has an even width")
        if not 0 < self.learning_rate < 1:
            raise BadSmallModel(f"learning_rate is {self.learning_rate}: it must lie between 0 and 1, for example 0.002")
        if self.evenly < 1:
            raise BadSmallModel(f"evenly is {self.evenly}: at least the last step is a checkpoint")

    @cached_property
    def checkpoints(self) -> tuple[int, ...]:
        """The steps at which the model is saved, in order."""
        doubling = {0, *(self.first * 2**i for i in range(self.steps.bit_length()) if self.first * 2**i <= self.steps)}
        return tuple(sorted(doubling | {round(self.steps * i / self.evenly) for i in range(1, self.evenly + 1)}))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A saved model. step: how many batches it has seen. loss: on the texts of held-out pairs, nats per token. folder: its name in the series'."""

    step: int
    tokens: int
    loss: float
    folder: str


Report = Callable[[int, int, str], None]


def _sizes(options: SmallModelOptions, vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary, "hidden_size": options.d_model, "num_hidden_layers": options.n_layers, "num_attention_heads": options.n_heads,
        "intermediate_size": 4 * options.d_model, "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip


def _gpt2(options: SmallModelOptions, vocabulary: int) -> GPT2Config:
    sizes = {"n_embd": options.d_model, "n_layer": options.n_layers, "n_head": options.n_heads, "n_positions": CONTEXT}
    return GPT2Config(vocab_size=vocabulary, **sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, pad_token_id=0)


CONFIGS: Mapping[str, Callable[[SmallModelOptions, int], Any]] = MappingProxyType({
    "llama": lambda options, n: LlamaConfig(**_sizes(options, n), num_key_value_heads=options.n_heads, tie_word_embeddings=False),
    "gpt_neox": lambda options, n: GPTNeoXConfig(**_sizes(options, n), rotary_pct=0.25 if options.d_model // options.n_heads >= 16 else 1.0),
    "gpt2": _gpt2,
})  # fmt: skip


# -- 1. The tokenizer ----------------------------------------------------------------------------------------


class _EveryWord(Vocabulary):
    """Words before there is a tokenizer: all are taken."""

    def single(self, words: Any) -> tuple[str, ...]:
        return tuple(dict.fromkeys(words))


def tasks_tokenizer(tasks: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is every word of the tasks' sentences, with and without the space before it; nothing is added to a text.

    Raises `BadSmallModel` where a task's answers depend on how a tokenizer cuts words (greater_than by digits is then asked by number words).
    """
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    found: set[str] = set()
    for task in tasks:
        for label, space in TASKS[task].spaces(_EveryWord(_words_only(splitter))).items():
            rng = random.Random(f"vocabulary:{task}:{label}")
            drawn = (space[rng.randrange(space.size)] for _ in range(_VOCABULARY_DRAWS))
            texts = {text for pair in drawn if pair is not None for text in (pair.clean + pair.answer, pair.corrupt + pair.wrong_answer)}
            found.update(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    entries = [END, UNKNOWN, *sorted(found)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(entries)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN, bos_token=END, eos_token=END, pad_token=END)


def _words_only(splitter: Any) -> PreTrainedTokenizerFast:
    """A tokenizer that knows no word: for tasks that ask how a tokenizer cuts before they choose their form."""
    empty = Tokenizer(models.WordLevel({UNKNOWN: 0}, unk_token=UNKNOWN))
    empty.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(tokenizer_object=empty, unk_token=UNKNOWN)


# -- 2. Texts ------------------------------------------------------------------------------------------------


def is_held_out(prompt: str) -> bool:
    """Whether a prompt is one of those that are never trained on."""
    return hashlib.sha256(prompt.encode()).digest()[0] * 10 // 256 < HELD_OUT_TENTHS


def held_out_pairs(tasks: Sequence[str], tokenizer: Any, n: int, *, seed: int = 0) -> list[Pair]:
    """`n` pairs of each task of which neither prompt is trained on, their labels in turn. Raises `BadSmallModel` where a task has fewer."""
    return interleave([_held_out(task, tokenizer, n, seed) for task in tasks])


def _held_out(task: str, tokenizer: Any, n: int, seed: int) -> list[Pair]:
    spaces = TASKS[task].spaces(Vocabulary(tokenizer))
    share = math.ceil(n / len(spaces))
    labels = [list(islice(_unseen(space, tokenizer, f"held out:{task}:{label}:{seed}"), share)) for label, space in spaces.items()]
    found = interleave(labels)
    if len(found) < n:
        raise BadSmallModel(f"task {task!r} has {len(found)} pairs that are not trained on: ask for no more than that, not {n}")
    return found[:n]


def _unseen(space: Space, tokenizer: Any, seed: str) -> Iterator[Pair]:
    """Distinct pairs of a space that fit the tokenizer and of which neither prompt is trained on."""
    seen: set[str] = set()
    for pair in _draws(space, seed):
        if pair.key not in seen and is_held_out(pair.clean) and is_held_out(pair.corrupt):
            seen.add(pair.key)
            if not isinstance(next(iter(encode_pairs([pair], tokenizer))), str):
                yield pair


def _draws(space: Space, seed: str, n: int = 200_000) -> Iterator[Pair]:
    """At most `n` pairs of a space, drawn with replacement."""
    rng = random.Random(seed)
    return (pair for _ in range(n) if (pair := space[rng.randrange(space.size)]) is not None)


@dataclass(frozen=True, eq=False)
class _Texts:
    """The sentences to train on: `draw` gives so many token rows of equal length, padded at the right, and what is to be predicted."""

    spaces: tuple[tuple[Space, ...], ...]
    tokenizer: Any
    rng: random.Random

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """Tokens (n, length), and the same with the padding marked as not to be learnt."""
        return encoded_texts(self.sentences(n), self.tokenizer)

    def sentences(self, n: int) -> list[str]:
        """So many prompts with their answers, none of a held-out prompt; tasks and labels equally often."""
        texts: list[str] = []
        while len(texts) < n:
            space = self.rng.choice(self.rng.choice(self.spaces))
            pair = space[self.rng.randrange(space.size)]
            if pair is None:
                continue
            prompt, answer = (pair.clean, pair.answer) if self.rng.random() < 0.5 else (pair.corrupt, pair.wrong_answer)
            if not is_held_out(prompt):
                texts.append(prompt + answer)
        return texts


def encoded_texts(texts: Sequence[str], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Tokens (n, length) padded at the right, and targets of the same shape in which padding is ignored."""
    batch = tokenizer(list(texts), add_special_tokens=False, padding=True, return_tensors="pt")
    return batch["input_ids"], batch["input_ids"].masked_fill(batch["attention_mask"] == 0, _IGNORED)


# -- 3. Training ---------------------------------------------------------------------------------------------


def train_small_model(folder: Path, options: SmallModelOptions, *, progress: Report | None = None) -> tuple[Checkpoint, ...]:
    """Train one model and save its checkpoints in `folder` (`step0`, `step1`, …), a JSONL of held-out pairs and `series.json` beside them.

    A folder that holds the finished series is left as it is; an interrupted training leaves nothing. Deterministic on a processor for one number of
    threads. Raises `OtherSeries` where the folder was made with other options, `TrainingFailed` where the loss is not finite.
    """
    if (folder / LISTING).is_file():
        return _finished(folder, options)
    if folder.exists() and any(folder.iterdir()):
        raise OtherSeries(f"{folder} is not empty and holds no {LISTING}: choose another folder, or empty it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:8]}"
    try:
        checkpoints = _train(work, options, progress)
        listing = {"options": {**asdict(options), "tasks": list(options.tasks)}, "checkpoints": [asdict(checkpoint) for checkpoint in checkpoints]}
        (work / LISTING).write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return checkpoints


def read_series(folder: Path) -> tuple[Checkpoint, ...]:
    """The checkpoints of a folder made by `train_small_model`. Raises `BadSmallModel` where it is none."""
    try:
        listed = json.loads((folder / LISTING).read_text(encoding="utf-8"))["checkpoints"]
        return tuple(Checkpoint(**row) for row in listed)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadSmallModel(f"{folder} is no series of checkpoints: {LISTING} cannot be read ({error})") from None


def _finished(folder: Path, options: SmallModelOptions) -> tuple[Checkpoint, ...]:
    made = json.loads((folder / LISTING).read_text(encoding="utf-8")).get("options", {})
    wanted = {**asdict(options), "tasks": list(options.tasks)}
    other = [name for name, value in wanted.items() if made.get(name) != value]
    if other:
        said = ", ".join(f"{name} {made.get(name)}, not {wanted[name]}" for name in other)
        raise OtherSeries(f"{folder} holds a series made with {said}: choose another folder, or the same options")
    return read_series(folder)


def _train(folder: Path, options: SmallModelOptions, progress: Report | None) -> tuple[Checkpoint, ...]:
    tokenizer = tasks_tokenizer(options.tasks)
    spaces = tuple(tuple(TASKS[task].spaces(Vocabulary(tokenizer)).values()) for task in options.tasks)
    texts = _Texts(spaces, tokenizer, random.Random(f"texts:{options.seed}"))
    pairs = held_out_pairs(options.tasks, tokenizer, HELD_OUT_PAIRS)
    unseen = encoded_texts([pair.clean + pair.answer for pair in pairs], tokenizer)
    folder.mkdir(parents=True)
    write_pairs(folder / HELD_OUT_FILE, pairs)
    sample = _Texts(spaces, tokenizer, random.Random(f"sample:{options.seed}")).sentences(N_TEXTS)
    (folder / TEXTS_FILE).write_text("".join(json.dumps({"text": text}) + "\n" for text in sample), encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        module: Any = AutoModelForCausalLM.from_config(CONFIGS[options.family](options, len(tokenizer)), attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(module.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(1, min(100, options.steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
    saved: list[Checkpoint] = []
    seen = 0
    for step in range(options.steps + 1):
        if step in options.checkpoints:
            saved.append(_save(folder, module, tokenizer, step, seen, unseen))
            if progress:
                progress(step, options.steps, f"loss {saved[-1].loss:.3f}")
        if step < options.steps:
            seen += _step(module, optimizer, *texts.draw(options.batch))
            schedule.step()
    return tuple(saved)


def _step(module: Any, optimizer: torch.optim.Optimizer, tokens: Tensor, targets: Tensor) -> int:
    """One step of the optimizer; how many tokens were learnt from."""
    module.train()
    loss = next_token_loss(module, tokens, targets)
    if not torch.isfinite(loss):
        raise TrainingFailed(f"the loss is {loss.item()}: lower the learning rate")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    return int((targets[:, 1:] != _IGNORED).sum())


def next_token_loss(module: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each token given those before it, padding left out."""
    logits = module(input_ids=tokens, use_cache=False).logits  # (n, length, vocabulary)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten(), ignore_index=_IGNORED)


def _save(folder: Path, module: Any, tokenizer: Any, step: int, seen: int, unseen: tuple[Tensor, Tensor]) -> Checkpoint:
    module.eval()
    with torch.no_grad():
        loss = next_token_loss(module, *unseen).item()
    name = f"step{step}"
    with quiet():
        module.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return Checkpoint(step, seen, loss, name)
