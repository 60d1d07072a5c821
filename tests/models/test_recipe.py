"""The detector's updates: the schedule, gradients held in bounds, the average, and which parameters decay."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from pneumo.models.recipe import (
    LAST_RATE,
    MOST_DECAY,
    MOST_NORM,
    WARMUP,
    DetectorRecipe,
    decay_groups,
    rate_factor,
)


def alone(numbers: torch.Tensor) -> torch.Tensor:
    """The sum over one rank."""
    return numbers


def small_model() -> nn.Module:
    """A convolution, batch norm with buffers, and a layer that is not trained."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1))
    model[2].weight.requires_grad = False
    return model


def test_the_rate_rises_to_its_highest_and_falls_to_its_last() -> None:
    steps = [rate_factor(i / 1000) for i in range(1001)]
    top = round(1000 * WARMUP)
    assert max(steps) == steps[top] == 1.0
    assert all(a <= b for a, b in pairwise(steps[: top + 1]))
    assert all(a >= b for a, b in pairwise(steps[top:]))
    assert steps[-1] == pytest.approx(LAST_RATE)
    assert min(steps) == pytest.approx(LAST_RATE), "no step is in vain"


@pytest.mark.parametrize("factor", [0.5, 40.0])
def test_gradients_are_multiplied_and_their_norm_is_bounded(factor: float) -> None:
    model = small_model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    recipe = DetectorRecipe(model, optimizer, alone)
    generator = torch.Generator().manual_seed(5)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.randn(p.shape, generator=generator)
    expected = [factor * p.grad for p in trained]
    reference = [nn.Parameter(torch.zeros_like(g)) for g in expected]
    for p, g in zip(reference, expected, strict=True):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(reference, MOST_NORM)
    recipe.adjust(factor, 0.5)
    for p, r in zip(trained, reference, strict=True):
        torch.testing.assert_close(p.grad, r.grad)
    assert optimizer.param_groups[0]["lr"] == rate_factor(0.5)


def test_the_norm_of_shards_is_that_of_all_ranks() -> None:
    """Two ranks with half of a gradient each, and one that has all of it, do the same."""
    gradient = 100 * torch.arange(1.0, 9.0)
    whole = nn.Linear(8, 1, bias=False)
    whole.weight.grad = gradient[None].clone()
    DetectorRecipe(whole, torch.optim.SGD(whole.parameters(), lr=1.0), alone).adjust(1.0, 0.5)
    squares = gradient.double().square().sum()
    found = []
    for part in gradient.split(4):
        half = nn.Linear(4, 1, bias=False)
        half.weight.grad = part[None].clone()
        DetectorRecipe(half, torch.optim.SGD(half.parameters(), lr=1.0), lambda _own: squares).adjust(1.0, 0.5)
        found.append(half.weight.grad[0])
    torch.testing.assert_close(torch.cat(found), whole.weight.grad[0])
    assert whole.weight.grad.norm() == pytest.approx(MOST_NORM, rel=1e-4)


def test_the_average_is_exponential_and_is_there_for_a_while_only() -> None:
    model = small_model()
    recipe = DetectorRecipe(model, torch.optim.SGD(model.parameters(), lr=1.0), alone)
    average = copy.deepcopy(model.state_dict())
    for update in range(1, 6):
        with torch.no_grad():
            for tensor in (*model.parameters(), model[1].running_mean, model[1].running_var):
                tensor += update
        recipe.follow()
        decay = MOST_DECAY * (1 - torch.exp(torch.tensor(-update / 2000.0)).item())
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                average[name] = decay * average[name] + (1 - decay) * value
    now = copy.deepcopy(model.state_dict())
    with torch.no_grad(), recipe.averaged():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                torch.testing.assert_close(value, average[name], msg=name)
        model[1].running_mean.fill_(7.0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, now[name]), f"{name} is back"
    with torch.no_grad(), recipe.averaged():
        assert (model[1].running_mean == 7.0).all(), "what was settled in the average stays in it"


def test_weights_decay_and_biases_and_scales_do_not() -> None:
    model = small_model()
    decaying, others = decay_groups(model.parameters(), 0.1)
    assert decaying["weight_decay"] == 0.1
    assert others["weight_decay"] == 0.0
    assert [id(p) for p in decaying["params"]] == [id(model[0].weight)]
    assert {id(p) for p in others["params"]} == {id(p) for p in (model[0].bias, *model[1].parameters(), model[2].bias)}
