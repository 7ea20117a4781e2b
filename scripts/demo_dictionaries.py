"""Trains the SmolLM2 dictionaries that come with the project, on the text of `scripts/demo_corpus.py`.

    python scripts/demo_corpus.py TEXT
    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE python scripts/demo_dictionaries.py TEXT OUT

Started again after an interruption it goes on where it stopped.
"""

import argparse
import sys
import time
from pathlib import Path

from featlas.model.corpus import read_texts
from featlas.model.loading import load_model
from featlas.model.sites import Site, SiteKind
from featlas.model.training import Progress, TrainingOptions, train_dictionaries

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    begin = time.monotonic()

    def report(progress: Progress) -> None:
        print(f"{time.monotonic() - begin:7.0f} s  {progress.stage} {progress.done}/{progress.total}", file=sys.stderr, flush=True)

    # bfloat16 halves the time of the one pass over the text; the error that it makes is in the model card.
    model = load_model("smollm2", dtype="bfloat16")
    prompts = list(read_texts(arguments.text / "prompts.jsonl"))
    for trained in train_dictionaries(model, arguments.text / "corpus.jsonl", arguments.out, OPTIONS, prompts=prompts, progress=report):
        print(f"{trained.site.name}: {trained.steps} steps, {trained.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
