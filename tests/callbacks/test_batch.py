"""Inputs found in batches of all usual forms, and replaced in them."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_lcnn.callbacks.batch import batch_input, batch_input_and_target, replace_batch_input

X, Y = torch.rand(2, 3), torch.tensor([0, 1])
NEW = torch.ones(2, 3)


class Named(NamedTuple):
    """As a collate function may return it."""

    x: Tensor
    y: Tensor


@dataclass
class Record:
    """A batch for which the user's ``penalty_inputs`` is needed."""

    picture: Tensor
    label: Tensor


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y),
        [X, Y, "name"],
        Named(X, Y),
        {"labels": Y, "image": X},
        OrderedDict(pixel_values=X, labels=Y),
        UserDict(x=X, y=Y),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_the_input_is_replaced_and_nothing_else(batch: Any) -> None:
    replaced = replace_batch_input(batch, NEW)
    assert type(replaced) is type(batch)
    assert replaced is not batch
    assert batch_input(replaced) is NEW
    assert batch_input(batch) is X
    assert len(replaced) == len(batch)
    assert batch_input_and_target(replaced)[1] is Y


def test_a_bare_tensor_is_the_input() -> None:
    assert replace_batch_input(X, NEW) is NEW


def test_a_named_tensor_is_replaced_wherever_it_lies() -> None:
    other = torch.rand(2)
    batch = {"meta": (other, "name"), "data": [Record(X, Y)]}
    replaced = replace_batch_input(batch, NEW, X)
    assert type(replaced["data"][0]) is Record
    assert replaced["data"][0].picture is NEW
    assert replaced["data"][0].label is Y
    assert replaced["meta"][0] is other
    assert batch["data"][0].picture is X


def test_only_the_first_of_equal_tensors_is_the_input() -> None:
    first, second = replace_batch_input((X, X), NEW)
    assert first is NEW
    assert second is X


def test_a_tensor_from_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a tensor that the batch holds, got one that this tuple does not: return"):
        replace_batch_input((X, Y), NEW, X.clone())
