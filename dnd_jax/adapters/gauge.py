"""The same product B A by other matrices: (B G)(G^-1 A) is one adapter for every invertible G.

Both functions keep every product to 1e-6 relative, work in float64 and return float32. Scales, DoRA magnitudes and
biases act on the product, so they need no change.
"""

from collections.abc import Callable

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float

from dnd_jax.types import InputError, Tree

A = Float[np.ndarray, "r in"]
B = Float[np.ndarray, "out r"]
LARGEST_CONDITION = 1e4  # of an A that can be aligned
EXACT = 2e-7  # root mean square of the error of a product in float32, relative to the product; the largest is some times that


def canonical(tree: Tree) -> Tree:
    """Return the unique balanced form of an adapter:  B = U sqrt(S), A = sqrt(S) V^T  of  B A = U S V^T.

    Singular values come in falling order; in every row of A the element of largest magnitude is positive. Unique where the
    singular values differ.
    """
    return _per_module(tree, lambda a, b, path: _balanced(a, b))


def align(tree: Tree, reference: Tree) -> Tree:
    """Return the adapter with A as near as possible to the reference's A in the least squares sense, the product the same.

    A becomes M A with M = argmin ||M A - A_ref||, B becomes B M^-1. Where M is so near to singular that float32 would lose the
    product, its small singular values are raised as far as exactness asks.

    Args:
      tree: matrices of full rank, as trained ones are.
      reference: a tree with the same modules; only its A matrices are used.

    Raises:
      InputError: an A without full rank, or another shape than the reference's.
    """
    targets = flatten_dict(reference, sep="/")
    return _per_module(tree, lambda a, b, path: _towards(a, b, np.asarray(targets[path], np.float64), path))


def _per_module(tree: Tree, change: Callable[[A, B, str], tuple[A, B]]) -> Tree:
    flat = {path: np.asarray(value, np.float64) for path, value in flatten_dict(tree, sep="/").items()}
    changed = {}
    for path, a in flat.items():
        if path.endswith("lora_A"):
            partner = path[: -len("lora_A")] + "lora_B"
            changed[path], changed[partner] = change(a, flat[partner], path)
    return unflatten_dict({path: changed[path].astype(np.float32) for path in flat}, sep="/")


def _balanced(a: A, b: B) -> tuple[A, B]:
    q_out, r_out = np.linalg.qr(b)
    q_in, r_in = np.linalg.qr(a.T)
    u, s, vt = np.linalg.svd(r_out @ r_in.T)
    rank, root = len(a), np.sqrt(s)
    new_a, new_b = np.zeros_like(a), np.zeros_like(b)
    new_a[: len(s)] = root[:, None] * (vt[: len(s)] @ q_in.T)
    new_b[:, : len(s)] = (q_out @ u[:, : len(s)]) * root
    sign = np.sign(new_a[np.arange(rank), np.abs(new_a).argmax(1)])
    sign[sign == 0] = 1
    return new_a * sign[:, None], new_b * sign


def _towards(a: A, b: B, target: A, path: str) -> tuple[A, B]:
    if a.shape != target.shape:
        raise InputError(f"{path} is {list(a.shape)}, the reference has {list(target.shape)}")
    if np.linalg.cond(a) > LARGEST_CONDITION:
        raise InputError(f"{path}: has condition number {np.linalg.cond(a):.0e}, at most {LARGEST_CONDITION:.0e} can be aligned")
    u, s, vt = np.linalg.svd(target @ np.linalg.pinv(a))
    floor = s.max() / LARGEST_CONDITION
    while True:
        kept = np.maximum(s, floor)
        new_a, new_b = ((u * kept) @ vt @ a).astype(np.float32), (b @ (vt.T / kept) @ u.T).astype(np.float32)
        if floor >= s.max() or _error(a, b, new_a, new_b) <= EXACT:
            return new_a, new_b
        floor *= 2


def _error(a: A, b: B, new_a: A, new_b: B) -> float:
    """Return ||B' A' - B A|| / ||B A||, without making the products."""
    left, right = np.linalg.qr(np.hstack([new_b, b]))[1], np.linalg.qr(np.vstack([new_a, -a]).T)[1]
    rank = len(a)
    product = np.linalg.norm(left[:, rank:] @ right[:, rank:].T)
    return float(np.linalg.norm(left @ right.T) / product) if product else 0.0
