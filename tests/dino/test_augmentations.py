import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from dino.augmentations import MEAN, STD, to_input


def test_networks_see_normalised_pixels_or_their_normalised_luminance():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8))
    torch.testing.assert_close(to_input(image), TF.normalize(TF.to_tensor(image), MEAN, STD))
    grey = TF.normalize(TF.to_tensor(image.convert("L")), sum(MEAN) / 3, sum(STD) / 3)
    torch.testing.assert_close(to_input(image, in_chans=1), grey)
