"""Merging methods word for word on dense float64 matrices: slow and independent.

Nothing here imports gam. Each takes the dense updates that are present and one weight for
each. Where a paper is about matrices of full rank, `in_core_space` restricts it to what the
updates span, the only place where a low-rank update says anything.
"""

import math

import numpy as np
from helpers import oracle


def linear(deltas, weights):
    return oracle.linear(deltas, weights)


def tsv(deltas, weights):
    """Algorithm 1 of arXiv 2412.00081: keep a share of each SVD, orthogonalise, add up."""
    keep = max(min(deltas[0].shape) // len(deltas), 1)
    lefts, values, rights = [], [], []
    for delta, weight in zip(deltas, weights, strict=True):
        u, s, v = oracle.thin_svd(weight * delta)
        lefts.append(u[:, :keep])
        values.append(s[:keep])
        rights.append(v[:, :keep])
    left, right = oracle.polar(np.hstack(lefts)), oracle.polar(np.hstack(rights))
    return left @ np.diag(np.concatenate(values)) @ right.T


def coverage(deltas, weights):
    """K_U^-1/2 (sum w dW) K_V^-1/2, K the sums of the projectors."""
    svds = [oracle.thin_svd(delta) for delta in deltas]
    merged = oracle.linear(deltas, weights)
    merged = _inverse_root(sum(u @ u.T for u, _, _ in svds)) @ merged
    return merged @ _inverse_root(sum(v @ v.T for _, _, v in svds))


def _inverse_root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    roots = np.array([1 / math.sqrt(value) if value > 1e-8 else 0.0 for value in values])
    return (vectors * roots) @ vectors.T


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


def frechet(deltas, weights):
    """Karcher means of the column and row spaces, then the mean core in their frames."""
    shares = np.abs(weights) / np.abs(weights).sum()
    svds = [oracle.thin_svd(delta) for delta in deltas]
    left, right = (karcher_subspace([svd[i] for svd in svds], shares) for i in (0, 2))
    core = sum(
        w * oracle.procrustes(u, left).T @ np.diag(s) @ oracle.procrustes(v, right)
        for w, (u, s, v) in zip(weights, svds, strict=True)
    )
    return left @ core @ right.T


def karcher_subspace(bases, shares):
    """Gradient descent of sum_i s_i d(X, span Q_i)^2 on the Grassmannian, whole steps."""
    rank = max(basis.shape[1] for basis in bases)
    projector = sum(share * (q @ q.T) for share, q in zip(shares, bases, strict=True))
    mean = np.linalg.eigh(projector)[1][:, -rank:]
    for _ in range(20_000):
        tangent = subspace_gradient(mean, bases, shares)
        u, s, vt = np.linalg.svd(tangent, full_matrices=False)
        if s[0] < 1e-12:
            break
        mean = (mean @ vt.T * np.cos(s) + u * np.sin(s)) @ vt
        mean = np.linalg.qr(mean)[0]
    return mean


def subspace_gradient(mean, bases, shares):
    """sum_i s_i log_X(Q_i), one principal angle after the other."""
    total = np.zeros_like(mean)
    for basis, share in zip(bases, shares, strict=True):
        a, _, bt = np.linalg.svd(mean.T @ basis, full_matrices=False)
        for near, far in zip((mean @ a).T, (basis @ bt.T).T, strict=True):
            rest = far - (far @ near) * near
            length = np.linalg.norm(rest)
            if length > 1e-15:
                angle = math.atan2(length, far @ near)
                total += share * angle * np.outer(rest / length, near @ mean)
    return total


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


def ties(matrices, weights, density=0.2):
    """Trim each matrix, elect a sign for each entry, average those that agree with it."""
    votes = []
    for matrix, weight in zip(matrices, weights, strict=True):
        vote = weight * matrix
        keep = max(math.floor(density * vote.size + 0.5), 1)
        limit = np.sort(np.abs(vote), axis=None)[-keep]
        votes.append(np.where(np.abs(vote) >= limit, vote, 0))
    sign = np.sign(sum(votes))
    merged = np.zeros_like(votes[0])
    for index in np.ndindex(merged.shape):
        agree = [i for i, v in enumerate(votes) if sign[index] and np.sign(v[index]) == sign[index]]
        if agree:
            share = sum(abs(weights[i]) for i in agree)
            merged[index] = sum(votes[i][index] for i in agree) / share
    return merged


def knots_ties(deltas, weights, density=0.2):
    """Section 4 of arXiv 2410.19735, with TIES between the aligned S V_i^T."""
    u, s, vt = np.linalg.svd(np.hstack(deltas), full_matrices=False)
    keep = s > 1e-7 * s[0]
    aligned = np.split(s[keep, None] * vt[keep], len(deltas), axis=1)
    return u[:, keep] @ ties(aligned, weights, density)


def core_ties(pairs, weights, density=0.2):
    """Algorithm 1 of arXiv 2509.17786 on the factors, with TIES between the core matrices."""
    factors = [(b.double().numpy(), a.double().numpy()) for b, a in pairs]
    left = oracle.thin_svd(np.hstack([b for b, _ in factors]))[0]
    right = oracle.thin_svd(np.vstack([a for _, a in factors]))[2]
    cores = [left.T @ b @ a @ right for b, a in factors]
    return left @ ties(cores, weights, density) @ right.T


def ctm(deltas, weights, dimension=4, beta=0.25, rule="ties", density=0.2):
    """Section 4 of arXiv 2606.03723 on dense matrices: Tucker-2 by HOSVD and HOOI."""
    weighted = [w * d for w, d in zip(weights, deltas, strict=True)]
    sizes = [np.linalg.norm(d) for d in weighted]
    even = [
        d / s * (beta * s + (1 - beta) * np.mean(sizes))
        for d, s in zip(weighted, sizes, strict=True)
    ]
    left = _leading(np.hstack(even), dimension)
    right = _leading(np.vstack(even).T, dimension)
    error = math.inf
    for _ in range(1000):
        new_left = _leading(np.hstack([d @ right for d in even]), dimension)
        new_right = _leading(np.vstack([new_left.T @ d for d in even]).T, dimension)
        total = sum(np.linalg.norm(d) ** 2 for d in even)
        kept = sum(np.linalg.norm(new_left.T @ d @ new_right) ** 2 for d in even)
        new_error = math.sqrt(max(total - kept, 0) / total)
        if abs(error - new_error) <= 1e-6:
            break
        left, right, error = new_left, new_right, new_error
    coordinates = [left.T @ d @ right for d in deltas]
    inner = ties(coordinates, weights, density) if rule == "ties" else linear(coordinates, weights)
    return left @ inner @ right.T


def _leading(matrix, rank):
    return np.linalg.svd(matrix, full_matrices=False)[0][:, :rank]


def pico(pairs):
    """The authors' calibration of arXiv 2604.16826: the dense updates, some directions shorter."""
    factors = [(b.double().numpy(), a.double().numpy()) for b, a in pairs]
    u, s, _ = np.linalg.svd(np.hstack([b for b, _ in factors]), full_matrices=False)
    collision = s**2 / (s**2).sum()
    change = 1 / (1 + (len(pairs) - 1) * collision) - 1
    return [b @ a + u @ (change[:, None] * (u.T @ (b @ a))) for b, a in factors]


METHODS = {
    "linear": linear,
    "task_arithmetic": linear,
    "concat": linear,
    "tsv": tsv,
    "coverage": coverage,
    "iso_c": in_core_space(iso_c),
    "iso_cts": in_core_space(iso_cts),
    "knots_ties": knots_ties,
    "ctm": ctm,
    "karcher": karcher,
    "multislerp": multislerp,
    "frechet": frechet,
}
"""Method to its dense form, default parameters throughout."""

FACTORED = {"core_ties": core_ties}
"""The same for methods that depend on how the updates are split into B and A."""
