"""Grad-CAM against networks worked by hand, and against finite differences."""

import cv2
import numpy as np
import pytest
import torch

from pneumo.models import MODELS, Settings, load
from pneumo.models.cnn import Cnn
from pneumo.models.gradcam import enlarged, grad_cam
from pneumo.models.task import Task


def test_weights_are_mean_gradients_and_what_speaks_against_is_left_out() -> None:
    maps = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]], [[0.0, 3.0], [1.0, 0.0]]]])
    slopes = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[-1.0, -2.0], [0.0, 1.0]]])  # their means are 1 and -1/2
    found = grad_cam(maps, lambda x: (x * slopes).sum(dim=(1, 2, 3)))
    # 1 - 0, 0 - 3/2, 0 - 1/2 and 2 - 0
    assert found.tolist() == [[[1.0, 0.0], [0.0, 2.0]]]


def worked_network() -> Cnn:
    """A CNN at 8 x 8 with maps x and 1 - x, pooled to 2 x 2, whose logit is 3 (2 sum of the first - sum of the second).

    The other maps are 0. The hidden unit is positive for the images here, so that it lets all through.
    """
    network = Cnn(8)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.conv1.weight[0, 0, 1, 1] = 1
        network.conv2.weight[0, 0, 1, 1] = 1
        network.conv2.weight[1, 0, 1, 1] = -1
        network.conv2.bias[1] = 1  # type: ignore[index]  # it has one
        network.fc1.weight[0, :4] = 2
        network.fc1.weight[0, 4:8] = -1
        network.fc1.bias[0] = 10
        network.fc2.weight[0, 0] = 3
    return network


def test_the_cnns_evidence_is_that_worked_by_hand() -> None:
    quarters = torch.tensor([[0.0, 0.25], [0.5, 1.0]])
    images = quarters.repeat_interleave(4, 0).repeat_interleave(4, 1)[None, None]
    network = worked_network()
    assert network(images).item() == pytest.approx(3 * (2 * 1.75 - 2.25 + 10))
    found = grad_cam(network.features(images), lambda x: network.classify(x).squeeze(1))
    # 6 x - 3 (1 - x), where that is positive
    assert torch.allclose(found, torch.tensor([[[0.0, 0.0], [1.5, 6.0]]]))


def test_weights_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    network = Cnn(16).double().eval()
    images = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        maps = network.features(images)
        step = 1e-6
        moves = step * torch.eye(64 * 16, dtype=torch.float64).reshape(-1, 64, 4, 4)
        weights = torch.stack(
            [(network.classify(one + moves) - network.classify(one - moves)).reshape(64, 16).mean(1) for one in maps]
        ) / (2 * step)
        expected = torch.relu((weights[:, :, None, None] * maps).sum(1))
    found = grad_cam(maps, lambda x: network.classify(x).squeeze(1))
    assert found.max() > 0
    assert torch.allclose(found, expected, atol=1e-9)


def test_a_task_maps_its_evidence_at_the_pictures_size_and_leaves_no_gradient() -> None:
    task = load("cnn")(Settings(16, 1e-3))
    network = task.build().eval()
    images = torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        found = task.evidence(network, images)
        alone = task.evidence(network, images[1:2])
    assert found.shape == (3, 16, 16)
    assert (found >= 0).all()
    assert torch.allclose(found[1:2], alone, atol=1e-6), "an image's evidence is its own"
    assert all(parameter.grad is None for parameter in network.parameters())


def test_enlarged_as_opencv_does() -> None:
    small = np.random.default_rng(0).random((4, 4)).astype(np.float32)
    found = enlarged(torch.from_numpy(small)[None], 16)[0].numpy()
    np.testing.assert_allclose(found, cv2.resize(small, (16, 16), interpolation=cv2.INTER_LINEAR), atol=1e-6)


def test_models_that_cannot_be_asked_say_so() -> None:
    assert [name for name, entry in MODELS.items() if entry.maps_evidence] == ["cnn"]
    with pytest.raises(NotImplementedError):
        Task.evidence(load("cnn")(Settings(16, 1e-3)), torch.nn.Identity(), torch.zeros(1, 1, 16, 16))
