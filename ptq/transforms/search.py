"""The search for a group's scale: of all candidates, the one with which the quantized layers come
closest to the float ones on sampled inputs. No scaling is a candidate as well."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq.algorithms.rtn import round_to_nearest
from ptq.config import ActivationScheme, Scheme
from ptq.core import choose_qparams
from ptq.formats import FORMATS
from ptq.kernels import quantize_activation
from ptq.transforms.apply import apply_scale, realizable
from ptq.transforms.base import LARGEST_SCALE, ChannelStats, ScaleGroup


@dataclass(eq=False)
class Target:
    """A quantized layer of a group.

    Args:
        weight: float [N, K].
        rows: of its input, float32 [R, K].
        scheme: that it will be quantized with.
    """

    weight: Tensor
    rows: Tensor
    scheme: Scheme

    def __post_init__(self) -> None:
        self.rows = self.rows.to(self.weight.device)
        self.exact = self.rows @ self.weight.float().T

    def error(self, s: Tensor) -> float:
        """``||Qa(x / s) Qw(W s)^T - x W^T||^2``, W s in the dtype of W, weights rounded to nearest.

        Plainly the sum of squares: which rows count is decided by who samples them.
        """
        return self.error_of(self.rows / s, self.weight.float() * s)

    def error_of(self, rows: Tensor, weight: Tensor) -> float:
        """The same for other rows and another weight, both float32, whose product is the same."""
        made = quantized_output(rows, weight.to(self.weight.dtype), self.scheme)
        return float((made - self.exact).square().sum(dtype=torch.float64))


@dataclass(eq=False)
class Reach:
    """What a transform makes candidates from.

    Args:
        absmax, absmean: float32 [K], of the input that the targets share; the largest and the
            mean of the channels that share a scale.
        targets: the quantized layers.
    """

    group: ScaleGroup
    absmax: Tensor
    absmean: Tensor
    targets: list[Target]

    def shared(self, values: Tensor, how: str) -> Tensor:
        """[K], with the amax or mean over the channels that share a scale for each of them."""
        channels = self.group.source_channels(values.numel()).to(values.device)
        joint = torch.zeros(int(channels.max()) + 1, device=values.device)
        return joint.scatter_reduce(0, channels, values, how, include_self=False)[channels]


Propose = Callable[[Reach], Iterable[tuple[str, Tensor]]]
"""Candidates of a group: a word for the report, and positive scales, float32 [K]; channels
whose entry is not a positive number keep 1."""


@torch.no_grad()
def scale_groups(
    block: nn.Module,
    groups: Sequence[ScaleGroup],
    samples: Mapping[str, Tensor],
    stats: Mapping[str, ChannelStats],
    schemes: Mapping[str, Scheme],
    propose: Propose,
) -> list[str]:
    """Scale each group that has a quantized target by its best candidate; a note for each.

    In the order given, each on the weights that those before it have left. The objective is the
    targets' error alone. A source with a scale for each row does not mind; one with a single
    scale for its whole weight would, so its group is left as it is.
    """
    notes = []
    for group in groups:
        names = [name for name in group.targets if name in schemes]
        if not names:
            continue
        if group.source in schemes and schemes[group.source].weights.granularity == "tensor":
            notes.append(f"{group}: not scaled, {group.source} has one scale for its whole weight")
        elif any(name not in samples or name not in stats for name in names):
            notes.append(f"{group}: not scaled, no calibration row reaches it")
        else:
            notes.append(_scale(block, group, names, samples, stats, schemes, propose))
    return notes


def _scale(
    block: nn.Module,
    group: ScaleGroup,
    names: Sequence[str],
    samples: Mapping[str, Tensor],
    stats: Mapping[str, ChannelStats],
    schemes: Mapping[str, Scheme],
    propose: Propose,
) -> str:
    targets = targets_of(block, names, samples, schemes)
    device = targets[0].weight.device
    reach = Reach(group, stats[names[0]].absmax, stats[names[0]].absmean, targets)
    reach.absmax = reach.shared(reach.absmax.to(device), "amax")
    reach.absmean = reach.shared(reach.absmean.to(device), "mean")
    unscaled = best = sum(target.error(torch.ones_like(reach.absmax)) for target in targets)
    chosen: tuple[str, Tensor] | None = None
    for word, raw in propose(reach):
        s = realizable(block, group, _tame(raw))
        error = sum(target.error(s) for target in targets)
        if error < best:
            best, chosen = error, (word, s)
    if chosen is not None:
        apply_scale(block, group, chosen[1])
    before, after = relative_errors(targets, unscaled, best)
    word = "no scaling is best" if chosen is None else chosen[0]
    return f"{group}: {word}, relative error {before:.3g} -> {after:.3g}"


def targets_of(
    block: nn.Module,
    names: Iterable[str],
    samples: Mapping[str, Tensor],
    schemes: Mapping[str, Scheme],
) -> list[Target]:
    """The named layers of a block, as they are now."""
    targets = []
    for name in names:
        weight = block.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        targets.append(Target(weight.detach(), samples[name], schemes[name]))
    return targets


def relative_errors(targets: Iterable[Target], *errors: float) -> list[float]:
    """The roots of summed errors of the targets, relative to what the float layers give."""
    size = sum(float(target.exact.square().sum(dtype=torch.float64)) for target in targets)
    return [math.sqrt(error / size) if size else 0.0 for error in errors]


def _tame(s: Tensor) -> Tensor:
    """Positive scales of geometric mean 1 within [1 / 1024, 1024]."""
    usable = s.isfinite() & (s > 0)
    if not bool(usable.any()):
        return torch.ones_like(s)
    s = s / s[usable].double().log().mean().exp().float()
    return torch.where(usable, s, torch.ones_like(s)).clamp(1 / LARGEST_SCALE, LARGEST_SCALE)


def quantized_output(rows: Tensor, weight: Tensor, scheme: Scheme) -> Tensor:
    """``Qa(x) Qw(W)^T``, float32 [R, N], of rows [R, K] and a weight rounded to nearest."""
    codes = round_to_nearest(weight, scheme.weights)
    return quantize_input(rows, scheme.activations) @ codes.dequantize().T


def quantize_input(x: Tensor, scheme: ActivationScheme | None) -> Tensor:
    """What the codes of x [R, K] stand for; a static range is that of these rows."""
    if scheme is None:
        return x
    if scheme.mode == "dynamic":
        return quantize_activation(x, scheme).dequantize()
    low, high = x.aminmax()
    q = choose_qparams(low, high, FORMATS[scheme.format], symmetric=scheme.symmetric)
    zero_point = None if q.zero_point is None else q.zero_point.to(torch.int32)
    return quantize_activation(x, scheme, q.scale, zero_point).dequantize()
