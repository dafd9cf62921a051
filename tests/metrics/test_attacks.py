"""Attacks: the built-in one against closed forms, torchattacks and foolbox; adversarial accuracy and its guards."""

import copy
import random

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_lcnn.functional import projected_gradient_attack
from lightning_lcnn.metrics import AdversarialAccuracy

matplotlib.use("Agg")
torchattacks = pytest.importorskip("torchattacks")


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


@pytest.fixture(scope="module")
def model(digits):
    """A small convolutional network with batch norm, frozen after training."""
    x, y = digits
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(1, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.Softplus(), nn.Flatten(), nn.Linear(192, 10)),
        )
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(5):
            for rows in torch.randperm(1500).split(64):
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
                optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def batch(digits):
    return digits[0][1500:1600], digits[1][1500:1600]


def accuracy(model, batch, **arguments):
    metric = AdversarialAccuracy(**arguments)
    metric.update(model, *batch)
    return metric.compute()


def linear(weight):
    """Two classes whose margin for class 0 is <w, x - 1/2>."""
    model = nn.Linear(len(weight), 2)
    with torch.no_grad():
        model.weight.copy_(torch.stack([weight, -weight]) / 2)
        model.bias.copy_(torch.tensor([-1.0, 1.0]) * weight.sum() / 4)
    return model


@pytest.mark.parametrize(("norm", "dual"), [("l2", 2), ("linf", 1)])
def test_linear_models_break_exactly_at_their_distance(norm, dual):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, generator=generator)
    x = 0.4 + 0.2 * torch.rand(64, 8, generator=generator)  # the bounds stay out of reach
    distance = (x - 0.5) @ weight / torch.linalg.vector_norm(weight, ord=dual)
    y = (distance < 0).long()
    for radius in (0.01, 0.03, 0.1):
        measured = accuracy(linear(weight), (x, y), radius=radius, norm=norm)
        expected = (distance.abs() > radius).float().mean()
        near = ((distance.abs() - radius).abs() < 1e-3 * radius).float().mean()  # rounding decides these
        assert abs(measured - expected) <= near


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_budget_bounds_and_no_worse_than_torchattacks(model, batch, norm):
    x, y = batch
    radius = 0.5 if norm == "l2" else 0.08
    adversarial = projected_gradient_attack(model, x, y, radius, norm, num_steps=20)
    size = torch.linalg.vector_norm((adversarial - x).flatten(1), ord=2 if norm == "l2" else torch.inf, dim=1)
    assert size.max() <= radius * (1 + 1e-5)
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    name = "PGDL2" if norm == "l2" else "PGD"
    options = {"alpha": radius / 8, "steps": 20}
    own = accuracy(model, batch, radius=radius, norm=norm)
    rival = accuracy(model, batch, radius=radius, norm=norm, attack=name, attack_kwargs=options)
    clean = (model(x).argmax(1) == y).float().mean()
    assert own <= rival + 0.02  # of 100 examples
    assert abs(own - rival) <= 0.1
    assert own < clean - 0.2


def test_every_form_of_an_attack_gives_the_same(model, batch):
    radius, options = 0.5, {"alpha": 0.1, "steps": 5}

    def function(network, x, target):
        return torchattacks.PGDL2(network, eps=radius, **options)(x, target)

    forms = [
        ("PGDL2", options),
        (torchattacks.PGDL2, options),
        (lambda network: torchattacks.PGDL2(network, eps=radius, **options), None),
        (lambda network, r: torchattacks.PGDL2(network, eps=r, **options), None),
        (function, None),
        (lambda network, x, target, r: torchattacks.PGDL2(network, eps=r, **options)(x, target), None),
        (lambda network, x, target, *, radius: torchattacks.PGDL2(network, eps=radius, **options)(x, target), None),
    ]
    values = {float(accuracy(model, batch, radius=radius, attack=a, attack_kwargs=k)) for a, k in forms}
    assert len(values) == 1


def test_foolbox(model, batch):
    foolbox = pytest.importorskip("foolbox")

    def attack(network, x, target, radius):
        wrapped = foolbox.PyTorchModel(network, bounds=(0, 1), device=x.device)
        return foolbox.attacks.L2PGD(rel_stepsize=0.1, steps=20)(wrapped, x, target, epsilons=radius)[1]

    own = accuracy(model, batch, radius=0.5)
    assert abs(accuracy(model, batch, radius=0.5, attack=attack) - own) <= 0.1
    assert all(p.grad is None for p in model.parameters())


def test_curve_over_radii(model, batch):
    import matplotlib.pyplot as plt

    metric = AdversarialAccuracy([0.5, 0.1, 0.25], full=True)
    for i in range(0, 100, 30):
        metric.update(model, batch[0][i : i + 30], batch[1][i : i + 30])
    result = metric.compute()
    assert metric.radii == [0.1, 0.25, 0.5]
    curve = torch.stack([result[f"robust_accuracy_{radius}"] for radius in metric.radii])
    assert (curve.diff() < 0).all()
    assert curve[0] <= result["clean_accuracy"]
    torch.testing.assert_close(result["clean_accuracy"], (model(batch[0]).argmax(1) == batch[1]).float().mean())
    for radius in metric.radii:
        assert 0 < result[f"mean_perturbation_{radius}"] <= result[f"max_perturbation_{radius}"] <= radius * 1.001
        alone = accuracy(model, batch, radius=radius)
        assert result[f"robust_accuracy_{radius}"] <= alone
    _, axes = metric.plot()
    torch.testing.assert_close(torch.tensor(axes.lines[0].get_ydata()), curve)
    simple = AdversarialAccuracy([0.1, 0.25])
    simple.update(model, *batch)
    simple.plot()
    single = AdversarialAccuracy(0.1, full=True)
    single.update(model, *batch)
    assert set(single.compute()) == {"clean_accuracy", "robust_accuracy", "mean_perturbation", "max_perturbation"}
    single.plot()
    plt.close("all")


def test_attacks_without_a_radius_count_within_it(model, batch):
    arguments = {"attack": "DeepFool", "attack_kwargs": {"steps": 10}, "radius_argument": None}
    with pytest.raises(ValueError, match=r"exceeded its budget: a perturbation of l2 norm .* over_budget='ignore'"):
        accuracy(model, (batch[0][:4], batch[1][:4]), radius=0.05, **arguments)
    x, y = batch[0][:24], batch[1][:24]
    radii = [0.05, 0.3, 3.0]
    curve = accuracy(model, (x, y), radius=radii, over_budget="ignore", **arguments)
    assert (curve.diff() <= 0).all()
    assert curve[-1] < curve[0]
    # torchattacks by itself, once: robust is who was right before, and is right after or was moved further than allowed
    adversarial = torchattacks.DeepFool(copy.deepcopy(model), steps=10)(x, y).detach()
    distance = torch.linalg.vector_norm((adversarial - x).flatten(1), dim=1)
    best = model(adversarial).topk(2)
    fooled, right = best.indices[:, 0] != y, model(x).argmax(1) == y
    border = best.values[:, 0] - best.values[:, 1] < 1e-5  # where rounding decides: DeepFool stops behind the border
    for radius, measured in zip(radii, curve, strict=True):
        expected = (right & ~(fooled & (distance <= radius * 1.001))).float().mean()  # the metric's tolerance
        unsure = (right & (border | ((distance / radius - 1.001).abs() < 1e-5))).float().mean()
        assert (measured - expected).abs() <= unsure + 1e-6
    with pytest.raises(RuntimeError, match="DeepFool takes no argument 'eps'; name the one"):
        accuracy(model, batch, radius=0.1, attack="DeepFool")


def test_normalised_inputs(model, batch):
    x, y = batch
    mean, std = [0.3], [0.25]

    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x * 0.25 + 0.3)

    normalised = ((x - 0.3) / 0.25, y)
    with pytest.raises(ValueError, match=r"inputs must lie in \[0, 1\], got \[-1\.2, 2\.8\]; pass normalization="):
        accuracy(Normalised(), normalised, radius=0.5)
    expected = accuracy(model, batch, radius=0.5)
    assert abs(accuracy(Normalised(), normalised, radius=0.5, normalization=(mean, std)) - expected) <= 0.01
    by_name = {"attack": "PGDL2", "attack_kwargs": {"alpha": 0.1}}
    rival = accuracy(Normalised(), normalised, radius=0.5, normalization=(mean, std), **by_name)
    assert abs(rival - accuracy(model, batch, radius=0.5, **by_name)) <= 0.01
    # without limits the attack works on the normalised inputs: the radius is in their units, 1 / std times larger
    free = accuracy(Normalised(), normalised, radius=2.0, bounds=None)
    assert free <= expected
    with pytest.raises(ValueError, match="`normalization` has 3 channels, the inputs have 1"):
        accuracy(Normalised(), normalised, radius=0.5, normalization=([0.0] * 3, [1.0] * 3))
    with pytest.raises(ValueError, match="equal length with std > 0"):
        AdversarialAccuracy(0.5, normalization=([0.0], [0.0]))


class Faulty:
    """Shows the faults of torchattacks in one attack: modes, gradients, random state, hooks, half-way failure."""

    def __init__(self, fail):
        self.fail = fail

    def __call__(self, network, x, target):
        network.train()
        torch.manual_seed(123), random.seed(5)
        for parameter in network.parameters():
            parameter.requires_grad_(True)
        x = x.clone().requires_grad_()
        network.model.eval()
        F.cross_entropy(network(x), target).backward()
        network.model[0].register_forward_hook(lambda *args: torch.nan)
        network.train()
        if self.fail:
            raise ArithmeticError("half-way")
        return x.detach()


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_survives_a_careless_attack(model, batch, fail):
    own = copy.deepcopy(model)
    own[1].weight.requires_grad_(False)
    own[0].weight.grad = torch.ones_like(own[0].weight)
    gradient = own[0].weight.grad
    state = copy.deepcopy(own.state_dict())
    before = torch.get_rng_state(), random.getstate()
    metric = AdversarialAccuracy(0.5, attack=Faulty(fail))
    if fail:
        with pytest.raises(RuntimeError, match=r"failed on \d+ examples at radius 0.5: ArithmeticError: half-way"):
            metric.update(own, *batch)
        assert metric.num_examples == 0
    else:
        metric.update(own, *batch)
        assert metric.compute() == (model(batch[0]).argmax(1) == batch[1]).float().mean()
    assert not any(module.training for module in own.modules())
    assert [p.requires_grad for p in own.parameters()] == [True, True, False, True, True, True]
    assert own[0].weight.grad is gradient
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert all(p.grad is None for p in list(own.parameters())[1:])
    assert not own[0]._forward_hooks
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    for name, value in own.state_dict().items():
        assert torch.equal(value, state[name])


@pytest.mark.parametrize("name", ["PGDL2", "CW", "AutoAttack"])
def test_torchattacks_under_inference_mode_leave_nothing(model, batch, name):
    holder = nn.Module()  # as in a LightningModule whose top is in training mode over a frozen network
    holder.net, holder.forward = model, model.forward
    holder.train()
    model.eval()
    options = {"PGDL2": {"alpha": 0.1}, "CW": {"steps": 20}, "AutoAttack": {"norm": "L2", "version": "rand"}}[name]
    metric = AdversarialAccuracy(
        1.0,
        attack=name,
        attack_kwargs=options,
        radius_argument=None if name == "CW" else "eps",
        over_budget="ignore" if name == "CW" else "raise",
        max_examples=8,
    )
    before = torch.get_rng_state()
    with torch.inference_mode():
        metric.update(holder, batch[0].clone(), batch[1].clone())
        first = metric.compute()
    assert torch.equal(before, torch.get_rng_state())
    assert holder.training
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    torch.rand(5)
    again = accuracy(model, (batch[0][:8], batch[1][:8]), **_again(metric))
    assert again == first  # seeded inside, whatever the global state


def test_an_attack_that_would_seed_itself_from_the_clock_is_reproducible(batch):
    seeds = []

    class Clocked:
        def __init__(self, model, seed=None):
            seeds.append(seed)

        def __call__(self, x, target):
            return x

    for seed in (0, 0, 1):
        AdversarialAccuracy(1.0, attack=Clocked, radius_argument=None, seed=seed).update(nn.Flatten(), *batch)
    own = AdversarialAccuracy(1.0, attack=Clocked, radius_argument=None, attack_kwargs={"seed": 7})
    own.update(nn.Flatten(), *batch)
    first, second, other, given = seeds
    assert isinstance(first, int)
    assert first == second != other
    assert given == 7


def _again(metric):
    names = ("attack", "attack_kwargs", "radius_argument", "over_budget")
    return {"radius": metric.radii[0]} | {name: getattr(metric, name) for name in names}


def test_adapter_and_train_mode(model, batch):
    wrapped = lambda x: {"logits": model(x)}  # noqa: E731
    with pytest.raises(TypeError, match="must return a tensor of logits, got dict; pass adapter="):
        accuracy(wrapped, batch, radius=0.5)
    adapted = accuracy(wrapped, batch, radius=0.5, adapter=lambda result: result["logits"])
    assert adapted == accuracy(model, batch, radius=0.5)
    with pytest.raises(ValueError, match=r"1 \(BatchNorm2d\) normalises with batch statistics"):
        accuracy(copy.deepcopy(model).train(), batch, radius=0.5)
    with pytest.raises(ValueError, match=r"`target` must lie in \[0, 10\) for 10 logits, got 11"):
        accuracy(model, (batch[0], batch[1] * 0 + 11), radius=0.5)
    with pytest.raises(TypeError, match="`x` must be floating point"):
        accuracy(model, (batch[0].long(), batch[1]), radius=0.5)


@pytest.mark.parametrize(
    ("attack", "error", "message"),
    [
        (lambda m, x, y: x[:1], ValueError, r"must return inputs of shape \(\d+, 1, 8, 8\), got \(1, 1, 8, 8\)"),
        (lambda m, x, y: None, ValueError, r"must return inputs of shape .* got NoneType"),
        (lambda m, x, y: x * torch.nan, ValueError, "returned NaN or infinity at radius 0.5"),
        (lambda m, x, y: x - 0.05, ValueError, r"left the allowed range \[0.0, 1.0\]: \[-0.05, 0.95\]"),
        (lambda m, x, y: (x + 0.2).clamp(0, 1), ValueError, "exceeded its budget: a perturbation of l2 norm"),
    ],
)
def test_bad_attack_results(attack, error, message, model, batch):
    with pytest.raises(error, match=message):
        accuracy(model, batch, radius=0.5, attack=attack)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"radius": 0.0}, ValueError, "`radius` must be a finite number > 0"),
        ({"radius": []}, ValueError, "at least one radius"),
        ({"radius": 0.1, "norm": "l3"}, ValueError, "`norm` must be one of"),
        ({"radius": 0.1, "norm": "l1"}, ValueError, "`norm` must be one of"),  # the default attack
        ({"radius": 0.1, "over_budget": "clip"}, ValueError, "`over_budget` must be one of"),
        ({"radius": 0.1, "seed": -1}, ValueError, "`seed` must be at least 0"),
        ({"radius": 0.1, "attack": "PGDL3"}, ValueError, "must name a class of torchattacks, got 'PGDL3'; it has"),
        ({"radius": 0.1, "attack": "PGD", "bounds": (-1, 1)}, ValueError, r"torchattacks clamps to \[0, 1\]"),
        ({"radius": 0.1, "attack": 3}, TypeError, "`attack` must be None, a name, a class or a callable, got int"),
        ({"radius": 0.1, "attack": lambda: None}, TypeError, r"`attack` must take \(model\), \(model, radius\)"),
        (
            {"radius": 0.1, "attack": lambda m, x, y: x, "attack_kwargs": {"steps": 3}},
            TypeError,
            r"`attack_kwargs` belong to an attack class; bind those of a function with functools\.partial",
        ),
    ],
)
def test_bad_configuration(arguments, error, message):
    with pytest.raises(error, match=message):
        AdversarialAccuracy(**arguments)


def test_a_ready_instance_is_refused(model):
    with pytest.raises(TypeError, match="instance of PGDL2, which holds a model and a device; pass the class"):
        AdversarialAccuracy(0.1, attack=torchattacks.PGDL2(model))


def test_a_missing_library_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(ImportError, match=r"torchattacks is needed here .*lightning-lcnn\[attacks\]"):
        AdversarialAccuracy(0.1, attack="PGD")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"radius": -1.0}, "`radius` must be a finite number > 0"),
        ({"radius": 0.1, "norm": "l0"}, "`norm` must be one of"),
        ({"radius": 0.1, "num_steps": 0}, "`num_steps` must be at least 1"),
        ({"radius": 0.1, "step_size": 0.0}, "`step_size` must be a finite number > 0"),
    ],
)
def test_bad_arguments_of_the_built_in_attack(arguments, message):
    with pytest.raises(ValueError, match=message):
        projected_gradient_attack(nn.Identity(), torch.rand(1, 2), torch.tensor([0]), **arguments)


def test_attack_that_brings_its_own_radius() -> None:
    x, target = torch.tensor([[0.5, 0.2], [0.9, 0.1]]), torch.tensor([0, 0])
    shift = torch.tensor([-0.2, 0.2])
    metric = AdversarialAccuracy(attack=lambda model, x, target: x + shift, full=True, norm="linf")
    metric.update(torch.nn.Identity(), x, target)
    result = metric.compute()
    assert result["robust_accuracy"] == 0.5
    torch.testing.assert_close(result["max_perturbation"], torch.tensor(0.2))
    named = AdversarialAccuracy(attack="FGSM", attack_kwargs={"eps": 0.2}, norm="linf")
    named.update(torch.nn.Identity(), x, target)
    assert named.compute() == 0.5
    with pytest.raises(ValueError, match="`radius` must be given for the built-in attack"):
        AdversarialAccuracy()
    needy = AdversarialAccuracy(attack=lambda model, x, target, radius: x)
    with pytest.raises(RuntimeError, match="pass `radius` to AdversarialAccuracy"):
        needy.update(torch.nn.Identity(), x, target)
