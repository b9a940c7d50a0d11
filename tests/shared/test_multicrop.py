import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import functional as TF

from shared.images.loading import EpochBatchSampler, make_loader
from shared.images.sources import ArraySource, FileSource
from shared.multicrop import MultiCropDataset, MultiCropWrapper, ViewRecipe, _allowed_reduction, normalize_views
from tests.shared.photographs import encoded, photograph

LARGE = ViewRecipe(size_px=16, scale=(0.4, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, grey_p=0.2, blur_p=1.0)
SMALL = ViewRecipe(size_px=8, scale=(0.05, 0.4), jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, blur_p=0.5)
RECIPES = [LARGE, LARGE, SMALL, SMALL, SMALL]


def small_source(count: int = 12) -> ArraySource:
    pixels = np.stack([photograph(i, 30, 40) for i in range(count)])
    return ArraySource("photographs", pixels, np.arange(count) % 3, ["a", "b", "c"])


def equal_batches(one, two) -> bool:
    return all(torch.equal(a, b) for a, b in zip([*one[0], *one[1:]], [*two[0], *two[1:]], strict=True))


@pytest.mark.parametrize("backend", ["fast", "pil"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_a_batch_is_crop_major_and_equal_to_its_images_one_by_one(backend, in_chans):
    dataset = MultiCropDataset(small_source(), RECIPES, seed=5, backend=backend, in_chans=in_chans)
    keys = [(3, 7), (3, 0), (3, 11), (3, 7)]
    (large, small), labels, indices = dataset.__getitems__(keys)
    assert large.shape == (2 * 4, in_chans, 16, 16) and small.shape == (3 * 4, in_chans, 8, 8)
    assert large.dtype == small.dtype == torch.uint8
    assert labels.tolist() == [1, 0, 2, 1] and indices.tolist() == [7, 0, 11, 7]
    for i, key in enumerate(keys):
        (alone_large, alone_small), _, _ = dataset[key]
        assert torch.equal(large[i::4], alone_large) and torch.equal(small[i::4], alone_small)


def test_views_are_a_function_of_seed_epoch_and_index():
    source = small_source()

    def views(seed, epoch, index):
        return MultiCropDataset(source, RECIPES, seed)[(epoch, index)][0][0]

    reference = views(1, 2, 3)
    assert torch.equal(views(1, 2, 3), reference)
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not torch.equal(views(*other), reference)


def test_batches_do_not_depend_on_the_number_of_workers():
    source = small_source()
    batches = {}
    for num_workers in (0, 1, 2):
        sampler = EpochBatchSampler(len(source), batch_size=4, seed=9)
        loader = make_loader(MultiCropDataset(source, RECIPES, 9), batch_sampler=sampler, num_workers=num_workers)
        batches[num_workers] = []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            batches[num_workers] += list(loader)
    assert len(batches[0]) == 6
    for num_workers in (1, 2):
        assert all(equal_batches(a, b) for a, b in zip(batches[0], batches[num_workers], strict=True))


def test_equal_sizes_share_a_tensor_only_when_they_are_neighbours():
    dataset = MultiCropDataset(small_source(), [LARGE, SMALL, LARGE])
    views, _, _ = dataset.__getitems__([(0, 0), (0, 1)])
    assert [tuple(view.shape) for view in views] == [(2, 3, 16, 16), (2, 3, 8, 8), (2, 3, 16, 16)]


def write_photographs(folder, count=6, height=30, width=40):
    for i in range(count):
        Image.fromarray(photograph(i, height, width)).save(folder / f"{i}.png")
    return FileSource("folder", folder, [f"{i}.png" for i in range(count)], np.arange(count), list("abcdef"))


def test_a_bad_image_is_replaced_by_the_same_other_one_every_time(tmp_path):
    source = write_photographs(tmp_path)
    (tmp_path / "2.png").write_bytes(b"no image")
    batches = [MultiCropDataset(source, RECIPES, seed=4).__getitems__([(0, 1), (0, 2), (0, 3)]) for _ in range(2)]
    assert equal_batches(*batches)
    _, labels, indices = batches[0]
    assert indices.tolist() == labels.tolist()  # the label is that of the picture that is shown
    assert indices[0] == 1 and indices[1] != 2 and indices[2] == 3
    epochs = {MultiCropDataset(source, RECIPES, seed=4)[(epoch, 2)][2].item() for epoch in range(20)}
    assert len(epochs) > 1 and 2 not in epochs


def test_large_jpegs_are_decoded_smaller_as_far_as_every_crop_allows(tmp_path, monkeypatch):
    (tmp_path / "0.jpg").write_bytes(encoded(photograph(0, 600, 800), "JPEG", quality=95))
    source = FileSource("large", tmp_path, ["0.jpg"])
    recipes = [ViewRecipe(size_px=16, scale=(0.3, 1.0)), ViewRecipe(size_px=12, scale=(0.1, 0.3))]
    dataset = MultiCropDataset(source, recipes)
    keys = [(epoch, 0) for epoch in range(8)]
    reductions = [_allowed_reduction(dataset.draw(600, 800, (0, *key)), recipes) for key in keys]
    assert set(reductions) <= {2, 4, 8} and max(reductions) == 8
    for key, reduction in zip(keys, reductions, strict=True):
        for view, recipe in zip(dataset.draw(600, 800, (0, *key)), recipes, strict=True):
            assert min(view.height, view.width) / reduction >= 2 * recipe.size_px
    reduced = dataset.__getitems__(keys)[0]
    monkeypatch.setattr("shared.multicrop._allowed_reduction", lambda views, recipes: 1)
    for small, full in zip(reduced, dataset.__getitems__(keys)[0], strict=True):
        assert 0 < (small.float() - full.float()).abs().mean() < 4


def test_normalisation_equals_torchvision():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pixels = photograph(0, 12, 12)
    view = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    (ours,) = normalize_views([view], "cpu", mean, std)
    expected = TF.normalize(TF.to_tensor(Image.fromarray(pixels)), mean, std)[None]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    (half,) = normalize_views([view], "cpu", mean, std, torch.bfloat16)
    assert torch.equal(half, ours.bfloat16())
    (grey,) = normalize_views([view[:, :1]], "cpu", mean, std)
    expected = (view[:, :1] / 255 - sum(mean) / 3) / (sum(std) / 3)
    torch.testing.assert_close(grey, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_normalised_views_are_channels_last(dtype, layout):
    view = torch.arange(2 * 3 * 4 * 5, dtype=dtype).view(2, 3, 4, 5).contiguous(memory_format=layout)
    (found,) = normalize_views([view], "cpu", (0, 0, 0), (1 / 255, 1 / 255, 1 / 255))
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, view.float(), atol=1e-5, rtol=1e-5)


class CountingBackbone(nn.Module):
    """Mean colour to features, at any resolution; counts its passes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.head = nn.Linear(5, 7)
        self.passes = 0

    def forward(self, images):
        self.passes += 1
        return self.head(self.linear(images.mean(dim=(2, 3))))


class PackingBackbone(CountingBackbone):
    packs_resolutions = True

    def forward(self, images):
        if isinstance(images, list):
            self.passes += 1
            return torch.cat([self.linear(group.mean(dim=(2, 3))) for group in images])
        return super().forward(images)


@pytest.mark.parametrize("backbone, passes", [(CountingBackbone, 3), (PackingBackbone, 1)])
def test_the_wrapper_gives_the_outputs_and_gradients_of_a_loop_over_views(backbone, passes):
    torch.manual_seed(0)
    views = [torch.randn(2, 3, size, size) for size in (8, 8, 4, 4, 4, 8)]
    wrapper = MultiCropWrapper(backbone(), nn.Linear(5, 6))
    outputs = wrapper(views)
    assert wrapper.backbone.passes == passes
    outputs.square().sum().backward()
    gradient = wrapper.backbone.linear.weight.grad.clone()

    wrapper.zero_grad()
    one_by_one = torch.cat([wrapper.head(wrapper.backbone.linear(view.mean(dim=(2, 3)))) for view in views])
    one_by_one.square().sum().backward()
    torch.testing.assert_close(outputs, one_by_one)
    torch.testing.assert_close(gradient, wrapper.backbone.linear.weight.grad)


def test_the_wrapper_takes_the_first_output_and_returns_float32_features():
    class Tuple16(CountingBackbone):
        def forward(self, images):
            return super().forward(images).bfloat16(), "more"

    features = MultiCropWrapper(Tuple16(), nn.Identity()).embed([torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4)])
    assert features.dtype == torch.float32 and features.shape == (4, 5)
