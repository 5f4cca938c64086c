import logging

import pytest
import torch

from easyedit_nmke.history.log import EditReport
from easyedit_nmke.history.state import LifelongState
from easyedit_nmke.methods.solver import NullSpaceSolver


@pytest.fixture
def lifelong():
    """A state over one layer of 6 neurons, its weights, and a function that makes one edit of them."""
    weights = {0: torch.zeros(3, 6)}
    state = LifelongState({}, {0: NullSpaceSolver(torch.zeros(6, 0), 0.1)}, [["{}"]])
    generator = torch.Generator().manual_seed(0)

    def edit(columns=1):
        state.follow(weights)
        keys = torch.randn(6, columns, generator=generator)
        weights[0] += state.solvers[0].update(keys, torch.ones(3, columns))
        state.advance(EditReport(columns, keys={0: keys}))

    return state, weights, edit


def test_weights_put_back_take_the_past_keys_back(lifelong):
    state, weights, edit = lifelong
    edit()
    after_one = weights[0].clone()
    edit(columns=2)
    assert (state.edits, state.solvers[0].count) == (2, 3)
    weights[0].copy_(after_one)
    state.follow(weights)
    assert (state.edits, state.solvers[0].count) == (1, 1)
    weights[0].zero_()
    state.follow(weights)
    assert (state.edits, state.solvers[0].count) == (0, 0)


def test_weights_changed_by_something_else_keep_the_past_keys_with_a_warning(lifelong, caplog):
    state, weights, edit = lifelong
    edit()
    weights[0][0, 0] += 1
    with caplog.at_level(logging.WARNING):
        state.follow(weights)
    assert "changed by something else since edit 1" in caplog.text and state.solvers[0].count == 1
    caplog.clear()
    edit()
    assert not caplog.text and state.edits == 2


def test_a_key_that_cannot_be_appended_leaves_all_layers_as_they_were():
    solvers = {layer: NullSpaceSolver(torch.zeros(6, 0), 0.1) for layer in (0, 1)}
    state = LifelongState({}, solvers, [["{}"]])
    state.follow({0: torch.zeros(3, 6), 1: torch.zeros(3, 6)})
    keys = {0: torch.ones(6, 1), 1: torch.full((6, 1), float("nan"))}
    with pytest.raises(ValueError, match="NaN"):
        state.advance(EditReport(1, keys=keys))
    assert [solver.count for solver in solvers.values()] == [0, 0] and state.edits == 0
