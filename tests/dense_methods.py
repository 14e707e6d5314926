"""Merging methods word for word on dense float64 matrices: slow and independent.

Nothing here imports gam. Each takes the dense updates that are present and one weight for
each. Where a paper is about matrices of full rank, `in_core_space` restricts it to what the
updates span, the only place where a low-rank update says anything.
"""

import math

import numpy as np
import oracle


def linear(deltas, weights):
    return oracle.linear(deltas, weights)


def tsv(deltas, weights):
    """Algorithm 1 of arXiv 2412.00081: keep a share of each SVD, orthogonalise, add up."""
    keep = min(deltas[0].shape) // len(deltas)
    lefts, values, rights = [], [], []
    for delta, weight in zip(deltas, weights, strict=True):
        u, s, v = oracle.thin_svd(weight * delta)
        lefts.append(u[:, :keep])
        values.append(s[:keep])
        rights.append(v[:, :keep])
    left, right = oracle.polar(np.hstack(lefts)), oracle.polar(np.hstack(rights))
    return left @ np.diag(np.concatenate(values)) @ right.T


def in_core_space(method):
    """Run a method on the updates in an orthonormal basis of what they span."""

    def run(deltas, weights, **params):
        left = oracle.thin_svd(np.hstack(deltas))[0]
        right = oracle.thin_svd(np.vstack(deltas))[2]
        return left @ method([left.T @ d @ right for d in deltas], weights, **params) @ right.T

    return run


def iso_c(deltas, weights):
    """Section 4.1 of arXiv 2502.04959."""
    u, s, vt = np.linalg.svd(oracle.linear(deltas, weights), full_matrices=False)
    return s.mean() * u @ vt


def iso_cts(deltas, weights, common=0.8):
    """Section 4.2 of arXiv 2502.04959, sizes as in the authors' code."""
    n, size = len(deltas), min(deltas[0].shape)
    own = round((size - int(size * common)) / n)
    shared = size - own * n
    u, s, vt = np.linalg.svd(oracle.linear(deltas, weights), full_matrices=False)
    lefts, values, rights = [u[:, :shared]], [s[:shared]], [vt[:shared].T]
    for delta, weight in zip(deltas, weights, strict=True):
        rest = weight * delta
        rest = rest - lefts[0] @ lefts[0].T @ rest
        u, s, vt = np.linalg.svd(rest, full_matrices=False)
        lefts.append(u[:, :own])
        values.append(s[:own])
        rights.append(vt[:own].T)
    left, right = oracle.polar(np.hstack(lefts)), oracle.polar(np.hstack(rights))
    return np.concatenate(values).mean() * left @ right.T


def karcher(deltas, weights, steps=10_000):
    """The fixed point of x <- exp_x(mean of log_x(u_i)) on the sphere of directions."""
    shares = np.abs(weights) / np.abs(weights).sum()
    points = [
        math.copysign(1, w) * d / np.linalg.norm(d) for d, w in zip(deltas, weights, strict=True)
    ]
    mean = sum(s * p for s, p in zip(shares, points, strict=True))
    mean = mean / np.linalg.norm(mean)
    for _ in range(steps):
        tangent = sum(s * _log(mean, p) for s, p in zip(shares, points, strict=True))
        angle = np.linalg.norm(tangent)
        if angle < 1e-14:
            break
        mean = math.cos(angle) * mean + math.sin(angle) * tangent / angle
    return sum(abs(w) * np.linalg.norm(d) for d, w in zip(deltas, weights, strict=True)) * mean


def multislerp(deltas, weights):
    return karcher(deltas, weights, steps=1)


def slerp(first, second, t):
    """Shoemake's formula between two directions, the sizes interpolated linearly."""
    sizes = np.linalg.norm(first), np.linalg.norm(second)
    first, second = first / sizes[0], second / sizes[1]
    angle = math.acos((first * second).sum())
    point = math.sin((1 - t) * angle) * first + math.sin(t * angle) * second
    return ((1 - t) * sizes[0] + t * sizes[1]) * point / math.sin(angle)


def _log(base, point):
    rest = point - (base * point).sum() * base
    length = np.linalg.norm(rest)
    return math.atan2(length, (base * point).sum()) * rest / length if length else rest


METHODS = {
    "linear": linear,
    "task_arithmetic": linear,
    "concat": linear,
    "tsv": tsv,
    "iso_c": in_core_space(iso_c),
    "iso_cts": in_core_space(iso_cts),
    "karcher": karcher,
    "multislerp": multislerp,
}
"""Method to its dense form, default parameters throughout."""
