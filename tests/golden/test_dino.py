"""DINO's network, head, loss, schedules, clipping and training against arrays measured on the reference.

Every size, parameter and case name comes from the file, so the tests hold for any file of this layout.
"""

import json
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dino.losses import DINOLoss
from dino.main_dino import Schedules, train_one_epoch
from dino.vision_transformer import DINOHead, DropPath, VisionTransformer, trunc_normal_
from shared.multicrop import MultiCropWrapper
from shared.optimisation.optim import (
    build_optimizer,
    clip_grad_norm_per_tensor_,
    param_groups_no_decay_on_bias_and_norm,
)
from shared.optimisation.schedules import cosine_schedule
from tests.golden import test_dino_protocols
from tests.golden.golden_file import GoldenFile
from tests.loop_run import LoopRun

GOLDEN = GoldenFile("dino")
CONFIG = GOLDEN.json("config")
GROUPS = (
    "config",
    "vit/",
    "drop_path/",
    "head/",
    "loss/",
    "sched/",
    "clip/",
    "train/",
    "multicrop/",
    "trunc_normal/",
)

RESOLUTIONS = [case for case in GOLDEN.cases("vit/") if case[0].isdigit()]
HEADS = [case for case in GOLDEN.cases("head/") if case != "x"]
TRAIN_CASES = {case["name"]: case for case in CONFIG["train"]["cases"]}

assert_close = partial(torch.testing.assert_close, rtol=1e-4, atol=2e-5)


def make_vit(img: int, patch: int, dim: int, depth: int, heads: int) -> VisionTransformer:
    return VisionTransformer(
        img_size=[img],
        patch_size=patch,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )


def checksums(tensors: dict[str, Tensor], names: np.ndarray) -> Tensor:
    """Mean, population standard deviation, norm and the first four values of each named tensor."""
    rows = torch.zeros(len(names), 7)
    for row, name in zip(rows, names, strict=True):
        flat = tensors[name].detach().flatten()
        row[:3] = torch.stack([flat.mean(), flat.std(correction=0), flat.norm()])
        row[3 : 3 + min(4, len(flat))] = flat[:4]
    return rows


@pytest.fixture(scope="module")
def vit() -> VisionTransformer:
    model = make_vit(*(int(size) for size in GOLDEN["vit/meta"]))
    model.load_state_dict(GOLDEN.state_dict("vit/sd/"))
    return model.eval()


def test_the_network_sizes_agree_with_the_configuration():
    assert list(GOLDEN["vit/meta"]) == [CONFIG["vit"][key] for key in ("img", "patch", "dim", "depth", "heads")]
    assert [f"{height}x{width}" for height, width in CONFIG["res"]] == RESOLUTIONS


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_positions_are_interpolated_as_in_the_reference(vit, resolution):
    height, width = GOLDEN[f"vit/{resolution}/x"].shape[-2:]
    positions = vit.interpolate_pos_encoding(height, width)
    torch.testing.assert_close(positions, GOLDEN.tensor(f"vit/{resolution}/pos"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["train", "eval"])  # in training the last block computes the class token only
@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_features_attention_and_layers(vit, resolution, mode):
    vit.train(mode == "train")
    x = GOLDEN.tensor(f"vit/{resolution}/x")
    assert_close(vit(x), GOLDEN.tensor(f"vit/{resolution}/out"))
    assert_close(vit.get_last_selfattention(x), GOLDEN.tensor(f"vit/{resolution}/last_attn"))
    (layer,) = vit.get_intermediate_layers(x, n=1)
    assert_close(layer, GOLDEN.tensor(f"vit/{resolution}/inter_n1"))


def test_packed_resolutions_give_the_features_of_separate_passes(vit):
    features = vit([GOLDEN.tensor(f"vit/{resolution}/x") for resolution in RESOLUTIONS])
    expected = torch.cat([GOLDEN.tensor(f"vit/{resolution}/out") for resolution in RESOLUTIONS])
    assert_close(features, expected)


def test_all_intermediate_layers(vit):
    x = GOLDEN.tensor(f"vit/{RESOLUTIONS[0]}/x")
    expected = [GOLDEN.tensor(f"vit/inter_all/{j}") for j in GOLDEN.cases("vit/inter_all/")]
    assert_close(vit.get_intermediate_layers(x, n=len(expected)), expected)


def test_drop_path_draws_and_rates():
    rates = GOLDEN["drop_path/rates"]
    model = VisionTransformer(
        img_size=8,
        patch_size=8,
        embed_dim=8,
        depth=len(rates),
        num_heads=1,
        drop_path_rate=GOLDEN.scalar("drop_path/rate_arg"),
    )
    np.testing.assert_allclose([block.drop_path.drop_prob for block in model.blocks], rates, atol=1e-7)

    x = GOLDEN.tensor("drop_path/x")
    for key in GOLDEN.keys("drop_path/out_p"):
        torch.manual_seed(GOLDEN.scalar("drop_path/seed"))
        assert_close(DropPath(float(key.removeprefix("drop_path/out_p")))(x), GOLDEN.tensor(key))


def test_truncated_normal_draws():
    for key in GOLDEN.keys("trunc_normal/std"):
        expected = GOLDEN.tensor(key)
        torch.manual_seed(GOLDEN.scalar("trunc_normal/seed"))
        drawn = trunc_normal_(torch.empty_like(expected), std=float(key.removeprefix("trunc_normal/std")))
        torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=1e-7)


def test_every_head_of_the_configuration_is_there():
    assert CONFIG["heads_cases"] == HEADS


@pytest.mark.parametrize("case", HEADS)
def test_head_outputs_and_gradients(case):
    state = GOLDEN.state_dict(f"head/{case}/sd/")
    sizes = CONFIG["head"]
    head = DINOHead(
        sizes["in"],
        sizes["out"],
        use_bn=any(name.endswith("running_mean") for name in state),
        norm_last_layer=not GOLDEN.scalar(f"head/{case}/requires_grad_g"),
        nlayers=sum(value.ndim == 2 for name, value in state.items() if name.startswith("mlp")),
        hidden_dim=sizes["hid"],
        bottleneck_dim=sizes["bot"],
    )
    assert list(head.state_dict()) == list(state)
    head.load_state_dict(state)
    assert head.last_layer.weight_g.requires_grad == bool(GOLDEN.scalar(f"head/{case}/requires_grad_g"))

    x = GOLDEN.tensor("head/x")
    assert_close(head.eval()(x), GOLDEN.tensor(f"head/{case}/out_eval"))
    out = head.train()(x)
    assert_close(out, GOLDEN.tensor(f"head/{case}/out_train"))

    out.square().mean().backward()
    gradients = {name: p.grad for name, p in head.named_parameters() if p.grad is not None}
    names = GOLDEN[f"head/{case}/gradcheck/names"]
    assert set(gradients) == set(names)
    expected = GOLDEN.tensor(f"head/{case}/gradcheck/values")
    torch.testing.assert_close(checksums(gradients, names), expected, rtol=1e-4, atol=1e-5)
    for key in GOLDEN.keys(f"head/{case}/grad_"):
        name = f"last_layer.{key.removeprefix(f'head/{case}/grad_')}"
        torch.testing.assert_close(gradients[name], GOLDEN.tensor(key), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("views", ["one by one", "joined per resolution"])
def test_multicrop_wrapper_orders_outputs_by_crop(views):
    state = GOLDEN.state_dict("multicrop/sd/")
    student = make_wrapped(TRAIN_CASES[list(TRAIN_CASES)[-1]]["norm"])
    student.load_state_dict(state)
    crops = [GOLDEN.tensor(f"multicrop/{case}") for case in GOLDEN.cases("multicrop/") if case.startswith("x")]
    if views == "joined per resolution":
        sides = dict.fromkeys(crop.shape[-1] for crop in crops)
        crops = [torch.cat([crop for crop in crops if crop.shape[-1] == side]) for side in sides]
    assert_close(student.eval()(crops), GOLDEN.tensor("multicrop/out"))


def make_loss() -> DINOLoss:
    out_dim, num_crops, warmup_temp, temp, warmup_epochs, num_epochs, _ = GOLDEN["loss/meta_f64"]
    return DINOLoss(int(out_dim), int(num_crops), warmup_temp, temp, int(warmup_epochs), int(num_epochs))


def test_teacher_temperature():
    np.testing.assert_allclose(make_loss().teacher_temps, GOLDEN["loss/teacher_temp_schedule_f64"], rtol=1e-12)


@pytest.mark.parametrize("epoch", [case for case in GOLDEN.cases("loss/") if case.startswith("epoch")])
def test_loss_centre_and_gradient(epoch):
    criterion = make_loss()
    for step in GOLDEN.cases(f"loss/{epoch}/"):
        prefix = f"loss/{epoch}/{step}"
        student = GOLDEN.tensor(f"{prefix}/student").requires_grad_()
        loss = criterion(student, GOLDEN.tensor(f"{prefix}/teacher"), int(epoch.removeprefix("epoch")))
        torch.testing.assert_close(loss.detach(), GOLDEN.tensor(f"{prefix}/loss").view(()), rtol=1e-5, atol=0)
        torch.testing.assert_close(criterion.center, GOLDEN.tensor(f"{prefix}/center_after"), rtol=1e-5, atol=1e-6)
        if f"{prefix}/grad_student" in GOLDEN:
            loss.backward()
            torch.testing.assert_close(student.grad, GOLDEN.tensor(f"{prefix}/grad_student"), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("case", GOLDEN.cases("sched/"))
def test_cosine_schedules(case):
    base, final, epochs, steps, warmup_epochs, start = GOLDEN[f"sched/{case}/args_f64"]
    values = cosine_schedule(base, final, int(epochs), int(steps), int(warmup_epochs), start)
    np.testing.assert_allclose(values, GOLDEN[f"sched/{case}/values_f64"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("threshold", [case for case in GOLDEN.cases("clip/") if case != "before"])
def test_each_gradient_tensor_is_clipped_on_its_own(threshold):
    parameters = [nn.Parameter(GOLDEN.tensor(f"clip/before/{i}")) for i in GOLDEN.cases("clip/before/")]
    for parameter in parameters:
        parameter.grad = parameter.detach().clone()
    norms = clip_grad_norm_per_tensor_(parameters, float(threshold))
    torch.testing.assert_close(norms, GOLDEN.tensor(f"clip/{threshold}/norms"), rtol=1e-5, atol=0)
    for i, parameter in enumerate(parameters):
        expected = GOLDEN.tensor(f"clip/{threshold}/after/{i}")
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-7)


def make_wrapped(norm_last_layer: bool) -> MultiCropWrapper:
    sizes = CONFIG["train"]
    backbone = make_vit(*(sizes[key] for key in ("img", "patch", "dim", "depth", "heads")))
    head = DINOHead(
        sizes["dim"],
        sizes["out"],
        norm_last_layer=norm_last_layer,
        hidden_dim=sizes["hid"],
        bottleneck_dim=sizes["bot"],
    )
    return MultiCropWrapper(backbone, head)


def parameter_tolerance(name: str, role: str, optimizer: str) -> float:
    # The key third of this bias has a gradient of zero; Adam divides rounding noise by its own size.
    if name.endswith("attn.qkv.bias") and optimizer == "adamw":
        return 5e-3 if role == "student" else 1e-3
    return 1e-5


def load_batch(it: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Views of one iteration as the training loader gives them: one tensor per resolution, labels, indices."""
    crops = [GOLDEN.tensor(f"train/images/it{it}/{crop}") for crop in GOLDEN.cases(f"train/images/it{it}/")]
    assert len(crops) == 2 + CONFIG["train"]["nloc"]
    groups = [torch.cat(group) for group in (crops[:2], crops[2:]) if group]
    return groups, torch.zeros(len(crops[0])), torch.arange(len(crops[0]))


@pytest.mark.parametrize("case", TRAIN_CASES.values(), ids=TRAIN_CASES)
def test_training_follows_the_reference_step_by_step(case, tmp_path):
    sizes, name = CONFIG["train"], case["name"]
    epochs, steps = sizes["epochs"], sizes["nit"]
    student, teacher = make_wrapped(case["norm"]), make_wrapped(True)
    student.load_state_dict(GOLDEN.state_dict("train/init_sd/"))
    teacher.load_state_dict(student.state_dict())
    optimizer = build_optimizer(case["opt"], param_groups_no_decay_on_bias_and_norm(student))
    criterion = DINOLoss(sizes["out"], 2 + sizes["nloc"], sizes["wt"], sizes["tt"], sizes["we"], epochs)
    schedules = Schedules(
        lr=cosine_schedule(case["lr"] * sizes["B"] / 256, sizes["min_lr"], epochs, steps, warmup_epochs=1),
        weight_decay=cosine_schedule(sizes["wd"], sizes["wd_end"], epochs, steps),
        momentum=cosine_schedule(sizes["mom"], 1.0, epochs, steps),
    )
    for key, values in (("lr", schedules.lr), ("wd", schedules.weight_decay), ("mom", schedules.momentum)):
        np.testing.assert_allclose(values, GOLDEN[f"train/{name}/{key}_f64"], rtol=0, atol=1e-12)

    for epoch in range(epochs):
        train_one_epoch(
            student,
            teacher,
            criterion,
            [load_batch(it) for it in range(epoch * steps, (epoch + 1) * steps)],
            optimizer,
            schedules,
            LoopRun(tmp_path, steps, epochs, epoch, student=student),
            clip_grad=case["clip"],
            freeze_last_layer=case["freeze"],
        )
        for role, network in (("student", student), ("teacher", teacher)):
            names = GOLDEN[f"train/{name}/epoch{epoch}/{role}/names"]
            values = GOLDEN.tensor(f"train/{name}/epoch{epoch}/{role}/values")
            parameters = dict(network.named_parameters())
            assert set(names) == set(parameters)
            for key, found, expected in zip(names, checksums(parameters, names), values, strict=True):
                atol = parameter_tolerance(key, role, case["opt"])
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol, msg=lambda m, key=key: f"{key}: {m}")
        center = GOLDEN.tensor(f"train/{name}/epoch{epoch}/center")
        torch.testing.assert_close(criterion.center, center, rtol=1e-4, atol=1e-5)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(losses, GOLDEN[f"train/{name}/losses"], rtol=1e-4)

    for key in GOLDEN.keys(f"train/{name}/final_"):
        role, tensor = key.removeprefix(f"train/{name}/final_").split("_", 1)
        parameter = find_final_tensor({"student": student, "teacher": teacher}[role], tensor)
        torch.testing.assert_close(parameter, GOLDEN.tensor(key), rtol=1e-4, atol=1e-5)


def find_final_tensor(network: MultiCropWrapper, abbreviation: str) -> Tensor:
    """``cls``, ``weight_v`` or ``blk{i}_qkv``: the file's short names of a few complete tensors."""
    if abbreviation.startswith("blk"):
        block, _ = abbreviation.removeprefix("blk").split("_")
        return network.backbone.blocks[int(block)].attn.qkv.weight.detach()
    if abbreviation == "cls":
        return network.backbone.cls_token.detach()
    return getattr(network.head.last_layer, abbreviation).detach()


def test_parameter_groups():
    student = make_wrapped(next(iter(TRAIN_CASES.values()))["norm"])
    names = {id(p): name for name, p in student.named_parameters()}
    for i, group in enumerate(param_groups_no_decay_on_bias_and_norm(student)):
        assert [names[id(p)] for p in group["params"]] == list(GOLDEN[f"train/param_group{i}_names"])


def test_every_group_of_the_file_has_a_test():
    elsewhere = (*test_dino_protocols.GROUPS, "attn_th/", "aug/")  # test_dino_attention.py, test_dino_augmentation.py
    assert [key for key in GOLDEN.arrays if not key.startswith((*GROUPS, *elsewhere))] == []


def test_every_array_was_compared():
    """Runs last: fails when an array of these groups was never read."""
    assert [key for group in GROUPS for key in GOLDEN.unread(group)] == []
