"""Head maps by the rules of the paper and of its reference code, and the random control.

Floating point and, for K-Means, a random start: none of these would decide the same ties alike in five
implementations. They are here to be compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chai_export.errors import ChaiError
from chai_export.quality.methods_medoids import HeadMap, Probabilities

_K_MEANS_STARTS = 10


def k_means_map(probabilities: Probabilities, num_kv_heads: int, kept: int, seed: int) -> HeadMap:
    """K-Means on the probabilities, each cluster represented by the head nearest to its centre.

    Source: the paper, section 3.3 (arXiv 2403.08058v2): K-Means on the attention scores of the first five
    tokens. It does not say which head stands for a cluster; the nearest to the centre is the best that
    K-Means itself can say.
    """
    cluster = _sklearn().cluster
    points = _by_kv_head(probabilities, num_kv_heads)
    # Fewer distinct points than clusters would leave clusters empty.
    clusters = min(kept, len(np.unique(points, axis=0)))
    fitted = cluster.KMeans(clusters, n_init=_K_MEANS_STARTS, random_state=seed).fit(points)
    to_centre = ((points - fitted.cluster_centers_[fitted.labels_]) ** 2).sum(axis=1)
    return _map_by_clusters(
        probabilities, num_kv_heads, fitted.labels_, lambda members: int(members[to_centre[members].argmin()])
    )


def agglomerative_map(probabilities: Probabilities, num_kv_heads: int, kept: int, seed: int) -> HeadMap:
    """Average-linkage clustering by cosine distance, each cluster represented by its lowest head.

    Source: the published code of the paper (facebookresearch/chai), which differs from the paper here; by
    its description, no line of it. It also leaves out the causal mask and applies the clusters to the
    probe tokens themselves: see the variants in :mod:`chai_export.quality.methods`.
    """
    del seed
    points = _by_kv_head(probabilities, num_kv_heads)
    if kept == num_kv_heads:
        labels = np.arange(num_kv_heads)
    else:
        model = _sklearn().cluster.AgglomerativeClustering(kept, linkage="average", metric="cosine")
        labels = model.fit(points).labels_
    return _map_by_clusters(probabilities, num_kv_heads, labels, lambda members: int(members.min()))


def random_map(probabilities: Probabilities, num_kv_heads: int, kept: int, seed: int) -> HeadMap:
    """Kept KV heads and membership drawn at random: the control that every rule must beat."""
    generator = np.random.default_rng(seed)
    representatives = np.sort(generator.permutation(num_kv_heads)[:kept])
    labels = generator.integers(0, kept, size=num_kv_heads)
    labels[representatives] = np.arange(kept)
    return _map_by_clusters(
        probabilities, num_kv_heads, labels, lambda members: int(np.intersect1d(members, representatives)[0])
    )


def _by_kv_head(probabilities: Probabilities, num_kv_heads: int) -> NDArray[np.float64]:
    """One point per KV head: the probabilities of its query heads side by side, float64 [G, H/G*t*t]."""
    points: NDArray[np.float64] = probabilities.astype(np.float64).reshape(num_kv_heads, -1)
    return points


def _map_by_clusters(
    probabilities: Probabilities,
    num_kv_heads: int,
    labels: NDArray[np.integer[Any]],
    representative: Callable[[NDArray[np.int64]], int],
) -> HeadMap:
    """Query heads follow the representative of their KV head's cluster, to its nearest query head."""
    heads = len(probabilities)
    group = heads // num_kv_heads
    flat = probabilities.reshape(heads, -1)
    head_map = np.arange(heads, dtype=np.int32)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        kv = representative(members)
        options = np.arange(kv * group, (kv + 1) * group)
        for member in members[members != kv]:
            for head in range(member * group, (member + 1) * group):
                distance = ((flat[options] - flat[head]) ** 2).sum(axis=1)
                head_map[head] = options[distance.argmin()]
    return head_map


def _sklearn() -> Any:
    try:
        import sklearn
        import sklearn.cluster
    except ImportError as error:
        raise ChaiError(
            "K-Means and agglomerative clustering need scikit-learn; install it with "
            "pip install 'chai-export[quality]', or leave those methods out with --methods"
        ) from error
    return sklearn
