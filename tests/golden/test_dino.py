"""DINO's network, loss, training, augmentation and evaluations against arrays measured on the reference.

Every size, parameter and case name comes from the file, so the tests hold for any file of this layout.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dino.augmentations import MEAN, STD, dino_views
from dino.eval_copy_detection import CopyDescriptor, Whitening, resize_and_normalize
from dino.eval_image_retrieval import MultiScale, score_ranks
from dino.eval_linear import FrozenFeatures
from dino.eval_video_segmentation import (
    hard_mask,
    neighborhood_window,
    normalize_frame,
    one_hot,
    patch_features,
    propagate_masks,
)
from dino.ground_truth import GroundTruth
from dino.losses import DINOLoss
from dino.main_dino import Schedules, train_one_epoch
from dino.vision_transformer import DINOHead, DropPath, VisionTransformer, trunc_normal_
from shared.evaluation.knn import knn_classify
from shared.evaluation.ranking import average_precision
from shared.images.loading import EvalDataset
from shared.images.sources import FileSource
from shared.images.views import DrawStreams, apply_fast, apply_pil, draw_view
from shared.multicrop import MultiCropWrapper, normalize_views
from shared.optimisation.optim import (
    build_optimizer,
    clip_grad_norm_per_tensor_,
    param_groups_no_decay_on_bias_and_norm,
)
from shared.optimisation.schedules import cosine_schedule
from shared.pictures.attention import attended_patches
from tests.golden.golden_file import GoldenFile, batch_of
from tests.loop_run import LoopRun
from tests.run_folders import losses

GOLDEN = GoldenFile("dino")
CONFIG = GOLDEN.json("config")
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


@pytest.fixture(scope="module")
def vit() -> VisionTransformer:
    model = make_vit(*(int(size) for size in GOLDEN["vit/meta"]))
    model.load_state_dict(GOLDEN.state_dict("vit/sd/"))
    return model.eval().requires_grad_(False)


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


def test_all_intermediate_layers(vit):
    x = GOLDEN.tensor(f"vit/{RESOLUTIONS[0]}/x")
    expected = GOLDEN.tensors("vit/inter_all/")
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
    GOLDEN.assert_checksums(f"head/{case}/gradcheck", gradients)
    for key in GOLDEN.keys(f"head/{case}/grad_"):
        name = f"last_layer.{key.removeprefix(f'head/{case}/grad_')}"
        torch.testing.assert_close(gradients[name], GOLDEN.tensor(key), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("views", ["one by one", "joined per resolution"])
def test_multicrop_wrapper_orders_outputs_by_crop(views):
    state = GOLDEN.state_dict("multicrop/sd/")
    student = make_wrapped(TRAIN_CASES[list(TRAIN_CASES)[-1]]["norm"])
    student.load_state_dict(state)
    crops = GOLDEN.tensors("multicrop/x")
    assert_close(student.eval()(crops if views == "one by one" else batch_of(crops)[0]), GOLDEN.tensor("multicrop/out"))


def make_loss() -> DINOLoss:
    out_dim, num_crops, warmup_temp, temp, warmup_epochs, num_epochs, _ = GOLDEN["loss/meta_f64"]
    return DINOLoss(int(out_dim), int(num_crops), warmup_temp, temp, int(warmup_epochs), int(num_epochs))


def test_teacher_temperature():
    np.testing.assert_allclose(make_loss().teacher_temps, GOLDEN["loss/teacher_temp_schedule_f64"], rtol=1e-12)


@pytest.mark.parametrize("epoch", GOLDEN.cases("loss/", "epoch"))
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
    parameters = [nn.Parameter(tensor) for tensor in GOLDEN.tensors("clip/before/")]
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
        crops = [GOLDEN.tensors(f"train/images/it{it}/") for it in range(epoch * steps, (epoch + 1) * steps)]
        assert {len(views) for views in crops} == {2 + sizes["nloc"]}
        train_one_epoch(
            student,
            teacher,
            criterion,
            [batch_of(views) for views in crops],
            optimizer,
            schedules,
            LoopRun(tmp_path, steps, epochs, epoch, student=student),
            clip_grad=case["clip"],
            freeze_last_layer=case["freeze"],
        )
        for role, network in (("student", student), ("teacher", teacher)):
            # The key third of this bias has a gradient of zero; Adam divides rounding noise by its own size.
            loose = {r"attn\.qkv\.bias$": 5e-3 if role == "student" else 1e-3} if case["opt"] == "adamw" else None
            parameters = dict(network.named_parameters())
            GOLDEN.assert_checksums(f"train/{name}/epoch{epoch}/{role}", parameters, loose=loose)
        center = GOLDEN.tensor(f"train/{name}/epoch{epoch}/center")
        torch.testing.assert_close(criterion.center, center, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(losses(tmp_path), GOLDEN[f"train/{name}/losses"], rtol=1e-4)

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


# --- Views ------------------------------------------------------------------------------------------------------------


def pooled_crops(apply) -> list[np.ndarray]:
    """Every view of the stored image: normalised and averaged over blocks of 8 x 8 pixels."""
    image = GOLDEN["aug/img_uint8"]
    torch_seed, python_seed = GOLDEN["aug/seeds_torch_python"].tolist()
    scales = GOLDEN["aug/scales"].tolist()
    num_crops = len(GOLDEN.keys("aug/crop"))
    streams = DrawStreams(torch_seed, python_seed)
    pooled = []
    for recipe in dino_views(scales[:2], scales[2:], num_crops - 2):
        view = draw_view(recipe, *image.shape[:2], streams)
        out = np.empty((recipe.size_px, recipe.size_px, 3), dtype=np.uint8)
        apply(image, view, recipe, out)
        (crop,) = normalize_views([torch.from_numpy(out).permute(2, 0, 1)[None]], "cpu", MEAN, STD)
        pooled.append(F.avg_pool2d(crop, 8)[0].numpy())
    return pooled


def test_the_pil_chain_makes_the_crops_of_the_reference():
    for i, crop in enumerate(pooled_crops(apply_pil)):
        np.testing.assert_allclose(crop, GOLDEN[f"aug/crop{i}_avgpool8"], atol=2e-2)


def test_the_fast_chain_makes_nearly_the_crops_of_the_reference():
    # The stored image is saturated noise, on which the coarse hue of 8-bit HSV shows most.
    for i, crop in enumerate(pooled_crops(apply_fast)):
        assert np.abs(crop - GOLDEN[f"aug/crop{i}_avgpool8"]).mean() < 0.04
        assert np.corrcoef(crop.ravel(), GOLDEN[f"aug/crop{i}_avgpool8"].ravel())[0, 1] == pytest.approx(1, abs=0.01)


# --- Evaluation -------------------------------------------------------------------------------------------------------


def test_weighted_knn():
    names = ("train_features", "train_labels", "test_features", "test_labels")
    data = [GOLDEN.tensor(f"knn/{name}") for name in names]
    cases = GOLDEN.cases("knn/", "k")
    assert cases
    for case in cases:
        k, temperature = case.removeprefix("k").split("_T")
        accuracy = knn_classify(*data, int(k), float(temperature), num_classes=CONFIG["knn"]["nc"])
        np.testing.assert_allclose(accuracy, GOLDEN[f"knn/{case}"], atol=0.01)


def test_multiscale_features(vit):
    """The reference divides by the norm of the whole batch; ours makes every row of unit length."""
    for case in GOLDEN.cases("multiscale/", "x_"):
        expected = GOLDEN.tensor(f"multiscale/{case.replace('x_', 'out_')}")
        torch.testing.assert_close(expected.norm(), torch.tensor(1.0))
        features = MultiScale(vit)(GOLDEN.tensor(f"multiscale/{case}"))
        assert_close(features, F.normalize(expected, dim=1))


def test_retrieval_scores():
    ranks = np.argsort(-GOLDEN["retrieval/sim_db_by_query"], axis=0).T
    labels = GOLDEN["retrieval/labels_0neutral_1easy_2hard_3junk"]
    relevance = [
        {name: np.flatnonzero(row == label).tolist() for label, name in ((1, "easy"), (2, "hard"), (3, "junk"))}
        for row in labels
    ]
    truth = GroundTruth([""] * ranks.shape[1], [""] * len(ranks), relevance)
    for protocol in ("medium", "hard"):
        result = score_ranks(ranks, truth, protocol)
        np.testing.assert_allclose(result.mean_ap, GOLDEN[f"retrieval/{protocol}/map"], rtol=1e-5)
        np.testing.assert_allclose(result.ap, GOLDEN[f"retrieval/{protocol}/aps"], rtol=1e-5)
        np.testing.assert_allclose(result.mean_precision, GOLDEN[f"retrieval/{protocol}/mpr"], rtol=1e-5)
        np.testing.assert_allclose(result.precision, GOLDEN[f"retrieval/{protocol}/prs"], rtol=1e-5)


def test_whitening():
    features = GOLDEN.tensor("pca/features")
    whitened = GOLDEN.tensor("pca/whitened_gram")
    rows = Whitening(features)(features[: len(whitened)])
    torch.testing.assert_close(rows @ rows.t(), whitened, rtol=1e-3, atol=1e-3)
    rows = F.normalize(rows, dim=1)
    torch.testing.assert_close(rows @ rows.t(), GOLDEN.tensor("pca/cosine_gram"), rtol=1e-3, atol=1e-4)


def test_copy_descriptors_of_image_files(vit, tmp_path):
    names = GOLDEN.cases("copy/", "img")
    for name in names:
        Image.fromarray(GOLDEN[f"copy/{name}"]).save(tmp_path / f"{name}.png")
    imsize = GOLDEN.scalar("copy/imsize")
    source = FileSource("copies", tmp_path, [f"{name}.png" for name in names])
    dataset = EvalDataset(source, lambda pixels: resize_and_normalize(pixels, imsize))
    descriptors = CopyDescriptor(vit)(torch.stack([image for image, *_ in dataset]))
    torch.testing.assert_close(descriptors, GOLDEN.tensor("copy/features"), rtol=1e-4, atol=1e-4)


def test_average_precision():
    cases = zip(GOLDEN["copy/ap_ranks"], GOLDEN["copy/ap_nres"].tolist(), GOLDEN["copy/ap_cases"].tolist(), strict=True)
    for padded, num_positives, expected in cases:
        assert average_precision(padded[padded >= 0], num_positives) == pytest.approx(expected, rel=1e-6)


def test_mask_propagation(vit):
    neighborhood, topk, height, width, num_classes = GOLDEN["vos/params"].tolist()
    num_context = len(GOLDEN.keys("vos/frame")) - 1
    frames = [GOLDEN.tensor(f"vos/frame{i}") for i in range(num_context + 1)]
    *context, target = (patch_features(vit, frame) for frame in frames)
    assert_close(target.t(), GOLDEN.tensor("vos/feat_tar"))

    window = neighborhood_window(height, width, neighborhood)
    assert torch.equal(window, GOLDEN.tensor("vos/mask_neighborhood").bool())
    masks = torch.cat([GOLDEN.tensor(f"vos/seg{i}") for i in range(num_context)])
    soft_mask = propagate_masks(target, torch.stack(context), masks, window, topk)
    assert soft_mask.shape == (num_classes, height, width)
    assert_close(soft_mask[None], GOLDEN.tensor("vos/seg_tar"))
    mismatches = hard_mask(soft_mask, CONFIG["vit"]["patch"]) != GOLDEN.tensor("vos/upsampled_normed_argmax")
    assert mismatches.float().mean() < 0.01


def test_video_frames_and_first_masks():
    half = GOLDEN.tensor("vos/color_normalize_of_half")
    torch.testing.assert_close(normalize_frame(torch.full((3, 1, 1), 0.5)), half.view(3, 1, 1), rtol=1e-5, atol=1e-6)
    masks, expected = GOLDEN.tensor("vos/one_hot_in"), GOLDEN.tensor("vos/one_hot_out")
    assert torch.equal(torch.stack([one_hot(mask, expected.shape[1]) for mask in masks]), expected)


def test_linear_features(vit):
    images = GOLDEN.tensor("vit/{}x{}/x".format(*CONFIG["res"][0]))
    for case in GOLDEN.cases("linear/"):
        n, avgpool = case.removeprefix("feat_n").split("_avg")
        features = FrozenFeatures(vit, int(n), bool(int(avgpool)))
        assert_close(features(images), GOLDEN.tensor(f"linear/{case}"))


MASKS = GOLDEN.cases("attn_th/", "mask_")


@pytest.mark.parametrize("case", MASKS)
def test_attended_patches(case):
    threshold = float(case.removeprefix("mask_"))
    attention, expected = GOLDEN.tensor("attn_th/in"), GOLDEN[f"attn_th/{case}"]
    scale = math.isqrt(expected[0].size // attention.shape[1])
    rows, columns = expected.shape[1] // scale, expected.shape[2] // scale
    mask = attended_patches(attention.unflatten(1, (rows, columns)), threshold).numpy()
    enlarged = mask.repeat(scale, axis=1).repeat(scale, axis=2)
    flipped = (enlarged != expected.astype(bool)).sum() / scale**2  # ties may fall either way
    assert flipped <= len(attention)
    np.testing.assert_array_equal(enlarged.any(axis=(1, 2)), expected.any(axis=(1, 2)))


def test_every_array_was_compared():
    assert GOLDEN.unread() == []
