import math

import pytest
import torch
from torch import nn

from deepcluster.convnets import alexnet, sobel_filter, vgg16


def test_initial_weights_have_the_published_spread(small_layers):
    torch.manual_seed(0)
    network = alexnet(out=50, img_size=64)
    convolution = network.features[8]
    assert convolution.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 384)), rel=0.02)
    assert network.top_layer.weight.std().item() == pytest.approx(0.01, rel=0.1)
    biases = [m.bias for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert all(bias.abs().max() == 0 for bias in biases)


def test_the_filter_does_not_see_colours():
    image = torch.rand(1, 3, 20, 20)
    sobel = sobel_filter()
    torch.testing.assert_close(sobel(image), sobel(image.flip(1)))
    constant = sobel(torch.full((1, 3, 20, 20), 0.7))
    torch.testing.assert_close(constant[..., 1:-1, 1:-1], torch.zeros(1, 2, 18, 18), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("build", "size"), [(alexnet, 62), (vgg16, 31)])
def test_images_that_are_too_small_are_refused(build, size):
    with pytest.raises(ValueError, match=f"images of {size} pixels are too small for {build.__name__}"):
        build(img_size=size)
