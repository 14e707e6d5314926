"""Measure the operations of gam_kernels, and whole merges of resident adapters.

    python benchmarks/ops.py --device cuda --model qwen3-8b --rank 16 --rank 64
    python benchmarks/ops.py --device cuda --model llama-3-70b --adapters 2 --adapters 8

Each operation is measured as it is called ("op"), in its plain definition ("reference") and in
batched calls of torch ("torch"), beside a copy of as many bytes as it has to move ("copy"), all
on one device, on the factors of one matrix of every layer (or expert) of the model: the largest.
Merges of one module alone, the smallest, stand beside the dense algorithm through torch.linalg
("literal") and PEFT's `add_weighted_adapter` ("peft"). Every result is compared with float64
first; nothing is written where one is off.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import literal
import torch
from inputs import make_factors
from models import MODELS, modules
from peft_layer import DENSITY, module_merge
from records import check_clean, quantiles, write

from gam.adapter import Adapter, LowRank
from gam.merging.execute import execute
from gam.merging.plan import plan_merge
from gam_kernels import combine, gram, polar
from gam_kernels.combine import reference as combine_reference
from gam_kernels.entries.op import entry_products
from gam_kernels.entries.reference import merge_entries
from gam_kernels.entries.vote import Vote
from gam_kernels.gram import reference as gram_reference
from gam_kernels.polar import reference as polar_reference

Function = Callable[[], Any]
_BOUND = {"gram": 1e-5, "combine": 4e-3, "polar": 1e-9, "entries": 1e-3, "resident gam": 1e-2}
# Rounding of the output; ties keeps the leading directions of a spectrum without gaps.
_BOUND |= {"module gam": 1e-2, "module linear": 1e-2, "module ties": 5e-2}
_MOST_MODULES = 128
_HEAD = 256  # rows of a merge of single entries that are checked


@dataclass(frozen=True)
class Case:
    """One operation on given inputs.

    Attributes:
        op: Its name.
        impls: Name to function, all with results that can be compared.
        exact: Returns what they should return, float64.
        flat: Makes one tensor of a result.
        moved: Bytes that have to be read and written at least.
        shape: What records of it say beside the model, the rank and the number of adapters.
    """

    op: str
    impls: dict[str, Function]
    exact: Function
    flat: Callable[[Any], torch.Tensor]
    moved: int
    shape: dict[str, Any] = field(default_factory=dict)


def cases(model: str, rank: int, count: int, device: str) -> Iterator[Case]:
    """Yield the operations on adapters of a model."""
    shapes = modules(model)
    widest = max(shapes.values(), key=sum)
    names = [name for name, shape in shapes.items() if shape == widest][:_MOST_MODULES]
    adapters = [
        {
            name: [
                factor.to(torch.bfloat16).to(device)
                for factor in make_factors(index, widest, rank, seed)
            ]
            for index, name in enumerate(names)
        }
        for seed in range(count)
    ]
    sides = [[adapter[name][1] for adapter in adapters] for name in names]
    wide = torch.stack([torch.cat(row, 1) for row in sides])
    moved = wide.numel() * wide.element_size()
    m, width, p = wide.shape
    single = torch.float32
    yield Case(
        "gram",
        {
            "op": lambda: gram(sides, single),
            "reference": lambda: gram_reference.gram(sides, single),
            "torch": lambda: wide.mT @ wide,
        },
        lambda: wide[0].double().mT @ wide[0].double(),
        lambda result: result[0],
        moved,
    )
    small = torch.randn(m, p, rank, dtype=torch.float64).to(device) / p**0.5
    yield Case(
        "combine",
        {
            "op": lambda: combine(sides, small, single, wide.dtype)[0],
            "reference": lambda: combine_reference.combine(sides, small, single, wide.dtype)[0],
            "torch": lambda: wide @ small.to(wide.dtype),
        },
        lambda: wide[0].double() @ small[0],
        lambda result: result[0],
        moved + m * width * rank * wide.element_size(),
    )
    square = torch.randn(m * (count - 1), rank, rank, dtype=torch.float64).to(device)
    yield Case(
        "polar",
        {
            "op": lambda: polar(square)[0],
            "reference": lambda: polar_reference.polar(square)[0],
            "torch": lambda: _svd_polar(square),
        },
        lambda: _svd_polar(square[:1])[0],
        lambda result: result[0],
        2 * square.numel() * square.element_size(),
    )
    left, right = [[adapter[names[0]][side].float() for adapter in adapters] for side in (1, 0)]
    votes = [
        Vote(b, a.contiguous(), low=float((b[:64] @ a).std()))
        for b, a in zip(left, right, strict=True)
    ]
    thin = torch.randn(widest[1], rank + 16).to(device)
    head = [replace(vote, left=vote.left[:_HEAD]) for vote in votes]
    yield Case(
        "entries",
        {
            "op": lambda: entry_products(votes, True, times=thin)[0],
            "reference": lambda: merge_entries(votes, True) @ thin,
        },
        lambda: merge_entries(head, True).double() @ thin.double(),
        lambda result: result[:_HEAD],
        sum(vote.left.nbytes + vote.right.nbytes for vote in votes) + thin.nbytes,
    )
    yield _resident(model, adapters, names, widest, rank)


def _resident(
    model: str, adapters: list[dict[str, Any]], names: list[str], shape: tuple[int, int], rank: int
) -> Case:
    """Return the merge of adapters that are on the device already."""
    plan = plan_merge(_resident_adapters(model, adapters))
    a, b = (
        torch.stack([torch.stack([adapter[n][side] for n in names]) for adapter in adapters])
        for side in (0, 1)
    )
    entries = len(names) * rank * sum(shape)

    def delta(result: Any) -> torch.Tensor:
        if isinstance(result, Adapter):
            module = result.modules[names[0]]
            return module.lora_b.double() @ module.lora_a.double()
        return result[0][0].double() @ result[1][0].double()

    wide = a[:, :1].double(), b[:, :1].double()
    return Case(
        "resident gam",
        {
            "op": lambda: execute(plan),
            "reference": lambda: execute(replace(plan, backend="torch")),
            "torch": lambda: torch_gam(a.float(), b.float()),
        },
        lambda: delta(torch_gam(*wide)),
        delta,
        (2 * len(adapters) + 1) * entries * a.element_size(),
    )


def _resident_adapters(model: str, adapters: list[dict[str, Any]]) -> list[Adapter]:
    return [
        Adapter(
            {name: LowRank(a, b) for name, (a, b) in adapter.items()},
            config={"base_model_name_or_path": f"benchmark/{model}"},
            name=str(index),
        )
        for index, adapter in enumerate(adapters)
    ]


def module_cases(
    model: str, rank: int, count: int, device: str, wanted: str | None
) -> Iterator[Case]:
    """Yield the merges of one module: that whose path ends as wanted, or the smallest."""
    shapes = modules(model)
    named = [name for name in shapes if name.endswith(wanted or "")]
    if not named:
        sys.exit(f"no module of {model} ends in {wanted!r}")
    name = min(named, key=lambda name: sum(shapes[name]))
    shape = shapes[name]
    factors = [
        [factor.to(torch.bfloat16).to(device) for factor in make_factors(0, shape, rank, seed)]
        for seed in range(count)
    ]
    given = _resident_adapters(model, [{name: pair} for pair in factors])

    def deltas(dtype: torch.dtype) -> list[torch.Tensor]:
        return [b.to(dtype) @ a.to(dtype) for a, b in factors]

    def delta(result: Any) -> torch.Tensor:
        if isinstance(result, torch.Tensor):
            return result.double()
        if isinstance(result, Adapter):
            result = result.modules[name].lora_a, result.modules[name].lora_b
        return result[1].double() @ result[0].double()

    for method, dense, params, combination in (
        ("gam", literal.gam, {}, None),
        ("linear", literal.linear, {}, "svd"),
        ("ties", literal.ties, {"density": DENSITY}, "ties_svd"),
    ):
        run = partial(execute, plan_merge(given, method=method, **params))
        dense_merge = partial(dense, rank=rank, **params)
        impls = {"op": run, "literal": lambda merge=dense_merge: merge(deltas(torch.float32))}
        if combination:
            impls["peft"] = module_merge(factors, combination)
        yield Case(
            f"module {method}",
            impls,
            lambda merge=dense_merge: merge(deltas(torch.float64)),
            delta,
            (count + 1) * rank * sum(shape) * 2,
            {"module": name, "out": shape[0], "in": shape[1]},
        )


def torch_gam(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B [m, d, r] and A [m, r, k] of the merge, by torch's batched QR and SVD.

    Args:
        a: [n, m, r, k].
        b: [n, m, d, r].
    """
    left, rows_b = torch.linalg.qr(b)
    right, rows_a = torch.linalg.qr(a.mT)
    core = rows_b @ rows_a.mT
    turn_left = _svd_polar(left.mT @ left[0])
    turn_right = _svd_polar(right.mT @ right[0])
    mean = (turn_left.mT @ core @ turn_right).mean(0)
    return (left @ turn_left).mean(0) @ mean, (right @ turn_right).mean(0).mT


def _svd_polar(matrix: torch.Tensor) -> torch.Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def measure(case: Case, runs: int, seconds: float, device: str) -> Iterator[dict[str, Any]]:
    """Check every implementation, then yield records of its times.

    The call that is checked also warms up. No more are made of an implementation after so many
    seconds: of one that is slower than that, the first is the one that counts.
    """
    exact = case.exact()
    errors, firsts = {}, {}
    for name, function in case.impls.items():
        firsts[name], result = _time(function, device)
        result = case.flat(result).double()
        errors[name] = float((result - exact).norm() / exact.norm())
        if name != "torch" and not errors[name] < _BOUND[case.op]:
            sys.exit(f"{case.op}, {name}: off by {errors[name]:.1e}")
    source = torch.ones(case.moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    impls = {**case.impls, "copy": lambda: target.copy_(source)}
    firsts["copy"], _ = _time(impls["copy"], device)
    for name, function in impls.items():
        times: list[float] = []
        while len(times) < runs and firsts[name] + sum(times) < 1e3 * seconds:
            times.append(_time(function, device)[0])
        times = times or [firsts[name]]
        yield {
            "op": case.op,
            "impl": f"peft {version('peft')}" if name == "peft" else name,
            "shape": case.shape,
            "metric": "ms",
            "unit": "ms",
            **quantiles(times),
            "moved_bytes": case.moved,
            "err_fp64": errors.get(name),
            "device": device,
        }


def _time(function: Function, device: str) -> tuple[float, Any]:
    """Return how long a call takes, in ms, until the device is done, and what it returns."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start), result


def _whole(record: dict[str, Any], shape: dict[str, Any]) -> dict[str, Any]:
    return {**record, "shape": {**shape, **record["shape"]}, "dtype": "bfloat16"}


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--rank", type=int, action="append")
    parser.add_argument("--adapters", type=int, action="append")
    parser.add_argument("--op", choices=_BOUND, action="append")
    parser.add_argument("--module", help="end of the path of the module for merges of one module")
    parser.add_argument("--runs", type=int, default=10, help="counted runs, after one more")
    parser.add_argument("--seconds", type=float, default=5.0, help="after which no more runs start")
    parser.add_argument("--dry", action="store_true", help="print the records; write nothing")
    options = parser.parse_args()
    check_clean(options.dry)
    torch.manual_seed(0)
    for model in options.model or ["qwen3-8b"]:
        for rank in options.rank or [16]:
            for count in options.adapters or [3]:
                shape = {"model": model, "rank": rank, "adapters": count}
                wanted = set(options.op or _BOUND)
                parts = []
                if any(not op.startswith("module ") for op in wanted):
                    parts.append(cases(model, rank, count, options.device))
                if any(op.startswith("module ") for op in wanted):
                    parts.append(module_cases(model, rank, count, options.device, options.module))
                for case in (case for part in parts for case in part):
                    if case.op in wanted:
                        found = measure(case, options.runs, options.seconds, options.device)
                        write((_whole(record, shape) for record in found), options.dry)


if __name__ == "__main__":
    main()
