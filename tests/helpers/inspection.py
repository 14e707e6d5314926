"""Random updates, and inspections of adapters in memory that hold one or more of them."""

import numpy as np
import torch
from helpers.adapters import CONFIG

from gam import Adapter, LowRank, inspect_adapters

NAME = "model.layers.0.self_attn.q_proj"


def rotation(generator, size):
    return np.linalg.qr(generator.standard_normal((size, size)))[0]


def adapter(name, modules):
    return Adapter(modules, CONFIG, name)


def random_updates(generator, ranks=(3, 3, 2), shape=(18, 13)):
    return [
        LowRank(
            torch.from_numpy(generator.standard_normal((r, shape[1]))),
            torch.from_numpy(generator.standard_normal((shape[0], r))),
            scale,
        )
        for r, scale in zip(ranks, (1.0, -0.5, 2.0), strict=True)
    ]


def inspect_updates(updates):
    return inspect_adapters(
        [adapter(str(index), {NAME: update}) for index, update in enumerate(updates)]
    )
