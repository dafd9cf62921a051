"""to_low_curvature finds functional calls inside ``forward`` and turns them into modules."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import lightning
import pytest
import torch
import torch.nn.functional as F
from torch import nn, relu

from lightning_lcnn.bounds import network_bound
from lightning_lcnn.conversion import to_low_curvature
from lightning_lcnn.layers import CenteredSoftplus, PiecewiseSoftplus, SmoothELU
from lightning_lcnn.recording.run import record_run

X = 3 * torch.randn(50, 4)  # so many that every ReLU has something to cut off
SCALE = 2.0


class Base(nn.Module):
    """Two linear layers; the subclasses say what comes between."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(self.between(self.first(x)))


class Function(Base):
    def between(self, x):
        return F.relu(x, inplace=True)


class Spelled(Base):
    def between(self, x):
        return torch.nn.functional.relu(x) + torch.relu(x) + relu(x) + torch.relu_(x.clone())


class MethodOfTensor(Base):
    def between(self, x):
        return x.relu() + (2 * x).relu_()


class WithArguments(Base):
    def between(self, x):
        return F.leaky_relu(x, 0.2) + F.relu6(input=x) + F.hardtanh(x, min_val=-2.0) + F.hardsigmoid(x)


class ControlFlow(Base):
    """What a trace would freeze: a flag, a loop, an attribute, a branch on values, a side effect."""

    def between(self, x: torch.Tensor, times: int = 2) -> torch.Tensor:
        for _ in range(times if self.training else 1):
            x = F.relu(x) * SCALE
        if x.sum() > 0:
            self.seen = x
        return F.dropout(x, 0.0, training=self.training)


class PositionalOnly(Base):
    def between(this, x, /):  # noqa: N805
        return F.relu(x)


class Inherited(Function):
    def between(self, x):
        return super().between(x) + F.relu(x - 1)


class Attribute(Base):
    def __init__(self):
        super().__init__()
        self.activation = F.relu

    def between(self, x):
        return self.activation(x)


class Comprehension(Base):
    def between(self, x):
        return sum([self.activate(x - i) for i in range(2)])

    def activate(self, x):
        return F.relu(x)


class Statements(Base):
    """In-place calls whose result nobody takes."""

    def between(self, x):
        F.relu_(x)
        F.leaky_relu(x, 0.2, inplace=True)
        y = 2 * x
        y.relu_()
        F.hardtanh(y, -1.0, 1.0, True)
        return x + y


class InPlaceFunctions(Base):
    def between(self, x):
        return F.leaky_relu_(x.clone(), 0.2) + F.hardtanh_(x.clone(), -2.0) + torch.selu_(x.clone())


REPLACED = [
    (Statements, 4),
    (InPlaceFunctions, 3),
    (Function, 1),
    (Spelled, 4),
    (MethodOfTensor, 2),
    (WithArguments, 4),
    (ControlFlow, 1),
    (PositionalOnly, 1),
    (Inherited, 1),
    (Attribute, 1),
    (Comprehension, 1),
]


def smooth_children(model: nn.Module) -> list[str]:
    return [
        name for name, m in model.named_children() if isinstance(m, CenteredSoftplus | PiecewiseSoftplus | SmoothELU)
    ]


@pytest.mark.filterwarnings("ignore:to_low_curvature left")  # Inherited: the parent's method is overridden
@pytest.mark.parametrize(("cls", "number"), REPLACED)
def test_calls_become_children(cls, number):
    model = cls().double()
    x = X.double()
    converted, report = to_low_curvature(model, x, beta=1e9, return_report=True)
    assert type(model) is cls
    assert isinstance(converted, cls)
    assert type(converted).__name__ == cls.__name__
    assert len(smooth_children(converted)) == number
    assert list(model.state_dict()) == [key for key in converted.state_dict() if key in model.state_dict()]
    for training in (True, False):  # as written, in either mode
        torch.testing.assert_close(converted.train(training)(x), model.train(training)(x))
    assert [row.what.split()[0] for row in report.kinks] == (["relu"] if cls is Inherited else [])


@pytest.mark.filterwarnings("ignore:to_low_curvature left")
@pytest.mark.parametrize("cls", [cls for cls, _ in REPLACED])
def test_the_result_can_be_copied_pickled_saved_and_converted_again(cls):
    converted = to_low_curvature(cls(), X).eval().requires_grad_(False)
    expected = converted(X)
    file = io.BytesIO()
    torch.save(converted, file)
    file.seek(0)
    pickled = pickle.loads(pickle.dumps(converted))
    for other in (copy.deepcopy(converted), pickled, torch.load(file, weights_only=False)):
        assert torch.equal(other(X), expected)
        assert type(other) is type(converted)
    with pytest.raises(ValueError, match="nothing to convert"):
        to_low_curvature(converted, X)


def test_a_method_can_be_edited_twice():
    class Pooled(Base):
        def between(self, x):
            return F.max_pool1d(F.relu(x)[:, None], 3, stride=1, padding=1)[:, 0]

    once, report = to_low_curvature(Pooled(), X, return_report=True)
    assert [row.reason for row in report.kinks] == ["max_pool='keep'"]
    twice = to_low_curvature(once, X, max_pool="average")
    assert smooth_children(twice) == ["relu_1"]
    assert type(twice.maxpool1d_1) is nn.AvgPool1d
    torch.testing.assert_close(twice.between(X), F.avg_pool1d(once.relu_1(X)[:, None], 3, 1, 1, False, False)[:, 0])


def test_one_class_for_all_equal_modules():
    converted = to_low_curvature(nn.Sequential(Function(), Function()), X)
    assert type(converted[0]) is type(converted[1])
    assert converted[0].relu_1 is not converted[1].relu_1


def test_the_bounds_see_the_new_modules():
    assert network_bound(Function().eval(), X[:1]).curvature == float("inf")
    assert network_bound(to_low_curvature(Function(), X).eval(), X[:1]).curvature < float("inf")


def test_the_result_compiles():
    converted = to_low_curvature(ControlFlow(), X).eval().requires_grad_(False)
    compiled = torch.compile(converted.between, backend="eager")
    torch.testing.assert_close(compiled(X), converted.between(X))


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.save_hyperparameters()
        self.net = Function()

    def forward(self, x):
        return F.log_softmax(self.net(F.relu(x)), dim=1)

    def training_step(self, batch, batch_idx):
        return self(batch).sum()


def test_lightning_module():
    converted = to_low_curvature(Classifier(), X)
    assert isinstance(converted, Classifier)
    assert type(converted.relu_1) is type(converted.net.relu_1) is CenteredSoftplus
    converted.training_step(X, 0).backward()
    assert converted.relu_1.log_beta.grad is not None
    assert torch.equal(pickle.loads(pickle.dumps(converted))(X), converted(X))


def helper(x):
    return F.relu(x)


def test_a_statement_is_replaced_where_the_example_has_nothing_to_cut_off():
    """The output alone would not show that the call was lost."""
    model = Statements()
    with torch.no_grad():
        model.first.bias.fill_(100.0)
    converted = to_low_curvature(model, X, beta=1e9)
    with torch.no_grad():
        model.first.bias.fill_(-1.0)
        converted.first.bias.fill_(-1.0)
    torch.testing.assert_close(converted(X), model(X), atol=1e-4, rtol=1e-4)


class Softsign(Base):
    def between(self, x):
        return F.softsign(x)


def test_softsign_has_no_kink_though_it_takes_the_absolute_value():
    for model in (Softsign(), nn.Sequential(nn.Linear(4, 4), nn.Softsign(), nn.Linear(4, 4))):
        assert not to_low_curvature(model, X, return_report=True)[1].kinks
        assert not record_run(model, X).kinks


def test_functional_poolings():
    class Pooled(Base):
        def between(self, x):
            x = torch.max_pool1d(x[:, None], 3, 1, 1)
            return F.adaptive_max_pool1d(x, 4)[:, 0]

    model = Pooled()
    _, report = to_low_curvature(model, X, max_pool="average", return_report=True)
    assert {"AvgPool1d", "AdaptiveAvgPool1d"} <= {row.after for row in report.changed}
    assert not report.kinks
    assert {row.reason for row in to_low_curvature(model, X, return_report=True)[1].kinks} == {"max_pool='keep'"}


class Helper(Base):
    def between(self, x):
        return helper(x)


class Dynamic(Base):
    slope = 0.1

    def between(self, x):
        return F.leaky_relu(x, self.slope)


def decorate(method):
    return method


class Decorated(Base):
    @decorate
    def between(self, x):
        return F.relu(x)


class Private(Base):
    __shift = 1

    def between(self, x):
        return F.relu(x - self.__shift)


class Patched(Base):
    def __init__(self):
        super().__init__()
        self.between = lambda x: F.relu(x)


class Other(Base):
    def between(self, x):
        return x.abs() + torch.maximum(x, 2 * x)


class OwnParameter(Base):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def between(self, x):
        return helper(x * self.scale)


class GivesUp(Base):
    """Its own class matters to it, so a rewritten one computes something else."""

    def between(self, x):
        return F.relu(x) if type(self) is GivesUp else x


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Helper, "functional call in `helper`, which is no method"),
        (OwnParameter, "functional call in `helper`, which is no method"),
        (Dynamic, "functional call without a counterpart"),
        (Decorated, "`between` is decorated"),
        (Private, "`between` uses private names"),
        (Patched, "functional call in `<lambda>`"),
        (Other, "functional call without a counterpart"),
        (GivesUp, "another output when it was rewritten"),
    ],
)
def test_calls_that_stay_are_reported(cls, reason):
    model = cls()
    with pytest.warns(UserWarning, match="with kinks"):
        converted, report = to_low_curvature(model, X, return_report=True)
    row = report.kinks[0]
    assert reason in row.reason
    assert f"{Path(__file__).name}:" in row.what
    assert type(converted.first).__name__ == "SpectralLinear"
    assert type(converted) is cls


def test_an_example_of_what_the_source_cannot_show():
    namespace = {"Base": Base, "F": F}
    exec("class NoSource(Base):\n    def between(self, x):\n        return F.relu(x)", namespace)
    with pytest.warns(UserWarning, match="the source of `between` is not available; use a module"):
        to_low_curvature(namespace["NoSource"](), X)


class Block(nn.Module):
    """As torchvision's: one ReLU for two places."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.relu = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(x + self.second(self.relu(self.first(x))))


def test_separate_activations():
    model = nn.Sequential(Block(), Block()).double()
    x = X.double()
    shared = to_low_curvature(model, x, beta=1e9)
    assert smooth_children(shared[0]) == ["relu"]
    assert type(shared[0]) is Block
    separate = to_low_curvature(model, x, beta=1e9, separate_activations=True)
    assert smooth_children(separate[0]) == smooth_children(separate[1]) == ["relu", "relu_1"]
    for converted in (shared, separate):
        torch.testing.assert_close(converted(x), model(x))


class Overwrites(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act, self.other = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.first(x)
        y = self.other(self.act(x) + 1)
        return x + y


def test_a_model_that_relies_on_overwriting_is_refused():
    with pytest.raises(ValueError, match=r"in-place activations after they have overwritten it \(act\)"):
        to_low_curvature(Overwrites(), X)
    converted = to_low_curvature(Overwrites(), X, skip="act")
    assert type(converted.other) is CenteredSoftplus


def test_random_outputs_are_no_reason_to_refuse():
    class Noisy(Block):
        def forward(self, x):
            return super().forward(x) + torch.rand_like(x)

    assert smooth_children(to_low_curvature(Noisy(), X)) == ["relu"]
