import pytest
import torch
from torch._dynamo.testing import CompileCounter

from dino.vision_transformer import vit_micro
from shared.evaluation.features import extract_features
from shared.networks.compiling import compile_network
from shared.optimisation.precision import Precision
from swav.resnet50 import resnet50


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


@pytest.mark.parametrize("amp", ["fp32", "bf16"])
def test_a_step_of_two_resolutions_is_one_graph_for_the_student_and_one_for_the_teacher(amp, compiler):
    network = vit_micro(8, img_size=32, drop_path_rate=0.3).train()
    views = [torch.randn(4, 3, 32, 32), torch.randn(6, 3, 16, 16)]
    compile_network(network)
    with Precision(amp, torch.device("cpu")).autocast():
        for _ in range(2):
            network(views).float().sum().backward()
            with torch.no_grad():
                network(views[0])
    assert compiler.frame_count == 2


def test_more_versions_than_the_limit_are_an_error_and_not_a_slow_run(compiler):
    network = torch.nn.Linear(2, 2)
    compile_network(network)
    with torch._dynamo.config.patch(recompile_limit=2), pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        for rows in range(2, 6):
            network(torch.randn(rows, 2))


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
