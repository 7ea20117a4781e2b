"""The stage, made: the tests' tiny atlas with samples, a circuit and a series, its page's server, a tiny .gguf file."""

import atexit
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from featlas.model.dictionary_sources import folder_id
from featlas.queries.series import SeriesRecord, write_series
from featlas.queries.store import open_graph

from ..study_atlas import TinyAtlas
from .stage import Broken, Stage

N_VOCAB, WIDTH = 32, 8


class WholeStage(Stage):
    """A stage with everything that a target asks for."""

    @cached_property
    def keys(self) -> list[str]:
        """Keys of the main run's features that drive others."""
        with open_graph(self.folder / "pristine", read_only=True) as store:
            found = store.read_edges("INFLUENCES", run=self.runs["main"])
        return [str(found["source"][0]), *map(str, found["target"].unique(maintain_order=True)[:2]), "nothing"]

    @cached_property
    def dictionary(self) -> str:
        """The id of the dictionary of resid_0."""
        return folder_id(self.folder / "dictionaries" / "resid_0")

    @cached_property
    def circuit(self) -> str:
        with open_graph(self.folder / "pristine", read_only=True) as store:
            return str(store.query("MATCH (c:Circuit) RETURN c.key AS key ORDER BY key")["key"][0])

    @cached_property
    def client(self) -> tuple[Any, tuple[str, ...]]:
        """A client of the server over the atlas as it was at first, and the names of its pages."""
        from featlas.pages.payload import PAGES
        from featlas.pages.reader import AtlasReader
        from featlas.pages.server import Served, ServeOptions, make_app
        from starlette.testclient import TestClient

        reader = AtlasReader(self.folder / "pristine")
        atexit.register(reader.close)
        app = make_app(reader, "token", Served("<!doctype html>", {"page.js": "1;"}), ServeOptions(rows=50, seconds=5))
        headers = {"authorization": "Bearer token"}
        return TestClient(app, base_url="http://127.0.0.1", headers=headers, raise_server_exceptions=True), tuple(PAGES)


def made(tiny: TinyAtlas, folder: Path) -> WholeStage:
    """A stage in an empty folder, from a tiny atlas that stays as it is."""
    for name in ("model", "dictionaries"):
        shutil.copytree(tiny.folder / name, folder / name)
    for name in ("task.jsonl", "slope.safetensors"):
        shutil.copy(tiny.folder / name, folder / name)
    shutil.copytree(tiny.atlas, folder / "atlas")
    write_tiny_gguf(folder / "tiny.gguf")
    stage = WholeStage(folder, tiny.runs, tiny.statistics_run)
    words = ("--model", stage.model, "--dictionaries", folder / "dictionaries", "--sites", "resid_0", "--atlas", stage.atlas)
    for command in (
        ("ingest", "samples", "--task", folder / "task.jsonl", "--limit", 26, *words),
        ("analyze", "circuit", "--run", tiny.runs["main"], "--edges", 20, "--atlas", stage.atlas),
    ):
        if (outcome := stage.run(*command)).refused:
            raise Broken("the stage cannot be made", outcome.err)
    members = pl.DataFrame({"name": ["step0", "step1"], "x": [0.0, 1.0]})
    write_series(folder / "series", SeriesRecord("5e21e5", "Tiny", "step", {"task": "even"}, {"members": members}))
    shutil.copytree(stage.atlas, folder / "pristine")
    return stage


def write_tiny_gguf(path: Path) -> None:
    """A llama of one layer without anything learned, as llama.cpp's converter writes one."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    for name, value in {
        "context_length": 64, "embedding_length": WIDTH, "block_count": 1, "feed_forward_length": 16, "head_count": 2, "head_count_kv": 2, "vocab_size": N_VOCAB,
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"▁w{i}" for i in range(N_VOCAB - 3))])
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types([2, 3, 3, *[1] * (N_VOCAB - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {
        "token_embd": (N_VOCAB, WIDTH), "output": (N_VOCAB, WIDTH), "output_norm": (WIDTH,), "blk.0.attn_norm": (WIDTH,), "blk.0.ffn_norm": (WIDTH,),
        **{f"blk.0.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}, "blk.0.ffn_gate": (16, WIDTH), "blk.0.ffn_up": (16, WIDTH),
        "blk.0.ffn_down": (WIDTH, 16),
    }  # fmt: skip
    numbers = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", numbers.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
