"""The baselines compute what their names say."""

import numpy as np
import pytest

from dnd_jax import baselines, embeddings
from dnd_jax.adapters import Leaf, Spec
from dnd_jax.adapters.spec import scale_of


def make_adapters(count, rng):
    return [{"m/lora_A": rng.normal(size=(2, 6)).astype(np.float32), "m/lora_B": rng.normal(size=(5, 2)).astype(np.float32)}
            for _ in range(count)]


@pytest.mark.parametrize("config,scale", [
    ({"r": 2, "lora_alpha": 4}, 2), ({"r": 2, "lora_alpha": 4, "use_rslora": True}, 4 / 2**0.5),
    ({"r": 2, "lora_alpha": 4, "alpha_pattern": {"m": 10}}, 5), ({"r": 8, "lora_alpha": 4, "rank_pattern": {"m": 2}}, 2)])
def test_mean_product_is_the_mean_of_products_at_the_same_scale(config, scale):
    adapters = make_adapters(3, np.random.default_rng(0))
    spec = Spec(config, {"m/lora_A": Leaf((2, 6), "float32"), "m/lora_B": Leaf((5, 2), "float32")})
    flat, wide = baselines.mean_product(adapters, spec)
    expected = np.mean([a["m/lora_B"] @ a["m/lora_A"] for a in adapters], axis=0)
    np.testing.assert_allclose(flat["m/lora_B"] @ flat["m/lora_A"] * scale_of("m", wide.config), expected * scale, rtol=1e-5,
                               atol=1e-6)
    assert wide.config["r"] == wide.config["lora_alpha"] == 6
    assert wide.leaves["m/lora_A"].shape == (6, 6) and wide.leaves["m/lora_B"].shape == (5, 6)


def test_random_has_the_mean_norm_of_each_matrix():
    adapters = make_adapters(4, np.random.default_rng(0))
    made = baselines.random_like(adapters, np.random.default_rng(1))
    for path in made:
        np.testing.assert_allclose(np.linalg.norm(made[path]), np.mean([np.linalg.norm(a[path]) for a in adapters]), rtol=1e-5)


def test_nearest_and_top_k_follow_similarity():
    known = np.array([[1.0, 0.0], [0.9, 0.3], [-1.0, 0.1]])
    similarity = embeddings.similarities(np.array([1.0, 0.01]), known)
    assert similarity.argmax() == 0
    np.testing.assert_array_equal(baselines.top_k_weights(similarity, 1, 1.0), [1, 0, 0])
    weights = baselines.top_k_weights(similarity, 2, 0.5)
    assert weights[2] == 0 and weights[0] > weights[1] > 0 and np.isclose(weights.sum(), 1)


def test_features_that_no_sample_varies_count_for_nothing():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(20, 3)), np.full((20, 2), 0.7)], 1)  # as of positions that no training prompt reaches
    model, query = baselines.Ridge(x, make_adapters(20, rng), 1e-3), np.array([0.3, -1.0, 0.5, 0.7, 0.7])
    np.testing.assert_array_equal(model(query)["m/lora_A"], model(query + np.array([0, 0, 0, 5, -5]))["m/lora_A"])


def test_ridge_recovers_a_linear_map_and_shrinks_to_the_mean():
    rng = np.random.default_rng(0)
    x, map_a, map_b = rng.normal(size=(200, 3)), rng.normal(size=(3, 12)), rng.normal(size=(3, 10))
    adapters = [{"m/lora_A": (v @ map_a).reshape(2, 6), "m/lora_B": (v @ map_b).reshape(5, 2)} for v in x]
    query = np.array([0.3, -1.0, 0.5])
    np.testing.assert_allclose(baselines.Ridge(x, adapters, 1e-9)(query)["m/lora_A"].ravel(), query @ map_a, atol=1e-5)
    mean = baselines.weighted_mean(adapters, np.ones(200))
    np.testing.assert_allclose(baselines.Ridge(x, adapters, 1e9)(query)["m/lora_B"], mean["m/lora_B"], atol=1e-5)
