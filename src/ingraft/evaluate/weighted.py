"""Metrics of many multisets of the same rows at once; by multiset the same as `evaluate.measures` says of its rows, each written down as often as it is in it.

What a library says of each multiset in turn costs milliseconds times thousands. Here a metric is made of sums over rows, which for all multisets together are one
product of matrices, or of ranks, for which the rows are put in order once. As there, 0 stands for what cannot be computed.

Legend: N rows, R multisets, K classes, G groups of equal values.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ingraft.evaluate.outcomes import Floats, quotient

ALMOST_NOTHING = 1e-12
"""A variance below this share of the rows' own is that of a constant."""


def one_hot(classes_N: NDArray[np.int64], kinds: int) -> Floats:
    """(N, K), with nothing for a class of -1."""
    return (classes_N[:, None] == np.arange(kinds)).astype(np.float64)


def macro_f1(right_NK: Floats, said_NK: Floats, hits_NK: Floats, times_RN: Floats, *, every: bool = False) -> Floats:
    """(R,) the mean of the classes' F1.

    Args:
        right_NK, said_NK, hits_NK: how often each class is right, is said, and is both, in each row.
        every: over all classes, and not those alone that occur or are said.
    """
    both_RK = times_RN @ (right_NK + said_NK)
    f1_RK = quotient(2 * (times_RN @ hits_NK), both_RK)
    kinds = np.full(len(times_RN), both_RK.shape[1], dtype=np.float64) if every else (both_RK > 0).sum(1).astype(float)
    return quotient(f1_RK.sum(1), kinds)


def matthews(right_NK: Floats, said_NK: Floats, times_RN: Floats) -> Floats:
    """(R,) Matthews' correlation, of any number of classes (Gorodkin 2004)."""
    right_RK, said_RK, hits_R = times_RN @ right_NK, times_RN @ said_NK, times_RN @ (right_NK * said_NK).sum(1)
    rows_R = right_RK.sum(1)
    above_R = hits_R * rows_R - (right_RK * said_RK).sum(1)
    squares_R = (rows_R**2 - (right_RK**2).sum(1)) * (rows_R**2 - (said_RK**2).sum(1))
    return quotient(above_R, np.sqrt(squares_R))


def pearson(x: Floats, y: Floats, times_RN: Floats) -> Floats:
    """(R,) the correlation of two columns.

    Args:
        x, y: (N,), or (R, N) where each multiset has numbers of its own.
    """
    rows_R1 = times_RN.sum(1, keepdims=True)
    x_RN, y_RN = (v - (times_RN * v).sum(1, keepdims=True) / rows_R1 for v in (x, y))
    xx_R, yy_R, xy_R = ((times_RN * product).sum(1) for product in (x_RN * x_RN, y_RN * y_RN, x_RN * y_RN))
    scale_x, scale_y = (max(float(np.square(v - v.mean()).max()), np.finfo(float).tiny) for v in (x, y))
    varies_R = (xx_R > ALMOST_NOTHING * scale_x) & (yy_R > ALMOST_NOTHING * scale_y)
    return np.where(varies_R, quotient(xy_R, np.sqrt(xx_R * yy_R)), 0.0).clip(-1.0, 1.0)


def ranks(x_N: Floats, times_RN: Floats) -> Floats:
    """(R, N) the place of each row's number among those of the multiset, from 1; equal numbers share the middle of their places."""
    group_N, ends_G = _groups(x_N)
    last_RG = _up_to(x_N, times_RN, ends_G)
    first_RG = np.concatenate([np.zeros((len(last_RG), 1)), last_RG[:, :-1]], axis=1)
    return ((first_RG + last_RG + 1) / 2)[:, group_N]


def spearman(x_N: Floats, y_N: Floats, times_RN: Floats) -> Floats:
    """(R,) the correlation of two columns' ranks."""
    return pearson(ranks(x_N, times_RN), ranks(y_N, times_RN), times_RN)


def average_precision(labels_N: Floats, scores_N: Floats, times_RN: Floats) -> Floats:
    """(R,) the mean of the precision at each row labelled 1, in the order of the scores, highest first; equal scores come in together."""
    ends_G = _groups(-scores_N)[1]
    taken_RG = _up_to(-scores_N, times_RN, ends_G)
    hits_RG = _up_to(-scores_N, times_RN * labels_N, ends_G)
    more_RG = np.diff(hits_RG, axis=1, prepend=0.0)
    return quotient((more_RG * quotient(hits_RG, taken_RG)).sum(1), hits_RG[:, -1])


def best_accuracy(labels_N: Floats, scores_N: Floats, times_RN: Floats) -> Floats:
    """(R,) the share of rows on their side of the threshold that suits the multiset best."""
    ends_G = _groups(-scores_N)[1]
    right_RG = _up_to(-scores_N, times_RN * (2 * labels_N - 1), ends_G)  # 1s that are let in, less the 0s
    none_R = times_RN @ (1 - labels_N)
    return quotient(none_R + right_RG.max(1).clip(0), times_RN.sum(1))


def _groups(x_N: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """By row the number of its group of equal values, in ascending order, and by group how many rows there are up to its end."""
    _, group_N, sizes_G = np.unique(x_N, return_inverse=True, return_counts=True)
    return group_N.astype(np.int64), sizes_G.cumsum()


def _up_to(x_N: Floats, values_RN: Floats, ends_G: NDArray[np.int64]) -> Floats:
    """(R, G) sums over the rows up to the end of each group, rows in ascending order of x."""
    return values_RN[:, np.argsort(x_N, kind="stable")].cumsum(1)[:, ends_G - 1]
