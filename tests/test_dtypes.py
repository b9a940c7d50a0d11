"""Every network of every folder computes in bfloat16 and float64, as it does in float32."""

import pytest
import torch

from deepcluster.hub import build_network as deepcluster_network
from dino.hub import build_backbone
from dino.vision_transformer import DINOHead
from msn.vision_transformer import build as msn_network
from paws.encoder import build_encoder
from resmlp.hub import build_network as resmlp_network
from swav.hub import build_network as swav_network
from xcit.hub import build_network as xcit_network

HEADS = {"output_dim": 8, "hidden_mlp": 16, "nmb_prototypes": [5, 7], "normalize": True}
NETWORKS = {
    "DINO's ViT": lambda: build_backbone("vit_micro", 8, img_size=32)[0],
    "DINO's head": lambda: torch.nn.Sequential(torch.nn.Flatten(), DINOHead(3 * 32 * 32, 16, hidden_dim=8)),
    "SwAV's ResNet": lambda: swav_network("resnet50", **HEADS),
    "SwAV with timm's ResNet": lambda: swav_network("test_resnet", **HEADS),
    "DeepCluster's AlexNet": lambda: deepcluster_network("alexnet", sobel=True, out=3, img_size=64),
    "DeepCluster with timm's ResNet": lambda: deepcluster_network("test_resnet", sobel=True, out=3, img_size=32),
    "MSN's ViT": lambda: msn_network("deit_micro", img_size=32),
    "PAWS's WideResNet": lambda: build_encoder("wide_resnet10w1", 16, use_pred_head=True),
    "PAWS's ResNet": lambda: build_encoder("resnet18", 16),
    "XCiT": lambda: xcit_network("xcit_nano_12_p8", 5),
    "ResMLP": lambda: resmlp_network("resmlp_12", 5, img_size=32, patch_size=8, embed_dim=16, depth=2),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_compute_in_every_type(name):
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    side = 64 if "AlexNet" in name else 32
    images = torch.randn(2, 3, side, side)
    expected = outputs(network, images)
    for dtype, tolerance in ((torch.float64, 1e-4), (torch.bfloat16, 0.1)):
        found = outputs(network.to(dtype), images.to(dtype))
        assert len(found) == len(expected) and all(output.dtype == dtype for output in found)
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours.float() - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.bfloat16, 0.1)])
def test_text_encoders_compute_in_every_type(dtype, tolerance):
    transformers = pytest.importorskip("transformers")
    from contriever.encoder import Contriever

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = Contriever(transformers.BertConfig(vocab_size=20, **sizes)).eval()
    tokens, mask = torch.arange(12).reshape(2, 6), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    with torch.no_grad():
        expected = encoder(input_ids=tokens, attention_mask=mask)
        found = encoder.to(dtype)(input_ids=tokens, attention_mask=mask)
    assert found.dtype == dtype and (found.float() - expected).norm() <= tolerance * expected.norm()


@torch.no_grad()
def outputs(network: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """All tensors that the network returns."""
    pending, found = [network(images)], []
    while pending:
        output = pending.pop(0)
        if isinstance(output, torch.Tensor):
            found.append(output)
        else:
            pending += output
    return found
