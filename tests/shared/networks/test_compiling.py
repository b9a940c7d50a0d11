import pytest
import torch
from torch._dynamo.testing import CompileCounter

from dino.vision_transformer import vit_micro
from msn.vision_transformer import build
from shared.evaluation.features import extract_features
from shared.networks.compiling import compile_network
from swav.resnet50 import resnet50
from xcit.cross_covariance_transformer import build_xcit


@pytest.fixture
def compiler(monkeypatch):
    """In place of the real one: it counts the graphs that it gets and runs them as they are."""
    torch._dynamo.reset()
    counter, compile_function = CompileCounter(), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **flags: compile_function(function, backend=counter, **flags)
    )
    yield counter
    torch._dynamo.reset()


NETWORKS = {  # and how many blocks with code of their own: the first never drops; the last looks at class tokens only
    "dino": (lambda rate: vit_micro(8, img_size=32, drop_path_rate=rate), 2),
    "msn": (lambda rate: build("deit_micro", img_size=32, drop_path_rate=rate), 3),
    "xcit": (lambda rate: build_xcit("xcit_nano_12_p16", img_size=32, drop_path_rate=rate), 2),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_that_differ_in_stochastic_depth_share_their_code(name, compiler):
    build_network, different_blocks = NETWORKS[name]
    torch.manual_seed(0)
    network, images = build_network(0.3), torch.randn(2, 3, 32, 32)
    compile_network(network)
    network.train()(images).sum().backward()
    assert compiler.frame_count <= different_blocks
    compiled = network.eval()(images)
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(compiled, network(images))


def test_extracting_features_compiles_nothing(compiler):
    network = vit_micro(8, img_size=32)
    images = [(torch.randn(3, 32, 32), 0, i) for i in range(5)]
    expected, _ = extract_features(network, images, torch.device("cpu"), batch_size=2)
    compile_network(network)
    features, _ = extract_features(network, images, torch.device("cpu"), batch_size=2)
    assert compiler.frame_count == 0 and torch.equal(features, expected)


def test_networks_with_heads_compile_what_comes_before_them(compiler):
    network = resnet50(output_dim=16, hidden_mlp=32, nmb_prototypes=5, width_per_group=8)
    names = list(network.state_dict())
    compile_network(network)
    network([torch.randn(2, 3, 32, 32)])
    assert compiler.frame_count >= 1 and list(network.state_dict()) == names
