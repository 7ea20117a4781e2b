"""A convolutional network on images, bound as language models are, so that the same engine attributes to it and ablates it.

1. `train_digits`: a small network on scikit-learn's handwritten digits (1,797 images of 8 × 8, in the package: nothing is downloaded).
2. `LayeredNetwork`: any stack of layers as sites and local functions. `resid_l` is layer l's map after its nonlinearity, flattened; `embed` is
   the pixels. Every layer reads the one before alone.
3. `image_pairs`: an image, its class and the wrong class that the network takes it for most; another image, of that class.

An image takes the place of a sequence of one token: the token is the image's number in the data set, as a language model's token is a row of its
embedding. Pairs, batches, baselines and donors are then those of language models: `counterfactual` is the other class's image, `resample` any other
one, `mean` the means over the images trained on. Answers are classes, the entries of the logits.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import UserError
from .baselines import NodeMoments
from .binding import Forward, Network, Patch, capture_sites, compare
from .dictionaries import IdentityDictionary, identity
from .pairs import Pair
from .sites import EMBED, OUTPUT, Basis, Site, SiteKind

IntArray = NDArray[np.int64]

CHANNELS = (8, 16)
"""Maps of the two convolutions: 8 of 8 × 8 and 16 of 4 × 4."""

HIDDEN = 64
"""Units of the dense layer."""

EPOCHS, RATE, DROPOUT = 30, 1e-2, 0.3
"""Of training: AdamW in batches of 64, the rate going up to `RATE` and down to nothing."""

TEST_SHARE = 1 / 3
"""Share of each class's images that the network is not trained on."""

_TEXT = re.compile(r"image (\d+) is a(?: (\d+))?")


class NoSuchImage(UserError):
    """A text that names no image of the data set, or no class."""


# --- the network ------------------------------------------------------------------------------------------------------


class DigitsNetwork(nn.Module):
    """Two convolutions (the second halves the map), a dense layer, ReLU after each, and a linear head: images (n, 1, 8, 8) → logits (n, 10)."""

    def __init__(self, channels: Sequence[int] = CHANNELS, hidden: int = HIDDEN, n_classes: int = 10) -> None:
        super().__init__()
        first, second = channels
        self.layers = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(1, first, 3, padding=1), nn.ReLU()),  # (n, first, 8, 8)
                nn.Sequential(nn.Conv2d(first, second, 3, stride=2, padding=1), nn.ReLU()),  # (n, second, 4, 4)
                nn.Sequential(nn.Flatten(), nn.Linear(second * 16, hidden), nn.ReLU()),  # (n, hidden)
            ]
        )
        self.head = nn.Linear(hidden, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        for layer in self.layers:
            images = layer(images)
        return self.head(images)


@dataclass(frozen=True, eq=False)
class Digits:
    """A trained network and its images. images (n, 1, 8, 8) from 0 to 1; labels (n,); train, test: numbers of images, those trained on and others."""

    module: DigitsNetwork
    images: Tensor
    labels: Tensor
    train: Tensor
    test: Tensor
    seed: int

    @cached_property
    def key(self) -> str:
        """What the model is called: its seed, and the first 8 hex digits of the sha256 of its weights."""
        weights = b"".join(p.detach().cpu().numpy().astype("<f4").tobytes() for p in self.module.parameters())
        return f"digits@{self.seed}-{hashlib.sha256(weights).hexdigest()[:8]}"

    @torch.no_grad()
    def accuracy(self, numbers: Tensor) -> float:
        """The share of these images whose class has the greatest logit."""
        return float((self.module(self.images[numbers]).argmax(1) == self.labels[numbers]).float().mean())


def load_images() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits: images (1797, 1, 8, 8) float32 from 0 to 1, classes (1797,)."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.tensor(found.target, dtype=torch.int64)


def train_digits(*, seed: int = 0, epochs: int = EPOCHS, channels: Sequence[int] = CHANNELS, hidden: int = HIDDEN) -> Digits:
    """Train the network on two thirds of each class's images, a few seconds on one core; the same seed gives the same network."""
    if epochs < 1:
        raise UserError(f"{epochs} epochs train nothing: give at least 1")
    images, labels = load_images()
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(images), generator=generator)
    by_class = [shuffled[labels[shuffled] == digit] for digit in range(10)]
    test = torch.cat([own[: round(TEST_SHARE * len(own))] for own in by_class]).sort().values
    train = torch.cat([own[round(TEST_SHARE * len(own)) :] for own in by_class])
    with torch.random.fork_rng(devices=[]):  # initial weights and dropout draw from torch's own generator
        torch.manual_seed(seed)
        module = DigitsNetwork(channels, hidden)
        _fit(module, images, labels, [train[torch.randperm(len(train), generator=generator)] for _ in range(epochs)])
    module.eval().requires_grad_(False)
    return Digits(module, images, labels, train.sort().values, test, seed)


def _fit(module: DigitsNetwork, images: Tensor, labels: Tensor, orders: Sequence[Tensor]) -> None:
    """Train on images in these orders, one for each epoch, with dropout behind every layer but the first."""
    optimiser = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=1e-2)
    batches = [batch for order in orders for batch in order.split(64)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=len(batches))
    for batch in batches:
        value = images[batch]
        for place, layer in enumerate(module.layers):
            value = nn.functional.dropout(layer(value), DROPOUT if place else 0.0)
        loss = nn.functional.cross_entropy(module.head(value), labels[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


# --- the adapter ------------------------------------------------------------------------------------------------------


class LayeredNetwork(Network):
    """A stack of layers seen as sites and local functions; positions do not mix, each is an image of its own.

    images: (n_images, ...), what a token is the number of. layers: modules from maps to maps, the first from images; head: from the last layer's
    map to logits. The module itself must compute just this: it is checked on two images, as a language model's blocks are.
    """

    chain = True

    def __init__(self, module: nn.Module, layers: Iterable[nn.Module], head: nn.Module, images: Tensor) -> None:
        self.module, self.layers, self.head = module, tuple(layers), head
        self.images = images.to(device=self.device, dtype=self.dtype)
        self.n_layers = len(self.layers)
        with torch.no_grad():
            maps = [self.images[:2]]
            for layer in self.layers:
                maps.append(layer(maps[-1]))
            self.shapes = tuple(tuple(one.shape[1:]) for one in maps)  # of the images, then of each layer's map
            self.d_model = max(self.width(Site(SiteKind.RESID, layer)) for layer in range(self.n_layers))
            compare(self.logits(maps[-1].flatten(1)), module(self.images[:2]), "the logits", self)

    def _shape(self, site: Site) -> tuple[int, ...]:
        """The shape of a site's map before it is flattened."""
        return self.shapes[0 if site == EMBED else site.layer + 1]

    def width(self, site: Site, basis: Basis = Basis.RESIDUAL) -> int:
        if basis is not Basis.RESIDUAL:
            raise UserError(f"site {site.name} has no attention heads: this is a network of plain layers")
        self.graph([site])  # says which sites there are
        return int(np.prod(self._shape(site)))

    def forward(
        self,
        tokens: Tensor,
        bases: Mapping[Site, Basis],
        *,
        patches: Mapping[Site, Patch] | None = None,
        stop_early: bool = False,
        keep_attention: bool = False,
    ) -> Forward:
        self._check(tokens)
        run, given = Forward(), patches or {}
        wanted = self.graph([*bases, *given]).sites[:-1] if bases or given else ()
        last = max((site.layer for site in bases), default=-1) if stop_early else self.n_layers
        value = self.images[tokens.to(self.device)].flatten(2)  # (batch, pos, pixels)
        for site in (EMBED, *(Site(SiteKind.RESID, layer) for layer in range(self.n_layers))):
            if site.layer > last:
                return run
            if site != EMBED:
                value = self.compute(site, [value], run, Basis.RESIDUAL)
            if site in given:
                value = given[site](value)
            if site in wanted and site in bases:
                run.values[site] = value
        if not stop_early:
            run.logits = self.logits(value[:, -1])
        return run

    def _check(self, tokens: Tensor) -> None:
        if tokens.ndim != 2 or not tokens.shape[1]:
            raise UserError(f"images have shape {tuple(tokens.shape)}: a batch of their numbers, (batch, pos), is needed")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < len(self.images):
            raise NoSuchImage(f"image {int(tokens.max())}: there are images 0 to {len(self.images) - 1}")

    def compute(self, site: Site, inputs: Sequence[Tensor], run: Forward, basis: Basis) -> Tensor:
        (before,) = inputs
        own = self._shape(EMBED if site.layer == 0 else Site(SiteKind.RESID, site.layer - 1))
        return self.layers[site.layer](before.reshape(-1, *own)).reshape(*before.shape[:-1], -1)

    def logits(self, resid: Tensor) -> Tensor:
        return self.head(resid.reshape(-1, *self.shapes[-1])).reshape(*resid.shape[:-1], -1)


def bind_digits(digits: Digits) -> LayeredNetwork:
    """The network's sites and local functions."""
    return LayeredNetwork(digits.module, digits.module.layers, digits.module.head, digits.images)


def neurons(binding: Network, sites: Iterable[Site] | None = None) -> dict[Site, IdentityDictionary]:
    """Every neuron of the sites (of all layers unless given) as a feature of its own."""
    chosen = [Site(SiteKind.RESID, layer) for layer in range(binding.n_layers)] if sites is None else list(sites)
    return {site: identity(binding.width(site), device=binding.device, dtype=binding.dtype) for site in chosen if site != OUTPUT}


def activations(binding: Network, numbers: Tensor, sites: Iterable[Site]) -> dict[Site, Tensor]:
    """Values of sites on images, each (n, width)."""
    return {site: value[:, 0] for site, value in capture_sites(binding, numbers[:, None], dict.fromkeys(sites, Basis.RESIDUAL)).items()}


def moments(binding: Network, numbers: Tensor, sites: Iterable[Site]) -> dict[Site, NodeMoments]:
    """Means and standard deviations of every neuron over images, for the baselines `mean` and `noise`; error nodes are 0."""
    return {
        site: NodeMoments(value.mean(0), torch.zeros_like(value[0]), value.std(0, correction=0), torch.zeros_like(value[0]))
        for site, value in activations(binding, numbers, sites).items()
    }


# --- images as pairs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageTokenizer:
    """Stands where a language model's tokenizer does: `image 17 is a 3` is the image's number and the class's.

    The two are numbers of different things, images and entries of the logits, as prompt and answer never meet in one place.
    """

    n_images: int
    n_classes: int = 10
    unk_token_id: int | None = None

    def __call__(self, texts: Sequence[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [self._ids(text) for text in texts]}

    def _ids(self, text: str) -> list[int]:
        match = _TEXT.fullmatch(text)
        if match is None or int(match[1]) >= self.n_images or int(match[2] or 0) >= self.n_classes:
            raise NoSuchImage(f"{text!r} is no image: 'image N is a C' has N from 0 to {self.n_images - 1} and C from 0 to {self.n_classes - 1}")
        return [int(number) for number in match.groups() if number is not None]

    def decode(self, ids: Sequence[int]) -> str:
        """The numbers as text."""
        return " ".join(map(str, ids))


@torch.no_grad()
def image_pairs(binding: LayeredNetwork, labels: Tensor, numbers: Tensor, among: Tensor, *, seed: int = 0) -> list[Pair]:
    """A pair for each image: its class is the answer, the wrong class of the greatest logit the wrong answer.

    The corrupted image is one of `among` that is of the wrong class, drawn by the seed and the image. The task is the class: `digit 3`.
    """
    logits = binding.forward(numbers[:, None], {}).logits
    assert logits is not None
    own = labels[numbers]
    wrong = logits.cpu().scatter(1, own[:, None], -torch.inf).argmax(1)
    of_class = {digit: among[labels[among] == digit] for digit in range(logits.shape[1])}
    pairs = []
    for number, answer, other in zip(numbers.tolist(), own.tolist(), wrong.tolist(), strict=True):
        others = of_class[other][of_class[other] != number]
        if not len(others):
            raise UserError(f"none of the {len(among)} images to draw from is a {other}: take more of them")
        drawn = int(others[np.random.default_rng((seed, number)).integers(len(others))])
        pairs.append(Pair(f"image {number} is a", f"image {drawn} is a", f" {answer}", f" {other}", f"digit {answer}", str(answer)))
    return pairs


def per_class(numbers: Tensor, labels: Tensor, n: int) -> Tensor:
    """The first `n` of each class's images, ascending; all of a class that has fewer."""
    own = labels[numbers]
    chosen = [numbers[own == digit][:n] for digit in own.unique().tolist()]
    return torch.cat(chosen).sort().values
