import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import BertConfig

from contriever.encoder import build_encoder
from dino.vision_transformer import vit_micro
from navit.native_resolution_vit import NaViT
from seer.regnet import SIZES, RegNet, initialise_
from shared.evaluation.features import extract_features
from shared.networks.compiling import compile_network
from shared.optimisation.precision import Precision
from swav.resnet50 import resnet50
from vit22b.monitor import AttentionMonitor
from vit22b.scaled_vit import ScaledViT


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


def test_equal_blocks_share_their_code_and_need_no_other_to_be_computed_again(compiler):
    network = initialise_(RegNet(SIZES["regnet_pico"], recompute=True))
    plain, images = copy.deepcopy(network), torch.randn(4, 3, 32, 32)
    for block in network.blocks():
        compile_network(block, "compute")
    for each in (network, plain):
        for _ in range(2):
            each(images).square().sum().backward()
    sizes = {str(block) for block in network.blocks()}
    assert compiler.frame_count == len(sizes) < len(network.blocks())
    for compiled, expected in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(compiled.grad, expected.grad)
    torch.testing.assert_close(dict(network.named_buffers()), dict(plain.named_buffers()))


def test_texts_of_any_number_and_length_share_their_code(compiler):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    encoder = build_encoder(BertConfig(vocab_size=20, **sizes))
    names = list(encoder.state_dict())
    compile_network(encoder, "vectors", dynamic=True)
    for texts, length in ((4, 9), (7, 8), (2, 30)):
        ids = torch.randint(20, (texts, length))
        encoder(ids, torch.ones_like(ids)).sum().backward()
    assert compiler.frame_count == 1 and list(encoder.state_dict()) == names


def test_images_of_any_size_share_the_code_of_their_tokens(compiler):
    network = NaViT(32, 2, 2, patch_size=4, max_side=8)
    for block in network.blocks:
        compile_network(block.attn, "heads", dynamic=True)
        compile_network(block.mlp, dynamic=True)
    for sides in ((8, 20, 8), (12, 16), (24,)):
        network([torch.randn(3, side, 8) for side in sides]).sum().backward()
    assert compiler.frame_count == 2


def test_attention_is_looked_at_in_compiled_blocks(compiler):
    network, images = ScaledViT(16, 2, 24, 4, 4, 16, 6), torch.randn(2, 3, 16, 16)
    monitor = AttentionMonitor(network)
    with monitor.watching():
        network(images)
    expected = monitor.values()
    for block in network.blocks:
        compile_network(block)
    for wanted in (False, True, False):
        with monitor.watching(wanted):
            network(images)
    assert compiler.frame_count == 1 and monitor.values() == expected and "entropy_1" in expected
