import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dino.vision_transformer import VisionTransformer
from shared.networks.compiling import compile_network
from shared.optimisation.accumulation import accumulate
from shared.optimisation.precision import Precision
from shared.sinkhorn import sinkhorn_knopp

CPU = torch.device("cpu")


def vit(**options) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(16, 8, embed_dim=16, depth=2, num_heads=2, **options).double()


def contrast(features: torch.Tensor) -> torch.Tensor:
    """A loss in which every row depends on every other one: balanced assignments, and negatives of the batch."""
    rows = F.normalize(features, dim=1)
    assignments = sinkhorn_knopp(rows.detach() @ rows.detach().T, num_iters=3)
    return F.cross_entropy(rows @ rows.T / 0.1, assignments.to(rows))


def gradients(network: nn.Module, *inputs) -> list[torch.Tensor]:
    contrast(network(*inputs)).backward()
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("pieces", [2, 3, 7])
def test_gradients_of_a_loss_that_couples_the_batch_are_those_of_the_whole_batch(pieces):
    images = torch.randn(7, 3, 16, 16, dtype=torch.float64)
    whole, cut = vit(), vit()
    accumulate(cut, pieces)
    torch.testing.assert_close(gradients(cut, images), gradients(whole, images), rtol=1e-10, atol=1e-13)


def test_rows_of_several_resolutions_keep_their_order():
    views = [torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.randn(6, 3, 8, 8, dtype=torch.float64)]
    whole, cut = vit(), vit()
    accumulate(cut, 3)
    torch.testing.assert_close(cut(views), whole(views), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(gradients(cut, views), gradients(whole, views), rtol=1e-10, atol=1e-13)


def test_tensors_beside_the_images_are_cut_with_them():
    class Masked(nn.Linear):
        def forward(self, rows, mask, factor):
            return super().forward(rows * mask) * factor

    network = Masked(3, 2)
    rows, mask = torch.randn(5, 3), torch.rand(5, 1)
    expected = network(rows, mask, torch.tensor(2.0))
    accumulate(network, 2)
    torch.testing.assert_close(network(rows, mask, torch.tensor(2.0)), expected)


def test_one_piece_is_in_memory_at_a_time():
    """Tensors that wait for the backward pass: of whole batches all layers', in pieces the inputs'."""
    kept = {}
    images = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    for pieces in (1, 4):
        network = vit()
        accumulate(network, pieces)
        saved = []

        def note(tensor, saved=saved):
            saved.append(tensor.numel() if tensor.grad_fn is not None else 0)  # activations, not weights and images
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            network(images)
        kept[pieces] = sum(saved)
    assert kept[1] > 8 * 16 * 5 * 2 and kept[4] == 0


def test_the_same_random_numbers_are_drawn_in_both_passes():
    """Stochastic depth: a piece whose second pass drew others would have the gradients of another network."""
    images = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    cut, by_hand = vit(drop_path_rate=0.5), vit(drop_path_rate=0.5)
    accumulate(cut, 3)
    torch.manual_seed(1)
    found = gradients(cut, images)
    torch.manual_seed(1)
    contrast(torch.cat([by_hand(piece) for piece in images.split(2)])).backward()
    torch.testing.assert_close(
        found, [p.grad for p in by_hand.parameters() if p.grad is not None], rtol=1e-10, atol=1e-13
    )


def test_batch_norms_normalise_each_piece_and_count_it_once(capsys):
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2)).double()
    images = torch.randn(6, 3, 5, 5, dtype=torch.float64) * torch.arange(1, 7).view(6, 1, 1, 1)
    whole(images)
    cut = copy.deepcopy(whole)
    accumulate(cut, 3)
    assert "--accumulate 3: batch norms" in capsys.readouterr().out
    found = gradients(cut, images)
    contrast(torch.cat([whole(piece) for piece in images.split(2)])).backward()
    torch.testing.assert_close(found, [p.grad for p in whole.parameters()], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dict(cut.named_buffers()), dict(whole.named_buffers()))
    assert cut[1].num_batches_tracked == 4 and cut[1].track_running_stats


def test_narrow_maps_stay_in_float32_in_the_second_pass_too():
    """A strided convolution of 1 pixel, whose bfloat16 gradient reads memory that nobody has written."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1, stride=2), nn.Flatten(), nn.Linear(4, 2))
    types = []
    network[0].register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    accumulate(network, 2)
    with Precision("bf16", CPU).autocast():
        features = network(torch.randn(4, 3, 1, 1))
    features.float().sum().backward()
    assert types == [torch.float32] * 4


def test_names_copies_and_evaluation_stay_as_they_are():
    network, plain = vit(), vit()
    accumulate(network, 2)
    assert list(network.state_dict()) == list(plain.state_dict())
    image = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(network(image), plain(image))  # one image, without gradients: in no pieces
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.cls_token.add_(1)
    images = image.repeat(2, 1, 1, 1)
    assert not torch.equal(other(images), network(images))  # a copy computes with its own weights


def test_a_method_for_the_backbone_alone_is_cut_and_the_head_is_not():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4)

        def forward_backbone(self, rows):
            return self.trunk(rows)

        def forward(self, rows):
            return self.head(self.forward_backbone(rows))

    torch.manual_seed(0)
    network = Network().double()
    rows = torch.randn(6, 3, dtype=torch.float64)
    expected = copy.deepcopy(network)(rows)
    accumulate(network, 3)
    torch.testing.assert_close(network(rows), expected, rtol=1e-12, atol=1e-14)


def test_mistakes_name_the_flag():
    with pytest.raises(ValueError, match="--accumulate 0 is less than 1"):
        accumulate(nn.Linear(2, 2), 0)
    network = nn.Linear(2, 2)
    accumulate(network, 4)
    with pytest.raises(ValueError, match="--accumulate 4: a batch of 3"):
        network(torch.zeros(3, 2))


@pytest.mark.slow
def test_a_compiled_network_takes_pieces():
    images = torch.randn(4, 3, 16, 16)
    whole, cut = vit().float(), vit().float()
    compile_network(cut)
    accumulate(cut, 2)
    torch.testing.assert_close(gradients(cut, images), gradients(whole, images), rtol=1e-4, atol=1e-6)
