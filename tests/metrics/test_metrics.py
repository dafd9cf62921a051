"""Metrics: values are those of the functions, whatever way they are accumulated, copied, cast or collected."""

import copy
import pickle

import matplotlib
import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection

from lightning_lcnn.functional import (
    gradient_stability,
    input_gradient_norm,
    input_hessian_norm,
    logit_margin,
    normalized_curvature,
)
from lightning_lcnn.metrics import (
    AdversarialAccuracy,
    GradientStability,
    InputGradientNorm,
    InputHessianNorm,
    NormalizedCurvature,
)

matplotlib.use("Agg")

PER_EXAMPLE = {
    "gradient norm": (InputGradientNorm, lambda *batch: input_gradient_norm(*batch).values),
    "hessian norm": (InputHessianNorm, lambda *batch: input_hessian_norm(*batch).values),
    "curvature": (NormalizedCurvature, lambda *batch: normalized_curvature(*batch).values),
    "stability": (lambda **k: GradientStability(0.2, **k), lambda *batch: gradient_stability(*batch, 0.2).values),
    "worst stability": (
        lambda **k: GradientStability(0.2, statistic="worst", **k),
        lambda *batch: gradient_stability(*batch, 0.2, num_worst_steps=5).worst,
    ),
}
ALL = {name: factory for name, (factory, _) in PER_EXAMPLE.items()} | {
    "adversarial": lambda **k: AdversarialAccuracy([0.3, 0.1], **k),
}


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Softplus(), nn.Linear(12, 4)).eval()


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(1)
    sizes = (5, 5, 3)
    return [(torch.rand(n, 6, generator=generator), torch.randint(0, 4, (n,), generator=generator)) for n in sizes]


def union(batches):
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def filled(metric, model, batches):
    for x, y in batches:
        metric.update(model, x, y)
    return metric


@pytest.mark.parametrize("name", PER_EXAMPLE)
def test_reductions_of_the_functions_values(name, model, batches):
    factory, function = PER_EXAMPLE[name]
    values = function(model, *union(batches))
    torch.testing.assert_close(filled(factory(), model, batches).compute(), values.mean())
    torch.testing.assert_close(filled(factory(reduction="median"), model, batches).compute(), values.quantile(0.5))
    torch.testing.assert_close(filled(factory(reduction=0.95), model, batches).compute(), values.quantile(0.95))
    torch.testing.assert_close(filled(factory(reduction="none"), model, batches).compute(), values)
    several = filled(factory(reduction=["mean", 0.9, "none"]), model, batches).compute()
    assert list(several) == ["mean", "q0.9", "values"]
    torch.testing.assert_close(several["q0.9"], values.quantile(0.9))


@pytest.mark.parametrize("name", ["hessian norm", "curvature"])
def test_share_of_converged_examples(name, model, batches):
    exact = filled(ALL[name](reduction="converged"), model, batches).compute()
    assert exact == 1  # six unknowns, six products
    assert filled(ALL[name](reduction="converged", num_hvps=1), model, batches).compute() < 1


@pytest.mark.parametrize("name", ALL)
def test_forward_reset_clone_pickle_and_deepcopy(name, model, batches):
    metric = filled(ALL[name](), model, batches)
    expected = metric.compute()
    by_forward = ALL[name]()
    first = by_forward(model, *batches[0])
    torch.testing.assert_close(first, filled(ALL[name](), model, batches[:1]).compute())
    for batch in batches[1:]:
        by_forward(model, *batch)
    torch.testing.assert_close(by_forward.compute(), expected)
    for twin in (metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        torch.testing.assert_close(twin.compute(), expected)
        twin.update(model, *batches[0])
        assert twin.num_examples == 18
    assert metric.num_examples == 13
    metric.reset()
    assert metric.num_examples == 0
    torch.testing.assert_close(filled(metric, model, batches).compute(), expected)


@pytest.mark.parametrize("name", ALL)
def test_state_dict_round_trip(name, model, batches):
    metric = ALL[name]()
    assert metric.state_dict() == {}
    metric.persistent(True)
    filled(metric, model, batches)
    other = ALL[name]()
    other.persistent(True)
    other.load_state_dict(metric.state_dict())  # the identity is not saved
    other._update_count = 1
    torch.testing.assert_close(other.compute(), metric.compute())


CASTS = {
    "bfloat16": lambda metric: nn.ModuleList([metric]).to(torch.bfloat16),
    "half": lambda metric: nn.ModuleList([metric]).half(),
    "set_dtype": lambda metric: metric.set_dtype(torch.half),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("cast", CASTS)
def test_casts_leave_counts_and_sums_precise(name, cast, model, batches):
    metric = ALL[name]()
    CASTS[cast](metric)
    for state in metric._defaults:
        assert getattr(metric, state) == [] or getattr(metric, state).dtype in (torch.int64, torch.float32)
    expected = filled(ALL[name](), model, batches).compute()
    torch.testing.assert_close(filled(metric, model, batches).compute(), expected)
    metric.reset()
    assert metric.num_examples.dtype == torch.int64
    metric.to(torch.bfloat16)
    filled(metric, model, batches)
    torch.testing.assert_close(metric.compute(), expected)


def test_double_sums_on_request(model, batches):
    metric = InputGradientNorm(reduction=["mean", "none"]).set_dtype(torch.float64)
    result = filled(metric, model, batches).compute()
    assert result["mean"].dtype == result["values"].dtype == torch.float64
    assert metric.num_examples.dtype == torch.int64


def test_a_bfloat16_module_measures(model, batches):
    low = copy.deepcopy(model).bfloat16()
    for name in ALL:
        metric = ALL[name]()
        for x, y in batches:
            metric.update(low, x.bfloat16(), y)
        value = metric.compute()
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, filled(ALL[name](), model, batches).compute(), rtol=0.3, atol=0.3)


def test_collections_never_merge_differently_configured_metrics(model, batches):
    collection = MetricCollection(
        {
            "a": InputGradientNorm(),
            "b": InputGradientNorm(output="loss"),
            "c": InputGradientNorm(lambda logits, target: logit_margin(logits, target)),  # equal states
            "d": InputGradientNorm(max_examples=13),  # equal states until the limit
            "small": AdversarialAccuracy(0.01),
            "smaller": AdversarialAccuracy(0.001),  # both perfect: equal states
            "large": AdversarialAccuracy(0.5),
        }
    )
    for x, y in batches + batches:
        collection.update(model, x, y)
    assert len(collection.compute_groups) == 7
    result = collection.compute()
    assert result["a"] == result["c"]
    assert collection["d"].num_examples == 13
    assert collection["a"].num_examples == 26
    assert result["small"] >= result["large"]
    alone = filled(AdversarialAccuracy(0.5), model, batches).compute()
    torch.testing.assert_close(result["large"], alone)


@pytest.mark.parametrize("name", ALL)
def test_only_copies_have_the_same_identity(name):
    metric, equal = ALL[name](), ALL[name]()
    assert metric.metric_state.keys() == equal.metric_state.keys()  # also over processes, each of which builds its own
    assert not torch.equal(metric.identity, equal.identity)
    for twin in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.to(torch.bfloat16)):
        assert torch.equal(twin.identity, metric.identity)


def test_dictionaries_in_collections_get_distinct_names(model, batches):
    collection = MetricCollection(
        {
            "margin": InputGradientNorm(reduction=["mean", "median"]),
            "loss": InputGradientNorm("loss", reduction=["mean"]),
        }
    )
    filled(collection, model, batches)
    assert set(collection.compute()) == {"margin_mean", "margin_median", "loss_mean"}


@pytest.mark.parametrize("name", ALL)
def test_max_examples_limits_update_and_forward(name, model, batches):
    expected = filled(ALL[name](), model, [(batches[0][0], batches[0][1]), (batches[1][0][:2], batches[1][1][:2])])
    limited = filled(ALL[name](max_examples=7), model, batches)
    assert limited.num_examples == 7
    torch.testing.assert_close(limited.compute(), expected.compute())
    by_forward = ALL[name](max_examples=7)
    for batch in batches:
        by_forward(model, *batch)
    assert by_forward.num_examples == 7
    torch.testing.assert_close(by_forward.compute(), expected.compute())
    by_forward.reset()
    by_forward.update(model, *batches[0])
    assert by_forward.num_examples == 5


class Breaks(nn.Module):
    def forward(self, x):
        raise RuntimeError("out of cheese")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("call", ["update", "forward"])
def test_an_exception_leaves_the_metric_as_it_was(name, call, model, batches):
    metric = filled(ALL[name](), model, batches)
    expected = metric.compute()
    with pytest.raises(RuntimeError, match="out of cheese"):
        getattr(metric, call)(Breaks(), *batches[0])
    torch.testing.assert_close(metric.compute(), expected)
    metric.update(model, *batches[0])
    assert metric.num_examples == 18


def test_the_model_is_not_stored(model, batches):
    import gc
    import weakref

    own = copy.deepcopy(model)
    alive = weakref.ref(own)
    metrics = [filled(factory(), own, batches) for factory in ALL.values()]
    del own
    gc.collect()
    assert alive() is None
    assert len(metrics) == len(ALL)


def test_nothing_measured_is_nan():
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert InputGradientNorm().compute().isnan()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert InputGradientNorm(reduction=0.5).compute().isnan()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert AdversarialAccuracy(0.1).compute().isnan()
    metric = InputGradientNorm()
    metric.update(nn.Identity(), torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))  # an empty last shard
    assert metric.compute().isnan()


@pytest.mark.parametrize("reduction", ["mean", "none", ["mean", "median"]])
def test_plots(reduction, model, batches):
    import matplotlib.pyplot as plt

    metric = filled(NormalizedCurvature(reduction=reduction), model, batches)
    figure, axes = metric.plot()
    assert figure is not None
    assert axes.lines
    _, given = plt.subplots()
    _, axes = metric.plot(metric.compute(), ax=given)
    assert axes is given
    if reduction == "mean":
        metric.plot([torch.tensor(1.0), torch.tensor(2.0)])
    plt.close("all")


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: InputGradientNorm("logits"), ValueError, "`output` must be one of"),
        (lambda: InputGradientNorm(reduction="max"), ValueError, "`reduction` must be one of"),
        (lambda: InputGradientNorm(reduction=1.5), ValueError, r"quantile in \(0, 1\), got 1.5"),
        (lambda: InputGradientNorm(reduction="converged"), ValueError, "InputGradientNorm has no iteration"),
        (lambda: InputGradientNorm(max_examples=0), ValueError, "`max_examples` must be at least 1"),
        (lambda: InputGradientNorm(batch_size=0), ValueError, "`batch_size` must be at least 1"),
        (lambda: InputHessianNorm(method="svd"), ValueError, "`method` must be one of"),
        (lambda: InputHessianNorm(hvp="svd"), ValueError, "`hvp` must be one of"),
        (lambda: NormalizedCurvature(num_hvps=0), ValueError, "`num_hvps` must be at least 1"),
        (lambda: GradientStability(0.0), ValueError, "`radius` must be a finite number > 0"),
        (lambda: GradientStability(0.1, statistic="max"), ValueError, "`statistic` must be one of"),
        (lambda: InputGradientNorm(colour=1), ValueError, "Unexpected keyword arguments: `colour`"),
    ],
)
def test_bad_configuration(build, error, message):
    with pytest.raises(error, match=message):
        build()
