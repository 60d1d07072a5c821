"""Batch norm over ranks: `sync` is nn.BatchNorm2d on the whole batch, `ghost` is it on each group, for every N."""

import copy
from dataclasses import dataclass, replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_ranks import Ranks
from torch import nn
from torch.nn import functional

from pneumo.errors import PneumoError
from pneumo.models.batchnorm import Mode, Norms, plain

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
STEPS = 2
Tensors = dict[str, torch.Tensor]


class Activating(nn.BatchNorm2d):
    """Plain batch norm and the SiLU after it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise and activate, by PyTorch's own operations."""
        return functional.silu(super().forward(input))


@dataclass(frozen=True)
class Case:
    """STEPS global batches: the images of each group of each rank; `settled` says after which steps to settle."""

    groups: list[list[int]]
    channels: int = 3
    height: int = 2
    width: int = 3
    channels_last: bool = False
    dtype: torch.dtype = torch.float64
    seed: int = 0
    offset: float = 0.0
    settled: tuple[bool, ...] = (False, True)
    activates: bool = False

    @property
    def images(self) -> list[int]:
        """The images of each rank."""
        return [sum(lengths) for lengths in self.groups]

    @property
    def lengths(self) -> list[int]:
        """The images of each group that has some, over all ranks."""
        return [length for lengths in self.groups for length in lengths if length]

    def layer(self) -> nn.BatchNorm2d:
        """A layer whose parameters and buffers are not those of a new one."""
        generator = torch.Generator().manual_seed(self.seed)
        layer = nn.BatchNorm2d(self.channels, eps=1e-3, momentum=0.3).to(self.dtype)
        with torch.no_grad():
            for tensor in (layer.weight, layer.bias, layer.running_mean):
                assert tensor is not None
                tensor.copy_(torch.randn(self.channels, generator=generator))
        return layer

    def oracle(self) -> nn.BatchNorm2d:
        """The same layer, as PyTorch has it, with its SiLU if it has one."""
        layer = self.layer()
        if self.activates:
            layer.__class__ = Activating
        return layer

    def norms(self, model: nn.Module, layer: nn.Module, mode: Mode, ranks: Ranks, rank: int) -> Norms:
        """A model in a mode on a rank."""
        return Norms(model, mode, ranks.small_sum(rank), ranks.count, [layer] if self.activates else [])

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The images of all ranks, and the gradients of what becomes of them."""
        generator = torch.Generator().manual_seed(1000 * self.seed + step)
        shape = sum(self.images), self.channels, self.height, self.width
        x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype) for _ in range(2))
        return self.formatted(x + self.offset), dy

    def share(self, step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A rank's images and gradients; for an empty share one image with whatever is in it, and no gradient."""
        x, dy = (whole.split(self.images)[rank] for whole in self.batch(step))
        if self.images[rank]:
            return x, dy
        shape = 1, *x.shape[1:]
        return self.formatted(torch.full(shape, 7.0, dtype=self.dtype)), torch.zeros(shape, dtype=self.dtype)

    def formatted(self, x: torch.Tensor) -> torch.Tensor:
        """In the case's memory format."""
        return x.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Uneven shares, empty ones, groups without images, both memory formats and types."""
    group = st.lists(st.integers(0, 3), max_size=3)
    groups = draw(st.lists(group, min_size=1, max_size=4).filter(lambda shares: sum(map(sum, shares)) > 0))
    height, width = draw(st.sampled_from([(1, 2), (2, 1), (2, 2), (3, 4), (1, 5)]))
    return Case(
        groups,
        draw(st.integers(1, 5)),
        height,
        width,
        draw(st.booleans()),
        draw(st.sampled_from(list(TOLERANCE))),
        draw(st.integers(0, 99)),
        draw(st.sampled_from([0.0, 3.0])),
        draw(st.tuples(*[st.booleans()] * STEPS)),
        draw(st.booleans()),
    )


def one_step(model: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Tensors:
    """Forward and backward: output, and gradients of the input and of the layer's parameters."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(dy)
    assert x.grad is not None
    gradients = {name.split(".")[-1]: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **gradients}


def statistics(layer: nn.Module) -> Tensors:
    """The running statistics."""
    return {name: value.clone() for name, value in layer.named_buffers()}


def train(case: Case, mode: Mode) -> list[list[Tensors]]:
    """What each rank has of each step, and last its settled running statistics."""
    ranks = Ranks(len(case.groups))

    def work(rank: int) -> list[Tensors]:
        model = nn.Sequential(case.layer())
        norms = case.norms(model, model[0], mode, ranks, rank)
        seen = []
        for step in range(STEPS):
            norms.of_batch(case.groups[rank], len(case.lengths))
            seen.append(one_step(model, *case.share(step, rank)))
            if case.settled[step]:
                norms.settle()
        norms.settle()
        return [*seen, statistics(model[0])]

    return ranks.run(work)


def joined(case: Case, ranks: list[list[Tensors]], step: int) -> Tensors:
    """The global batch of a step: rows of the ranks that have images, gradients summed over all as backends do."""
    rows = [seen[step] for seen, images in zip(ranks, case.images, strict=True) if images]
    whole = {name: torch.cat([row[name] for row in rows]) for name in ("y", "dx")}
    return whole | {name: torch.stack([seen[step][name] for seen in ranks]).sum(0) for name in ("weight", "bias")}


def magnitudes(layer: nn.BatchNorm2d, x: torch.Tensor, dy: torch.Tensor) -> dict[str, float]:
    """How large the terms are that add up to each result: its rounding errors are a fraction of them."""
    count, slope = x[:, 0].numel(), (x.var((0, 2, 3), correction=0) + layer.eps).rsqrt()
    distance = float((x.abs().amax((0, 2, 3)) * slope).max()) + 1
    gradient, weight = float(dy.abs().max()), float(layer.weight.detach().abs().max())
    return {
        "y": distance * weight + float(layer.bias.detach().abs().max()),
        "dx": distance * weight * gradient * float(slope.max()),
        "weight": distance * gradient * count,
        "bias": gradient * count,
    }


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float, magnitude: float = 1.0) -> None:
    """Equal but for rounding."""
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance * magnitude)


@settings(deadline=None, max_examples=40)
@given(cases())
def test_sync_is_plain_batch_norm_on_the_whole_batch(case: Case) -> None:
    found, whole = train(case, "sync"), case.oracle().double()
    for step in range(STEPS):
        x, dy = (tensor.double() for tensor in case.batch(step))
        expected, seen = one_step(whole, x, dy), joined(case, found, step)
        for name, magnitude in magnitudes(whole, x, dy).items():
            assert_close(seen[name], expected[name], TOLERANCE[case.dtype], magnitude)
    for rank in found:
        for name, value in statistics(whole).items():
            assert_close(rank[-1][name], value, TOLERANCE[case.dtype], 1 + case.offset)
            assert torch.equal(rank[-1][name], found[0][-1][name]), "ranks have the very same statistics"


@settings(deadline=None, max_examples=40)
@given(cases())
def test_ghost_is_plain_batch_norm_on_each_group(case: Case) -> None:
    found, layer = train(case, "ghost"), case.layer()
    running = {name: value.double() for name, value in statistics(layer).items()}
    for step in range(STEPS):
        parts = list(zip(*(tensor.split(case.lengths) for tensor in case.batch(step)), strict=True))
        groups = [case.oracle() for _ in case.lengths]
        for group in groups:
            group.momentum = 1.0  # its running statistics become those of its batch
        expected = [one_step(group, x, dy) for group, (x, dy) in zip(groups, parts, strict=True)]
        seen = joined(case, found, step)
        for name in ("y", "dx"):
            magnitude = max(magnitudes(group, *part)[name] for group, part in zip(groups, parts, strict=True))
            assert_close(seen[name], torch.cat([one[name] for one in expected]), TOLERANCE[case.dtype], magnitude)
        for name in ("weight", "bias"):
            terms = torch.stack([one[name] for one in expected])
            assert_close(seen[name], terms.double().sum(0), TOLERANCE[case.dtype], float(terms.abs().sum(0).max()))
        for name in ("running_mean", "running_var"):
            mean = torch.stack([statistics(group)[name].double() for group in groups]).mean(0)
            running[name] += (mean - running[name]) * layer.momentum
    running["num_batches_tracked"] += STEPS
    for rank in found:
        for name, value in running.items():
            assert_close(rank[-1][name], value, 1e-12 if case.dtype == torch.float64 else 1e-5, 1 + case.offset)
            assert torch.equal(rank[-1][name], found[0][-1][name]), "ranks have the very same statistics"


@settings(deadline=None, max_examples=40)
@given(cases())
def test_ghost_does_not_depend_on_the_number_of_ranks(case: Case) -> None:
    """Nor on which of them has a group: to the last bit, but for the order in which ranks and groups are summed.

    PyTorch's own SiLU rounds the last few values of a tensor otherwise than those before: it is left out.
    """
    case = replace(case, activates=case.activates and case.channels_last)
    several, one = train(case, "ghost"), train(replace(case, groups=[case.lengths]), "ghost")
    for step in range(STEPS):
        seen = joined(case, several, step)
        for name in ("y", "dx"):
            assert torch.equal(seen[name], one[0][step][name]), name
    for name, value in one[0][-1].items():
        assert_close(several[0][-1][name], value, 1e-12 if case.dtype == torch.float64 else 1e-5, 1 + case.offset)


@settings(deadline=None, max_examples=20)
@given(cases())
def test_local_is_plain_batch_norm_on_each_share_and_settles_to_the_mean(case: Case) -> None:
    case = replace(case, settled=(False,) * STEPS)
    found, layers = train(case, "local"), [case.oracle() for _ in case.groups]
    for rank, (layer, images) in enumerate(zip(layers, case.images, strict=True)):
        for step in range(STEPS if images else 0):
            x, dy = case.share(step, rank)
            expected = one_step(layer, x, dy)
            for name, magnitude in magnitudes(layer, x, dy).items():
                tolerance = TOLERANCE[case.dtype] if case.activates else 0.0
                assert_close(found[rank][step][name], expected[name], tolerance, magnitude)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([statistics(layer)[name].double() for layer in layers]).mean(0)
        for rank in found:
            assert_close(rank[-1][name], mean, TOLERANCE[case.dtype])
    assert all(int(rank[-1]["num_batches_tracked"]) == STEPS for rank in found), "steps are counted on all ranks"


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("pixels", [(1, 1), (2, 3)])
@pytest.mark.parametrize("activates", [False, True])
def test_a_blank_image_leaves_no_trace(mode: Mode, pixels: tuple[int, int], activates: bool) -> None:
    _, blank, _ = train(Case([[2], [], [3]], 3, *pixels, channels_last=True, activates=activates), mode)
    for step in range(STEPS):
        assert torch.isfinite(blank[step]["y"]).all()
        assert all(not blank[step][name].any() for name in ("dx", "weight", "bias"))


def identity(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks where all others have nothing."""
    return tensor


def converted(mode: Mode, model: nn.Module, images: int, ranks: int = 2, *, activates: bool = False) -> Norms:
    """A model in a mode, told of a batch of one group, on the only rank that has images; or a layer that activates."""
    norms = Norms(model, mode, identity, ranks, [model] if activates else [])
    norms.of_batch([images], 1)
    return norms


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("activates", [False, True])
def test_gradients_are_those_of_finite_differences(mode: Mode, channels_last: bool, activates: bool) -> None:
    case = Case([[2]], 2, 1, 2, channels_last, activates=activates)
    layer = case.layer()
    converted(mode, layer, 2, activates=activates)
    inputs = [case.batch(0)[0].requires_grad_(), layer.weight, layer.bias]

    def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))
        return found

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize(("dtype", "mean", "running"), [("float32", 1e4, 0.0), ("float64", 1e7, 1e7)])
def test_sync_keeps_a_small_variance_far_from_zero(dtype: str, mean: float, running: float) -> None:
    """The mean of squares less the square of the mean has no digit left here."""
    case = Case([[4], [1], [3]], 4, 8, 8, dtype=getattr(torch, dtype), offset=mean)
    ranks = Ranks(3)

    def work(rank: int) -> torch.Tensor:
        layer = case.layer()
        layer.momentum = 1.0  # then the running variance is the batch's
        layer.running_mean.fill_(running)
        norms = Norms(layer, "sync", ranks.small_sum(rank), ranks.count)
        norms.of_batch(case.groups[rank], 3)
        layer(case.share(0, rank)[0])
        return layer.running_var

    x = case.batch(0)[0]
    expected = x.double().var((0, 2, 3))
    wrong = (x.square().mean((0, 2, 3)) - x.mean((0, 2, 3)).square()).double()
    assert ((wrong / expected - 1).abs() > 0.01).any(), "a case on which the usual wrong way fails"
    for variance in ranks.run(work):
        assert_close(variance, expected, 1e-4)


@pytest.mark.parametrize(("mode", "forward", "backward"), [("sync", 2, 2), ("ghost", 0, 0), ("local", 0, 0)])
@pytest.mark.parametrize("activates", [False, True])
def test_each_layer_sums_once_forward_and_once_backward(
    mode: Mode, forward: int, backward: int, activates: bool
) -> None:
    case, ranks = Case([[2], [1, 2]], channels_last=True), Ranks(2)

    def work(rank: int) -> None:
        model = nn.Sequential(case.layer(), nn.Conv2d(3, 3, 1, dtype=case.dtype), case.layer())
        activating = [model[0], model[2]] if activates else []
        norms = Norms(model, mode, ranks.small_sum(rank), ranks.count, activating)
        norms.of_batch(case.groups[rank], 3)
        y = model(case.share(0, rank)[0].requires_grad_())
        assert ranks.sums[rank] == forward
        y.sum().backward()
        assert ranks.sums[rank] == forward + backward
        with torch.no_grad():
            model(case.share(0, rank)[0])
        assert ranks.sums[rank] == 2 * forward + backward
        norms.settle()
        settled = ranks.sums[rank]
        assert settled == 2 * forward + backward + (mode != "sync")
        model.eval()(case.share(0, rank)[0])
        assert ranks.sums[rank] == settled, "evaluating is no collective"

    ranks.run(work)


@settings(deadline=None, max_examples=20)
@given(cases())
def test_ranks_with_the_kernels_and_without_agree(case: Case) -> None:
    """On a rank whose images have their channels outermost PyTorch's operations do it, as without the library."""
    case = replace(case, channels=3, height=2, width=3, activates=True, channels_last=True)

    class Mixed(Case):
        def share(self, step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
            x, dy = super().share(step, rank)
            return (x.contiguous() if rank % 2 else x), dy

    mixed, same = train(Mixed(**vars(case)), "sync"), train(case, "sync")
    for step in range(STEPS):
        found, expected = joined(case, mixed, step), joined(case, same, step)
        for name, magnitude in magnitudes(case.layer(), *case.batch(step)).items():
            assert_close(found[name], expected[name], TOLERANCE[case.dtype], magnitude)


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("activates", [False, True])
def test_outputs_and_gradients_keep_the_memory_format(mode: Mode, channels_last: bool, activates: bool) -> None:
    case = Case([[2, 3]], channels_last=channels_last)
    layer = case.layer()
    Norms(layer, mode, identity, 2, [layer] if activates else []).of_batch([2, 3], 2)
    x = case.batch(0)[0].requires_grad_()
    y = layer(x)
    y.sum().backward()  # whose gradient is one number, expanded
    assert y.stride() == x.stride()
    assert x.grad is not None
    assert x.grad.stride() == x.stride()


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("activates", [False, True])
def test_images_that_lie_apart_in_memory_are_normalised_alike(mode: Mode, activates: bool) -> None:
    case, outputs = Case([[5]], 4), []
    x = case.batch(0)[0]
    within = torch.cat((x, x), 1).contiguous(memory_format=torch.channels_last)[:, :4]
    for images in (x, torch.cat((x, x), 1)[:, :4], within, x.mT.contiguous().mT):
        layer = case.layer()
        converted(mode, layer, 5, activates=activates)
        outputs.append(layer(images))
    for other in outputs[1:]:
        assert_close(other, outputs[0], 1e-14)


@pytest.mark.parametrize("mode", get_args(Mode))
def test_state_and_copies_are_those_of_a_plain_model(mode: Mode) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.SiLU(), nn.Sequential(nn.BatchNorm2d(3)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    held = dict(model.named_parameters())
    norms = converted(mode, model, 2)
    assert list(model.state_dict()) == list(before)
    assert all(held[name] is parameter for name, parameter in model.named_parameters())
    model(torch.randn(2, 1, 6, 5))
    norms.settle()
    twin = copy.deepcopy(model)
    plain(twin)
    assert [type(layer) for layer in (twin[1], twin[3][0])] == [nn.BatchNorm2d] * 2
    assert vars(twin[1]).keys() == vars(nn.BatchNorm2d(3)).keys(), "nothing of ours stays"
    assert type(model[1]) is not nn.BatchNorm2d, "the original is as it was"
    x = torch.randn(4, 1, 6, 5)
    assert torch.equal(twin.eval()(x), model.eval()(x))
    model.load_state_dict(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_average_over_time_settles_as_the_model_does() -> None:
    """The usual average of a model's tensors, on each rank by itself, while running statistics differ."""
    case = Case([[2], [1, 2], []])

    def average(ranks: Ranks, groups: list[list[int]]) -> list[Tensors]:
        def work(rank: int) -> Tensors:
            model = case.layer()
            norms = Norms(model, "ghost", ranks.small_sum(rank), ranks.count)
            mean = copy.deepcopy(model)
            for step in range(STEPS):
                norms.of_batch(groups[rank], 3)
                model(replace(case, groups=groups).share(step, rank)[0])
                for held, new in zip(mean.buffers(), model.buffers(), strict=True):
                    if held.is_floating_point():
                        held.lerp_(new, 0.25)
            norms.settle(mean)
            return statistics(mean)

        return ranks.run(work)

    (expected,) = average(Ranks(1), [[2, 1, 2]])
    for found in average(Ranks(3), case.groups):
        for name, value in expected.items():
            assert_close(found[name], value, 1e-12)


@pytest.mark.parametrize("mode", get_args(Mode))
@given(cases())
@settings(deadline=None, max_examples=20)
def test_settling_in_between_changes_no_bit_of_what_is_trained(mode: Mode, case: Case) -> None:
    """Outputs and gradients of every later step are the same, whether statistics were settled before or not."""
    for often, never in zip(
        train(replace(case, settled=(True,) * STEPS), mode),
        train(replace(case, settled=(False,) * STEPS), mode),
        strict=True,
    ):
        for settled, unsettled in zip(often[:-1], never[:-1], strict=True):
            assert all(torch.equal(value, unsettled[name]) for name, value in settled.items())


@pytest.mark.parametrize("mode", ["sync", "local"])
def test_one_rank_keeps_the_plain_layer(mode: Mode) -> None:
    layer = nn.BatchNorm2d(3)
    norms = converted(mode, layer, 2, ranks=1)
    norms.settle()
    plain(layer)
    assert type(layer) is nn.BatchNorm2d


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("mode", get_args(Mode))
def test_a_frozen_layer_normalises_by_what_it_has_and_keeps_it(mode: Mode, ranks: int) -> None:
    """In training too, and nothing travels for it."""

    def no_sum(_numbers: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a sum for a frozen layer")

    layer = Case([[2]]).layer().requires_grad_(False)
    before, expected = copy.deepcopy(layer.state_dict()), copy.deepcopy(layer).eval()
    norms = Norms(layer, mode, no_sum, ranks)
    norms.of_batch([2], ranks)
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(layer.train()(images), expected(images))
    norms.settle()
    plain(layer)
    assert type(layer) is nn.BatchNorm2d
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("mode", ["ghost", "local"])
def test_statistics_that_differ_between_ranks_are_not_used(mode: Mode) -> None:
    layer = nn.BatchNorm2d(3)
    norms = converted(mode, layer, 2)
    layer(torch.randn(2, 3, 4, 4))
    with pytest.raises(AssertionError, match="settled"):
        layer.eval()(torch.randn(2, 3, 4, 4))
    with pytest.raises(AssertionError, match="settled"):
        plain(layer)
    norms.settle()
    layer.eval()(torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("mode", get_args(Mode))
def test_a_batch_that_was_not_announced_is_no_batch(mode: Mode) -> None:
    layer = nn.BatchNorm2d(3)
    converted(mode, layer, 2)
    with pytest.raises(AssertionError, match="3 images where 2"):
        layer(torch.randn(3, 3, 4, 4))


@pytest.mark.parametrize("mode", ["sync", "ghost"])
def test_a_single_value_has_no_variance(mode: Mode) -> None:
    layer = nn.BatchNorm2d(3)
    converted(mode, layer, 1)
    with pytest.raises(PneumoError, match="more than 1 value"):
        layer(torch.randn(1, 3, 1, 1))


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(3, momentum=None),
        nn.BatchNorm2d(3, affine=False),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.BatchNorm1d(3),
        nn.SyncBatchNorm(3),
    ],
    ids=["momentum", "weight", "running statistics", "1d", "SyncBatchNorm"],
)
@pytest.mark.parametrize("mode", get_args(Mode))
def test_what_no_mode_is_written_for_is_refused_by_name(mode: Mode, layer: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), layer)
    with pytest.raises(PneumoError, match="'2' is "):
        Norms(model, mode, identity, 2)
    assert type(model[1]) is nn.BatchNorm2d, "refused before anything was converted"


def test_a_copy_of_an_activating_layer_is_one() -> None:
    """And has no plain form, which would not apply its SiLU."""
    layer, x = nn.BatchNorm2d(3), torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    converted("ghost", layer, 2, ranks=1, activates=True)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(twin.eval()(x), layer.eval()(x))
    with pytest.raises(AssertionError, match="SiLU"):
        plain(twin)


def test_who_activates_has_to_be_a_layer() -> None:
    with pytest.raises(AssertionError, match="no layer"):
        Norms(nn.Sequential(nn.BatchNorm2d(3)), "ghost", identity, 1, [nn.BatchNorm2d(3)])


def test_a_converted_model_is_not_converted_again() -> None:
    layer = nn.BatchNorm2d(3)
    converted("ghost", layer, 2)
    with pytest.raises(PneumoError, match=r"only nn\.BatchNorm2d"):
        Norms(layer, "sync", identity, 2)
