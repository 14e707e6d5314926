"""The paper's algorithms, word for word on dense float64 matrices: slow and independent.

Nothing here imports gam. Where the paper is silent the project's rules are followed, again
on dense matrices.
"""

import numpy as np


def thin_svd(delta, tolerance=1e-13):
    """SVD of a dense update, cut at its numerical rank."""
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    rank = int((s > tolerance * s[0]).sum()) if s[0] > 0 else 0
    return u[:, :rank], s[:rank], vt[:rank].T


def polar(matrix):
    p, _, qt = np.linalg.svd(matrix, full_matrices=False)
    return p @ qt


def procrustes(basis, target):
    """argmin_R ||basis R - target||_F."""
    return polar(basis.T @ target)


def gam(deltas, weights=None, reference=None, retract=False, svds=None):
    """Equations 1 to 5 of arXiv 2606.00357 with weights; zero updates may be among them."""
    n = len(deltas)
    weights = np.full(n, 1 / n) if weights is None else np.asarray(weights, dtype=float)
    weights = weights / np.abs(weights).sum()
    svds = [thin_svd(delta) for delta in deltas] if svds is None else svds
    present = [i for i in range(n) if len(svds[i][1]) and weights[i] != 0]
    if not present:
        return np.zeros_like(deltas[0])
    ranks = {i: len(svds[i][1]) for i in present}
    if reference not in ranks:
        reference = next(i for i in present if ranks[i] == max(ranks.values()))
    u_ref, _, v_ref = svds[reference]
    shares = {i: abs(weights[i]) / sum(abs(weights[j]) for j in present) for i in present}
    u_bar = s_bar = v_bar = 0.0
    cover_u = cover_v = 0.0
    for i in present:
        u, s, v = svds[i]
        ru, rv = procrustes(u, u_ref), procrustes(v, v_ref)
        u_bar = u_bar + shares[i] * (u @ ru)
        v_bar = v_bar + shares[i] * (v @ rv)
        s_bar = s_bar + weights[i] * (ru.T @ np.diag(s) @ rv)
        cover_u = cover_u + shares[i] * (ru.T @ ru)
        cover_v = cover_v + shares[i] * (rv.T @ rv)
    u_bar = u_bar @ np.linalg.inv(cover_u)
    v_bar = v_bar @ np.linalg.inv(cover_v)
    if retract:
        u_bar, v_bar = polar(u_bar), polar(v_bar)
    return u_bar @ s_bar @ v_bar.T


def consensus_frame(bases, shares, iterations=3000):
    """Generalised Procrustes mean of orthonormal bases, on dense projectors."""
    rank = max(basis.shape[1] for basis in bases)
    projector = sum(share * (basis @ basis.T) for basis, share in zip(bases, shares, strict=True))
    frame = np.linalg.eigh(projector)[1][:, -rank:]
    for _ in range(iterations):
        rotations = [procrustes(basis, frame) for basis in bases]
        mean = sum(s * (b @ r) for s, b, r in zip(shares, bases, rotations, strict=True))
        cover = sum(s * (r.T @ r) for s, r in zip(shares, rotations, strict=True))
        new = polar(mean @ np.linalg.inv(cover))
        if np.abs(new - frame).max() < 1e-14:
            break
        frame = new
    return new


def gam_consensus(deltas, weights=None):
    n = len(deltas)
    weights = np.full(n, 1 / n) if weights is None else np.asarray(weights, dtype=float)
    weights = weights / np.abs(weights).sum()
    svds = [thin_svd(delta) for delta in deltas]
    shares = np.abs(weights)
    u_ref = consensus_frame([svd[0] for svd in svds], shares)
    v_ref = consensus_frame([svd[2] for svd in svds], shares)
    u_bar = sum(
        share * u @ procrustes(u, u_ref) for share, (u, _, _) in zip(shares, svds, strict=True)
    )
    v_bar = sum(
        share * v @ procrustes(v, v_ref) for share, (_, _, v) in zip(shares, svds, strict=True)
    )
    s_bar = sum(
        w * procrustes(u, u_ref).T @ np.diag(s) @ procrustes(v, v_ref)
        for w, (u, s, v) in zip(weights, svds, strict=True)
    )
    return u_bar @ s_bar @ v_bar.T


def linear(deltas, weights, rank=None):
    merged = sum(weight * delta for weight, delta in zip(weights, deltas, strict=True))
    return merged if rank is None else truncate(merged, rank)


def truncate(delta, rank):
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def relative_error(result, expected):
    return np.linalg.norm(result - expected) / np.linalg.norm(expected)
