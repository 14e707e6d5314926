"""Memory that a thread keeps."""

from concurrent.futures import ThreadPoolExecutor

import torch

from gam_kernels import _scratch
from gam_kernels._scratch import scratch


def address(*arguments):
    return scratch(*arguments).untyped_storage().data_ptr()


def test_is_the_same_memory_at_every_call_under_a_name():
    first = scratch("test", (3, 4), torch.float32)
    assert first.shape == (3, 4)
    assert first.dtype == torch.float32
    assert first.is_contiguous()
    first.fill_(2)
    assert torch.equal(scratch("test", (2, 2), torch.float32), torch.full((2, 2), 2.0))
    assert address("test", (1, 5), torch.float64) == address("test", (3, 4), torch.float32)
    assert address("other", (3, 4), torch.float32) != address("test", (3, 4), torch.float32)


def test_grows_and_holds_one_piece_only():
    for size in (10, 1000, 50):
        assert scratch("growing", (size,), torch.int32).shape == (size,)
    held = [
        memory for key, memory in vars(_scratch._local)["memory"].items() if key[0] == "growing"
    ]
    assert [memory.numel() for memory in held] == [4000]


def test_empty():
    assert scratch("nothing", (0, 3), torch.float64).shape == (0, 3)


def test_each_device_has_its_own():
    assert scratch("device", (2,), torch.float32, "meta").device.type == "meta"
    assert scratch("device", (2,), torch.float32).device.type == "cpu"


def test_each_thread_has_its_own():
    mine = scratch("thread", (8,), torch.float32).fill_(1)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: scratch("thread", (8,), torch.float32).fill_(3)).result()
    assert torch.equal(mine, torch.ones(8))
