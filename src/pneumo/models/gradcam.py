"""Grad-CAM: where in an image the evidence lies that a convolutional network goes by.

R. R. Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization, ICCV 2017.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 -- the name that everybody uses


def grad_cam(maps: torch.Tensor, score: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return the evidence for a score -> (b, h, w), at least 0, in the score's unit times the maps' unit.

    `maps` (b, k, h, w) are the rectified feature maps of a convolution, `score` makes of them one number for each image
    (b,), of its own maps alone. A map's weight is the mean of the score's gradient over its places (equation 1), the
    evidence the positive part of the weighted sum of the maps (equation 2).
    """
    with torch.enable_grad():
        leaf = maps.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(score(leaf).sum(), leaf)
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    return F.relu((weights * maps.detach()).sum(dim=1))


def enlarged(evidence: torch.Tensor, size: int) -> torch.Tensor:
    """Return evidence (b, h, w) at the pictures' resolution, (b, size, size): bilinear between the places' middles."""
    return F.interpolate(evidence[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0]
