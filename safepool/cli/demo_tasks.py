"""Floor 7: the work that ``safepool demo`` hands to both pools. It knows no pool.

A module as people write one: NumPy and SciPy are imported at the top, so a worker loads
them before its first task. Only the demo's child processes import it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.interpolate import RBFInterpolator, griddata

from safepool.cli.demo_options import FEWEST_POINTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ANSWERS", "interpolate_and_solve"]

# What is kept of each of the five operations: enough to compare, small enough to send.
_KEPT = FEWEST_POINTS

ANSWERS = 5 * _KEPT
"""Length of one task's result."""

# griddata answers NaN outside the convex hull; with the corners every query is inside.
_CORNERS = ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))


def interpolate_and_solve(seed: int, points: int) -> NDArray[np.float64]:
    """Interpolate scattered measurements twice, then solve and decompose a system.

    The input follows from the seed alone, so that two pools work on the same numbers.

    Args:
        seed: Number of the task.
        points: Scattered points, and rows and columns of the matrices; at least ``FEWEST_POINTS``.

    Returns:
        ``ANSWERS`` numbers: 16 each of ``RBFInterpolator``, ``griddata``, ``solve``,
        ``eigvalsh`` and the singular values. Never NaN.
    """
    random = np.random.default_rng(seed)
    places = np.vstack([_CORNERS, random.random((points - len(_CORNERS), 2))])
    measured = np.sin(4.0 * places[:, 0]) * np.cos(3.0 * places[:, 1])
    wanted = random.random((_KEPT, 2))
    matrix = random.standard_normal((points, points))
    # Symmetric and far from singular: a last bit of difference in BLAS stays a last bit.
    system = matrix @ matrix.T / points + np.eye(points)
    return np.concatenate(
        [
            RBFInterpolator(places, measured)(wanted),
            griddata(places, measured, wanted),
            np.linalg.solve(system, measured)[:_KEPT],
            np.linalg.eigvalsh(system)[:_KEPT],
            np.linalg.svd(matrix, compute_uv=False)[:_KEPT],
        ],
        dtype=np.float64,
    )
