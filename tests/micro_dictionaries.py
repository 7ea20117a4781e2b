"""Small random dictionaries of every kind, on the scale of the site that they are for."""

from collections.abc import Callable

import torch
from featlas.model.dictionaries import (
    Basis,
    Dictionary,
    GatedDictionary,
    InputTransform,
    JumpReLUDictionary,
    LinearDictionary,
    Normalisation,
    ReLUDictionary,
    TopKDictionary,
    identity,
    per_head_linear,
)
from torch import Tensor

_CLASSES: dict[str, Callable[..., Dictionary]] = {
    "relu": ReLUDictionary,
    "topk": TopKDictionary,
    "jumprelu": JumpReLUDictionary,
    "gated": GatedDictionary,
}
_TRANSFORMS = {
    "": InputTransform(subtract_b_dec=True),
    "layer_norm": InputTransform(normalisation=Normalisation.LAYER_NORM),
    "constant_norm": InputTransform(normalisation=Normalisation.CONSTANT_NORM, subtract_b_dec=True),
    "centred": InputTransform(centred=True),
}
KINDS = (
    *_CLASSES, "linear", "per_head_linear", "identity", "relu/layer_norm", "topk/layer_norm", "jumprelu/constant_norm", "gated/centred",
)  # fmt: skip
"""Kind, or kind/input transformation."""


def tiny_dictionary(
    kind: str, d_in: int, *, seed: int = 0, basis: Basis = Basis.RESIDUAL, sample: Tensor | None = None, n_heads: int = 4, d_sae: int = 24
) -> Dictionary:
    """A random dictionary of `kind`; `sample`, (..., d_in), gives it the site's mean as b_dec."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator)
    if kind == "identity":
        return identity(d_in, basis=basis)
    if kind == "per_head_linear":
        head = d_in // n_heads
        return per_head_linear("tiny", random(n_heads, head, 3), random(n_heads, 3, head), b_dec=0.1 * random(d_in))
    W_dec = random(d_sae, d_in)
    W_dec /= W_dec.norm(dim=-1, keepdim=True)
    b_dec = 0.1 * random(d_in) if sample is None else sample.flatten(0, -2).mean(0)
    common = {"id": "tiny", "basis": basis, "W_dec": W_dec, "b_dec": b_dec, "W_enc": W_dec.T + 0.1 * random(d_in, d_sae)}
    if kind == "linear":
        return LinearDictionary(**common, b_enc=0.1 * random(d_sae))
    base, _, transform = kind.partition("/")
    own = {
        "relu": lambda: {"b_enc": 0.1 * random(d_sae)},
        "topk": lambda: {"b_enc": 0.1 * random(d_sae), "k": 5},
        "jumprelu": lambda: {"b_enc": 0.1 * random(d_sae), "threshold": 0.3 * torch.rand(d_sae, generator=generator)},
        "gated": lambda: {"b_gate": 0.1 * random(d_sae), "b_mag": 0.1 * random(d_sae), "r_mag": 0.3 * random(d_sae)},
    }[base]()
    return _CLASSES[base](**common, **own, input=_TRANSFORMS[transform])
