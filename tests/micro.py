"""Tiny language models of each family, made from their configuration, with a word-level tokenizer."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.gpt2 import GPT2Config
from transformers.models.gpt_neox import GPTNeoXConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

VOCAB = 48
FAMILIES = ("gpt2", "gpt_neox", "gpt_neox_sequential", "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text")


def tiny_config(family: str, *, n_layers: int = 3, d_model: int = 16, n_heads: int = 4) -> Any:
    """The configuration of a tiny model; grouped queries and sliding windows where the family has them."""
    common = {"vocab_size": VOCAB, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    llama_like = {
        **common, "hidden_size": d_model, "intermediate_size": 3 * d_model, "num_hidden_layers": n_layers, "num_attention_heads": n_heads,
        "num_key_value_heads": n_heads // 2, "head_dim": d_model // n_heads, "initializer_range": 0.3,
    }  # fmt: skip
    if family == "gpt2":
        sizes = {"n_embd": d_model, "n_layer": n_layers, "n_head": n_heads, "n_positions": 64}
        return GPT2Config(vocab_size=VOCAB, **sizes, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
    if family.startswith("gpt_neox"):
        return GPTNeoXConfig(
            **common, hidden_size=d_model, intermediate_size=3 * d_model, num_hidden_layers=n_layers, num_attention_heads=n_heads,
            rotary_pct=0.5, use_parallel_residual=family == "gpt_neox", initializer_range=0.3,
        )  # fmt: skip
    if family == "qwen2":
        llama_like.pop("head_dim")
    gemma = {"query_pre_attn_scalar": d_model // n_heads, "sliding_window": 4}
    return {
        "llama": lambda: LlamaConfig(**llama_like),
        "qwen2": lambda: Qwen2Config(**llama_like),
        "qwen3": lambda: Qwen3Config(**llama_like),
        "mistral": lambda: MistralConfig(**llama_like, sliding_window=4),
        "gemma2": lambda: Gemma2Config(**llama_like, **gemma, final_logit_softcapping=20.0, attn_logit_softcapping=30.0),
        "gemma3_text": lambda: Gemma3TextConfig(**llama_like, **gemma, sliding_window_pattern=2),
    }[family]()


def tiny_module(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int) -> Any:
    """A randomly initialised tiny model of `family`, ready for inference, its norms' weights random too."""
    torch.manual_seed(seed)
    config = tiny_config(family, **sizes)
    module = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if family == "gemma2" else "sdpa")
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:  # norms and biases start at 0 or 1: random ones find bugs that those hide
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            elif "embed" in name or "wte" in name or "wpe" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module.to(dtype).eval().requires_grad_(False)


def word_tokenizer(words: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with VOCAB entries: `words` first, then w0, w1, …; no special tokens are added."""
    entries = [*words, *(f"w{i}" for i in range(VOCAB - len(words) - 1)), "[UNK]"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(entries)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def save_tiny(folder: Any, family: str = "llama", *, seed: int = 0, words: tuple[str, ...] = (), **sizes: int) -> Any:
    """Save a tiny model and its tokenizer as a local folder that `load_model` reads; returns the folder."""
    tiny_module(family, seed=seed, **sizes).save_pretrained(folder)
    word_tokenizer(words).save_pretrained(folder)
    return folder


def save_tiny_with_corpus(folder: Path, *, words: int) -> Path:
    """A tiny Llama in `folder/model`, and so many random words beside it in `corpus.txt`; the folder."""
    save_tiny(folder / "model", "llama")
    numbers = np.random.default_rng(0).integers(0, 40, size=words)
    (folder / "corpus.txt").write_text(" ".join(f"w{i}" for i in numbers) + "\n")
    return folder
