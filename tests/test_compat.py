"""What each private name behind `_compat` means; a release that changes one fails here, and is answered there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim.swa_utils import update_bn
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics import MeanMetric, Metric

from lightning_lcnn import _compat
from tests.lightning_helpers import (
    COMPILER_WARNINGS,
    FILTERS,
    PACKAGES,
    lightning_module,
    loader,
    plain_classifier,
    probe,
    trainer,
)

pytestmark = FILTERS
# Lightning itself still passes `skip_none` to jsonargparse
CLI_WARNINGS = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


def test_every_function_has_a_test_and_says_why_it_is_there() -> None:
    functions = [name for name, value in vars(_compat).items() if getattr(value, "__module__", "") == _compat.__name__]
    tests = [name for name in globals() if name.startswith("test_")]
    assert len(functions) > 20
    for name in functions:
        assert any(name in test for test in tests), name
        assert getattr(_compat, name).__doc__, name


def test_batch_norm_is_what_torch_takes_for_one() -> None:
    assert all(issubclass(cls, _compat.BatchNorm) for cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm))
    assert not issubclass(nn.InstanceNorm2d, _compat.BatchNorm)

    class Own(_compat.BatchNorm):
        def forward(self, input: Tensor) -> Tensor:
            return F.batch_norm(input, self.running_mean, self.running_var, training=self.training, momentum=0.5)

    layer = Own(1)
    update_bn([torch.ones(2, 1)], layer)
    assert layer.running_mean == 0.5
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(layer)) is nn.SyncBatchNorm


def test_dispatch_mode_sees_operations() -> None:
    seen = []

    class Mode(_compat.DispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.ones(1).relu()
    assert seen == ["ones", "relu"]


def test_in_function_transform() -> None:
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append((_compat.in_function_transform(), _compat.in_torch_func()))
        return x.sum()

    function(torch.ones(2))
    torch.func.grad(function)(torch.ones(2))
    torch.func.vmap(function)(torch.ones(2, 2))
    with forward_ad.dual_level():
        function(torch.ones(2))
    function(torch.ones(2))
    assert seen == [(False, False), (True, True), (True, True), (True, False), (False, False)]


def test_in_torch_func() -> None:
    assert not _compat.in_torch_func()
    assert torch.func.vmap(lambda x: x * _compat.in_torch_func())(torch.ones(2)).tolist() == [1, 1]


def test_is_dispatch_recorded() -> None:
    assert not _compat.is_dispatch_recorded()
    with FlopCounterMode(display=False):
        assert _compat.is_dispatch_recorded()
    assert not _compat.is_dispatch_recorded()


def test_version_of() -> None:
    x = torch.ones(2)
    before = _compat.version_of(x)
    x[:1].add_(1)  # a view shares the count
    assert _compat.version_of(x) == _compat.version_of(x.detach()) == before + 1
    x.add(1)
    assert _compat.version_of(x) == before + 1


class Double(torch.autograd.Function):
    """Tells in its backward which of its arguments' nodes are computed."""

    executed: list[bool]

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return 2 * x + y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        Double.executed = [_compat.is_executed(node) for node, _ in ctx.next_functions]
        return 2 * grad, grad


def test_is_executed() -> None:
    x, y = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    a, b = x.exp(), y.exp()
    result = Double.apply(a, b)
    torch.autograd.grad(result, x, retain_graph=True)
    assert Double.executed == [True, False]
    result.backward(retain_graph=True)
    assert Double.executed == [True, True]
    with pytest.raises(RuntimeError):
        torch.autograd.grad(Double.apply(x, y), x)


def test_function_of() -> None:
    x = torch.ones(1, requires_grad=True)
    assert _compat.function_of(Double.apply(x, x).grad_fn) is Double
    assert _compat.function_of(x.exp().grad_fn) is None


def test_softplus_over() -> None:
    x = torch.linspace(-3, 3, 7)
    expected = F.softplus(x, 2.0)
    assert _compat.softplus_over(x, 2.0) is x
    assert torch.equal(x, expected)


@COMPILER_WARNINGS
def test_has_inductor_option() -> None:
    assert _compat.has_inductor_option("cpp", "threads")
    assert not _compat.has_inductor_option("cpp", "no_such_option")
    with pytest.raises(RuntimeError, match="no_such_option"):
        torch.compile(torch.exp, options={"cpp.no_such_option": 1})


@COMPILER_WARNINGS
@pytest.mark.parametrize(("prefers", "graphs"), [(True, 1), (False, 2)])
def test_prefer_dynamic_size(prefers: bool, graphs: int) -> None:
    torch.compiler.reset()
    seen = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    function = torch.compile(lambda x: x + 1, backend=backend)
    for size in (4, 6):
        x = torch.ones(size)
        if prefers:
            _compat.prefer_dynamic_size(x, 0)
        function(x)
    assert len(seen) == graphs


@COMPILER_WARNINGS
def test_is_compiled_and_uncompiled() -> None:
    net = nn.Linear(2, 2)
    compiled = torch.compile(net, backend="eager")
    assert _compat.is_compiled(compiled)
    assert _compat.uncompiled(compiled) is net
    assert not _compat.is_compiled(net)
    assert _compat.uncompiled(net) is net
    assert not _compat.is_compiled(torch.exp)


def test_is_batch_norm() -> None:
    norms = [nn.BatchNorm1d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2), nn.LazyBatchNorm2d()]
    others = [nn.InstanceNorm2d(2), nn.GroupNorm(1, 2), nn.LayerNorm(2), nn.ReLU()]
    assert all(map(_compat.is_batch_norm, norms))
    assert not any(map(_compat.is_batch_norm, others))


def test_hook_tables() -> None:
    layer, seen = nn.Linear(2, 2), []
    layer.register_forward_pre_hook(lambda *_: seen.append("pre"))
    layer.register_forward_hook(lambda *_, **__: seen.append("forward"), with_kwargs=True, always_call=True)
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    layer.register_full_backward_pre_hook(lambda *_: seen.append("backward pre"))
    forward = _compat.hook_tables(layer, forward_only=True)
    assert sum(map(len, forward.values())) == 2
    tables = _compat.hook_tables(layer)
    assert forward.items() <= tables.items()
    for table in tables.values():
        table.clear()
    layer(torch.ones(1, 2)).sum().backward()
    assert seen == []


def test_is_hook_attribute() -> None:
    layer = nn.Linear(2, 2)
    ours = {name for name in vars(layer) if _compat.is_hook_attribute(name)}
    assert ours >= set(_compat.hook_tables(layer))
    rest = {"training", "_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"}
    assert set(vars(layer)) - ours == rest | {"in_features", "out_features"}


def test_has_hooks_between() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.register_forward_hook(lambda *_: None)
    assert not _compat.has_hooks_between(first, second)
    assert _compat.has_hooks_between(second, first)
    first.register_forward_pre_hook(lambda *_: None)
    assert not _compat.has_hooks_between(first, nn.ReLU())
    assert _compat.has_hooks_between(nn.ReLU(), first)


def test_is_of_fully_shard(free_port: int) -> None:
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layer = nn.Linear(2, 2)
    before = set(vars(layer))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port}", rank=0, world_size=1)
    try:
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    finally:
        dist.destroy_process_group()
    added = set(vars(layer)) - before
    states = [name for name in added if _compat.is_of_fully_shard(name)]
    assert states
    assert all(type(vars(layer)[name]) is bool for name in added.difference(states))  # flags, which harm no copy
    assert not any(map(_compat.is_of_fully_shard, before))


def test_ignored_by_ddp() -> None:
    layer = nn.Linear(2, 2)
    assert _compat.ignored_by_ddp(layer) == set()
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(layer, ["bias"])
    assert _compat.ignored_by_ddp(layer) == {"bias"}


def test_ignore_in_ddp(free_port: int) -> None:
    from torch import distributed as dist

    layer = nn.BatchNorm1d(2)
    _compat.ignore_in_ddp(layer, {"weight", "running_mean"})
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(layer)
        assert len(list(wrapped.modules_buffers)) == 2
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("package", PACKAGES)
def test_logs_now_and_logger_step(package: str) -> None:
    now, steps = [], []

    def look(runner: Any, module: Any) -> None:
        now.append(_compat.logs_now(runner))
        steps.append(_compat.logger_step(runner))

    module = plain_classifier(package)()
    runner = trainer(package, callbacks=[probe("on_train_batch_end", look)], log_every_n_steps=2)
    runner.fit(module, loader(16))
    assert now == [False, True, False, True]
    assert steps == [0, 1, 2, 3]


def test_averaged_network() -> None:
    from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

    found: list[Any] = []
    averaging = WeightAveraging()
    assert _compat.averaged_network(averaging) is None
    look = probe("on_train_batch_end", lambda runner, _: found.append(_compat.averaged_network(averaging)))
    module = plain_classifier()()
    trainer(callbacks=[averaging, look]).fit(module, loader(4))
    assert found[0].module.net[6].weight.shape == module.net[6].weight.shape
    stochastic = StochasticWeightAveraging(1e-3, swa_epoch_start=1)
    trainer(callbacks=[stochastic], max_epochs=2).fit(module, loader(4))
    average = _compat.averaged_network(stochastic)
    assert isinstance(average, type(module))
    assert _compat.averaged_network(look) is None


@pytest.mark.parametrize("package", PACKAGES)
def test_layer_sync(package: str) -> None:
    without = trainer(package, strategy="ddp").strategy
    assert _compat.layer_sync(without) is None
    assert _compat.layer_sync(trainer(package).strategy) is None
    plugin = _compat.layer_sync(trainer(package, strategy="ddp", sync_batchnorm=True).strategy)
    assert type(plugin).__name__ == "TorchSyncBatchNorm"
    assert type(plugin.apply(nn.BatchNorm1d(2))) is nn.SyncBatchNorm


def test_set_layer_sync() -> None:
    asked = []

    class Plugin:
        def apply(self, model: Any) -> Any:
            asked.append("apply")
            return model

        def revert(self, model: Any) -> Any:
            asked.append("revert")
            return model

    runner = trainer(strategy="ddp", sync_batchnorm=True, max_steps=1)
    _compat.set_layer_sync(runner.strategy, Plugin())
    try:
        runner.fit(plain_classifier()(), loader(4))
    finally:
        torch.distributed.destroy_process_group()
    assert asked == ["apply", "revert"]


@CLI_WARNINGS
def test_class_path_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.setattr("sys.argv", ["python"])  # Lightning warns of arguments of the process
    arguments = ["--model", f"{__name__}.Saving"]
    options = {"save_config_callback": None, "seed_everything_default": False, "subclass_mode_model": True}
    cli = LightningCLI(Saving, run=False, args=arguments, **options)
    assert _compat.class_path_of(cli.model.hparams) == f"{__name__}.Saving"
    assert _compat.class_path_of({"size": 1}) == ""


class Saving(lightning_module()):  # type: ignore[misc]
    """Saves its arguments."""

    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_bookkeeping_of() -> None:
    class Fails(Metric):
        full_state_update = False

        def __init__(self) -> None:
            super().__init__()
            self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
            self.fails = False

        def update(self, x: Tensor) -> None:
            if self.fails:
                raise RuntimeError("stop")
            self.total = self.total + x

        def compute(self) -> Tensor:
            return self.total

    metric = Fails()
    metric(torch.ones(()))
    before = {name: value for name, value in vars(metric).items() if not name.startswith("_forward")}
    kept = metric.metric_state | _compat.bookkeeping_of(metric)
    metric.fails = True
    with pytest.raises(RuntimeError, match="stop"):
        metric(torch.ones(()))
    for name, value in kept.items():
        setattr(metric, name, value)
    metric.fails = False
    changed = {name for name, value in before.items() if vars(metric)[name] is not value}
    assert changed <= {"_computed", "fails"}  # the result, which is computed anew
    assert metric(torch.ones(())) == 1
    assert metric.compute() == 2


def test_default_states() -> None:
    metric = MeanMetric()
    assert _compat.default_states(metric).keys() == metric.metric_state.keys()
    _compat.default_states(metric)["mean_value"] = torch.tensor(3.0)
    metric.reset()
    assert metric.mean_value == 3


def test_set_state_dtype() -> None:
    metric = MeanMetric()
    _compat.set_state_dtype(metric, torch.float64)
    assert metric.dtype == torch.float64
    assert metric.mean_value.dtype == torch.float32


def test_is_within_set_dtype() -> None:
    seen = []

    class Watched(MeanMetric):
        def _apply(self, fn: Any, exclude_state: Any = "") -> Any:
            seen.append(_compat.is_within_set_dtype(self))
            return super()._apply(fn, exclude_state=exclude_state)

    Watched().set_dtype(torch.float64)
    Watched().double()
    nn.ModuleList([Watched()]).double()
    assert seen[0]
    assert not any(seen[1:])


def test_forget_result() -> None:
    metric = MeanMetric()
    metric.update(1.0)
    metric.compute()
    metric.mean_value = torch.tensor(5.0)
    assert metric.compute() == 1
    _compat.forget_result(metric)
    assert metric.compute() == 5


def test_keep_out_of_state_dict() -> None:
    metric = MeanMetric()
    metric.persistent(True)
    saved = copy.copy(metric.state_dict())
    _compat.keep_out_of_state_dict(metric, "weight")
    assert saved.keys() - metric.state_dict().keys() == {"weight"}
    metric.load_state_dict(metric.state_dict())


@CLI_WARNINGS
def test_overridden_hooks_of_lightning_cli_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.setattr("sys.argv", ["python"])  # Lightning warns of arguments of the process
    called = []

    class CLI(LightningCLI):
        def _parse_ckpt_path(self) -> None:
            called.append("_parse_ckpt_path")

        def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
            called.append("_prepare_subcommand_kwargs")
            return super()._prepare_subcommand_kwargs(subcommand)

        def _run_subcommand(self, subcommand: str) -> None:
            called.append("_run_subcommand")
            super()._run_subcommand(subcommand)

    from lightning.pytorch.demos.boring_classes import BoringModel

    quiet = ["logger=false", "enable_checkpointing=false", "enable_progress_bar=false", "accelerator=cpu", "devices=1"]
    arguments = ["validate", *(f"--trainer.{option}" for option in quiet)]
    CLI(BoringModel, args=arguments, save_config_callback=None, seed_everything_default=False)
    assert called == ["_parse_ckpt_path", "_run_subcommand", "_prepare_subcommand_kwargs"]


def test_schema_of_an_operation() -> None:
    schema = _compat.schema_of(torch.ops.aten.add_.Tensor)
    assert schema.is_mutable
    assert [argument.name for argument in schema.arguments] == ["self", "other", "alpha"]


def test_fake_mode_computes_sizes_alone() -> None:
    with _compat.fake_mode() as mode:
        fake = mode.from_tensor(torch.ones(2, 3))
        assert (fake @ fake.T).shape == (2, 2)
        with pytest.raises(Exception, match="_local_scalar_dense") as caught:
            fake.sum().item()
    assert _compat.depends_on_values(caught.value)
    assert not _compat.depends_on_values(ValueError())


def test_depends_on_values() -> None:
    with _compat.fake_mode() as mode, pytest.raises(Exception, match="nonzero") as caught:
        mode.from_tensor(torch.ones(2)).nonzero()
    assert _compat.depends_on_values(caught.value)


def test_has_global_hooks() -> None:
    assert not _compat.has_global_hooks()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        assert _compat.has_global_hooks()
    finally:
        handle.remove()
    assert not _compat.has_global_hooks()


def test_storage_address() -> None:
    x = torch.ones(4)
    assert _compat.storage_address(x) == _compat.storage_address(x[2:].view(2))
    assert _compat.storage_address(x) != _compat.storage_address(x.clone())


def test_copy_all() -> None:
    targets = [torch.zeros(2), torch.zeros(3)]
    _compat.copy_all(targets, [torch.ones(2), torch.full((3,), 2.0)])
    assert [t.tolist() for t in targets] == [[1.0, 1.0], [2.0, 2.0, 2.0]]
