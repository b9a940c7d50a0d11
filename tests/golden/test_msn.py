"""MSN's network, loss, schedules, training and evaluations against arrays measured on the reference.

Every size, parameter and case name comes from the file, so the tests hold for any file of this layout.
"""

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from msn import vision_transformer
from msn.linear_eval import LinearClassifier, build_optimizer, train_one_epoch
from msn.logistic_eval import LowShotClassifier, preprocess
from msn.losses import MSNLoss
from msn.main import param_groups
from msn.main import train_one_epoch as pretrain_one_epoch
from msn.schedules import Schedules, learning_rates, linear, weight_decays
from msn.vision_transformer import ProjectionHead, VisionTransformer, interpolate_positions
from shared import distributed
from shared.optimisation.optim import build_optimizer as build_adamw
from shared.optimisation.schedules import cosine_schedule
from shared.sinkhorn import sinkhorn_knopp
from tests.golden.golden_file import GoldenFile, batch_of
from tests.golden.hash_fill import seed_filled
from tests.loop_run import LoopRun
from tests.processes import run_processes
from tests.run_folders import lines, losses

GOLDEN = GoldenFile("msn")
RANKS = len({key.split("/")[-1] for key in GOLDEN.keys("loss_dist/") if "/in/anchors_r" in key})

assert_close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


def make_vit(case: str) -> VisionTransformer:
    img, patch, dim, depth, heads, mlp_ratio, hidden, out, use_bn = GOLDEN[f"{case}/in/arch"].tolist()
    encoder = VisionTransformer(int(img), int(patch), 3, int(dim), int(depth), int(heads), mlp_ratio)
    encoder.fc = ProjectionHead(int(dim), int(hidden), int(out), bool(use_bn))
    load(encoder, GOLDEN.state_dict(f"{case}/in/sd/"))
    return encoder


def load(network: nn.Module, state: dict[str, Tensor]) -> None:
    """The file has counters as float32, some of them with a dimension."""
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    network.load_state_dict({name: value.view(shapes[name]) for name, value in state.items()})


# --- Loss -------------------------------------------------------------------------------------------------------------


def make_loss(case: str) -> MSNLoss:
    return MSNLoss(
        num_proto=len(GOLDEN[f"{case}/in/prototypes"]),
        temperature=GOLDEN.number(case, "tau"),
        me_max=bool(GOLDEN.number(case, "me_max")),
        memax_weight=GOLDEN.number(case, "memax_weight"),
        use_ent=bool(GOLDEN.number(case, "use_entropy")),
        ent_weight=GOLDEN.number(case, "ent_weight"),
        use_sinkhorn=bool(GOLDEN.number(case, "use_sinkhorn")),
        label_smoothing=GOLDEN.number(case, "label_smoothing"),
    )


def loss_and_gradients(
    criterion: MSNLoss, anchors: Tensor, targets: Tensor, prototypes: Tensor, sharpen: float
) -> dict[str, Tensor]:
    """What the file has of a loss, under its names."""
    anchors, prototypes = anchors.clone().requires_grad_(), prototypes.clone().requires_grad_()
    terms = criterion(anchors, targets, prototypes, sharpen)
    terms.total.backward()
    return {
        "ploss": terms.cross_entropy.detach(),
        "me_max_loss": terms.me_max.detach(),
        "entropy": terms.entropy.detach(),
        "total": terms.total.detach(),
        "targets": terms.targets.repeat(len(anchors) // len(targets), 1),
        "np": torch.tensor(float(len(terms.targets.argmax(dim=1).unique()))),
        "max_t": terms.targets.amax(dim=1).mean(),
        "min_t": terms.targets.amin(dim=1).mean(),
        "grad_anchors": anchors.grad,
        "grad_prototypes": prototypes.grad,
        "grad_prototypes_allreduced": distributed.all_reduce_sum(prototypes.grad),
    }


@pytest.mark.parametrize("case", GOLDEN.families("loss"))
def test_loss_targets_and_gradients(case):
    arguments = (GOLDEN.tensor(f"{case}/in/{name}") for name in ("anchors", "targets_z", "prototypes"))
    found = loss_and_gradients(make_loss(case), *arguments, GOLDEN.number(case, "T"))
    views = GOLDEN.scalar(f"{case}/in/num_views")
    assert len(found["targets"]) == views * len(GOLDEN[f"{case}/in/targets_z"])
    for key in GOLDEN.keys(f"{case}/out/"):
        name = key.removeprefix(f"{case}/out/")
        expected = GOLDEN.tensor(key)
        assert_close(found[name].view(expected.shape), expected, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def of_rank(rank: int, case: str) -> dict[str, Tensor]:
    torch.manual_seed(rank)
    arguments = (GOLDEN.tensor(f"{case}/in/{name}") for name in (f"anchors_r{rank}", f"targets_z_r{rank}"))
    prototypes = GOLDEN.tensor(f"{case}/in/prototypes")
    return loss_and_gradients(make_loss(case), *arguments, prototypes, GOLDEN.number(case, "T"))


def sinkhorn_of_rank(rank: int, case: str) -> dict[str, Tensor]:
    return {"Q": balanced(GOLDEN.tensor(f"{case}/in/P_r{rank}"), case)}


def balanced(probabilities: Tensor, case: str) -> Tensor:
    log_p = probabilities.log().clamp_min(-1e4)
    return sinkhorn_knopp(log_p, epsilon=1.0, num_iters=GOLDEN.number(case, "num_itr"))


def everything_of_rank(rank: int) -> dict[str, dict[str, Tensor]]:
    found = {case: of_rank(rank, case) for case in GOLDEN.families("loss_dist")}
    return found | {case: sinkhorn_of_rank(rank, case) for case in GOLDEN.families("sinkhorn_dist")}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, dict[str, Tensor]]]:
    return run_processes(everything_of_rank, RANKS)


@pytest.mark.parametrize("case", GOLDEN.families("loss_dist", "sinkhorn_dist"))
def test_two_ranks(case, two_ranks):
    for key in GOLDEN.keys(f"{case}/out/"):
        rank, name = key.removeprefix(f"{case}/out/r").split("_", 1)
        expected = GOLDEN.tensor(key)
        found = two_ranks[int(rank)][case][name].view(expected.shape)
        assert_close(found, expected, msg=lambda m, key=key: f"{key}: {m}")
    for key in GOLDEN.keys(f"{case}/in/"):
        assert GOLDEN[key].size  # the ranks have read them in processes of their own


@pytest.mark.parametrize("case", GOLDEN.families("sinkhorn"))
def test_sinkhorn_of_probabilities(case):
    assert_close(balanced(GOLDEN.tensor(f"{case}/in/P"), case), GOLDEN.tensor(f"{case}/out/Q"), atol=1e-6)


# --- Network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN.families("interp"))
def test_positions_are_interpolated_as_in_the_reference(case):
    side = round(GOLDEN.number(case, "num_patches") ** 0.5)
    found = interpolate_positions(GOLDEN.tensor(f"{case}/in/pos_embed"), side, side)
    assert_close(found, GOLDEN.tensor(f"{case}/out/pos"))


@pytest.fixture
def masks(monkeypatch) -> list[Tensor]:
    """The masks that have been drawn."""
    drawn: list[Tensor] = []
    draw = vision_transformer.draw_kept_patches

    def recording(num_patches: int, patch_drop: float) -> Tensor:
        drawn.append(draw(num_patches, patch_drop))
        return drawn[-1]

    monkeypatch.setattr(vision_transformer, "draw_kept_patches", recording)
    return drawn


@pytest.mark.parametrize("case", GOLDEN.families("vit"))
@torch.no_grad()
def test_encoder_outputs_and_masks(case, masks):
    encoder = make_vit(case).eval()
    seed = GOLDEN.number(case, "seed")
    x, small = GOLDEN.tensor(f"{case}/in/x"), GOLDEN.tensor(f"{case}/in/x_small")
    close = partial(assert_close, atol=2e-5)

    def expect(name: str, found: Tensor) -> None:
        close(found, GOLDEN.tensor(f"{case}/out/{name}"), msg=lambda m: f"{name}: {m}")

    def expect_mask(name: str) -> None:
        assert masks[-1].tolist() == GOLDEN[f"{case}/out/{name}"].tolist()

    expect("eval_h", encoder(x))
    expect("eval_h_small", encoder(small))
    expect("blocks1", encoder.forward_blocks(x, 1))
    expect("blocks2", encoder.forward_blocks(x, 2))
    expect("eval_cls", encoder.forward_backbone(x))
    expect("eval_cls_small", encoder.forward_backbone(small))
    expect("attn", encoder.get_last_selfattention(x))
    layers = encoder.get_intermediate_layers(x, 2)
    expect("last2_avgpool", torch.cat([*(layer[:, 0] for layer in layers), layers[-1][:, 1:].mean(dim=1)], dim=1))

    for j, patch_drop in enumerate(GOLDEN[f"{case}/in/patch_drops"].tolist()):
        torch.manual_seed(seed + j)
        expect(f"drop{j}_h", encoder(x, round(patch_drop, 6)))
        expect_mask(f"drop{j}_keep")
    torch.manual_seed(seed + 100)
    expect("multi_h", encoder([x, x.flip(0), small, small.flip(3)], 0.5))
    expect_mask("multi_keep")
    torch.manual_seed(seed + 200)
    expect("blocks_masked", encoder.forward_blocks(x, 1, 0.25))
    expect_mask("blocks_masked_keep")
    assert len(masks) == len(GOLDEN[f"{case}/in/patch_drops"]) + 2  # one for the first size only

    if f"{case}/out/train_h" in GOLDEN:
        found = encoder.train()(x)
        close(found, GOLDEN.tensor(f"{case}/out/train_h"), atol=5e-5)
        for norm in ("bn1", "bn2"):
            for statistic in ("running_mean", "running_var"):
                expect(f"train_{norm}_{statistic}", getattr(getattr(encoder.fc, norm), statistic))


@pytest.mark.parametrize("case", GOLDEN.families("proc"))
@torch.no_grad()
def test_full_size_encoders(case, masks):
    encoder = vision_transformer.build(["deit_small", "deit_tiny"][GOLDEN.number(case, "arch_id")])
    encoder.fc = ProjectionHead(encoder.embed_dim, GOLDEN.number(case, "hidden_dim"), GOLDEN.number(case, "output_dim"))
    encoder.load_state_dict(seed_filled(encoder.state_dict(), GOLDEN.number(case, "base_seed")))
    encoder.eval()
    seed = GOLDEN.number(case, "x_seed")
    large, small = (
        torch.from_numpy(np.random.RandomState(seed + i).standard_normal((2, 3, side, side)).astype(np.float32))
        for i, side in enumerate((224, 96))
    )
    found = {
        "h224": encoder(large),
        "h96": encoder(small),
        "cls_blocks1_224": encoder.forward_blocks(large),
        "cls224": encoder.forward_backbone(large),
    }
    torch.manual_seed(GOLDEN.number(case, "seed"))
    found["h224_drop"] = encoder(large, GOLDEN.number(case, "patch_drop"))
    found["keep"] = masks[-1].float()
    for key in GOLDEN.keys(f"{case}/out/"):
        name = key.removeprefix(f"{case}/out/")
        assert_close(found[name], GOLDEN.tensor(key), atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


# --- Training ---------------------------------------------------------------------------------------------------------


def make_schedules(case: str, momentum: tuple[float, float] = (0.996, 1.0)) -> Schedules:
    value = partial(GOLDEN.number, case)
    length = (value("epochs"), value("ipe"))
    return Schedules(
        lr=learning_rates(value("start_lr"), value("lr"), value("final_lr"), *length, value("warmup")),
        weight_decay=weight_decays(value("wd"), value("final_wd"), *length),
        momentum=linear(*momentum, *length),
        sharpen=linear(value("start_sharpen"), value("final_sharpen"), *length),
    )


@pytest.mark.parametrize("case", GOLDEN.families("sched"))
def test_schedules(case):
    schedules = make_schedules(case)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    close(schedules.lr, GOLDEN[f"{case}/out/lr"])
    close(schedules.weight_decay, GOLDEN[f"{case}/out/wd"])
    close(schedules.momentum, GOLDEN[f"{case}/out/momentum"])
    close(1 - schedules.momentum, GOLDEN[f"{case}/out/one_minus_momentum"])
    close(schedules.sharpen, GOLDEN[f"{case}/out/T"])

    encoder = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    optimizer = build_adamw("adamw", param_groups(encoder, nn.Parameter(torch.zeros(3, 2))))
    for step, expected in enumerate(GOLDEN[f"{case}/out/groups_lr_wd"]):
        schedules.apply(optimizer, step)
        groups = optimizer.param_groups
        close([*(group["lr"] for group in groups), *(group["weight_decay"] for group in groups)], expected)


def without_noise(name: str, values: Tensor, has_bn: bool) -> tuple[Tensor, Tensor]:
    """The entries on which the loss depends, and the others: rounding noise, which Adam enlarges to whole steps.

    Keys may be shifted by a constant; with batch norms in the head so may what comes before them.
    """
    shifted = ("norm.bias", "fc.fc1.bias", "fc.fc2.bias", "fc.bn1.running_mean", "fc.bn2.running_mean")
    values = values.float().flatten()
    if name.endswith("attn.qkv.bias"):
        queries, keys, values = values.chunk(3)
        return torch.cat([queries, values]), keys
    if has_bn and name.split("/")[-1] in shifted:
        return values[:0], values
    return values, values[:0]


@pytest.mark.parametrize("case", GOLDEN.families("train"))
def test_training_follows_the_reference_step_by_step(case, tmp_path, monkeypatch):
    value = partial(GOLDEN.number, case)
    epochs, steps, views = value("epochs"), value("ipe"), value("rand_views") + value("focal_views")
    torch.manual_seed(value("seed"))
    keep = iter(GOLDEN.tensor(f"{case}/out/keep").long())
    monkeypatch.setattr(vision_transformer, "draw_kept_patches", lambda num_patches, patch_drop: next(keep))
    batches = []
    for i in range(steps):
        batches.append(batch_of([GOLDEN.tensor(f"{case}/in/img/s{i}_v{j}") for j in range(1 + views)]))

    encoder, target_encoder = make_vit(case), make_vit(case).requires_grad_(False)
    prototypes = nn.Parameter(GOLDEN.tensor(f"{case}/in/prototypes"))
    optimizer = build_adamw("adamw", param_groups(encoder, prototypes))
    criterion = MSNLoss(
        len(prototypes),
        value("tau"),
        memax_weight=value("memax_weight"),
        use_ent=bool(value("use_ent")),
        ent_weight=value("ent_weight"),
        use_sinkhorn=bool(value("use_sinkhorn")),
        label_smoothing=value("label_smoothing"),
    )
    schedules = make_schedules(case)
    np.testing.assert_allclose(schedules.lr, GOLDEN[f"{case}/out/lr"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(schedules.weight_decay, GOLDEN[f"{case}/out/wd"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(schedules.sharpen, GOLDEN[f"{case}/out/T"], rtol=1e-5, atol=1e-7)

    def look() -> dict[str, Tensor]:
        state = {f"grad_clipped/{name}": p.grad.clone() for name, p in encoder.named_parameters()}
        state |= {"grad/prototypes": prototypes.grad.clone(), "prototypes": prototypes.detach().clone()}
        for role, network in (("enc", encoder), ("tgt", target_encoder)):
            state |= {f"{role}/{name}": value.clone() for name, value in network.state_dict().items()}
        return state

    states = []
    for epoch in range(epochs):
        run = LoopRun(tmp_path, steps, epochs, epoch, look=look, encoder=encoder)
        pretrain_one_epoch(
            encoder,
            target_encoder,
            prototypes,
            criterion,
            batches,
            optimizer,
            schedules,
            run,
            patch_drop=value("patch_drop"),
            clip_grad=value("clip_grad"),
        )
        states += run.seen

    written = lines(tmp_path)
    found, expected = np.array([[x["msn"], x["me_max"], x["ent"]] for x in written]), GOLDEN[f"{case}/out/losses"]
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found, expected, rtol=5e-3, atol=5e-3)
    has_bn = bool(GOLDEN[f"{case}/in/arch"][-1])
    steps_taken = int(GOLDEN[f"{case}/in/snap_steps"].max())
    for key in GOLDEN.keys(f"{case}/out/step"):
        step, name = key.removeprefix(f"{case}/out/step").split("/", 1)
        found, found_noise = without_noise(name, states[int(step) - 1][name], has_bn)
        expected, noise = without_noise(name, GOLDEN.tensor(key), has_bn)
        if name.startswith("grad"):
            assert (found - expected).norm() <= 1e-3 * expected.norm() + 1e-7, key
            assert all(part.abs().max() < 1e-4 for part in (found_noise, noise) if len(part)), key
        else:
            # in the mean: where a gradient is nearly 0, Adam makes much of its rounding
            assert (found - expected).norm() <= 1e-4 * (found.numel() ** 0.5 + expected.norm()), key
            assert_close(found_noise, noise, atol=2 * steps_taken * float(schedules.lr.max()), rtol=0)


# --- Evaluations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN.families("lineval"))
def test_linear_classifier_and_its_optimiser(case, tmp_path):
    state = GOLDEN.state_dict(f"{case}/in/sd/")
    steps, total_steps = GOLDEN.number(case, "steps"), GOLDEN.number(case, "total_steps")
    classifier = LinearClassifier(
        len(state["norm.weight"]), GOLDEN.number(case, "num_classes"), GOLDEN.number(case, "normalize")
    )
    classifier.load_state_dict(state)
    optimizer = build_optimizer(classifier, GOLDEN.number(case, "lr"), GOLDEN.number(case, "wd"))
    lrs = cosine_schedule(GOLDEN.number(case, "lr"), 0.0, 1, total_steps)
    np.testing.assert_allclose(lrs[:steps], GOLDEN[f"{case}/out/lr"], rtol=1e-5)

    batches = [(GOLDEN.tensor(f"{case}/in/x{i}"), GOLDEN.tensor(f"{case}/in/y{i}").long()) for i in range(steps)]
    assert_close(classifier(batches[0][0]).detach(), GOLDEN.tensor(f"{case}/out/logits0"))
    loader = [([x], labels, None) for x, labels in batches]
    train_one_epoch(classifier, nn.Identity(), loader, optimizer, lrs, LoopRun(tmp_path, steps))
    np.testing.assert_allclose(losses(tmp_path), GOLDEN[f"{case}/out/losses"], rtol=1e-4, atol=1e-5)
    for name, expected in GOLDEN.state_dict(f"{case}/out/final/").items():
        assert_close(classifier.state_dict()[name], expected)


@pytest.mark.parametrize("case", GOLDEN.families("logreg"))
def test_logistic_regression_solves_the_published_objective(case):
    train, test = GOLDEN.tensor(f"{case}/in/X"), GOLDEN.tensor(f"{case}/in/X_test")
    labels, test_labels = GOLDEN.tensor(f"{case}/in/y").long(), GOLDEN.tensor(f"{case}/in/y_test").long()
    for found, name in ((train, "X_pre"), (test, "X_test_pre")):
        assert_close(torch.from_numpy(preprocess(found.numpy())), GOLDEN.tensor(f"{case}/out/{name}"), atol=1e-6)
    classifier = LowShotClassifier(train, labels, GOLDEN.number(case, "lambd"))
    # the weights of a softmax without intercept are fixed by the regulariser: their mean over classes is 0
    np.testing.assert_allclose(classifier.weights, GOLDEN[f"{case}/out/W_tight"], atol=2e-2)
    logits = GOLDEN[f"{case}/out/X_test_pre"] @ classifier.weights
    np.testing.assert_allclose(logits, GOLDEN[f"{case}/out/test_logits_tight"], atol=2e-2)
    for accuracy, name in (
        (classifier.accuracy(train, labels), "train_acc"),
        (classifier.accuracy(test, test_labels), "test_acc"),
    ):
        expected = GOLDEN.scalar(f"{case}/out/{name}")
        assert abs(accuracy / 100 - expected) <= 0.04, name


def test_every_array_was_compared():
    """Runs last: fails when an array was never read."""
    assert GOLDEN.unread() == []
