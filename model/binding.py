"""Binding: where a Hugging Face model keeps its sites, and its local functions in plain torch.

`Network` is what clean runs, ablation and attribution ask of any model; `Binding` answers for a language model, in these steps:

1. `bind` finds each block's parts (norms, attention, MLP, output projection) by one row of names per family.
2. It composes every block by hand on a probe input and compares with the model's own block: an architecture that
   does not compose as (attention, MLP, sum) is refused there, not discovered later in wrong numbers.
3. `Binding.forward` runs the model and records, or replaces, the values of chosen sites by hooks that are always removed.
4. `LocalFunction` recomputes one site from its parents' values alone, norms and attention patterns included.

The value of a site is what its dictionary reads: for `Basis.RESIDUAL` what is added to (or in) the residual stream,
for `Basis.HEADS` the concatenated head outputs before the output projection (`hook_z`).

Wherever the model's parts lie (`placement.py`) and whatever type its weights have, what goes in and comes out here is on one device,
`device`, and in float32 (float64 in a float64 model): a part takes its input to itself, and its output is brought back.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FeatlasError, UserError
from .placement import home_of, light_graphs, place_of
from .sites import EMBED, Basis, Site, SiteGraph, SiteKind

BINDING_TOLERANCE = 1e-4
"""Relative error above which a hand-composed block is refused (fp32 models measure 0 to 1e-7)."""


class UnknownArchitecture(UserError):
    """The model is of no family whose blocks are known, or its blocks do not compose as expected."""


class HookLeftBehind(FeatlasError):
    """A hook was still on the model where none should be."""


class TooLong(UserError):
    """A sequence is longer than the model's context."""


@dataclass(frozen=True)
class Block:
    """The parts of one transformer block; `post_*` are identities where the family has no post-norm."""

    module: nn.Module
    ln_attn: nn.Module
    attn: nn.Module
    out_proj: nn.Module
    post_attn: nn.Module
    ln_mlp: nn.Module
    mlp: nn.Module
    post_mlp: nn.Module


@dataclass
class Forward:
    """What one run of the model left behind.

    values: site → (batch, pos, width). logits: (batch, vocab) at the last position, None when the run stopped early.
    attention: per layer the arguments that its attention got besides the hidden states (masks, rotary tables).
    """

    values: dict[Site, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    attention: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)

    def shortened(self, length: int) -> "Forward":
        """The attention's arguments for the first `length` positions alone; a causal model computes the same there."""
        short = Forward()
        for layer, (args, kwargs) in self.attention.items():
            if any(isinstance(value, Tensor) for value in args):
                raise UnknownArchitecture("attention takes tensors by position besides the hidden states: this architecture is not supported")
            short.attention[layer] = (args, {name: _cut(name, value, length) for name, value in kwargs.items()})
        return short

    def suffix(self, start: int, end: int) -> "Forward":
        """The attention's arguments for positions `start` to `end` alone, which read all positions before `end`.

        Where the mask is left to the kernel ("causal" counts from the first query) it is written out.
        """
        short = self.shortened(end)
        if start == 0:
            return short
        causal: Tensor | None = None  # one for all layers
        for layer, (args, kwargs) in short.attention.items():
            cut = {name: _behind(name, value, start) for name, value in kwargs.items()}
            if cut.get("attention_mask") is None and end - start > 1:
                causal = self._causal(start, end) if causal is None else causal
                cut["attention_mask"] = causal
            short.attention[layer] = (args, cut)
        return short

    def _causal(self, start: int, end: int) -> Tensor:
        """Additive mask of the queries from `start` on, (1, 1, end - start, end)."""
        like = next(iter(self.values.values()))
        hidden = torch.ones(end - start, end, dtype=torch.bool, device=like.device).triu(start + 1)
        return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)[None, None]


class _Stop(Exception):
    """Ends a run once the last wanted site is recorded."""


Patch = Callable[[Tensor], Tensor]


# First name present wins; a family differs from the next only in these words.
_NAMES: dict[str, tuple[str, ...]] = {
    "attn": ("self_attn", "attention", "attn"),
    "out_proj": ("o_proj", "dense", "c_proj"),
    "ln_attn": ("input_layernorm", "ln_1"),
    "ln_mlp": ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2"),
    "mlp": ("mlp",),
    "layers": ("layers", "h"),
    "norm": ("norm", "final_layer_norm", "ln_f"),
}


def _part(owner: nn.Module, role: str) -> nn.Module:
    for name in _NAMES[role]:
        found = getattr(owner, name, None)
        if isinstance(found, nn.Module):
            return found
    raise UnknownArchitecture(
        f"{type(owner).__name__} has no part {' or '.join(_NAMES[role])}: "
        "families known are GPT-2, GPT-NeoX, Llama, Qwen2, Qwen3, Mistral, Gemma-2 and Gemma-3"
    )


def _block(module: nn.Module) -> Block:
    attn = _part(module, "attn")
    # Gemma alone has post-norms; there `post_attention_layernorm` acts on the attention's output, elsewhere it is the MLP's pre-norm.
    gemma = hasattr(module, "pre_feedforward_layernorm")
    return Block(
        module=module,
        ln_attn=_part(module, "ln_attn"),
        attn=attn,
        out_proj=_part(attn, "out_proj"),
        post_attn=module.post_attention_layernorm if gemma else nn.Identity(),  # type: ignore[arg-type]
        ln_mlp=_part(module, "ln_mlp"),
        mlp=_part(module, "mlp"),
        post_mlp=module.post_feedforward_layernorm if gemma else nn.Identity(),  # type: ignore[arg-type]
    )


def _cache_name(attn: nn.Module) -> str:
    """Under which name an attention module takes a cache of keys and values."""
    for name in ("past_key_values", "layer_past", "past_key_value"):
        if name in inspect.signature(attn.forward).parameters:
            return name
    raise UnknownArchitecture(f"{type(attn).__name__} takes no cache of keys and values: this architecture is not supported")


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def unwrap(model: Any) -> nn.Module:
    """The plain torch module inside a `LoadedModel`, an nnsight `LanguageModel` or a TransformerLens bridge."""
    for attribute in ("module", "_module", "original_model"):
        inner = getattr(model, attribute, None)
        if isinstance(inner, nn.Module):
            return inner
    if isinstance(model, nn.Module):
        return model
    raise UnknownArchitecture(
        f"{type(model).__name__} holds no torch module: pass a LoadedModel, an nnsight LanguageModel or a Hugging Face causal language model"
    )


class Network(ABC):
    """A network seen as sites and local functions: all that clean runs, ablation and attribution ask of a model.

    layers: what makes each `resid_l`, n_layers of them. d_model: the width of the residual stream; where sites differ, that of the widest.
    n_heads, d_heads: 0 without attention. chain: plain layers, each reading the one before (`SiteGraph.chain`). `tokens` (batch, pos) are whatever
    its input is numbered by. device, dtype: of everything that goes in and comes out. precision: the type of the weights.
    """

    module: nn.Module
    layers: Sequence[nn.Module]
    n_layers: int
    d_model: int
    n_heads: int = 0
    d_heads: int = 0
    parallel: bool = False
    chain: bool = False
    cache_name: str = ""

    @property
    def device(self) -> torch.device:
        return home_of(self.module)

    @property
    def precision(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.precision, torch.float32)

    def home(self, value: Tensor) -> Tensor:
        """A value of a part, in the device and type of all values."""
        return value.to(self.device, self.dtype)

    @contextmanager
    def autocast(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Autocast to a type (None: none at all) on every kind of device that a part is on."""
        with ExitStack() as stack:
            for kind in dict.fromkeys([self.device.type, *(place_of(layer).type for layer in self.layers)]):
                stack.enter_context(torch.autocast(kind, dtype or torch.bfloat16, enabled=dtype is not None))
            yield

    def graph(self, sites: Iterable[Site], target: Site | None = None) -> SiteGraph:
        """The graph of who reads whom over `sites` in this model; `target`: what y reads, the last residual stream unless given."""
        return SiteGraph.of(self.n_layers, self.parallel, sites, target, chain=self.chain)

    @abstractmethod
    def width(self, site: Site, basis: Basis = Basis.RESIDUAL) -> int:
        """The width of a site's value; raises `UserError` for a basis that the site lacks."""

    @abstractmethod
    def forward(
        self,
        tokens: Tensor,
        bases: Mapping[Site, Basis],
        *,
        patches: Mapping[Site, Patch] | None = None,
        stop_early: bool = False,
        keep_attention: bool = False,
    ) -> Forward:
        """Run the model on `tokens` (batch, pos), recording the values of the sites in `bases`.

        `patches` replaces a site's value by a function of it before anything reads it. With `stop_early` the run ends
        after the last recorded site and there are no logits. Gradients flow as torch's grad mode says.
        """

    @abstractmethod
    def compute(self, site: Site, inputs: Sequence[Tensor], run: Forward, basis: Basis) -> Tensor:
        """A site's value in `basis` from its architectural parents' (`SiteGraph.architectural_parents`), each (batch, pos, width)."""

    @abstractmethod
    def logits(self, resid: Tensor) -> Tensor:
        """Logits of the last site, `resid` (..., width) → (..., vocab)."""

    def written(self, site: Site, value: Tensor, basis: Basis) -> Tensor:
        """What a site's value adds to what its readers read: itself, unless it is in a basis of its own."""
        return value

    def attend(self, layer: int, resid: Tensor, run: Forward, basis: Basis = Basis.RESIDUAL, *, cache: Any = None) -> Tensor:
        """What attention of `layer` makes of a residual stream; raises `UnknownArchitecture` where there is none."""
        raise UnknownArchitecture(f"{type(self.module).__name__} has no attention")

    def transform(self, layer: int, resid: Tensor) -> Tensor:
        """What the MLP of `layer` adds to the residual stream; raises `UnknownArchitecture` where there is none."""
        raise UnknownArchitecture(f"{type(self.module).__name__} has no residual stream that MLPs add to")

    def assert_no_hooks(self) -> None:
        """Raise `HookLeftBehind` if any module of the model still has a forward or backward hook."""
        for name, module in self.module.named_modules():
            if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
                raise HookLeftBehind(f"a hook was left on {name or 'the model'}: remove it before measuring, it would change the numbers")


class Binding(Network):
    """A causal language model seen as sites and local functions."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        config: Any = module.config
        trunk = getattr(module, getattr(module, "base_model_prefix", "model"), None)
        if not isinstance(trunk, nn.Module):
            raise UnknownArchitecture(f"{type(module).__name__} has no base model: pass a causal language model")
        self.blocks: tuple[Block, ...] = tuple(_block(b) for b in _part(trunk, "layers").children())
        self.final_norm = _part(trunk, "norm")
        self.unembedding: nn.Module = module.get_output_embeddings()  # type: ignore[operator]
        self.layers = tuple(block.module for block in self.blocks)
        self.n_layers = len(self.blocks)
        self.d_model = int(config.hidden_size)
        self.n_heads = int(config.num_attention_heads)
        self.parallel = bool(getattr(config, "use_parallel_residual", False))
        self.context = int(getattr(config, "max_position_embeddings", 0) or 0)
        weight = self.blocks[0].out_proj.weight  # its shape alone is looked at
        # Conv1D (GPT-2) keeps its weight as (in, out), Linear as (out, in).
        self.d_heads = int(weight.shape[1] if isinstance(self.blocks[0].out_proj, nn.Linear) else weight.shape[0])  # type: ignore[index]
        self.head_dim = self.d_heads // self.n_heads
        self.cache_name = _cache_name(self.blocks[0].attn)

    def width(self, site: Site, basis: Basis = Basis.RESIDUAL) -> int:
        """The width of a site's value; raises `UserError` for a basis that the site lacks."""
        if basis is Basis.HEADS:
            if site.kind is not SiteKind.ATTN:
                raise UserError(f"site {site.name} has no attention heads: the heads basis (hook_z) belongs to attn_L sites only")
            return self.d_heads
        return self.d_model

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise UserError(f"tokens have shape {tuple(tokens.shape)}: a batch of non-empty sequences, (batch, pos), is needed")
        if self.context and tokens.shape[1] > self.context:
            raise TooLong(
                f"a sequence of {tokens.shape[1]} tokens is longer than the model's context of {self.context}: shorten or split it"
            )

    def forward(
        self,
        tokens: Tensor,
        bases: Mapping[Site, Basis],
        *,
        patches: Mapping[Site, Patch] | None = None,
        stop_early: bool = False,
        keep_attention: bool = False,
    ) -> Forward:
        """Run the model on `tokens` (batch, pos), equal lengths without padding, recording the values of the sites in `bases`.

        `patches` replaces a site's value by a function of it before anything reads it. With `stop_early` the run ends
        after the last recorded site and there are no logits. Gradients flow as torch's grad mode says.
        """
        self._check_tokens(tokens)
        run = Forward()
        wanted = dict(bases)
        last = max((_order(s, self.n_layers) for s in wanted), default=None) if stop_early else None
        with self._hooks(run, wanted, patches or {}, last, keep_attention), light_graphs(self.module):
            try:
                output = self.module(input_ids=tokens.to(self.device), use_cache=False, logits_to_keep=1)
                run.logits = self.home(output.logits[:, -1])  # (batch, vocab)
            except _Stop:
                pass
        return run

    @contextmanager
    def _hooks(
        self, run: Forward, wanted: Mapping[Site, Basis], patches: Mapping[Site, Patch], last: tuple[int, int] | None, keep_attention: bool
    ) -> Iterator[None]:
        handles: list[Any] = []

        def seen(site: Site, value: Tensor) -> Tensor:
            value, theirs = self.home(value), value
            if site in patches:
                value = patches[site](value)
            if site in wanted:
                run.values[site] = value
            # What is recorded lies on the way to what reads it, so that gradients pass it.
            value = value.to(theirs.device, theirs.dtype)
            if last is not None and _order(site, self.n_layers) == last:
                raise _Stop
            return value

        try:
            handles.extend(self._hook(site, wanted.get(site, Basis.RESIDUAL), seen) for site in {*wanted, *patches})
            if keep_attention:
                for layer, block in enumerate(self.blocks):
                    handles.append(block.attn.register_forward_pre_hook(_keep(run, layer), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, site: Site, basis: Basis, seen: Callable[[Site, Tensor], Tensor]) -> Any:
        """Put one hook where `site` has its value."""
        if site == EMBED:
            return self.blocks[0].module.register_forward_pre_hook(lambda m, args: (seen(site, args[0]), *args[1:]))
        block = self.blocks[site.layer]
        if site.kind is SiteKind.ATTN and basis is Basis.HEADS:
            return block.out_proj.register_forward_pre_hook(lambda m, args: (seen(site, args[0]), *args[1:]))
        module = {
            SiteKind.ATTN: block.attn if isinstance(block.post_attn, nn.Identity) else block.post_attn,
            SiteKind.MLP: block.mlp if isinstance(block.post_mlp, nn.Identity) else block.post_mlp,
            SiteKind.RESID: block.module,
        }[site.kind]

        def after(m: nn.Module, args: Any, output: Any) -> Any:
            value = seen(site, _first(output))
            return (value, *output[1:]) if isinstance(output, tuple) else value

        return module.register_forward_hook(after)

    def logits(self, resid: Tensor) -> Tensor:
        """Logits of a final residual stream, `resid` (..., d_model) → (..., vocab), final norm and soft-cap included."""
        with light_graphs(self.module):
            normed = self.final_norm(self._at(self.final_norm, resid))
            logits = self.unembedding(self._at(self.unembedding, normed))
            cap = getattr(self.module.config, "final_logit_softcapping", None)
            return self.home(torch.tanh(logits / cap) * cap if cap else logits)

    def apply(self, part: nn.Module, value: Tensor) -> Tensor:
        """What one part of the model makes of a value."""
        return self.home(part(self._at(part, value)))

    def is_home(self, layer: int) -> bool:
        """Whether a block's weights lie where values are, in their type."""
        weights = self.layers[layer].parameters()
        return all(weight.device == self.device and weight.dtype == self.dtype for weight in weights)

    def _at(self, part: nn.Module, value: Tensor) -> Tensor:
        """A value where a part computes, in the type of its weights."""
        return value.to(place_of(part), self.precision)

    def arguments(self, layer: int, run: Forward) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The recorded arguments of a layer's attention, where the layer computes."""
        args, kwargs = run.attention[layer]
        place = place_of(self.layers[layer])
        return _moved(args, place, self.precision), {name: _moved(value, place, self.precision) for name, value in kwargs.items()}

    def attend(self, layer: int, resid: Tensor, run: Forward, basis: Basis = Basis.RESIDUAL, *, cache: Any = None) -> Tensor:
        """What attention of `layer` makes of a residual stream (batch, pos, d_model): its site's value in `basis`.

        `cache` stands where transformers puts its cache: an object whose `update(keys, values, …)` returns what is attended to.
        """
        block = self.blocks[layer]
        args, kwargs = self.arguments(layer, run)
        if cache is not None:
            kwargs[self.cache_name] = cache
        with light_graphs(self.module):
            normed = block.ln_attn(self._at(block.module, resid))
            if basis is Basis.RESIDUAL:
                return self.home(block.post_attn(_first(block.attn(normed, *args, **kwargs))))
            grabbed: list[Tensor] = []
            handle = block.out_proj.register_forward_pre_hook(lambda m, inputs: grabbed.append(inputs[0]))
            try:
                block.attn(normed, *args, **kwargs)
            finally:
                handle.remove()
            return self.home(grabbed[0])

    def written(self, site: Site, value: Tensor, basis: Basis) -> Tensor:
        """What a site's value adds to the residual stream: itself, or head outputs through projection and post-norm."""
        if basis is Basis.RESIDUAL:
            return value
        block = self.blocks[site.layer]
        with light_graphs(self.module):
            written = block.out_proj(self._at(block.module, value).contiguous())  # GPT-2's projection takes views of its input
            return self.home(block.post_attn(written))

    def transform(self, layer: int, resid: Tensor) -> Tensor:
        """What the MLP of `layer` adds to the residual stream that it reads, (..., d_model) → (..., d_model)."""
        block = self.blocks[layer]
        with light_graphs(self.module):
            return self.home(block.post_mlp(block.mlp(block.ln_mlp(self._at(block.module, resid)))))

    def compute(self, site: Site, inputs: Sequence[Tensor], run: Forward, basis: Basis) -> Tensor:
        if site.kind is SiteKind.ATTN:
            return self.attend(site.layer, inputs[0], run, basis)
        total = sum(inputs[1:], inputs[0])
        return self.transform(site.layer, total) if site.kind is SiteKind.MLP else total


def _keep(run: Forward, layer: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = {name: _shared(value) for name, value in kwargs.items() if name != "hidden_states"}
        run.attention[layer] = (_shared(args[1:]), rest)

    return hook


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """An attention argument on a device; numbers with a point, of masks and rotary tables, in a type."""
    if isinstance(value, tuple):
        return tuple(_moved(part, device, dtype) for part in value)
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)


# Which dimensions of an attention argument run over positions.
_POSITION_DIMS = {"attention_mask": (-2, -1), "position_ids": (-1,), "position_embeddings": (-2,), "cache_position": (-1,)}


def _cut(name: str, value: Any, length: int) -> Any:
    """An attention argument cut to the first `length` positions."""
    if isinstance(value, tuple):
        return tuple(_cut(name, v, length) for v in value)
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if name not in _POSITION_DIMS:
        raise UnknownArchitecture(f"attention takes a tensor {name!r}: this architecture is not supported")
    for dim in _POSITION_DIMS[name]:
        value = value.narrow(dim, 0, min(length, value.shape[dim]))
    return value


def _behind(name: str, value: Any, start: int) -> Any:
    """A (cut) attention argument without the queries' positions before `start`."""
    if isinstance(value, tuple):
        return tuple(_behind(name, v, start) for v in value)
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    dim = _POSITION_DIMS[name][0]  # a mask's columns are the keys' positions, of which all stay
    if value.shape[dim] == 1:  # the same for all positions
        return value
    return value.narrow(dim, start, value.shape[dim] - start)


def _shared(value: Any) -> Any:
    """The first sequence's share of an attention argument: without padding all sequences of one length have the same, and it broadcasts."""
    if isinstance(value, Tensor):
        return value[:1] if value.ndim else value
    return tuple(_shared(v) for v in value) if isinstance(value, tuple) else value


def _order(site: Site, n_layers: int) -> tuple[int, int]:
    """Order in which the model itself computes the sites (an MLP in parallel with attention comes after it in the code)."""
    rank = {SiteKind.EMBED: 0, SiteKind.ATTN: 1, SiteKind.MLP: 2, SiteKind.RESID: 3, SiteKind.OUTPUT: 4}[site.kind]
    return (n_layers if site.kind is SiteKind.OUTPUT else site.layer, rank)


def capture_sites(binding: Network, tokens: Tensor, sites: Mapping[Site, Basis]) -> dict[Site, Tensor]:
    """Values of `sites` on `tokens` (batch, pos), each (batch, pos, width), without gradients; stops after the last one needed."""
    with torch.no_grad():
        return binding.forward(tokens, sites, stop_early=True).values


@dataclass(frozen=True)
class _Evaluation:
    """One run of a local function. It is freed with its last reference, and the graph of a backward pass with it: nothing refers back to it."""

    function: "LocalFunction"
    values: Mapping[Site, Tensor]
    constants: Mapping[Site, Tensor]
    run: Forward
    memo: dict[Site, Tensor] = field(default_factory=dict)

    def stream(self, site: Site) -> Tensor:
        """What `site` adds to, or holds of, the residual stream."""
        if site not in self.memo:
            if site in self.values:
                basis = self.function.bases.get(site, Basis.RESIDUAL)
                self.memo[site] = self.function.binding.written(site, self.values[site], basis)
            elif site in self.constants:
                self.memo[site] = self.constants[site]
            else:
                self.memo[site] = self.compute(site, Basis.RESIDUAL)
        return self.memo[site]

    def compute(self, site: Site, basis: Basis) -> Tensor:
        """A site's value from what it reads."""
        inputs = [self.stream(parent) for parent in self.function.graph.architectural_parents(site)]
        return self.function.binding.compute(site, inputs, self.run, basis)


class LocalFunction:
    """One site recomputed from its parents' values, by composition where sites between them were left out.

    What the site reads that no chosen site feeds (the residual stream before a graph that starts late) stays at its
    clean value. The output `y` is represented by the final residual stream, which is all that it reads.
    """

    def __init__(self, binding: Network, graph: SiteGraph, site: Site, bases: Mapping[Site, Basis]) -> None:
        self.binding, self.graph, self.site, self.bases = binding, graph, site, bases
        self.target = graph.architectural_parents(site)[0] if site.kind is SiteKind.OUTPUT else site
        self.parents = graph.parents(site)
        self.constants: tuple[Site, ...] = ()
        self.mixes_positions = False
        if self.parents:
            self._plan()

    def _plan(self) -> None:
        """Find the constants that the function needs and whether it recomputes attention."""
        constants: set[Site] = set()
        visited: set[Site] = set()

        def visit(site: Site, top: bool = False) -> None:
            if site in visited or (not top and site in self.parents):
                return
            visited.add(site)
            if not self.graph.sources(site):
                constants.add(site)
                return
            self.mixes_positions |= site.kind is SiteKind.ATTN
            for parent in self.graph.architectural_parents(site):
                visit(parent)

        visit(self.target, top=self.site.kind is not SiteKind.OUTPUT)
        self.constants = tuple(sorted(constants, key=lambda s: _order(s, self.binding.n_layers)))

    def __call__(self, values: Mapping[Site, Tensor], constants: Mapping[Site, Tensor], run: Forward) -> Tensor:
        """The site's value, (batch, pos, width), from `values` of its parents and `constants` of what stays clean.

        Where the function does not mix positions, batch and pos may be any gathered positions.
        `run` lends the attention's masks and rotary tables.
        """
        if self.target in values and self.site.kind is SiteKind.OUTPUT:
            return values[self.target]
        evaluation = _Evaluation(self, values, constants, run)
        # Blocks in ascending order first, so that the recursion stays within one block.
        for layer in range(self.lowest, self.target.layer):
            below = Site(SiteKind.RESID, layer)
            if below not in values and below not in constants and self.graph.sources(below):
                evaluation.stream(below)
        return evaluation.compute(self.target, self.bases.get(self.target, Basis.RESIDUAL))

    @property
    def lowest(self) -> int:
        """The lowest layer among the parents (0 for `embed`)."""
        return max(0, min(parent.layer for parent in self.parents))


def bind(model: Any) -> Binding:
    """Bind a causal language model and check every block's composition numerically.

    Takes a `LoadedModel`, an nnsight `LanguageModel`, or a Hugging Face module. Raises `UnknownArchitecture` where a
    block composed by hand differs from the model's own by more than `BINDING_TOLERANCE` (relative).
    """
    module = unwrap(model)
    if getattr(module, "config", None) is None or not hasattr(module, "get_output_embeddings"):
        raise UnknownArchitecture(f"{type(module).__name__} is no Hugging Face causal language model")
    binding = Binding(module)
    module.eval()
    _check_composition(binding)
    return binding


@torch.no_grad()
def _check_composition(binding: Binding) -> None:
    """Compare every block, composed by hand from its captured input, with what the model computed."""
    vocab = int(binding.module.config.vocab_size)  # type: ignore[union-attr, arg-type]
    tokens = torch.tensor([[(7 * i + 3) % vocab for i in range(6)], [(5 * i + 1) % vocab for i in range(6)]])
    layers: Sequence[Site] = [Site(SiteKind.RESID, layer) for layer in range(binding.n_layers)]
    run = binding.forward(tokens, dict.fromkeys([EMBED, *layers], Basis.RESIDUAL), keep_attention=True)
    before, short = run.values[EMBED], run.shortened(3)
    for layer in layers:
        attn = binding.attend(layer.layer, before, run)
        mlp = binding.transform(layer.layer, before if binding.parallel else before + attn)
        compare(before + attn + mlp, run.values[layer], f"block {layer.layer}", binding)
        compare(binding.attend(layer.layer, before[:, :3], short), attn[:, :3], f"attention {layer.layer} on a shorter sequence", binding)
        before = run.values[layer]
    assert run.logits is not None
    compare(binding.logits(before[:, -1]), run.logits, "the output head", binding)


def compare(ours: Tensor, theirs: Tensor, what: str, binding: Network) -> None:
    """Raise `UnknownArchitecture` where a value composed from a model's parts is not the model's own (relative error)."""
    error = float((ours - theirs).float().norm() / theirs.float().norm().clamp_min(1e-30))
    # Half precision rounds each of the block's sums; the tolerance is in units of its last place.
    tolerance = BINDING_TOLERANCE if binding.precision in (torch.float32, torch.float64) else 64 * float(torch.finfo(binding.precision).eps)
    if not error <= tolerance:
        raise UnknownArchitecture(
            f"{type(binding.module).__name__}: {what} composed from its parts differs from the model by {error:.1e} "
            f"(allowed {tolerance:.0e}): this architecture is not supported"
        )
