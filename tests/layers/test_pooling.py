"""Log-mean-exp pooling against max pooling, closed forms and finite differences."""

from __future__ import annotations

import math
from typing import Any

import onnx.reference
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_lcnn.functional import log_mean_exp_pool2d
from lightning_lcnn.layers import LogMeanExpPool2d
from tests.lightning_helpers import COMPILER_WARNINGS

WINDOWS = [(2, None, 0), (3, 2, 1), ((2, 3), (1, 2), (0, 1)), (3, 3, 0)]


@pytest.mark.parametrize(("kernel", "stride", "padding"), WINDOWS)
def test_lies_between_mean_and_maximum_and_tends_to_both(kernel: Any, stride: Any, padding: Any) -> None:
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    maximum = F.max_pool2d(x, kernel, stride, padding)
    mean = F.avg_pool2d(x, kernel, stride, padding, count_include_pad=False)
    for temperature in (1e-4, 0.1, 1.0, 1e4):
        pooled = log_mean_exp_pool2d(x, kernel, stride, padding, temperature)
        assert (pooled <= maximum + 1e-12).all()
        assert (pooled >= mean - 1e-10).all()
        assert (pooled >= maximum - temperature * math.log(9) - 1e-12).all()
    torch.testing.assert_close(log_mean_exp_pool2d(x, kernel, stride, padding, 1e-5), maximum, atol=1e-4, rtol=0)
    torch.testing.assert_close(log_mean_exp_pool2d(x, kernel, stride, padding, 1e6), mean, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", range(3, 12))
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 0), (3, 2, 1), (2, 2, 1), (2, 3, 1), (3, 1, 1)])
def test_ceil_mode_has_the_windows_of_torch(kernel: int, stride: int, padding: int, size: int) -> None:
    x = torch.randn(1, 2, size, size + 1, dtype=torch.float64)
    maximum = F.max_pool2d(x, kernel, stride, padding, ceil_mode=True)
    pooled = log_mean_exp_pool2d(x, kernel, stride, padding, 1e-5, ceil_mode=True)
    torch.testing.assert_close(pooled, maximum, atol=1e-4, rtol=0)
    constant = log_mean_exp_pool2d(torch.ones_like(x), kernel, stride, padding, 0.3, ceil_mode=True)
    torch.testing.assert_close(constant, torch.ones_like(maximum))


@pytest.mark.parametrize(("kernel", "stride", "padding"), WINDOWS)
def test_first_and_second_derivatives(kernel: Any, stride: Any, padding: Any) -> None:
    x = torch.randn(1, 1, 5, 6, dtype=torch.float64, requires_grad=True)
    pool = LogMeanExpPool2d(kernel, stride, padding, temperature=0.5)
    assert torch.autograd.gradcheck(pool, x)
    assert torch.autograd.gradgradcheck(pool, x)


def test_constants_pass_and_large_numbers_stay_finite() -> None:
    constant = log_mean_exp_pool2d(torch.full((1, 1, 4, 4), 3.0), 2, padding=1)
    torch.testing.assert_close(constant, torch.full((1, 1, 3, 3), 3.0))
    x = (torch.randn(1, 2, 6, 6) * 1e4).requires_grad_()
    y = log_mean_exp_pool2d(x, 3, 2, 1, temperature=1e-3)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(1, 1, 4, 4).to(dtype)
    y = log_mean_exp_pool2d(x, 2, temperature=1e-3)
    assert y.dtype == dtype
    assert torch.equal(y, log_mean_exp_pool2d(x.float(), 2, temperature=1e-3).to(dtype))


def test_exports() -> None:
    pool = LogMeanExpPool2d(2)
    x = torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(torch.export.export(pool, (x,)).module()(x), pool(x))


@COMPILER_WARNINGS
def test_exports_to_onnx_with_padding() -> None:
    pool, x = LogMeanExpPool2d(3, 2, 1), torch.randn(1, 2, 5, 5)
    program = torch.onnx.export(pool, (x,), dynamo=True, verbose=False)
    session = onnx.reference.ReferenceEvaluator(program.model_proto)
    (result,) = session.run(None, {session.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), pool(x))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kernel_size": 0}, ValueError, "`kernel_size` must be at least 1"),
        ({"kernel_size": 2.0}, TypeError, "`kernel_size` must be an integer"),
        ({"kernel_size": (2, 2, 2)}, ValueError, "`kernel_size` must be one integer or two"),
        ({"kernel_size": 2, "stride": 0}, ValueError, "`stride` must be at least 1"),
        ({"kernel_size": 2, "padding": 2}, ValueError, "`padding` must be at most half"),
        ({"kernel_size": 2, "temperature": 0.0}, ValueError, "`temperature` must be a finite number > 0"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LogMeanExpPool2d(**arguments)


def test_wrong_inputs() -> None:
    with pytest.raises(ValueError, match=r"must have shape \(N, C, H, W\)"):
        LogMeanExpPool2d(2)(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match="does not fit an input of size"):
        nn.Sequential(LogMeanExpPool2d(5))(torch.zeros(1, 1, 4, 4))
