"""Adversarial training: the examples against torchattacks, training against a loop by hand, and all it must leave."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lcnn.callbacks import AdversarialTraining, PenaltyCallback, PowerIteration
from lightning_lcnn.functional import projected_gradient_attack
from lightning_lcnn.mixin import LCNNMixin
from lightning_lcnn.penalties import Penalty
from tests.lightning_helpers import FILTERS, PACKAGES, lightning_module, plain_classifier, trainer

pytestmark = FILTERS


def network() -> nn.Sequential:
    """Batch norm, whose running statistics an attack could change, and kinks."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)
    )


def pixels(n: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, 1, 6, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def batches(n: int = 16, batch_size: int = 4, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*pixels(n)), batch_size=batch_size, **kwargs)


def classifier(package: str = "lightning.pytorch", net: nn.Module | None = None) -> Any:
    """Keeps every batch that its step gets, and the mode it gets it in."""

    class Classifier(plain_classifier(package)):
        def __init__(self) -> None:
            super().__init__()
            self.net = network() if net is None else net
            self.seen: list[Any] = []
            self.modes: set[bool] = set()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen.append(batch)
            self.modes |= {module.training for module in self.modules()}
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Classifier()


def sizes(adversarial: Tensor, x: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm((adversarial - x).flatten(1), 2 if norm == "l2" else torch.inf, dim=1)


# --- the examples


@pytest.mark.parametrize(("norm", "name", "radius"), [("l2", "PGDL2", 0.5), ("linf", "PGD", 0.1)])
def test_the_last_iterate_is_that_of_torchattacks(norm: str, name: str, radius: float) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    x, y = pixels()
    net = network().eval()
    rival = getattr(torchattacks, name)(net, eps=radius, alpha=radius / 3, steps=5, random_start=False)(x, y)
    ours = projected_gradient_attack(
        net, x, y, radius, norm, num_steps=5, step_size=radius / 3, objective="loss", keep="last"
    )
    assert torch.allclose(ours, rival, atol=1e-5)  # rounding of the two forms of the loss
    assert sizes(ours, x, norm).min() > radius / 2


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_random_starts_are_uniform_in_the_ball(norm: str) -> None:
    x = torch.full((4000, 3), 0.5)
    constant = nn.Linear(3, 2)
    nn.init.zeros_(constant.weight)  # no gradient: the start is where it ends
    y = torch.zeros(len(x), dtype=torch.int64)
    ends = projected_gradient_attack(constant, x, y, 0.1, norm, random_start=True, keep="last")
    inner = sizes(ends, x, norm) / 0.1
    # (‖δ‖/r)³ is uniform: its mean has a standard error of 0.0046, and each sign comes in half of the cases
    assert abs((inner**3).mean() - 0.5) < 0.02
    assert inner.max() <= 1 + 1e-5
    assert ((ends > x).float().mean(0) - 0.5).abs().max() < 0.03


def test_the_loss_of_sure_examples_still_has_a_direction() -> None:
    x = torch.tensor([[0.5, 0.5]])
    sure = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        sure.weight.copy_(torch.tensor([[80.0, 0.0], [0.0, -80.0]]))  # loss exp(-80)
    found = projected_gradient_attack(sure, x, torch.tensor([0]), 0.1, objective="loss", keep="last")
    assert torch.allclose(found, torch.tensor([[0.5 - 0.1 / 2**0.5, 0.5 - 0.1 / 2**0.5]]), atol=1e-6)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("normalization", [None, ([0.4], [0.2])])
def test_training_sees_examples_of_higher_loss_within_ball_and_bounds(norm: str, normalization: Any) -> None:
    mean, std = (0.0, 1.0) if normalization is None else (0.4, 0.2)
    x, y = pixels()
    module = classifier()
    before = copy.deepcopy(module.net).eval()
    data = DataLoader(TensorDataset((x - mean) / std, y), batch_size=16)
    trainer(callbacks=[AdversarialTraining(0.1, norm=norm, normalization=normalization)]).fit(module, data)
    adversarial = module.seen[0][0] * std + mean
    assert adversarial.min() > -1e-6
    assert adversarial.max() < 1 + 1e-6
    distances = sizes(adversarial, x, norm)
    assert distances.max() < 0.1 * (1 + 1e-5)
    assert distances.min() > 0.05
    losses = [F.cross_entropy(before((points - mean) / std), y, reduction="none") for points in (x, adversarial)]
    assert bool((losses[1] > losses[0]).all())
    assert not module.seen[0][0].requires_grad
    assert torch.equal(x, pixels()[0])


def test_torchattacks_trains_as_well() -> None:
    torchattacks = pytest.importorskip("torchattacks")
    module = classifier()
    callback = AdversarialTraining(0.1, torchattacks.PGDL2, attack_kwargs={"alpha": 0.05, "steps": 3})
    trainer(callbacks=[callback]).fit(module, batches())
    assert sizes(torch.cat([batch[0] for batch in module.seen]), pixels()[0], "l2").max() < 0.1 * (1 + 1e-5)
    assert module.modes == {True}


# --- what it changes of a training, and what not


def fast_gradient(model: nn.Module, x: Tensor, target: Tensor, radius: float) -> Tensor:
    """One step in evaluation mode, careless about gradients."""
    x = x.clone().requires_grad_()
    F.cross_entropy(model(x), target).backward()
    assert x.grad is not None
    return (x + radius * x.grad.sign()).clamp(0, 1).detach()


def trained_by_hand(accumulate: int, autocast: bool) -> nn.Module:
    """The loop that the callback stands for, with a fresh copy of the network under attack."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step, (x, y) in enumerate(batches()):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            adversarial = fast_gradient(copy.deepcopy(net).eval(), x, y, 0.1)
            loss = F.cross_entropy(net(adversarial), y) / accumulate
        loss.backward()
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return net


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(("accumulate", "precision"), [(1, "32-true"), (2, "32-true"), (2, "bf16-mixed")])
def test_training_equals_a_loop_by_hand(package: str, accumulate: int, precision: str) -> None:
    """Weights and running statistics: nothing but the batch differs from standard training."""
    module = classifier(package)
    callback = AdversarialTraining(0.1, fast_gradient, norm="linf")
    trainer(package, callbacks=[callback], accumulate_grad_batches=accumulate, precision=precision).fit(
        module, batches()
    )
    expected = trained_by_hand(accumulate, precision == "bf16-mixed").state_dict()
    assert not torch.equal(expected["0.weight"], network().state_dict()["0.weight"])
    # twice the same operations; in bfloat16 too, for the casts are the same
    for name, value in module.net.state_dict().items():
        assert torch.allclose(value, expected[name], rtol=1e-6, atol=1e-7), name
    assert module.modes == {True}
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_validation_sees_clean_images() -> None:
    module = classifier()
    validated: list[Tensor] = []
    module.validation_step = lambda batch, batch_idx: validated.append(module.training_step(batch, batch_idx))
    trainer(callbacks=[AdversarialTraining(0.1)], num_sanity_val_steps=0).fit(module, batches(), batches())
    assert len(validated) == 4
    for (adversarial, _), (clean, _), (x, _) in zip(module.seen[:4], module.seen[4:], batches(), strict=True):
        assert torch.equal(clean, x)
        assert not torch.equal(adversarial, x)


def test_part_of_the_batch_is_attacked_and_the_rest_shared() -> None:
    module = classifier()
    trainer(callbacks=[AdversarialTraining(0.1, fraction=0.3)]).fit(module, batches())
    for (adversarial, _), (x, _) in zip(module.seen, batches(), strict=True):
        changed = (adversarial != x).flatten(1).any(1)
        assert changed.tolist() == [True, True, False, False]


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_channels_last_stays(fraction: float) -> None:
    module = classifier(net=nn.Sequential(nn.Conv2d(3, 1, 1), network()))

    def transfer(batch: Any, dataloader_idx: int) -> Any:
        return batch[0].repeat(1, 3, 1, 1).contiguous(memory_format=torch.channels_last), batch[1]

    module.on_after_batch_transfer = transfer
    trainer(callbacks=[AdversarialTraining(0.1, fraction=fraction)]).fit(module, batches())
    assert all(batch[0].is_contiguous(memory_format=torch.channels_last) for batch in module.seen)


@pytest.mark.parametrize(
    ("schedule", "expected"), [(4, [0.05, 0.1, 0.15, 0.2]), (lambda step: float(step == 2), [0.0, 0.0, 0.2, 0.0])]
)
def test_the_radius_follows_the_schedule(schedule: Any, expected: list[float]) -> None:
    module = classifier()
    logged: list[float] = []
    module.log = lambda name, value, **_: logged.append(value) if name == "adversarial/radius" else None
    trainer(callbacks=[AdversarialTraining(0.2, norm="linf", schedule=schedule)]).fit(module, batches())
    found = [float(sizes(seen[0], x, "linf").max()) for seen, (x, _) in zip(module.seen, batches(), strict=True)]
    assert found == pytest.approx(expected, abs=1e-6)
    assert logged == pytest.approx([radius for radius in expected if radius])


class Named(NamedTuple):
    """A batch with names."""

    image: Tensor
    label: Tensor


@pytest.mark.parametrize(
    "form",
    [tuple, list, lambda items: Named(*items), lambda items: {"label": items[1], "image": items[0], "index": 3}],
    ids=["tuple", "list", "namedtuple", "dict"],
)
def test_batches_keep_their_type(form: Any) -> None:
    def collate(items: list[Any]) -> Any:
        return form([torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])])

    class Module(lightning_module()):
        """No ``forward``."""

        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.criterion = nn.CrossEntropyLoss()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert type(batch) is type(form([1, 2]))
            x, y = (batch["image"], batch["label"]) if isinstance(batch, dict) else batch
            self.change = float(sizes(x, pixels()[0], "l2").max())
            return self.criterion(self.net(x), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    trainer(callbacks=[AdversarialTraining(0.1)]).fit(module, batches(batch_size=16, collate_fn=collate))
    assert module.change == pytest.approx(0.1, rel=1e-4)


# --- random numbers


class Draws(nn.Module):
    """Keeps what the global generator gives in training, as dropout would draw."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.drawn.append(float(torch.rand(())))
        return x


def test_the_global_generator_is_left_alone() -> None:
    drawn = []
    for callbacks in ([], [AdversarialTraining(0.1)]):
        torch.manual_seed(3)
        module = classifier(net=nn.Sequential(Draws(), network()))
        torch.manual_seed(4)
        trainer(callbacks=callbacks).fit(module, batches())
        drawn.append(module.net[0].drawn)
    assert drawn[0] == drawn[1]


def test_runs_repeat_and_a_resumed_one_goes_on(tmp_path: Any) -> None:
    def fit(epochs: int, seed: int | None = None, ckpt_path: Any = None) -> Any:
        module = classifier()
        torch.manual_seed(5)
        runner = trainer(callbacks=[AdversarialTraining(0.1, seed=seed)], max_epochs=epochs)
        runner.fit(module, batches(), ckpt_path=ckpt_path)
        return runner, module

    first, second = fit(2)[1], fit(2)[1]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first.seen, second.seen, strict=True))
    assert not torch.equal(fit(1, seed=6)[1].seen[0][0], first.seen[0][0])
    half = fit(1)[0]
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(2, ckpt_path=tmp_path / "half.ckpt")[1]
    assert len(resumed.seen) == 4
    assert all(torch.equal(a[0], b[0]) for a, b in zip(resumed.seen, first.seen[4:], strict=True))


# --- with penalties, and afterwards


class SumOfInputs(Penalty):
    """Keeps the batches it gets."""

    name = "sum_of_inputs"
    needs_batch = True

    def __init__(self) -> None:
        super().__init__(1.0)
        self.seen: list[Tensor] = []

    def terms(self, model: nn.Module, x: Tensor, target: Tensor, **_: Any) -> dict[str, Tensor]:
        """Count."""
        self.seen.append(x)
        return {"sum_of_inputs": x.sum()}


@pytest.mark.parametrize("first", [True, False])
def test_the_penalty_callback_sees_adversarial_batches_in_any_order(first: bool) -> None:
    penalty, module = SumOfInputs(), classifier()
    callbacks = [AdversarialTraining(0.1), PenaltyCallback(penalty)]
    trainer(callbacks=callbacks if first else callbacks[::-1]).fit(module, batches())
    assert len(penalty.seen) == len(module.seen) == 4
    assert all(x is seen[0] for x, seen in zip(penalty.seen, module.seen, strict=True))
    assert "training_step" not in module.__dict__


def test_the_mixin_sees_adversarial_batches() -> None:
    penalty, plain = SumOfInputs(), classifier()

    class Low(LCNNMixin, type(plain)):  # type: ignore[misc]
        def configure_penalties(self) -> list[Penalty]:
            return [penalty]

    module = Low()
    trainer(callbacks=[AdversarialTraining(0.1), PowerIteration()]).fit(module, batches())
    assert len(module.seen) == 4
    assert all(x is seen[0] for x, seen in zip(penalty.seen, module.seen, strict=True))


@pytest.mark.parametrize("first", [True, False])
def test_everything_is_restored_after_an_error(first: bool) -> None:
    module = classifier()
    broken = classifier()
    broken.training_step = lambda batch, batch_idx: 1 / 0
    own = broken.training_step
    for target, error in ((module, KeyboardInterrupt), (broken, ZeroDivisionError)):
        callbacks = [AdversarialTraining(0.1), PenaltyCallback(SumOfInputs())]
        runner = trainer(callbacks=callbacks if first else callbacks[::-1])
        if error is KeyboardInterrupt:
            target.on_train_batch_end = _interrupt
        with pytest.raises((error, SystemExit)):
            runner.fit(target, batches())
    assert "training_step" not in module.__dict__
    assert broken.__dict__["training_step"] is own


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_second_fit_attacks_once() -> None:
    module, callback = classifier(), AdversarialTraining(0.1, norm="linf")
    for _ in range(2):
        trainer(callbacks=[callback]).fit(module, batches())
    assert sizes(module.seen[-1][0], pixels()[0][-4:], "linf").max() < 0.1 * (1 + 1e-5)


# --- errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"radius": 0.0}, ValueError, "`radius` must be a finite number > 0"),
        ({"radius": 0.1, "norm": "l3"}, ValueError, "`norm` must be one of"),
        ({"radius": 0.1, "norm": "l1"}, ValueError, "`norm` must be one of"),
        ({"radius": 0.1, "fraction": 1.5}, ValueError, r"`fraction` must lie in \(0, 1\], got 1.5"),
        ({"radius": 0.1, "num_steps": 0}, ValueError, "`num_steps` must be at least 1"),
        ({"radius": 0.1, "schedule": 0}, ValueError, "`schedule` must be at least 1"),
        ({"radius": 0.1, "seed": -1}, ValueError, "`seed` must be at least 0"),
        ({"radius": 0.1, "attack": fast_gradient, "num_steps": 3}, ValueError, "`num_steps` belongs to the built-in"),
        ({"radius": 0.1, "attack": 3}, TypeError, "`attack` must be None, a name, a class or a callable, got int"),
        ({"radius": 0.1, "normalization": ([0.5], [0.0])}, ValueError, "with std > 0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AdversarialTraining(**arguments)


def test_bad_batches_are_refused() -> None:
    x, y = pixels()

    def fit(*tensors: Tensor, attack: Any = None) -> None:
        data = DataLoader(TensorDataset(*tensors), batch_size=4)
        trainer(callbacks=[AdversarialTraining(0.1, attack)]).fit(classifier(), data)

    with pytest.raises(ValueError, match=r"inputs must lie in \[0, 1\], got .* pass normalization="):
        fit(x * 2, y)
    with pytest.raises(TypeError, match=r"`target` must hold class indices, int64 of shape \(B,\), got torch.float32"):
        fit(x, F.one_hot(y, 3).float())
    with pytest.raises(ValueError, match="`batch` must hold a target tensor"):
        fit(x)
    with pytest.raises(ValueError, match="the attack exceeded its budget"):
        fit(x, y, attack=lambda model, x, target: 1 - x)
    with pytest.raises(RuntimeError, match=r"the attack failed on 4 examples at radius 0\.1: ZeroDivisionError"):
        fit(x, y, attack=lambda model, x, target: 1 / 0)


def test_two_attacks_and_an_unknown_network_are_refused() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `AdversarialTraining`"):
        trainer(callbacks=[AdversarialTraining(0.1), AdversarialTraining(0.2)]).fit(classifier(), batches())

    class Module(lightning_module()):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = network(), nn.Linear(3, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.head(self.body(batch[0])), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(ValueError, match=r"Module has no `forward` and 2 children with parameters: define `forward"):
        trainer(callbacks=[AdversarialTraining(0.1)]).fit(Module(), batches())
    trainer(callbacks=[AdversarialTraining(0.1, submodule="body")]).fit(Module(), batches())


# --- the effect


def test_robust_accuracy_rises() -> None:
    """Digits at equal steps, ℓ₂ 0.5."""
    from sklearn.datasets import load_digits

    from lightning_lcnn.metrics import AdversarialAccuracy

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    robust, clean = [], []
    for callbacks in ([], [AdversarialTraining(0.5)]):
        torch.manual_seed(0)
        module = classifier(net=nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))
        module.configure_optimizers = lambda module=module: torch.optim.SGD(module.parameters(), lr=0.5)
        data = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=50)
        trainer(callbacks=callbacks, max_epochs=8).fit(module, data)
        metric = AdversarialAccuracy(0.5)
        metric.update(module.net.eval(), x[1400:], y[1400:])
        robust.append(float(metric.compute()))
        clean.append(float((module.net(x[1400:]).argmax(1) == y[1400:]).float().mean()))
    # seeds 0, 1 and 2: +0.078, +0.075, +0.076 and -0.010, -0.015, -0.012
    assert robust[1] > robust[0] + 0.05
    assert clean[1] > clean[0] - 0.03
