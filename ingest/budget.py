"""How much memory the engine's pieces take, as estimated from shapes, so that chunks keep within a budget."""

from collections.abc import Sequence

from ..model.binding import LocalFunction, Network
from ..model.sites import SiteKind
from ..model.tail import Tail

CHUNKS = 5
"""A chunk may take this part of the memory allowed: several live at once (forward, backward, what is accumulated)."""

LENGTHS = 16
"""Into how many lengths a sequence is cut at most where rows at different positions see prefixes of different length."""


def chunk(memory: int, per_item: int) -> int:
    """How many items of `per_item` bytes make a chunk, one at least."""
    return max(1, memory // CHUNKS // per_item)


def position_width(length: int) -> int:
    """How many neighbouring positions go together, so that a sequence of `length` is cut into `LENGTHS` at most."""
    return max(1, -(-length // LENGTHS))


def hidden_width(binding: Network) -> int:
    """Width of the MLP's inner layer."""
    config = getattr(binding.module, "config", None)  # a language model has one
    return int(getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * binding.d_model)


def block_bytes(binding: Network) -> int:
    """Bytes that one position of one sequence leaves behind in a block's forward pass, for its backward pass."""
    return (14 * binding.d_model + 5 * hidden_width(binding)) * binding.dtype.itemsize


def tail_row_bytes(binding: Network, tail: Tail, start: int) -> int:
    """Bytes of one run of a tail from position `start` on, with gradients."""
    keys = 2 * binding.d_heads * tail.length * binding.dtype.itemsize  # the clean prefix' keys and values, copied for each run
    return tail.n_layers * ((tail.length - start) * block_bytes(binding) + keys)


def vjp_row_bytes(binding: Network, function: LocalFunction, length: int) -> int:
    """Bytes that one position of one row takes in a backward pass through a local function over `length` positions."""
    if function.mixes_positions:
        return (8 * binding.d_model + 4 * hidden_width(binding) + 2 * binding.n_heads * length) * binding.dtype.itemsize
    if function.target.kind is SiteKind.MLP:
        return (8 * binding.d_model + 4 * hidden_width(binding)) * binding.dtype.itemsize
    return 8 * binding.d_model * binding.dtype.itemsize


def forward_bytes(binding: Network, function: LocalFunction, length: int) -> int:
    """Bytes that one position leaves behind in a forward pass through a local function over `length` positions."""
    if function.mixes_positions:
        return blocks_of(function) * (block_bytes(binding) + 3 * binding.n_heads * length * binding.dtype.itemsize)
    return block_bytes(binding) if function.target.kind is SiteKind.MLP else 8 * binding.d_model * binding.dtype.itemsize


def blocks_of(function: LocalFunction) -> int:
    """How many blocks a local function goes through, one at least."""
    lowest = min((parent.layer for parent in function.parents), default=0)
    return max(1, function.target.layer - lowest)


def block_flops(binding: Network) -> float:
    """Floating-point operations of one position's way through a block, forward: two per weight."""
    return 2.0 * sum(parameter.numel() for parameter in binding.layers[0].parameters() if parameter.ndim == 2)


def sequence_bytes(binding: Network, widths: Sequence[int], steps: int, length: int, *, dense: bool = False) -> int:
    """Bytes that one sequence of a batch takes from beginning to end; `widths` are the dictionaries' numbers of features.

    The most of it is the graph of the clean run's backward pass, unless the baseline is `dense`: then every feature of every site changes.
    """
    stream = (len(widths) * 4 + steps + (binding.n_layers if steps > 1 else 2)) * binding.d_model * binding.dtype.itemsize
    encoding = (sum(widths) if dense else 0) * binding.dtype.itemsize + sum(widths) + 6 * max(widths) * binding.dtype.itemsize
    return length * (stream + encoding + binding.n_layers * block_bytes(binding))
