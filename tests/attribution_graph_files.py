"""Attribution graphs as circuit-tracer and its kin write them, small: per-layer transcoders, a cross-layer transcoder, attention features too."""

import json
from pathlib import Path
from typing import Any

PROMPT = ("<bos>", " The", " capital", " of", " Texas", " is")


def paired(x: int, y: int) -> int:
    """The Cantor pairing by walking its diagonals."""
    number = 0
    for diagonal in range(x + y):
        number += diagonal + 1
    return number + y


def feature(layer: int, index: int, pos: int, **more: Any) -> dict[str, Any]:
    return {
        "node_id": f"{layer}_{index}_{pos}", "feature": paired(layer, index), "layer": str(layer), "ctx_idx": pos,
        "feature_type": "cross layer transcoder", "token_prob": 0.0, "is_target_logit": False, "run_idx": 0, "reverse_ctx_idx": 0,
        "jsNodeId": f"{layer}_{index}-0", "clerp": "", "influence": 0.4, "activation": 3.5, **more,
    }  # fmt: skip


def error(layer: int, pos: int, **more: Any) -> dict[str, Any]:
    shared = feature(layer, 0, pos)
    own = {"node_id": f"{layer}_-1_{pos}", "feature": -1, "feature_type": "mlp reconstruction error", "jsNodeId": f"{layer}_-1-{pos}"}
    return {**shared, **own, "activation": None, **more}


def token(index: int, pos: int) -> dict[str, Any]:
    own = {"node_id": f"E_{index}_{pos}", "feature": pos, "layer": "E", "feature_type": "embedding", "jsNodeId": f"E_{index}-{pos}"}
    return {**feature(0, 0, pos), **own, "activation": None}


def logit(index: int, text: str, p: float, *, n_layers: int, pos: int = 5, target: bool = False) -> dict[str, Any]:
    own = {
        "node_id": f"{n_layers + 1}_{index}_{pos}", "feature": index, "layer": str(n_layers + 1), "feature_type": "logit", "token_prob": p,
        "is_target_logit": target, "jsNodeId": f"L_{index}-{pos}", "clerp": f'Output "{text}" (p={p:.3f})', "influence": None, "activation": None,
    }  # fmt: skip
    return {**feature(0, 0, pos), **own}


def links(*ends: tuple[dict[str, Any], dict[str, Any], float]) -> list[dict[str, Any]]:
    return [{"source": a["node_id"], "target": b["node_id"], "weight": weight} for a, b, weight in ends]


def whole(nodes: list[dict[str, Any]], made: list[dict[str, Any]], **metadata: Any) -> dict[str, Any]:
    told = {
        "slug": "texas", "scan": "gemma-2-2b", "transcoder_list": [], "prompt_tokens": list(PROMPT), "prompt": "".join(PROMPT), "node_threshold": 0.8,
        "schema_version": 1, **metadata,
    }  # fmt: skip
    state = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": told, "qParams": state, "nodes": nodes, "links": made}


def texas(scale: float = 1.0, **metadata: Any) -> dict[str, Any]:
    """Per-layer transcoders of a 26-layer model: tokens, features of layers of one and two digits, an error node, two logits."""
    capital, place = token(6037, 2), token(9447, 4)
    low, high = feature(3, 15928, 2, clerp="capitals"), feature(20, 15589, 5, clerp='say "Austin" <city> & co')
    missed = error(11, 4)
    austin, dallas = logit(22605, " Austin", 0.41, n_layers=26, target=True), logit(26865, " Dallas", 0.02, n_layers=26)
    made = links(
        (capital, low, 2.0 * scale), (place, high, 1.5 * scale), (low, high, -0.5 * scale), (missed, high, 0.75 * scale),
        (high, austin, 4.0 * scale), (high, dallas, -1.0 * scale), (missed, austin, 0.25 * scale), (capital, austin, 0.125 * scale),
    )  # fmt: skip
    return whole([capital, place, low, high, missed, austin, dallas], made, **metadata)


def cross_layer() -> dict[str, Any]:
    """A cross-layer transcoder in Neuronpedia's own form: the feature is its index, and there is no schema version."""
    a, b, out = feature(0, 253, 1, feature=253), feature(7, 81, 3, feature=81), logit(5, " x", 0.9, n_layers=8, target=True)
    content = whole([token(2, 0), a, b, out], links((token(2, 0), a, 1.0), (a, b, 2.0), (b, out, 3.0)), scan="clt", slug="clt")
    del content["metadata"]["schema_version"]
    return content


def with_attention() -> dict[str, Any]:
    """Attention features (lorsa) at even layers, transcoders at odd ones."""
    attn = feature(4, 9, 2, feature=9, feature_type="lorsa")
    mlp = feature(5, 7, 3, feature=7)
    missed = error(4, 2, feature_type="lorsa error")
    out = logit(5, " x", 0.9, n_layers=12, target=True)
    return whole([attn, mlp, missed, out], links((attn, mlp, 1.0), (missed, mlp, 0.5), (mlp, out, 2.0)), scan="lorsa", slug="lorsa")


def saved(content: dict[str, Any], path: Path) -> Path:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path
