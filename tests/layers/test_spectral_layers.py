"""Spectral layers: their true slope, exact gradient, and the contract of every stateful layer."""

import copy
import io
import math
import pickle
import random

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from lightning_lcnn.layers import SpectralConv1d, SpectralConv2d, SpectralConv3d, SpectralLinear

CONV = {1: SpectralConv1d, 2: SpectralConv2d, 3: SpectralConv3d}
EVEN_SAME = "ignore:Using padding='same' with even kernel lengths"

# constructor, shape of one input
CASES = {
    "linear": (lambda **k: SpectralLinear(6, 4, **k), (6,)),
    "conv1d": (lambda **k: SpectralConv1d(3, 4, 5, stride=2, **k), (3, 12)),
    "conv2d": (lambda **k: SpectralConv2d(4, 6, 3, padding=1, **k), (4, 7, 6)),
    "strided groups": (lambda **k: SpectralConv2d(4, 6, (3, 2), (2, 1), (1, 0), groups=2, **k), (4, 8, 5)),
    "depthwise dilated": (lambda **k: SpectralConv2d(4, 4, 3, padding=2, dilation=2, groups=4, **k), (4, 7, 6)),
    "even same": (lambda **k: SpectralConv2d(2, 3, 4, padding="same", **k), (2, 6, 5)),
    "pointwise": (lambda **k: SpectralConv2d(4, 3, 1, bias=False, **k), (4, 3, 3)),
    "conv3d": (lambda **k: SpectralConv3d(2, 3, 2, padding="valid", **k), (2, 4, 3, 5)),
}
cases = pytest.mark.parametrize("name", CASES)
pytestmark = pytest.mark.filterwarnings(EVEN_SAME)


def build(name, seed=0, seen=True, **arguments):
    """Layer of a case, and a batch of inputs; ``seen``: the layer knows its input size."""
    torch.manual_seed(seed)
    make, shape = CASES[name]
    layer = make(**arguments)
    x = torch.randn(3, *shape)
    if seen:
        layer(x)
    return layer, x


def true_slope(layer, shape):
    """Largest singular value of the Jacobian of the layer as it is, in float64."""
    layer = copy.deepcopy(layer).double()
    zero = torch.zeros(1, *shape, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(layer, zero)
    return torch.linalg.matrix_norm(jacobian.reshape(-1, math.prod(shape)), 2).item()


@cases
@pytest.mark.parametrize("gamma", [None, 2.5])
def test_true_slope_is_the_gain(name, gamma):
    layer, x = build(name, gamma=gamma)
    gain = gamma or 1.0
    assert layer.slope().item() == pytest.approx(gain)
    assert true_slope(layer, x.shape[1:]) == pytest.approx(gain, rel=1e-3)


def test_true_slope_of_random_layers_is_at_most_one_in_a_thousand_too_large():
    rng = random.Random(0)
    torch.manual_seed(0)
    done = 0
    while done < 60:
        rank = rng.choice([1, 2, 2, 3])
        groups = rng.choice([1, 1, 2])
        kernel = tuple(rng.randint(1, 4) for _ in range(rank))
        size = tuple(rng.randint(4, {1: 60, 2: 11, 3: 5}[rank]) for _ in range(rank))
        dilation = rng.randint(1, 2)
        if any(n < dilation * (k - 1) + 1 for n, k in zip(size, kernel, strict=True)):
            continue
        layer = CONV[rank](
            groups * rng.randint(1, 4),
            groups * rng.randint(1, 4),
            kernel,
            stride=rng.randint(1, 3),
            padding=rng.randint(0, 2),
            dilation=dilation,
            groups=groups,
            input_size=size,
        )
        assert 1 - 1e-5 <= true_slope(layer, (layer.in_channels, *size)) <= 1 + 1e-3
        done += 1


@cases
def test_weight_gradient_is_exact(name):
    layer, x = build(name, gamma=1.5)
    layer, x = layer.double(), x.double()

    def function(weight, log_gamma, inputs):
        return torch.func.functional_call(layer, {"weight": weight, "log_gamma": log_gamma}, (inputs,))

    weight = layer.weight.detach().clone().requires_grad_()
    log_gamma = layer.log_gamma.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(function, (weight, log_gamma, x[:1].requires_grad_()))
    assert torch.autograd.gradgradcheck(function, (weight, log_gamma, x[:1].requires_grad_()))


def test_gradient_of_sigma_is_that_of_the_true_norm():
    layer, x = build("strided groups")
    layer = layer.double()
    layer.reset_spectral_norm(tolerance=1e-9, max_iterations=2000)
    channels, *size = x.shape[1:]
    unit = torch.eye(channels * math.prod(size), dtype=torch.float64).view(-1, channels, *size)
    response = nn.functional.conv2d(unit, layer.weight, None, layer.stride, layer.padding, groups=layer.groups)
    norm = torch.linalg.matrix_norm(response.reshape(len(unit), -1), 2)
    (expected,) = torch.autograd.grad(norm, layer.weight)
    torch.testing.assert_close(layer.sigma(), norm)
    torch.testing.assert_close(layer.spectral_gradient, expected, rtol=1e-6, atol=1e-6)


@cases
def test_few_updates_follow_a_changing_weight(name):
    layer, x = build(name)
    for _ in range(30):
        with torch.no_grad():
            layer.weight.add_(0.002 * torch.randn_like(layer.weight))
        residual = layer.update_spectral_norm()
    assert residual.shape == ()
    assert residual < 0.2
    assert true_slope(layer, x.shape[1:]) == pytest.approx(1, abs=0.02)
    layer.reset_spectral_norm()
    assert true_slope(layer, x.shape[1:]) <= 1 + 1e-3


def test_refresh_between_forward_and_backward_is_harmless():
    layer, x = build("conv2d")
    output = layer(x).square().sum()
    expected = torch.autograd.grad(output, layer.weight, retain_graph=True)
    layer.update_spectral_norm()
    torch.testing.assert_close(torch.autograd.grad(output, layer.weight), expected, rtol=0, atol=0)


@cases
@pytest.mark.parametrize("seen", [False, True])
def test_saved_and_loaded_layers_are_bit_equal(name, seen):
    layer, x = build(name, gamma=2.0, seen=seen)
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    other, _ = build(name, seed=1, seen=False, gamma=1.0)
    other.load_state_dict(layer.state_dict())
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stored, weights_only=False), other]
    expected = layer(x)
    for twin in copies:
        assert torch.equal(twin(x), expected)
        assert all(
            torch.equal(a, b) for a, b in zip(twin.state_dict().values(), layer.state_dict().values(), strict=True)
        )


@cases
def test_state_dict_keys_never_change_and_forward_changes_state_once(name):
    layer, x = build(name, seen=False)
    keys = list(layer.state_dict())
    assert {"weight", "spectral_gradient", "right_vector"} <= set(keys)
    layer.eval()
    layer(x)
    state = copy.deepcopy(layer.state_dict())
    layer.train()
    layer(x)
    assert list(layer.state_dict()) == keys
    assert all(torch.equal(state[key], value) for key, value in layer.state_dict().items())


def test_checkpoint_of_another_input_size_brings_its_own():
    source = SpectralConv2d(3, 4, 3, input_size=(9, 5))
    for target in (SpectralConv2d(3, 4, 3), SpectralConv2d(3, 4, 3, input_size=(6, 6))):
        target.load_state_dict(source.state_dict())
        assert target.right_vector.shape == (3, 9, 5)
    with pytest.raises(RuntimeError, match="size mismatch for right_vector"):
        SpectralConv2d(3, 4, 3).load_state_dict(source.state_dict() | {"right_vector": torch.zeros(7, 9, 5)})


@cases
def test_weights_of_stock_layers_load_and_bring_a_fresh_norm(name):
    layer, x = build(name)
    stock = {"weight": 5 * torch.randn_like(layer.weight), "bias": torch.zeros(layer.weight.shape[0])}
    result = nn.Sequential(layer).load_state_dict({f"0.{k}": v for k, v in stock.items()}, strict=False)
    assert set(result.missing_keys) == {"0.spectral_gradient", "0.right_vector"}
    assert true_slope(layer, x.shape[1:]) <= 1 + 1e-3


def test_buffers_without_their_weight_are_not_trusted():
    layer, x = build("conv2d")
    other, _ = build("conv2d", seed=1)
    state = {k: v for k, v in other.state_dict().items() if k != "weight"}
    layer.load_state_dict(state, strict=False)
    assert true_slope(layer, x.shape[1:]) <= 1 + 1e-3


def test_weight_changed_from_outside_is_served_by_a_reset():
    layer, x = build("conv2d")
    nn.init.orthogonal_(layer.weight, gain=7.0)
    layer.reset_spectral_norm()
    assert true_slope(layer, x.shape[1:]) <= 1 + 1e-3
    layer.reset_parameters()
    assert true_slope(layer, x.shape[1:]) <= 1 + 1e-3


@cases
def test_a_stale_norm_below_zero_warns_and_leaves_the_weight(name):
    layer, x = build(name)
    with torch.no_grad():
        layer.weight.neg_()
    for training in (True, False):
        with pytest.warns(UserWarning, match=r"stale norm ⟨W, G⟩ = -.* uses its raw weight.*every_n_steps=1"):
            output = layer.train(training)(x)
        with pytest.warns(UserWarning, match="stale norm"):
            torch.testing.assert_close(layer.normalized_weight(), layer.weight * layer.slope())
        assert output.isfinite().all()
    layer.reset_spectral_norm()
    assert layer(x).isfinite().all()


@cases
def test_zero_weight_gives_the_bias_and_a_finite_gradient(name):
    layer, x = build(name, gamma=2.0)
    nn.init.zeros_(layer.weight)
    layer.reset_spectral_norm()
    output = layer(x)
    output.square().sum().backward()
    assert layer.sigma() == 0
    bias = 0 if layer.bias is None else layer.bias.view(-1, *[1] * (x.dim() - 2))
    assert torch.equal(output, torch.zeros_like(output) + bias)
    assert layer.weight.grad.isfinite().all()
    assert layer.update_spectral_norm() == 0


def test_before_the_first_input_the_norm_is_that_of_a_small_size():
    layer = SpectralConv2d(3, 8, 3, padding=1)
    assert layer.right_vector.shape == (0,)
    assert true_slope(layer, (3, 10, 10)) == pytest.approx(1, abs=0.05)
    layer.update_spectral_norm()
    assert layer.right_vector.shape == (0,)
    with torch.inference_mode():
        layer(torch.randn(2, 3, 6, 9))
    assert layer.right_vector.shape == (3, 6, 9)
    layer(torch.randn(2, 3, 6, 9)).sum().backward()  # nothing of inference mode is left behind
    layer.update_spectral_norm()
    assert not layer.right_vector.is_inference()


def test_unbatched_input_shows_the_size():
    layer = SpectralConv2d(3, 8, 3)
    layer(torch.randn(3, 6, 9))
    assert layer.right_vector.shape == (3, 6, 9)


def test_state_is_deterministic_and_the_global_generator_untouched():
    torch.manual_seed(0)
    stock = nn.Conv2d(3, 4, 3)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    layer = SpectralConv2d(3, 4, 3)
    assert torch.equal(layer.weight, stock.weight)
    layer(torch.zeros(1, 3, 8, 8))
    assert torch.equal(torch.get_rng_state(), state)
    copies = [SpectralConv2d.from_layer(stock, input_size=(8, 8)) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(copies[0].spectral_gradient, layer.spectral_gradient)
    assert torch.equal(copies[0].right_vector, copies[1].right_vector)


@cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(name, dtype):
    layer, x = build(name, seen=False, gamma=2.0)
    layer = layer.to(dtype)
    output = layer(x.to(dtype))
    layer.update_spectral_norm()
    output.sum().backward()
    assert output.dtype == layer.weight.grad.dtype == layer.spectral_gradient.dtype == dtype
    # the weight and G are rounded to 8 bits in bfloat16
    assert true_slope(layer, x.shape[1:]) == pytest.approx(2, rel=3e-3)


@cases
def test_autocast(name):
    layer, x = build(name, seen=False)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
        layer.update_spectral_norm()
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert true_slope(layer, x.shape[1:]) <= 1 + 1e-3


def test_channels_last():
    layer, x = build("conv2d", gamma=2.0)
    expected = layer(x)
    twin = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    output = twin(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(twin.weight.grad, layer.weight.grad)
    torch.testing.assert_close(twin.update_spectral_norm(), layer.update_spectral_norm(), rtol=0, atol=1e-5)


@cases
def test_compile_without_graph_break_or_recompilation(name):
    layer, x = build(name, gamma=2.0)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), layer(x))
        compiled(x).sum().backward()
        layer.update_spectral_norm()
    assert counter.frame_count == 1


def test_compile_before_the_first_input():
    layer, x = build("conv2d", seen=False)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter)
    for _ in range(4):
        compiled(x)
    assert counter.frame_count <= 2
    assert torch.equal(compiled(x), layer(x))


def test_per_sample_gradients_by_torch_func():
    layer, x = build("conv2d")
    parameters = dict(layer.named_parameters())

    def loss(parameters, one):
        return torch.func.functional_call(layer, parameters, (one[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    total = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
    torch.testing.assert_close(each["weight"].sum(0), total, rtol=1e-4, atol=1e-5)


def test_default_device_does_not_matter():
    layer, _ = build("conv2d")
    expected = layer.spectral_gradient.clone()
    with torch.device("meta"):
        layer.reset_spectral_norm()
        layer.update_spectral_norm()
    torch.testing.assert_close(layer.spectral_gradient, expected, rtol=1e-3, atol=1e-3)


def test_meta_device_then_materialised():
    with torch.device("meta"):
        network = nn.Sequential(SpectralConv2d(3, 4, 3, input_size=(6, 6)), SpectralLinear(4, 2))
    network.to_empty(device="cpu")
    for layer in network:
        layer.reset_parameters()
    assert true_slope(network[0], (3, 6, 6)) <= 1 + 1e-3
    assert true_slope(network[1], (4,)) <= 1 + 1e-3


@pytest.mark.parametrize(
    ("stock", "spectral", "size"),
    [
        (nn.Linear(6, 4, dtype=torch.float64), SpectralLinear, None),
        (nn.Conv1d(3, 4, 5, stride=2, bias=False), SpectralConv1d, (12,)),
        (nn.Conv2d(4, 6, 3, padding="same", dilation=2, groups=2), SpectralConv2d, (7, 6)),
        (nn.Conv3d(2, 3, 2), SpectralConv3d, None),
    ],
)
def test_from_layer_copies_everything_and_shares_nothing(stock, spectral, size):
    stock.eval().weight.requires_grad_(False)
    before = copy.deepcopy(stock.state_dict())
    arguments = {} if size is None else {"input_size": size}
    layer = spectral.from_layer(stock, gamma=1.0, **arguments)
    assert not layer.training
    assert not layer.weight.requires_grad
    assert {p.dtype for p in layer.parameters()} == {stock.weight.dtype}
    assert not any(p.is_meta for p in [*layer.parameters(), *layer.buffers()])
    with torch.no_grad():
        layer.log_gamma.copy_(layer.sigma().log())  # a gain of σ restores the function
    shape = (6,) if isinstance(stock, nn.Linear) else (stock.in_channels, *(size or (4, 4, 4)))
    x = torch.randn(2, *shape, dtype=stock.weight.dtype)
    torch.testing.assert_close(spectral.from_layer(stock, gamma=None, **arguments)(x).shape, stock(x).shape)
    if size is not None or isinstance(stock, nn.Linear):
        torch.testing.assert_close(layer(x), stock(x))
    with torch.no_grad():
        layer.weight.zero_()
    assert all(torch.equal(before[key], value) for key, value in stock.state_dict().items())


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"`padding_mode` must be 'zeros', got 'reflect'.*ReflectionPad2d"):
        SpectralConv2d(3, 4, 3, padding=1, padding_mode="reflect")
    with pytest.raises(ValueError, match="`padding_mode` must be 'zeros', got 'circular'"):
        SpectralConv2d.from_layer(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"))
    with pytest.raises(ValueError, match="`gamma` must be a finite number > 0, got 0"):
        SpectralLinear(3, 4, gamma=0.0)
    for size in [(8,), (3, 8, 8), (2, 8)]:
        with pytest.raises(ValueError, match=r"`input_size` must be the spatial size of the input, 2 integers"):
            SpectralConv2d(3, 4, 3, input_size=size)
    with pytest.raises(TypeError, match=r"`layer` must be exactly a torch\.nn\.Conv2d, got Conv1d"):
        SpectralConv2d.from_layer(nn.Conv1d(3, 4, 3))
    with pytest.raises(TypeError, match=r"`layer` must be exactly a torch\.nn\.Linear, got NonDynamicallyQuant"):
        SpectralLinear.from_layer(nn.MultiheadAttention(4, 2).out_proj)
    layer = SpectralLinear(3, 4)
    nn.init.constant_(layer.weight, math.nan)
    with pytest.raises(ValueError, match="not finite; look at the layer's weight"):
        layer.reset_spectral_norm()


@pytest.mark.gpu
@cases
def test_cuda_agrees_with_cpu(name):
    layer, x = build(name, gamma=2.0)
    twin = copy.deepcopy(layer).cuda()
    twin.reset_spectral_norm()
    torch.testing.assert_close(twin(x.cuda()).cpu(), layer(x), rtol=2e-3, atol=2e-3)  # TF32
