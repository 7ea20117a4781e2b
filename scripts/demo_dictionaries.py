"""Trains, and measures, the SmolLM2 dictionaries that come with the project, on the text of `scripts/demo_corpus.py`.

    python scripts/demo_corpus.py TEXT
    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE python scripts/demo_dictionaries.py TEXT OUT
    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE python scripts/demo_dictionaries.py TEXT OUT --evaluate

Started again after an interruption the training goes on where it stopped.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from featlas.model.corpus import prompt_tokens, read_texts, token_blocks
from featlas.model.dictionary_sources import load_dictionaries
from featlas.model.evaluation import evaluate_dictionaries
from featlas.model.loading import LoadedModel, load_model
from featlas.model.sites import Site, SiteKind
from featlas.model.tasks import TASKS, build_task
from featlas.model.training import Progress, TrainingOptions, train_dictionaries
from torch import Tensor

OPTIONS = TrainingOptions(
    sites=tuple(Site(SiteKind.RESID, layer) for layer in (5, 11, 17, 23, 29)),
    width=2048,
    k=32,
    tokens=500_000,
    prompt_share=0.2,
    epochs=3,
    autocast=True,
    seed=0,
)

# The training reads the corpus from its beginning and stops well before these.
UNSEEN_TEXTS = 60
UNSEEN_BLOCKS = 160
PROMPTS_PER_TASK = 60


def train(text: Path, out: Path) -> None:
    begin = time.monotonic()

    def report(progress: Progress) -> None:
        print(f"{time.monotonic() - begin:7.0f} s  {progress.stage} {progress.done}/{progress.total}", file=sys.stderr, flush=True)

    # bfloat16 halves the time of the one pass over the text; the error that it makes is in the model card.
    model = load_model("smollm2", dtype="bfloat16")
    prompts = list(read_texts(text / "prompts.jsonl"))
    for trained in train_dictionaries(model, text / "corpus.jsonl", out, OPTIONS, prompts=prompts, progress=report):
        print(f"{trained.site.name}: {trained.steps} steps, {trained.seconds:.0f} s", flush=True)


def unseen_text(model: LoadedModel, text: Path) -> Iterator[Tensor]:
    """Blocks of the last texts of the corpus."""
    texts = list(read_texts(text / "corpus.jsonl"))[-UNSEEN_TEXTS:]
    return token_blocks(texts, model.tokenizer, OPTIONS.context, limit=UNSEEN_BLOCKS)


def unseen_prompts(model: LoadedModel) -> Iterator[Tensor]:
    """Prompts of featlas's tasks, whose word lists and wording differ from those of the training's sentences."""
    prompts = [pair.clean for name in TASKS for pair in build_task(name, model.tokenizer, n=PROMPTS_PER_TASK, seed=1)]
    return prompt_tokens(prompts, model.tokenizer, longest=OPTIONS.context)


def evaluate(text: Path, out: Path) -> None:
    model = load_model("smollm2")
    dictionaries = load_dictionaries(str(out), model)
    columns = ("site", "text", "FVU", "L0", "dead", "loss recovered", "clean / spliced / zero loss", "positions", "outliers")
    print(_row(columns) + "\n" + _row(["---"] * len(columns)))
    for name, sequences in (("unseen text", unseen_text(model, text)), ("task prompts", unseen_prompts(model))):
        for q in evaluate_dictionaries(model, dictionaries, sequences, loss_tokens=4000):
            losses = f"{q.loss_clean:.3f} / {q.loss_spliced:.3f} / {q.loss_zero:.3f}"
            numbers = (f"{q.fvu:.3f}", f"{q.l0:.1f}", f"{q.dead_share:.1%}", f"{q.loss_recovered:.3f}", losses, str(q.positions), str(q.outliers))
            print(_row((q.site.name, name, *numbers)), flush=True)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--evaluate", action="store_true", help="measure finished dictionaries in float32 and print a table")
    arguments = parser.parse_args()
    (evaluate if arguments.evaluate else train)(arguments.text, arguments.out)


if __name__ == "__main__":
    main()
