"""The choice between torch and Triton, and what operations refuse."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import gam_kernels
from gam_kernels import combine, gram, polar, resolve

NAMES = [module.name for module in pkgutil.walk_packages(gam_kernels.__path__, "gam_kernels.")]


@pytest.mark.parametrize(
    "name", [name for name in NAMES if not name.endswith((".kernel", "._triton"))]
)
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module, globs={**vars(module), "torch": torch}).failed == 0


def test_auto_is_torch_where_there_is_no_cuda_tensor():
    assert resolve("auto", torch.zeros(1)) == "torch"
    assert resolve("auto", torch.zeros(1, device="meta")) == "torch"
    assert resolve("torch", torch.zeros(1)) == "torch"


def test_triton_never_falls_back(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="got 'triton' for a tensor on cpu, expected one on a"):
        resolve("triton", torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve("triton", torch.zeros(1)) == "triton"
    with pytest.raises(ValueError, match="for a tensor on meta"):
        resolve("triton", torch.zeros(1, device="meta"))


def test_unknown_backend():
    with pytest.raises(ValueError, match="got 'cuda', expected 'auto', 'torch' or 'triton'"):
        resolve("cuda", torch.zeros(1))


X = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ([[X], [X, X]], r"factors\[1\]: got shapes \[\(3, 2\), \(3, 2\)\], expected those of"),
        ([[X], [torch.zeros(4, 2)]], r"factors\[1\]: got shapes \[\(4, 2\)\], expected those of"),
        ([[]], r"factors\[0\]: got shapes \[\], .* at least one"),
        ([[X, torch.zeros(4, 2)]], r"factors\[0\]\[1\]: got torch.float32 of shape \(4, 2\)"),
        ([[X[0]]], r"factors\[0\]\[0\]: got torch.float32 of shape \(2,\)"),
        ([[X.long()]], r"factors\[0\]\[0\]: got torch.int64 of shape"),
        ([[X, X.to("meta")]], r"factors\[0\]\[1\]: got a tensor on meta, expected .*, cpu"),
    ],
)
def test_factors_that_are_no_batch(factors, message):
    with pytest.raises(ValueError, match=message):
        gram(factors, torch.float64)


def test_other_refusals():
    with pytest.raises(ValueError, match=r"dtype: got torch.float16, expected torch.float32 or"):
        gram([[X]], torch.float16)
    with pytest.raises(ValueError, match=r"coefficients: got shape \(1, 3, 1\), expected \(1, 2,"):
        combine([[X]], torch.zeros(1, 3, 1), torch.float64, torch.float32)
    with pytest.raises(ValueError, match=r"matrix: got shape \(3, 2\), expected \(m, p, q\)"):
        polar(X)


def test_no_modules_are_an_empty_batch():
    assert gram([], torch.float32).shape == (0, 0, 0)
    products, errors = combine([], torch.zeros(0, 3, 2), torch.float32, torch.float16)
    assert products == []
    assert errors.shape == (0, 2)
    factor, smallest = polar(torch.zeros(0, 3, 2).double())
    assert factor.shape == (0, 3, 2)
    assert smallest.shape == (0,)
