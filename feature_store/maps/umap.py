"""UMAP of points whose nearest neighbours are known exactly; every map of this room is made by it.

Exact neighbours instead of umap-learn's own search need no approximation and halve what numba has to compile. The
import and the compilation take 8 CPU seconds for the first map of a process. The same seed gives the same map on one
machine; the last digits depend on the libraries and the processor, which is why maps are stored.

McInnes, Healy and Melville, UMAP: Uniform Manifold Approximation and Projection, arXiv:1802.03426.
"""

import warnings

import numpy as np
import numpy.typing as npt

MIN_POINTS = 10
"""A map of fewer points is refused."""


def umap_from_neighbours(
    points: npt.NDArray[np.floating],
    index: npt.NDArray[np.integer],
    distance: npt.NDArray[np.floating],
    *,
    min_dist: float,
    seed: int,
) -> npt.NDArray[np.float32]:
    """UMAP coordinates [n_points 2] of points [n_points dimension] whose nearest neighbours are known.

    Args:
        points: they determine the initial positions of the unconnected pieces of the neighbour graph.
        index: the neighbours of each point, itself first [n_points n_neighbors].
        distance: their Euclidean distances [n_points n_neighbors].
        min_dist: least distance of neighbours on the map.
        seed: seed of the layout.
    """
    with warnings.catch_warnings():
        # umap warns of missing extras and of points that are nobody's neighbour, numba of its own features
        warnings.simplefilter("ignore")
        import umap

        model = umap.UMAP(
            n_neighbors=index.shape[1],
            min_dist=min_dist,
            random_state=seed,
            n_jobs=1,
            precomputed_knn=(index.astype(np.int32), distance.astype(np.float32), None),
            force_approximation_algorithm=True,
        )
        laid_out: npt.NDArray[np.float32] = model.fit_transform(points.astype(np.float32)).astype(np.float32)
    return laid_out
