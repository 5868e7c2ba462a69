"""Norms, distances and spectra of products, against products that are really made."""

import shutil

import numpy as np
import pytest

from dnd_jax import anatomy
from dnd_jax.types import InputError

MODULES = {"model/layers/0/self_attn/q_proj": (6, 8), "model/layers/0/mlp/up_proj": (10, 8)}


def adapter(rng, rank=2):
    flat = {}
    for module, (out, width) in MODULES.items():
        flat[f"{module}/lora_A"] = rng.normal(size=(rank, width)).astype(np.float32)
        flat[f"{module}/lora_B"] = rng.normal(size=(out, rank)).astype(np.float32)
    return flat


def product(flat):
    return [flat[f"{module}/lora_B"].astype(float) @ flat[f"{module}/lora_A"] for module in MODULES]


@pytest.fixture
def made(rng):
    adapters = [adapter(rng) for _ in range(5)]
    return adapters, np.stack([np.concatenate([p.ravel() for p in product(flat)]) for flat in adapters])


def test_gram_norms_and_distances_are_those_of_the_products(made):
    adapters, vectors = made
    grams = anatomy.gram(adapters)
    assert anatomy.modules(adapters[0]) == list(MODULES) and grams.shape == (2, 5, 5)
    np.testing.assert_allclose(grams.sum(0), vectors @ vectors.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(anatomy.norms(grams), np.transpose([[np.linalg.norm(p) for p in product(f)] for f in adapters]),
                               rtol=1e-5)
    apart = np.linalg.norm(vectors[:, None] - vectors, axis=-1)
    np.testing.assert_allclose(anatomy.distances(grams.sum(0)), apart, rtol=1e-5, atol=1e-5)
    deviations = vectors - vectors[:3].mean(0)
    around = anatomy.centred(grams.sum(0), range(3))
    np.testing.assert_allclose(around, deviations @ deviations.T, rtol=1e-5, atol=1e-4)
    cosines = deviations @ deviations.T / np.outer(*[np.linalg.norm(deviations, axis=1)] * 2)
    np.testing.assert_allclose(anatomy.cosines(around), cosines, atol=1e-5)


def test_spectrum_is_that_of_the_products(rng):
    flat = adapter(rng, rank=3)
    flat |= {path: value for path, value in adapter(rng, rank=1).items() if "up_proj" in path}
    found = anatomy.spectrum(flat)
    for ours, p in zip(found, product(flat), strict=True):
        np.testing.assert_allclose(ours, np.linalg.svd(p, compute_uv=False)[:3], atol=1e-5)
    assert found.shape == (2, 3) and (found[1, 1:] == 0).all()


def test_neighbours_know_an_averager_a_copy_and_the_truth(rng):
    """From one A, as published, means of products are products of means."""
    shared = adapter(rng)

    def of_b(scale):
        return {path: value if path.endswith("A") else rng.normal(size=value.shape) * scale for path, value in shared.items()}

    train, held_out = {f"t{i}": of_b(1.0) for i in range(4)}, {"x": of_b(1.0), "y": of_b(1.0), "z": of_b(1.0)}
    mean = {path: np.mean([flat[path] for flat in train.values()], axis=0) for path in shared}
    rows = anatomy.neighbours(anatomy.Specimens(train, held_out, {"z": train["t2"], "y": held_out["y"], "x": mean}))
    averager, truth, copy = rows
    assert averager["task"] == "x" and averager["generated_trained"] == pytest.approx(1) and averager["cosine_trained"] == 0
    assert averager["generated_mean"] == pytest.approx(0, abs=1e-6)
    assert truth["generated_trained"] == pytest.approx(0, abs=1e-6) and truth["cosine_trained"] == pytest.approx(1)
    assert truth["generated_nearest"] == pytest.approx(truth["trained_nearest"]) and truth["generated_mean"] == pytest.approx(1)
    assert copy["nearest"] == "t2" and copy["generated_nearest"] == pytest.approx(0, abs=1e-6)
    assert copy["cosine_nearest"] == pytest.approx(1)


def test_specimens_of_a_run(smoke, monkeypatch, tmp_path):
    monkeypatch.chdir(smoke)
    found = anatomy.read("build/tenants-smoke/run")
    assert (len(found.train), len(found.held_out)) == (6, 2) and found.held_out.keys() == found.generated.keys()
    rows = anatomy.neighbours(found)
    assert len(rows) == 2 and all(np.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
    shutil.copytree("build/tenants-smoke/run", tmp_path / "run")
    (tmp_path / "run" / "manifest.sha256").write_text("0" * 64)
    with pytest.raises(InputError, match=r"manifest\.json: sha256 is .*, .*run/manifest\.sha256 says 000000000000"):
        anatomy.read(tmp_path / "run")
