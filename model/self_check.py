"""Is a model seen right? What the engine assumes of a model is measured on it, with numbers: for an architecture that nobody has tried yet.

On two short sequences of tokens, each value that featlas computes is compared with the model's own (relative error, norm of the difference by norm):
1. reading: the logits of a run that reads every site are those of a plain run;
2. blocks: each block, composed of attention and MLP, gives the residual stream behind it;
3. head: the output head on the last residual stream gives the logits;
4. heads: the attention heads' outputs, projected, are what attention adds to the stream;
5. writing: a site that is written with its own value changes nothing, and one written with 0 changes the logits;
6. local functions: a site from moved parents, against the whole model with these parents moved;
7. tails: the rest of the model behind a moved site, run from a position on, against the whole model with the site moved;
8. hooks: none is left in the model, and a plain run afterwards gives the first logits again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .binding import Binding, LocalFunction
from .sites import EMBED, OUTPUT, Basis, Site, SiteKind
from .tail import CleanRun, Tail

TOLERANCE = 1e-4
"""Relative error that float32 stays under; half precision is allowed 64 units of its last place."""

LENGTH = 6


@dataclass(frozen=True)
class Measured:
    """One comparison: the greatest relative error found and the one allowed; `detail` says of what."""

    name: str
    error: float
    allowed: float
    detail: str

    @property
    def works(self) -> bool:
        return self.error <= self.allowed


@dataclass(frozen=True, eq=False)
class _Seen:
    """A clean run that read every site, and the plain logits (batch, vocab)."""

    binding: Binding
    tokens: Tensor
    run: CleanRun
    plain: Tensor

    @property
    def top(self) -> Site:
        return Site(SiteKind.RESID, self.binding.n_layers - 1)

    def moved(self, site: Site, seed: int) -> Tensor:
        """A site's value with noise of a tenth of its size, (batch, pos, width)."""
        value = self.run.values[site]
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)).to(value)
        return value + 0.1 * value.float().std().to(value.dtype) * noise


@torch.no_grad()
def self_check(binding: Binding) -> list[Measured]:
    """Every comparison, in order. Nothing is raised for a model that is seen wrong: the errors say so."""
    half = binding.precision not in (torch.float32, torch.float64)
    allowed = 64 * float(torch.finfo(binding.precision).eps) if half else TOLERANCE
    seen = _look(binding)
    checks: tuple[tuple[str, Callable[[_Seen], Iterator[tuple[float, str]]]], ...] = (
        ("reading", _reading), ("blocks", _blocks), ("output head", _head), ("attention heads", _heads), ("writing", _writing),
        ("local functions", _local_functions), ("tails", _tails), ("hooks", _hooks),
    )  # fmt: skip
    found = []
    for name, check in checks:
        errors = list(check(seen))
        worst = max(errors, key=lambda error: error[0] if error[0] == error[0] else float("inf"))
        found.append(Measured(name, worst[0], allowed, f"{len(errors)} compared, the worst: {worst[1]}"))
    return found


def _look(binding: Binding) -> _Seen:
    """A clean run that reads every site of every layer."""
    vocab = int(binding.module.config.vocab_size)  # type: ignore[union-attr, arg-type]
    tokens = torch.tensor([[(7 * i + 3) % vocab for i in range(LENGTH)], [(5 * i + 1) % vocab for i in range(LENGTH)]])
    kinds = (SiteKind.ATTN, SiteKind.MLP, SiteKind.RESID)
    sites = [EMBED, *(Site(kind, layer) for layer in range(binding.n_layers) for kind in kinds)]
    run = binding.forward(tokens, dict.fromkeys(sites, Basis.RESIDUAL), keep_attention=True)
    return _Seen(binding, tokens, CleanRun(binding, run, run.values), _logits(binding, tokens))


def _logits(binding: Binding, tokens: Tensor) -> Tensor:
    """The model's own logits at the last position, (batch, vocab), by no code of ours."""
    return binding.home(binding.module(input_ids=tokens.to(binding.device), use_cache=False).logits[:, -1])


def _error(ours: Tensor, theirs: Tensor) -> float:
    """Relative: norm of the difference by norm of the model's own."""
    return float((ours - theirs).float().norm() / theirs.float().norm().clamp_min(1e-30))


def _put(value: Tensor) -> Callable[[Tensor], Tensor]:
    """A patch: this value instead of the site's own."""
    return lambda _: value


def _reading(seen: _Seen) -> Iterator[tuple[float, str]]:
    assert seen.run.run.logits is not None
    yield _error(seen.run.run.logits, seen.plain), "logits of a run that reads all sites"


def _blocks(seen: _Seen) -> Iterator[tuple[float, str]]:
    binding, values = seen.binding, seen.run.values
    for layer in range(binding.n_layers):
        before = seen.run.before(layer)
        attn = binding.attend(layer, before, seen.run.run)
        mlp = binding.transform(layer, before if binding.parallel else before + attn)
        yield _error(before + attn + mlp, values[Site(SiteKind.RESID, layer)]), f"resid_{layer}"


def _head(seen: _Seen) -> Iterator[tuple[float, str]]:
    yield _error(seen.binding.logits(seen.run.values[seen.top][:, -1]), seen.plain), f"logits of {seen.top.name}"


def _heads(seen: _Seen) -> Iterator[tuple[float, str]]:
    binding = seen.binding
    for layer in {0, binding.n_layers // 2, binding.n_layers - 1}:
        site = Site(SiteKind.ATTN, layer)
        heads = binding.forward(seen.tokens, {site: Basis.HEADS}, stop_early=True).values[site]
        yield _error(binding.written(site, heads, Basis.HEADS), seen.run.values[site]), f"heads of {site.name}"


def _writing(seen: _Seen) -> Iterator[tuple[float, str]]:
    """Identity patches change nothing; patches with 0 must change something, which counts as an error of 1 where they do not."""
    binding = seen.binding
    for site in _some(binding):
        value = seen.run.values[site]
        same = binding.forward(seen.tokens, {}, patches={site: _put(value)}).logits
        gone = binding.forward(seen.tokens, {}, patches={site: torch.zeros_like}).logits
        assert same is not None
        assert gone is not None
        yield _error(same, seen.plain), f"{site.name} written with its own value"
        yield float(torch.equal(gone, seen.plain)), f"{site.name} written with 0"


def _some(binding: Binding) -> list[Site]:
    """A site of each kind, in the first, the middle and the last layer."""
    layers = sorted({0, binding.n_layers // 2, binding.n_layers - 1})
    return [EMBED, *(Site(kind, layer) for layer in layers for kind in (SiteKind.ATTN, SiteKind.MLP, SiteKind.RESID))]


def _local_functions(seen: _Seen) -> Iterator[tuple[float, str]]:
    binding, sites = seen.binding, _some(seen.binding)
    bases = dict.fromkeys(sites, Basis.RESIDUAL)
    graph = binding.graph(bases)
    for i, site in enumerate(graph.sites):
        function = LocalFunction(binding, graph, site, bases)
        if not function.parents:
            continue
        moved = {parent: seen.moved(parent, i) for parent in function.parents}
        ours = function(moved, {site: seen.run.values[site] for site in function.constants}, seen.run.run)
        patches = {parent: _put(value) for parent, value in moved.items()}
        read = seen.top if site == OUTPUT else site
        theirs = binding.forward(seen.tokens, {read: Basis.RESIDUAL}, patches=patches).values[read]
        yield _error(ours, theirs), f"{site.name} from {', '.join(parent.name for parent in function.parents)}"


def _tails(seen: _Seen) -> Iterator[tuple[float, str]]:
    """Positions before the change stay clean in a tail; so they do in the whole model, where they read nothing behind them."""
    binding, n = seen.binding, len(seen.tokens)
    start, last = LENGTH // 2, LENGTH - 1
    for i, site in enumerate(_some(binding)):
        if site == seen.top:
            continue
        value = seen.run.values[site].clone()
        value[:, start:] = seen.moved(site, 100 + i)[:, start:]
        tail = Tail(seen.run, site, Basis.RESIDUAL, seen.top, Basis.RESIDUAL, last)
        ours = tail(value[:, start:], torch.arange(n, device=value.device), start)
        theirs = binding.forward(seen.tokens, {seen.top: Basis.RESIDUAL}, patches={site: _put(value)}).values[seen.top]
        yield _error(ours, theirs[:, last]), f"{seen.top.name} behind {site.name}"


def _hooks(seen: _Seen) -> Iterator[tuple[float, str]]:
    seen.binding.assert_no_hooks()
    yield _error(_logits(seen.binding, seen.tokens), seen.plain), "plain logits afterwards"
