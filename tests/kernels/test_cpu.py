"""What the passes on a CPU do to the process that they run in."""

from concurrent.futures import ThreadPoolExecutor

import torch
from helpers.factors import factors
from threadpoolctl import threadpool_info

from gam_kernels import gram


def test_threads_of_numpy_are_what_they_were():
    def threads():
        libraries = threadpool_info()
        return [lib["num_threads"] for lib in libraries if lib["user_api"] == "blas"]

    parts = factors(2, 3000, (8, 8), torch.float64, "b", device="cpu")
    before = threads()
    expected = gram(parts, torch.float64)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: gram(parts, torch.float64), range(40)):
            assert torch.equal(result, expected)
    assert threads() == before
