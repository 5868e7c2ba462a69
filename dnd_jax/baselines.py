"""The rungs that a generator must beat: adapters made of training adapters, without a decoder. Pure NumPy.

An adapter is a flat dict from `/`-separated path to matrix, as in `flatten_dict(tree, sep="/")`.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from dnd_jax.adapters import Leaf, Spec
from dnd_jax.adapters.profiles import beyond_lora
from dnd_jax.adapters.spec import rank_of, scale_of
from dnd_jax.types import InputError

Flat = dict[str, np.ndarray]


def weighted_mean(adapters: Sequence[Flat], weights: Sequence[float] | np.ndarray) -> Flat:
    """Return the mean of A and of B over adapters, float32, with weights that sum to one."""
    w = np.asarray(weights, np.float32) / np.sum(weights)
    return {path: np.tensordot(w, np.stack([a[path] for a in adapters]).astype(np.float32), 1) for path in adapters[0]}


def mean_product(adapters: Sequence[Flat], spec: Spec) -> tuple[Flat, Spec]:
    """Return an adapter whose product B A is the mean of the adapters' products, exactly: ranks side by side, scales in B.

    Raises:
      InputError: adapters that are more than products, such as DoRA, of which it would not be the mean.
    """
    if more := beyond_lora(spec):
        raise InputError(f"no mean product: the adapters have {', '.join(more)}")
    rank = len(adapters) * max(rank_of(module, spec.config) for module in spec.modules)
    flat = {}
    for module in spec.modules:
        path_a, path_b = spec.pair(module)
        a = np.concatenate([adapter[path_a] for adapter in adapters], 0)
        b = np.concatenate([adapter[path_b] for adapter in adapters], 1) * (scale_of(module, spec.config) / len(adapters))
        flat[path_a] = np.pad(a, ((0, rank - len(a)), (0, 0)))
        flat[path_b] = np.pad(b, ((0, 0), (0, rank - len(a)))).astype(a.dtype)
    config = {**spec.config, "r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    return flat, Spec(config, {p: Leaf(v.shape, spec.leaves[p].dtype) for p, v in flat.items()})


def random_like(adapters: Sequence[Flat], rng: np.random.Generator) -> Flat:
    """Return Gaussian matrices, each of the training adapters' mean norm."""
    made = {}
    for path in adapters[0]:
        value = rng.normal(size=adapters[0][path].shape).astype(np.float32)
        norm = np.mean([np.linalg.norm(a[path]) for a in adapters])
        made[path] = value * np.float32(norm / np.linalg.norm(value))
    return made


def top_k_weights(similarity: Float[np.ndarray, " K"], k: int, temperature: float) -> Float[np.ndarray, " K"]:
    """Return softmax weights over the k most similar, zero elsewhere."""
    chosen = np.argsort(-similarity)[:k]
    weights = np.zeros_like(similarity)
    weights[chosen] = np.exp((similarity[chosen] - similarity.max()) / temperature)
    return weights / weights.sum()


class Ridge:
    """Ridge regression from standardised features of conditions to all weights: the linear rival of the decoder.

    In its dual form, where a prediction is a weighted sum of adapters: nothing is of the size of features times weights.
    """

    def __init__(self, features: Float[np.ndarray, "S D"], adapters: Sequence[Flat], penalty: float):
        """Fit S samples, equally many of each adapter and in the adapters' order; the penalty is multiplied by S.

        Features that are the same in all samples, as of positions that no training prompt reaches, count for nothing.
        """
        self._adapters, self._mean, deviation = adapters, features.mean(0), features.std(0)
        self._scale = np.where(deviation > 1e-4 * deviation.max(), deviation + 1e-6, np.inf)
        x = ((features - self._mean) / self._scale).astype(np.float64)
        self._dual = np.linalg.solve(x @ x.T + penalty * len(x) * np.eye(len(x)), x)

    def __call__(self, features: Float[np.ndarray, " D"]) -> Flat:
        """Predict an adapter, float32."""
        weights = self._dual @ ((features - self._mean) / self._scale)
        weights += (1 - weights.sum()) / len(weights)  # what isn't explained is the mean
        weights = weights.reshape(len(self._adapters), -1).sum(1)
        return {path: sum(w * a[path].astype(np.float64) for w, a in zip(weights, self._adapters, strict=True)).astype(np.float32)
                for path in self._adapters[0]}
