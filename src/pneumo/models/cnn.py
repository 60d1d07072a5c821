"""The study's CNN: two convolutional and two fully connected layers."""

from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 -- the name that everybody uses
from torch import nn

from pneumo.models.gradcam import enlarged, grad_cam
from pneumo.models.task import Answers, Share, Task


class Cnn(nn.Module):
    """conv 1-32, conv 32-64, fc 64 (size/4)^2 - 128 - 1; returns logits, shape (b, 1).

    Pooling comes before ReLU: the function is the same (both are monotone), and ReLU has a quarter of the work.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.fc1 = nn.Linear(64 * (size // 4) ** 2, 128)
        self.fc2 = nn.Linear(128, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logit of each of (b, 1, size, size) images."""
        return self.classify(self.features(images))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the last convolution's feature maps, pooled and rectified: (b, 64, size/4, size/4)."""
        x = F.relu(F.max_pool2d(self.conv1(_channels_last(images)), 2))
        return F.relu(F.max_pool2d(self.conv2(x), 2))

    def classify(self, maps: torch.Tensor) -> torch.Tensor:
        """Return the logits (b, 1) that `features` lead to."""
        logits: torch.Tensor = self.fc2(F.relu(self.fc1(maps.flatten(1))))
        return logits


def _channels_last(images: torch.Tensor) -> torch.Tensor:
    """The same memory of (b, 1, h, w) images with the strides of channels last: convolutions and pooling are faster.

    With one channel both formats are the same memory, and the layers go by the strides alone. Inputs carry the format
    and never parameters, which FSDP2 would refuse.
    """
    height, width = images.shape[2:]
    return images.contiguous().as_strided(images.shape, (height * width, 1, width, 1))


class CnnTask(Task):
    """Pneumonia or not: binary cross-entropy on the logit, Adam."""

    def build(self) -> nn.Module:
        """Make the CNN."""
        return Cnn(self.size)

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """Make a fused Adam."""
        return torch.optim.Adam(parameters, lr=self.settings.learning_rate, fused=True)

    def loss(self, model: nn.Module, share: Share) -> torch.Tensor:
        """Return the summed cross-entropy."""
        logits = model(share.images).squeeze(1)
        return F.binary_cross_entropy_with_logits(logits, share.labels, reduction="sum")

    def answers(self, model: nn.Module, images: torch.Tensor) -> Answers:
        """Return the probabilities."""
        return Answers(torch.sigmoid(model(images).squeeze(1)).float().cpu().numpy())

    def evidence(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """Return Grad-CAM's maps of the logit, by the last convolution."""
        network = cast(Cnn, model)
        with torch.no_grad():
            maps = network.features(images)
        return enlarged(grad_cam(maps, lambda x: network.classify(x).squeeze(1)), self.size)
