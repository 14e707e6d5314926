"""Updates with factors of one's choice, for strategies that look at single entries."""

import torch

from gam.algebra.updates import Basis, Side, Update


def update(left, right, name="a", modules=()):
    """The update ``left @ right^T`` of one or more modules, its factors kept as they are."""
    left, right = (torch.as_tensor(side).double() for side in (left, right))
    if left.ndim == 2:
        left, right = left[None], right[None]
    m, _, r = left.shape
    eye = torch.eye(r, dtype=torch.float64).expand(m, r, r)
    sides = [
        Basis(
            Side([[part] for part in factor], factor.dtype, [eye], factor.mT @ factor),
            0,
            slice(0, r),
            eye,
        )
        for factor in (left, right)
    ]
    return Update(name, sides[0], eye, sides[1], r, modules or [f"module.{i}" for i in range(m)])


def whole(basis):
    return torch.stack([basis.dense(module) for module in range(len(basis.gauge))])


def explicit(matrix, name="a"):
    """An update of exactly these entries."""
    matrix = torch.as_tensor(matrix).double()
    return update(matrix, torch.eye(matrix.shape[1]), name)


def random_update(d, k, r, seed, m=1, name=None):
    generator = torch.Generator().manual_seed(seed)
    sides = (torch.randn(m, n, r, generator=generator, dtype=torch.float64) for n in (d, k))
    return update(*sides, name or f"adapter {seed}")


def whole_numbers(d, k, seed):
    """An update of small whole numbers, so that ties abound and sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    return explicit(torch.randint(-4, 5, (d, k), generator=generator))


def dense(item, module=0):
    left, right = item.left.dense(module), item.right.dense(module)
    return (left @ item.core[module] @ right.mT).numpy()
