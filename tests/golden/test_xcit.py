"""XCiT against values measured on the reference: network, dense features, distillation, sampling, DINO with XCiT."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dino.losses import DINOLoss
from dino.main_dino import Schedules
from dino.main_dino import train_one_epoch as train_dino_epoch
from dino.vision_transformer import DINOHead
from shared.multicrop import MultiCropWrapper
from shared.optimisation.optim import build_optimizer, param_groups_no_decay_on_bias_and_norm
from tests.golden.golden_file import GoldenFile, batch_of
from tests.golden.supervised import check_distillation, check_repeated_augmentation, distillation_cases
from tests.loop_run import LoopRun
from tests.run_folders import losses
from xcit.cross_covariance_transformer import (
    LPI,
    XCA,
    ClassAttention,
    ClassAttentionBlock,
    ConvPatchEmbed,
    FourierPositions,
    XCABlock,
    XCiT,
    fourier_features,
)
from xcit.feature_pyramid import FeaturePyramid

GOLDEN = GoldenFile("xcit")
CONFIG = GOLDEN.json("config")
DIM, HEADS = CONFIG["dim"], CONFIG["heads"]
MODELS = GOLDEN.cases("", "model")
DETECTORS = GOLDEN.cases("", "det")


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=2e-5)


def loaded(module: nn.Module, prefix: str) -> nn.Module:
    """The module, in evaluation mode, filled strictly and in the order of the file."""
    state = GOLDEN.state_dict(prefix)
    assert list(module.state_dict()) == list(state)
    module.load_state_dict(state)
    return module.eval()


def assert_gradients(module: nn.Module, group: str, rtol: float = 1e-4) -> None:
    GOLDEN.assert_checksums(group, {name: p.grad for name, p in module.named_parameters()}, rtol)


def assert_buffers(module: nn.Module, prefix: str) -> None:
    buffers = dict(module.named_buffers())
    names = [key.removeprefix(prefix) for key in GOLDEN.keys(prefix)]
    assert names
    for name in names:
        assert_close(buffers[name], GOLDEN.tensor(prefix + name))


def grids(prefix: str) -> list[tuple[str, int, int]]:
    """(name, height, width) of the cases below a prefix that are named after a size."""
    sizes = [case.rpartition("_")[2] for case in GOLDEN.cases(prefix) if case.rpartition("_")[2][:1].isdigit()]
    return [(size, *map(int, size.split("x"))) for size in dict.fromkeys(sizes)]


def test_positions():
    layer = loaded(FourierPositions(CONFIG["pe_dim"]), "posenc/sd/")
    for case in GOLDEN.cases("posenc/"):
        if case == "sd":
            continue
        rows, columns = map(int, case.removeprefix("raw_").split("x"))
        expected = GOLDEN.tensor(f"posenc/{case}")
        found = (
            fourier_features(rows, columns) if case.startswith("raw_") else layer(rows, columns).view(rows, columns, -1)
        )
        found = found.permute(2, 0, 1)[None].expand_as(expected)
        torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-5)


def test_cross_covariance_attention():
    layer = loaded(XCA(DIM, HEADS, qkv_bias="xca/sd/qkv.bias" in GOLDEN), "xca/sd/")
    out = layer(GOLDEN.tensor("mod/x"))
    assert_close(out, GOLDEN.tensor("xca/out"))
    out.square().mean().backward()
    assert_gradients(layer, "xca/gradcheck")


def test_local_patch_interaction():
    layer, grid = loaded(LPI(DIM), "lpi/sd/"), GOLDEN["mod/hw"].tolist()
    assert_close(layer(GOLDEN.tensor("mod/x"), *grid), GOLDEN.tensor("lpi/out_eval"))
    assert_close(layer.train()(GOLDEN.tensor("mod/x"), *grid), GOLDEN.tensor("lpi/out_train"))
    assert_buffers(layer, "lpi/buffers_after/")


def test_class_attention():
    layer = loaded(ClassAttention(DIM, HEADS, qkv_bias="class_attn/sd/qkv.bias" in GOLDEN), "class_attn/sd/")
    x = GOLDEN.tensor("mod/x_cls")
    # the reference returns the patch tokens along with the class token
    assert_close(torch.cat([layer(x), x[:, 1:]], dim=1), GOLDEN.tensor("class_attn/out"))


@pytest.mark.parametrize("case", GOLDEN.cases("cab/", "out_"))
def test_class_attention_block(case):
    bias = "cab/sd/attn.qkv.bias" in GOLDEN
    if case == "out_eta_none":
        block = ClassAttentionBlock(DIM, HEADS, qkv_bias=bias, eta=None, tokens_norm=True)
        state = GOLDEN.state_dict("cab/sd/")
        block.load_state_dict({name: value for name, value in state.items() if not name.startswith("gamma")})
    else:
        tokens_norm = bool(int(case.rpartition("_")[2]))
        block = loaded(
            ClassAttentionBlock(DIM, HEADS, qkv_bias=bias, eta=CONFIG["eta"], tokens_norm=tokens_norm), "cab/sd/"
        )
    assert_close(block.eval()(GOLDEN.tensor("mod/x_cls")), GOLDEN.tensor(f"cab/{case}"))


def test_xca_block():
    bias, grid = "xcablock/sd/attn.qkv.bias" in GOLDEN, GOLDEN["mod/hw"].tolist()
    block = loaded(XCABlock(DIM, HEADS, qkv_bias=bias, eta=CONFIG["eta"]), "xcablock/sd/")
    assert_close(block(GOLDEN.tensor("mod/x"), *grid), GOLDEN.tensor("xcablock/out_eval"))
    assert_close(block.train()(GOLDEN.tensor("mod/x"), *grid), GOLDEN.tensor("xcablock/out_train"))


@pytest.mark.parametrize("case", GOLDEN.cases("", "patch"))
def test_patch_embedding(case):
    layer = loaded(ConvPatchEmbed(int(case.removeprefix("patch")), 3, CONFIG["pe_embed"]), f"{case}/sd/")
    for size, *_ in grids(f"{case}/"):
        tokens, grid = layer(GOLDEN.tensor(f"{case}/x_{size}"))
        assert_close(tokens, GOLDEN.tensor(f"{case}/out_{size}"))
        assert list(grid) == GOLDEN[f"{case}/hw_{size}"].tolist()


@pytest.mark.parametrize("case", MODELS)
def test_network(case):
    patch_size, num_classes, dim, depth, heads, tokens_norm, cls_attn_layers, use_pos = GOLDEN[f"{case}/meta"].tolist()
    network = XCiT(
        patch_size=patch_size,
        num_classes=num_classes,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        eta=GOLDEN.scalar(f"{case}/init_gamma"),
        tokens_norm=bool(tokens_norm),
        cls_attn_layers=cls_attn_layers,
        use_pos=bool(use_pos),
    )
    eta = GOLDEN.scalar(f"{case}/init_gamma")
    gammas = [p for name, p in network.named_parameters() if "gamma" in name]
    assert gammas and all(torch.allclose(gamma, torch.full_like(gamma, eta)) for gamma in gammas)
    loaded(network, f"{case}/sd/")
    sizes = [size for size, *_ in grids(f"{case}/")]
    assert sizes
    for size in sizes:
        images = GOLDEN.tensor(f"{case}/{size}/x")
        assert_close(network(images), GOLDEN.tensor(f"{case}/{size}/out_eval"))
        assert_close(network.forward_features(images), GOLDEN.tensor(f"{case}/{size}/features_eval"))

    out = network.train()(GOLDEN.tensor(f"{case}/{sizes[0]}/x"))
    assert_close(out, GOLDEN.tensor(f"{case}/train_out"))
    assert_buffers(network, f"{case}/buffers_after/")
    if f"{case}/gradcheck/names" in GOLDEN:  # without it the reference could not go back
        out.square().mean().backward()
        assert_gradients(network, f"{case}/gradcheck", rtol=1e-3)


@pytest.mark.parametrize("case", DETECTORS)
def test_dense_features(case):
    sizes = CONFIG["det"]
    network = FeaturePyramid(
        sizes["idx"],
        patch_size=int(case.removeprefix("det")),
        embed_dim=sizes["dim"],
        depth=sizes["depth"],
        num_heads=sizes["heads"],
    )
    features = loaded(network, f"{case}/sd/")(GOLDEN.tensor(f"{case}/x"))
    names = GOLDEN.cases(f"{case}/", "feat")
    assert len(features) == len(names) == 4
    for feature, name in zip(features.values(), names, strict=True):
        assert_close(feature, GOLDEN.tensor(f"{case}/{name}"))


@pytest.mark.parametrize("key", distillation_cases(GOLDEN))
def test_distillation(key):
    check_distillation(GOLDEN, key)


@pytest.mark.parametrize("case", GOLDEN.cases("rasampler/"))
def test_repeated_augmentation(case, monkeypatch):
    check_repeated_augmentation(GOLDEN, case, monkeypatch)


# --- XCiT in DINO -----------------------------------------------------------------------------------------------------


def make_wrapped() -> MultiCropWrapper:
    sizes, state = CONFIG["dino"], GOLDEN.state_dict("dino/init_sd/")
    backbone = XCiT(patch_size=8, embed_dim=sizes["dim"], depth=sizes["depth"], num_heads=sizes["heads"], num_classes=0)
    head = DINOHead(
        sizes["dim"],
        sizes["out"],
        norm_last_layer=sizes["norm"],
        hidden_dim=len(state["head.mlp.0.weight"]),
        bottleneck_dim=len(state["head.mlp.4.weight"]),
    )
    network = MultiCropWrapper(backbone, head)
    assert list(network.state_dict()) == list(state)
    network.load_state_dict(state)
    return network


def test_dino_parameter_groups():
    student = make_wrapped()
    names = {id(p): name for name, p in student.named_parameters()}
    for i, group in enumerate(param_groups_no_decay_on_bias_and_norm(student)):
        assert [names[id(p)] for p in group["params"]] == list(GOLDEN[f"dino/param_group{i}_names"])


def test_dino_training_follows_the_reference_step_by_step(tmp_path):
    sizes = CONFIG["dino"]
    student, teacher = make_wrapped(), make_wrapped()
    teacher.requires_grad_(False)
    optimizer = build_optimizer("adamw", param_groups_no_decay_on_bias_and_norm(student))
    epochs = len(GOLDEN["dino/lr_f64"])  # of one step
    criterion = DINOLoss(sizes["out"], 2 + sizes["nloc"], 0.04, 0.07, 1, epochs)
    schedules = Schedules(GOLDEN["dino/lr_f64"], GOLDEN["dino/wd_f64"], GOLDEN["dino/mom_f64"])
    for epoch in range(epochs):
        train_dino_epoch(
            student,
            teacher,
            criterion,
            [batch_of(GOLDEN.tensors(f"dino/images/it{epoch}/"))],
            optimizer,
            schedules,
            LoopRun(tmp_path, 1, epochs, epoch, student=student),
            clip_grad=GOLDEN.scalar("dino/clip"),
            freeze_last_layer=1,
        )
        for role, network in (("student", student), ("teacher", teacher)):
            # keys: a gradient of zero, which Adam divides by itself
            loose = {r"cls_attn_blocks.*attn\.qkv\.bias$": 1e-2 if role == "student" else 2e-3}
            tensors = {k: v for k, v in network.state_dict().items() if v.is_floating_point()}
            GOLDEN.assert_checksums(f"dino/epoch{epoch}/{role}", tensors, atol=2e-5, loose=loose)
        center = GOLDEN.tensor(f"dino/epoch{epoch}/center")
        torch.testing.assert_close(criterion.center, center, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(losses(tmp_path), GOLDEN["dino/losses"], rtol=1e-4)


def test_every_array_was_compared():
    """Runs last: fails when an array was never read."""
    assert GOLDEN.unread() == []
