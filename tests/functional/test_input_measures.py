"""What all input measures share: bad input is refused, and the user's model stays as it was."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_lcnn.functional import (
    gradient_stability,
    input_gradient_norm,
    input_hessian_norm,
    input_hessian_norm_probabilistic_bound,
    normalized_curvature,
)

MEASURES = {
    "gradient_norm": input_gradient_norm,
    "hessian_norm": input_hessian_norm,
    "bound": input_hessian_norm_probabilistic_bound,
    "curvature": normalized_curvature,
    "stability": lambda *args, **kwargs: gradient_stability(*args, radius=0.1, num_worst_steps=2, **kwargs),
}


@pytest.fixture(params=MEASURES)
def measure(request):
    return MEASURES[request.param]


def network():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Softplus(), nn.Dropout(0.5)),
            *(nn.Flatten(), nn.Linear(4 * 16, 3)),
        ).eval()


def batch(size=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 2, 4, 4, generator=generator), torch.arange(size) % 3


def test_bad_inputs(measure):
    model, (x, y) = network(), batch()
    with pytest.raises(TypeError, match=r"`x` must be floating point to be differentiated, got torch\.int64; convert"):
        measure(model, x.long(), y)
    with pytest.raises(TypeError, match="`x` and `target` must be tensors, got list and Tensor"):
        measure(model, x.tolist(), y)
    with pytest.raises(ValueError, match="`x` must be finite, got NaN or infinity in 2 of 4 examples"):
        measure(model, torch.where(torch.arange(4)[:, None, None, None] < 2, torch.nan, x), y)
    with pytest.raises(ValueError, match=r"`target` must lie in \[0, 3\) for 3 logits, got 3"):
        measure(model, x, y + 1)
    with pytest.raises(ValueError, match=r"`target` must lie in \[0, 3\) for 3 logits, got -100"):
        measure(model, x, torch.full_like(y, -100))
    with pytest.raises(TypeError, match=r"`target` must hold class indices, shape \(B,\), got torch.float32"):
        measure(model, x, torch.eye(3)[y])
    with pytest.raises(ValueError, match="`target` must have one entry per example, 4, got shape"):
        measure(model, x, y[:3])
    with pytest.raises(ValueError, match="not be empty"):
        measure(model, x[:0], y[:0])
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        measure(model, x, y, batch_size=0)
    with pytest.raises(ValueError, match="`output` must be one of"):
        measure(model, x, y, output="logits")
    with pytest.raises(TypeError, match="`output` must be one of"):
        measure(model, x, y, output=3)
    with pytest.raises(ValueError, match=r"one value per example, shape \(4,\), got \(4, 3\)"):
        measure(model, x, y, output=lambda logits, target: logits)
    with pytest.raises(TypeError, match="`model` must be a module or a callable"):
        measure("resnet18", x, y)


def test_bad_models(measure):
    model, (x, y) = network(), batch()
    with pytest.raises(ValueError, match=r"1 \(BatchNorm2d\) normalises with batch statistics.*model\.eval\(\) first"):
        measure(network().train(), x, y)
    partly = network()
    partly[1].train()
    with pytest.raises(ValueError, match=r"1 \(BatchNorm2d\) normalises with batch statistics, which couples"):
        measure(partly, x, y)
    stateless = nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten(), nn.Linear(32, 3)).eval()
    with pytest.raises(ValueError, match=r"0 \(BatchNorm2d\) normalises with batch statistics"):
        measure(stateless, x, y)
    noisy = network()
    noisy[3].train()
    with pytest.raises(ValueError, match=r"3 \(Dropout\) draws noise in training mode"):
        measure(noisy, x, y)
    skipping = nn.Sequential(type("DropPath", (nn.Identity,), {})(), network())
    skipping[0].train()
    with pytest.raises(ValueError, match=r"0 \(DropPath\) draws noise in training mode"):
        measure(skipping, x, y)
    with pytest.raises(TypeError, match="must return a tensor of logits, got dict; pass adapter="):
        measure(lambda x: {"logits": model(x)}, x, y)
    with pytest.raises(ValueError, match=r"logits must have shape \(batch, classes\) = \(4, K\), got \(4, 3, 1\)"):
        measure(lambda x: model(x).unsqueeze(2), x, y)
    with pytest.raises(ValueError, match="logits are not finite"):
        measure(lambda x: model(x) * torch.inf, x, y)
    with pytest.raises(ValueError, match="the margin needs at least 2 classes"):
        measure(lambda x: model(x)[:, :1], x, torch.zeros_like(y))
    sharded = type("FullyShardedDataParallel", (nn.Module,), {"forward": lambda self, x: x})()
    with pytest.raises(ValueError, match="FSDP1 flattens its weights"):
        measure(sharded, x, y)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "arnoldi"}, "`method` must be one of"),
        ({"hvp": "exact"}, "`hvp` must be one of"),
        ({"num_hvps": 0}, "`num_hvps` must be at least 1, got 0"),
    ],
)
def test_bad_hessian_arguments(arguments, message):
    for hessian_measure in (input_hessian_norm, normalized_curvature):
        with pytest.raises(ValueError, match=message):
            hessian_measure(network(), *batch(), **arguments)
    with pytest.raises(ValueError, match=r"`failure_probability` must lie in \(0, 1\), got 0"):
        input_hessian_norm_probabilistic_bound(network(), *batch(), failure_probability=0)


def test_adapter_takes_dicts_and_tuples(measure):
    model, (x, y) = network(), batch()
    expected = measure(model, x, y).values
    for wrap, adapter in (
        (lambda z: {"logits": z, "loss": None}, lambda result: result["logits"]),
        (lambda z: (z, x), lambda result: result[0]),
    ):
        torch.testing.assert_close(measure(lambda x, w=wrap: w(model(x)), x, y, adapter=adapter).values, expected)


def snapshot(model):
    return {
        "modes": [module.training for module in model.modules()],
        "gradients": [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "hooks": [list(module._forward_hooks) for module in model.modules()],
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "random": (torch.get_rng_state(), random.getstate(), tuple(np.random.get_state()[1])),  # noqa: NPY002
        "grad_mode": torch.is_grad_enabled(),
    }


def assert_equal(before, after):
    for key in ("modes", "requires_grad", "hooks", "grad_mode"):
        assert before[key] == after[key], key
    for old, new in zip(before["gradients"], after["gradients"], strict=True):
        assert (old is None) == (new is None)
        assert old is None or (old[0] == new[0] and torch.equal(old[1], new[1]))
    for name, value in before["state"].items():
        assert torch.equal(value, after["state"][name]), name
    assert torch.equal(before["random"][0], after["random"][0])
    assert before["random"][1:] == after["random"][1:]


class Mean(nn.Module):
    """Fails, draws random numbers, changes modes and registers hooks on request."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.fail_at = None
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002 - the global state is the point
        self.model[3].training = True  # between forward passes: dropout itself has run or is identity here
        self.model[1].register_forward_hook(lambda *args: None)
        if self.calls == self.fail_at:
            raise RuntimeError("out of cheese")
        self.model[3].training = False
        result = self.model(x)
        self.model[3].training = True
        return result


@pytest.mark.parametrize("fail_at", [None, 1, 2])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_model_stays_as_it_was_also_after_an_exception(measure, fail_at, context):
    model = Mean(network())
    model.model[0].weight.requires_grad_(False)
    model.model[5].bias.grad = torch.ones(3)
    kept = model.model[1].register_forward_hook(lambda *args: None)
    model.fail_at = fail_at
    x, y = batch()
    with context():
        inside = x.clone()  # an inference tensor under inference_mode
        before = snapshot(model)
        if fail_at is None:
            measure(model, inside, y.clone(), batch_size=2)
        else:
            with pytest.raises(RuntimeError, match="out of cheese"):
                measure(model, inside, y.clone(), batch_size=2)
        assert_equal(before, snapshot(model))
        assert inside.grad is None
        assert not inside.requires_grad
    kept.remove()
    assert len(model.model[1]._forward_hooks) == 0


def test_inference_mode_gives_the_same_values(measure):
    model, (x, y) = network(), batch()
    expected = measure(model, x, y).values
    with torch.inference_mode():
        torch.testing.assert_close(measure(model, x.clone(), y.clone()).values, expected)


def test_tensors_made_in_inference_mode_inside_the_model():
    class Cached(nn.Module):
        """Keeps a buffer from its first forward, as FSDP2 keeps gathered weights."""

        cache = None

        def forward(self, x):
            if self.cache is None:
                self.cache = torch.ones(3, 32)
            return x.flatten(1) @ self.cache.T

    model, (x, y) = Cached(), batch()
    with torch.inference_mode():
        model(x)
        with pytest.raises(RuntimeError, match=r"tensors made in inference mode.*Trainer\(inference_mode=False\)"):
            normalized_curvature(model, x, y)


def test_kinks_are_said_once_per_model(recwarn):
    rectified = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 3))
    x, y = batch()
    with pytest.warns(UserWarning, match=r"kinks \(MaxPool2DWithIndices, Relu\).*smooth pieces"):
        result = normalized_curvature(rectified, x, y)
    assert result.values.tolist() == [0] * 4
    recwarn.clear()
    input_hessian_norm(rectified, x, y)
    input_gradient_norm(rectified, x, y)
    normalized_curvature(network(), x, y)  # softplus has none
    assert not recwarn.list


def test_a_functional_relu_is_seen_too():
    x, y = batch()
    with pytest.warns(UserWarning, match=r"kinks \(Relu\)"):
        input_hessian_norm(lambda x: torch.relu(x.flatten(1)[:, :3]), x, y, hvp="finite_difference")


def test_operations_without_a_second_derivative():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0].cos()

    x, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    expected = input_hessian_norm(torch.sin, x, y).values
    for hvp in ("double_backward", "forward_over_reverse"):
        with pytest.raises(RuntimeError, match=r"no second derivative.*pass hvp='finite_difference'"):
            input_hessian_norm(Once.apply, x, y, hvp=hvp)
    measured = input_hessian_norm(Once.apply, x, y, hvp="finite_difference").values
    torch.testing.assert_close(measured, expected, atol=2e-3, rtol=1e-3)  # central differences in float32


def test_compiled_parts_are_refused_and_measured_by_differences():
    """Their backward keeps no graph, so that a second derivative would silently be zero."""
    x, y = batch()
    plain = network()
    expected = normalized_curvature(plain, x, y).values
    inside = nn.Sequential(torch.compile(plain, backend="aot_eager"), nn.Identity()).eval()
    with pytest.raises(
        RuntimeError, match=r"(CompiledFunctionBackward|donated buffers).*; pass hvp='finite_difference'"
    ):
        normalized_curvature(inside, x, y)
    measured = normalized_curvature(inside, x, y, hvp="finite_difference").values
    torch.testing.assert_close(measured, expected, rtol=1e-2, atol=0)  # h = 5e-3 in float32


def test_checkpointed_and_vectorised_parts_and_attention():
    x, y = batch()
    plain = network()
    expected = normalized_curvature(plain, x, y).values
    recomputed = lambda x: torch.utils.checkpoint.checkpoint(plain, x, use_reentrant=False)  # noqa: E731
    torch.testing.assert_close(normalized_curvature(recomputed, x, y).values, expected)
    vectorised = lambda x: torch.func.vmap(lambda image: plain(image[None])[0])(x)  # noqa: E731
    torch.testing.assert_close(normalized_curvature(vectorised, x, y).values, expected)
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=F.gelu, batch_first=True)
    attentive = nn.Sequential(nn.Unflatten(1, (4, 8)), layer, nn.Flatten(), nn.Linear(32, 3)).eval()
    tokens = x.flatten(1)
    by_mode = [
        input_hessian_norm(attentive, tokens, y, hvp=mode).values
        for mode in ("double_backward", "forward_over_reverse", "finite_difference")
    ]
    torch.testing.assert_close(by_mode[0], by_mode[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(by_mode[0], by_mode[2], rtol=2e-2, atol=0)


def test_compiled_and_wrapped_models_are_unwrapped():
    x, y = batch()
    plain = network()
    expected = normalized_curvature(plain, x, y).values
    torch.testing.assert_close(normalized_curvature(torch.compile(plain), x, y).values, expected)
    torch.testing.assert_close(normalized_curvature(nn.DataParallel(plain), x, y).values, expected)


def test_vanishing_gradients_give_infinity_and_constants_zero():
    x, y = torch.zeros(1, 2), torch.tensor([0])
    assert normalized_curvature(torch.square, x, y).values.item() == torch.inf
    constant = normalized_curvature(lambda x: torch.tensor([[1.0, 0.0]]), x, y)
    assert constant.values.item() == 0
    assert gradient_stability(lambda x: 0 * x, x, y, radius=1.0).values.item() == 0
