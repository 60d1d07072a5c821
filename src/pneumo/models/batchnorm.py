"""Batch norm of a model that is trained on several ranks: over which images its statistics are taken, in three modes.

Plain batch norm takes them over the images that a rank happens to have, so the number of ranks changes the training.
`sync` takes them over the whole global batch, at the price of two small sums a layer and step. `ghost` takes them over
groups of images that are the same however many ranks there are, and communicates nothing. `local` is the plain one.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812 -- the name that everybody uses
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pneumo.errors import PneumoError
from pneumo.models.norm_silu import NormSilu, suits

Mode = Literal["sync", "ghost", "local"]
SmallSum = Callable[[torch.Tensor], torch.Tensor]
Counts = Sequence[float]
Agreed = tuple[torch.Tensor, torch.Tensor, Counts]
_backward = torch.ops.aten.native_batch_norm_backward.default  # looked up once: it is called for each layer and group


class Norms:
    """The batch-norm layers of a model in one mode; it is told of each batch before the forward pass.

    Every nn.BatchNorm2d of `model` is converted in place and keeps its names, parameters and buffers: a state_dict is
    that of the plain model. Inputs are float32 or float64. `small_sum` sums a contiguous CPU tensor in place over the
    `ranks` ranks and returns it, the same on each of them. On one rank `sync` and `local` leave the plain layers as
    they are. Layers whose scales are not trained are frozen: they keep their running statistics and normalise by them,
    in any mode. Layers in `activating` apply the SiLU that follows them, which the model itself must not do then; they
    are converted in any case. Raises PneumoError for batch norm of other kinds: see `_check`.
    """

    def __init__(
        self, model: nn.Module, mode: Mode, small_sum: SmallSum, ranks: int, activating: Collection[nn.Module] = ()
    ) -> None:
        self._share = _Share(small_sum, ranks)
        found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)]
        for name, layer in found:
            _check(name, layer)
        for _, layer in found:
            activates = any(layer is one for one in activating)
            kind = _KINDS[mode] if ranks > 1 or mode == "ghost" else _LocalNorm if activates else None
            if not layer.weight.requires_grad:
                kind = _FrozenNorm
            if kind is not None:
                _convert(layer, kind, self._share, activates)
        self._layers = _layers(model)
        assert sum(layer.activates for layer in self._layers) == len(activating), "who activates is no layer here"

    def of_batch(self, lengths: Sequence[int], groups: int) -> None:
        """Say what the coming batch is: this rank's images of each virtual group, in order, and the groups of all ranks
        that have images.

        A rank with no images has lengths that add up to 0, and runs the model on one blank image, which leaves no trace
        in statistics and gradients. Only `ghost` makes a difference between the groups of a rank.
        """
        self._share.lengths, self._share.groups = [length for length in lengths if length], groups
        assert groups >= max(1, len(self._share.lengths)), f"{list(lengths)} are more than {groups} groups"

    def settle(self, model: nn.Module | None = None) -> None:
        """Make the running statistics of all ranks equal: the model's, or those of `model`, a copy of it. Collective.

        It has to come before the model is evaluated or written. `ghost` then has what one rank with all groups would
        have, also in a copy whose buffers are averages of the model's over time; `local` has the mean over the ranks.
        For `sync` there is nothing to do.
        """
        layers = self._layers if model is None else _layers(model)
        unequal = [layer for layer in layers if not isinstance(layer, _SyncNorm | _FrozenNorm)]
        if unequal and self._share.ranks > 1:
            buffers = [buffer for layer in unequal for buffer in (layer.running_mean, layer.running_var)]
            sums = self._share.sum(torch.cat([buffer.double() for buffer in buffers]))
            parts = torch.split_with_sizes(sums.div_(self._share.ranks), [len(buffer) for buffer in buffers])
            torch._foreach_copy_(buffers, parts)
        for layer in unequal:
            layer.settled = True


def plain(model: nn.Module) -> None:
    """Make every converted layer an nn.BatchNorm2d again, in place; its statistics have been settled.

    Raises PneumoError for a layer that FSDP has sharded by itself, which only a state_dict can leave.
    """
    for layer in _layers(model):
        assert layer.settled, "running statistics that differ between ranks have to be settled"
        assert not layer.activates, "without the SiLU that it applies the layer would be another"
        _convert(layer, nn.BatchNorm2d, None)


class _Share:
    """What all layers of a model know: the coming batch, and how to reach the other ranks. Copies of the model share
    it: what reaches the ranks cannot be copied.
    """

    def __init__(self, small_sum: SmallSum, ranks: int) -> None:
        self._small_sum, self.ranks = small_sum, ranks
        self.lengths: list[int] = []  # of the groups with images on this rank
        self.groups = 0

    def __deepcopy__(self, _memo: Any) -> "_Share":
        return self

    def check(self, images: int) -> None:
        """Batches that are not the announced ones would silently be normalised as something else."""
        announced = sum(self.lengths)
        assert images == (announced or 1), f"batch norm got {images} images where {announced} were announced"

    def sum(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the sum over the ranks, on the CPU. Collective."""
        return self._small_sum(numbers.cpu())


class _Norm(nn.BatchNorm2d):
    """A converted layer. Its parameters may be sharded between the passes: they are looked up in each one."""

    momentum: float
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor
    share: _Share
    settled: bool
    activates: bool

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the normalised images, shape (b, C, h, w) like the input, in its memory format."""
        if not self.training:
            assert self.settled, "running statistics that differ between ranks have to be settled"
            return self.activated(super().forward(input))
        self.share.check(len(input))
        self.num_batches_tracked.add_(1)
        self.settled = self.settles_itself()
        x = _dense(input)
        if not self.share.lengths:
            return self.activated(self.of_blank(x))
        if self.activates and suits(x, self.weight, self.bias):
            return NormSilu.apply(x, self.weight, self.bias, self)  # type: ignore[no-any-return]
        return self.activated(self.over_images(x))

    def activated(self, y: torch.Tensor) -> torch.Tensor:
        """Apply the SiLU that follows, if that is this layer's affair."""
        return F.silu(y) if self.activates else y

    def settles_itself(self) -> bool:
        """Whether the running statistics are equal on all ranks without `Norms.settle`."""
        return self.share.ranks == 1

    def over_images(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise in training, and keep the running statistics."""
        raise NotImplementedError

    def together(self) -> Sequence[int]:
        """The images of each part of the batch that has statistics of its own: here it is the whole batch."""
        return (sum(self.share.lengths),)

    def take(self, mean: torch.Tensor, variance: torch.Tensor, values: Counts) -> Agreed:
        """Move the running statistics, and return those to normalise by: see norm_silu.Statistics."""
        raise NotImplementedError

    def sum_over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        """Return the sums of gradients over all that has the same statistics: here they are this rank's own."""
        return sums

    def move(self, statistics: torch.Tensor, fraction: float) -> None:
        """Let the running statistics fade by `momentum`, and add so much of statistics (2, C)."""
        buffers = [self.running_mean, self.running_var]
        torch._foreach_mul_(buffers, 1 - self.momentum)
        torch._foreach_add_(buffers, statistics.to(self.running_mean.dtype).unbind(), alpha=fraction)

    def of_blank(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise a blank image by itself: whatever the running statistics are, its activations stay finite.

        This is below F.batch_norm, which refuses a single pixel.
        """
        return torch.batch_norm(x, self.weight, self.bias, None, None, True, 0.0, self.eps, False)


class _FrozenNorm(_Norm):
    """Running statistics that stay as they are, in training too."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the images, normalised as in evaluation."""
        y = F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return self.activated(y)


class _LocalNorm(_Norm):
    """Statistics of this rank's images."""

    def over_images(self, x: torch.Tensor) -> torch.Tensor:
        buffers = self.running_mean, self.running_var
        return F.batch_norm(x, *buffers, self.weight, self.bias, True, self.momentum, self.eps)

    def take(self, mean: torch.Tensor, variance: torch.Tensor, values: Counts) -> Agreed:
        _refuse_single(values[0])
        self.move(torch.cat((mean, _unbiased(variance, values))), self.momentum)
        return mean, variance, values


class _GhostNorm(_Norm):
    """Statistics of each virtual group by itself, so that they are the same on whatever rank the group is.

    Serial's running statistics move, at each step, towards the mean over all G groups:

        serial <- (1 - m) serial + m (s_1 + ... + s_G) / G

    Rank r of R sees only its own groups, and keeps r <- (1 - m) r + m R (sum of its own s) / G. Both are linear, and
    the mean of the ranks' sums times R is the sum over all groups: so the mean over the ranks equals serial's at every
    step, whether or not the ranks were made equal in between, and however empty some shares are. A rank's own running
    statistics mean nothing before that. Variances are unbiased within their group. `num_batches_tracked` counts steps.
    """

    def of_blank(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise a blank image; a rank without groups has nothing to add to its running statistics, which fade."""
        self.add(self.running_mean.new_zeros(2, 0, self.num_features))
        return super().of_blank(x)

    def over_images(self, x: torch.Tensor) -> torch.Tensor:
        lengths = self.share.lengths
        for length in lengths:
            _refuse_single(length * x.shape[2] * x.shape[3])
        statistics = self.running_mean.new_zeros(2, len(lengths), self.num_features)
        y = _Ghost.apply(x, self.weight, self.bias, statistics, lengths, self.eps)
        self.add(statistics)
        return y  # type: ignore[no-any-return]

    def together(self) -> Sequence[int]:
        """The images of each group."""
        return self.share.lengths

    def take(self, mean: torch.Tensor, variance: torch.Tensor, values: Counts) -> Agreed:
        for count in values:
            _refuse_single(count)
        self.add(torch.stack((mean, _unbiased(variance, values))))
        return mean, variance, values

    def add(self, statistics: torch.Tensor) -> None:
        """Move the running statistics towards those (2, groups, C) of the rank's groups, as said above."""
        self.move(statistics.sum(1), self.momentum * self.share.ranks / self.share.groups)


class _Ghost(torch.autograd.Function):
    """Batch norm of groups of images, each by the native kernels on a slice of the batch, in any memory format."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        statistics: torch.Tensor,
        lengths: list[int],
        eps: float,
    ) -> torch.Tensor:
        """Normalise; `statistics`, zeros of shape (2, groups, C), gets the groups' means and unbiased variances."""
        y, saved = torch.empty_like(x), torch.empty_like(statistics)
        parts = zip(*(_groups(whole, lengths) for whole in (x, y)), *statistics, *saved, strict=True)
        for images, out, mean, variance, save_mean, save_invstd in parts:
            outs = out, save_mean, save_invstd
            torch.native_batch_norm(images, weight, bias, mean, variance, True, 1.0, eps, out=outs)
        ctx.save_for_backward(x, weight, saved)
        ctx.lengths, ctx.eps = lengths, eps
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, saved = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        parts = zip(*(_groups(whole, ctx.lengths) for whole in (_formatted(gradients[0], x), x)), *saved, strict=True)
        found = [
            _backward(gradient, images, weight, None, None, *stats, True, ctx.eps, wanted)
            for gradient, images, *stats in parts
        ]
        dx, dweight, dbias = zip(*found, strict=True)
        return (
            (torch.cat(dx) if len(dx) > 1 else dx[0]) if wanted[0] else None,
            functools.reduce(torch.add, dweight) if wanted[1] else None,
            functools.reduce(torch.add, dbias) if wanted[2] else None,
            *(None, None, None),
        )


def _groups(whole: torch.Tensor, lengths: list[int]) -> Sequence[torch.Tensor]:
    """The images of each group; a split of one part costs as much as one of many."""
    return (whole,) if len(lengths) == 1 else torch.split_with_sizes(whole, lengths)


class _SyncNorm(_Norm):
    """Statistics of all images of all ranks, each value with equal weight."""

    def settles_itself(self) -> bool:
        return True

    def of_blank(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise a blank image by the others' statistics: its rank takes part in the sums, with nothing."""
        return self.over_images(x)

    def over_images(self, x: torch.Tensor) -> torch.Tensor:
        return _Sync.apply(x, self.weight, self.bias, self)  # type: ignore[no-any-return]

    def take(self, mean: torch.Tensor, variance: torch.Tensor, values: Counts) -> Agreed:
        """Return mean and biased variance (1, C) of all ranks' values, in float64, and how many values a channel has
        over all ranks; the running statistics take their step. Collective.

        Means and squares travel as distances from the running mean, which all ranks have alike, in float64. The squares
        about a rank's own mean come from the native kernel, so nothing is lost but in the spread of the ranks' means:
        1e-16 (distance / deviation)^2 of the variance, which is less than the rounding of float32 images.
        """
        offset = mean[0].double() - self.running_mean
        sums = torch.cat((offset, offset.square().add_(variance[0]), offset.new_ones(1)))
        sums = self.share.sum(sums.mul_(values[0] if self.share.lengths else 0))
        count = sums[-1].item()
        _refuse_single(count)
        offset, square = sums.div_(count)[:-1].to(mean.device).view(2, -1)
        square.addcmul_(offset, offset, value=-1).clamp_(min=0)
        mean = offset + self.running_mean
        self.running_mean.add_(offset, alpha=self.momentum)
        self.running_var.mul_(1 - self.momentum).add_(square, alpha=self.momentum * count / (count - 1))
        return mean[None], square[None], [count]

    def sum_over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        """Return the sums over all ranks. Collective."""
        return self.share.sum(sums.flatten()).to(sums.device).view_as(sums)


class _Sync(torch.autograd.Function):
    """Batch norm by statistics over the ranks. With xhat = (x - mean) invstd and sums over all ranks' n values,

        dx = weight invstd (dy - sum(dy) / n - xhat sum(dy xhat) / n),   dweight = sum(dy xhat),   dbias = sum(dy).

    The gradients of weight and bias are this rank's sums, as those of every other layer are.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, layer: _SyncNorm) -> torch.Tensor:
        """Normalise."""
        mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
        mean, variance, (ctx.count,) = layer.take(mean[None], variance[None], [x.numel() // len(weight)])
        mean, variance = mean[0].to(x.dtype), variance[0].to(x.dtype)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.layer, ctx.blank, ctx.eps = layer, not layer.share.lengths, layer.eps
        return F.batch_norm(x, mean, variance, weight, bias, eps=layer.eps)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        dy = _formatted(gradients[0], x)
        _, dweight, dbias = _backward(dy, x, weight, mean, variance, None, None, False, ctx.eps, [False, True, True])
        if ctx.blank:
            dweight, dbias = torch.zeros_like(dweight), torch.zeros_like(dbias)
        if not ctx.needs_input_grad[0]:  # the same on all ranks, since the model is
            return None, dweight, dbias, None
        sums = ctx.layer.sum_over_ranks(torch.stack((dweight, dbias)).double())
        if ctx.blank:
            return torch.zeros_like(x), dweight, dbias, None
        scale = (variance + ctx.eps).rsqrt_().mul_(weight)
        slope, constant = sums.div_(-ctx.count).to(x.dtype).mul_(scale)
        dx = F.batch_norm(x, mean, variance, slope, constant, eps=ctx.eps)  # slope xhat + constant, in one pass
        return dx.addcmul_(dy, scale.view(-1, 1, 1)), dweight, dbias, None


_KINDS: dict[Mode, type[_Norm]] = {"sync": _SyncNorm, "ghost": _GhostNorm, "local": _LocalNorm}
_OURS = (*_KINDS.values(), _FrozenNorm)


def _layers(model: nn.Module) -> list[_Norm]:
    """The converted layers."""
    return [layer for layer in model.modules() if isinstance(layer, _Norm)]


def _check(name: str, layer: _BatchNorm) -> None:
    """Raise PneumoError for what no mode is written for: it would go on with the statistics of a rank."""
    whole = layer.weight is not None and layer.bias is not None and layer.running_mean is not None
    if type(layer) is not nn.BatchNorm2d or not whole or layer.momentum is None:
        raise PneumoError(
            f"batch norm {name!r} is {layer}: "
            "only nn.BatchNorm2d with weight, bias, running statistics and momentum can be used here."
        )


def _convert(layer: Any, kind: type[nn.BatchNorm2d], share: _Share | None, activates: bool = False) -> None:
    """Make a layer one of another kind; the object stays, with its parameters, buffers and hooks."""
    if type(layer) not in (nn.BatchNorm2d, *_OURS):
        raise PneumoError(f"{type(layer).__name__} is sharded: load its full state into a new model instead.")
    layer.__class__ = kind
    if share is None:
        del layer.share, layer.settled, layer.activates
    else:
        layer.share, layer.settled, layer.activates = share, True, activates


def _unbiased(variance: torch.Tensor, values: Counts) -> torch.Tensor:
    """The unbiased variances (parts, C) of the biased ones."""
    return variance * variance.new_tensor([[count / (count - 1)] for count in values])


def _refuse_single(count: float) -> None:
    """Raise PneumoError for a single value a channel, which has no variance; so does torch."""
    if count <= 1:
        raise PneumoError(f"batch norm needs more than {count:g} value(s) a channel in training; use larger batches.")


def _dense(x: torch.Tensor) -> torch.Tensor:
    """The same values in one of the two memory formats that the kernels are fast for."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _formatted(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gradient in the memory format of x, which the kernels want."""
    return gradient.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)
