"""The same product by other matrices: exact, unique, and near a reference."""

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dnd_jax import adapters

SHAPES = {"q": (3, 24, 16), "v": (2, 8, 40), "wide": (5, 4, 6)}  # rank, in, out; the last has a rank above its input


def make(rng, modules=SHAPES):
    return {name: {"lora_A": rng.normal(size=(r, n)).astype(np.float32), "lora_B": rng.normal(size=(m, r)).astype(np.float32)}
            for name, (r, n, m) in modules.items()}


def products(tree):
    return {name: m["lora_B"].astype(np.float64) @ m["lora_A"].astype(np.float64) for name, m in tree.items()}


def assert_same_products(one, other):
    for name, value in products(one).items():
        assert np.abs(products(other)[name] - value).max() <= 1e-6 * np.abs(value).max()


def regauged(tree, rng):
    """Another adapter with the same products."""
    changed = {}
    for name, m in tree.items():
        g = rng.normal(size=(len(m["lora_A"]),) * 2) + 2 * np.eye(len(m["lora_A"]))
        changed[name] = {"lora_A": g @ m["lora_A"].astype(np.float64), "lora_B": m["lora_B"] @ np.linalg.inv(g)}
    return changed


def test_canonical_keeps_products_and_is_balanced(rng):
    tree = make(rng)
    form = adapters.canonical(tree)
    assert_same_products(tree, form)
    for m in form.values():
        assert m["lora_A"].dtype == m["lora_B"].dtype == np.float32
        np.testing.assert_allclose(m["lora_A"] @ m["lora_A"].T, m["lora_B"].T @ m["lora_B"], atol=1e-4)
        assert (np.diff(np.linalg.norm(m["lora_A"], axis=1)) <= 1e-6).all()


def test_canonical_is_the_same_for_every_gauge(rng):
    tree = make(rng, {k: SHAPES[k] for k in ("q", "v")})
    one, other = (flatten_dict(adapters.canonical(t), sep="/") for t in (tree, regauged(tree, rng)))
    for path, value in one.items():
        np.testing.assert_allclose(other[path], value, atol=1e-5)


def test_canonical_of_an_untrained_adapter_is_zero(rng):
    tree = make(rng)
    tree["q"]["lora_B"][:] = 0
    form = adapters.canonical(tree)["q"]
    assert not form["lora_A"].any() and not form["lora_B"].any()


def test_align_keeps_products_and_undoes_a_change_of_gauge(rng):
    modules = {k: SHAPES[k] for k in ("q", "v")}
    tree, other = make(rng, modules), make(rng, modules)
    assert_same_products(tree, adapters.align(tree, other))
    back = flatten_dict(adapters.align(regauged(tree, rng), tree), sep="/")
    for path, value in flatten_dict(tree, sep="/").items():
        np.testing.assert_allclose(back[path], value, atol=1e-5)


@pytest.mark.parametrize("rank", [2, 16])
def test_align_keeps_products_however_far_the_reference_is(rank):
    """Of unrelated A some are nearly singular seen from the other: their inverse would lose the product's digits."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        tree, other = (make(rng, {"q": (rank, 96, 64)}) for _ in range(2))
        assert_same_products(tree, adapters.align(tree, other))


def test_align_is_the_nearest(rng):
    modules = {"q": SHAPES["q"]}
    tree, reference = make(rng, modules), make(rng, modules)
    a, target = (x["q"]["lora_A"].astype(np.float64) for x in (adapters.align(tree, reference), reference))
    for _ in range(20):
        moved = (np.eye(3) + 0.01 * rng.normal(size=(3, 3))) @ a
        assert np.linalg.norm(a - target) < np.linalg.norm(moved - target)


def test_align_refuses_what_it_cannot_do(rng):
    tree = make(rng, {"q": SHAPES["q"]})
    with pytest.raises(adapters.InputError, match=r"q/lora_A is \[3, 24\], the reference has \[2, 24\]"):
        adapters.align(tree, make(rng, {"q": (2, 24, 16)}))
    tree["q"]["lora_A"][1] = tree["q"]["lora_A"][0]
    with pytest.raises(adapters.InputError, match="condition number"):
        adapters.align(tree, make(rng, {"q": SHAPES["q"]}))
