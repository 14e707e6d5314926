"""Random LoRA factors, and strategies run on them without files."""

import math

import torch

from gam.algebra.factorize import decompose
from gam.algebra.factors import from_factors, from_module


def factors(d, k, r, seed, cond_b=1.0, cond_a=1.0, dtype=torch.float32):
    """A pair (B [d, r], A [r, k]) with the given condition numbers, rounded to a dtype."""
    generator = torch.Generator().manual_seed(seed)

    def tall(rows, cond):
        basis = torch.randn(rows, r, generator=generator, dtype=torch.float64)
        if cond > 1:
            mix = torch.randn(r, r, generator=generator, dtype=torch.float64)
            values = torch.logspace(0, -math.log10(cond), r, dtype=torch.float64)
            basis = torch.linalg.qr(basis).Q * values @ torch.linalg.qr(mix).Q
        return basis.to(dtype)

    return tall(d, cond_b), tall(k, cond_a).mT.contiguous()


def dense(b, a, scale=1.0):
    return (scale * b.double() @ a.double()).numpy()


def updates_of(pairs, scales=None, batched=True, dtype=torch.float64):
    """Updates of one module from a list of (B, A); zero ones are left out."""
    names = [str(i) for i in range(len(pairs))]
    b, a = [b for b, _ in pairs], [a for _, a in pairs]
    scales = torch.tensor([1.0] * len(pairs) if scales is None else scales, dtype=torch.float64)
    if batched:
        updates, _ = from_factors(names, [b], [a], scales[None], dtype)
        if updates:
            return updates
    return from_module(names, b, a, scales)


def formed(side, coefficients):
    (result,), _ = side.form(coefficients)
    return result


def dense_product(updates, product):
    left, right = updates[0].left.side, product.right_side or updates[0].right.side
    return (formed(left, product.left) @ product.core[0] @ formed(right, product.right).mT).numpy()


def refactored(updates, product, rank, scale=1.0):
    sides = updates[0].left.side, updates[0].right.side
    left, right = (
        side if part is None else side.columns(part)[0]
        for side, part in zip(sides, (product.left, product.right), strict=True)
    )
    spectrum = decompose(left, product.core, right).cut(rank).scaled(scale)
    return formed(left, spectrum.left), formed(right, spectrum.right).mT, spectrum
