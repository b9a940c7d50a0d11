"""PAWS's losses, sampler, optimiser and networks against arrays measured on the reference, on one and two processes.

Every size, parameter and case name comes from the file.
"""

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from paws import losses
from paws.augmentations import choose_recipe
from paws.encoder import WideResNetEncoder, build_encoder
from paws.evaluation import classify
from paws.heads import Encoder
from paws.optimisation import LARS, lr_schedule, parameter_groups
from paws.paws_train import train_one_epoch
from paws.support_sampler import SupportSampler
from tests.golden.golden_file import GoldenFile, batch_of
from tests.golden.hash_fill import seed_filled
from tests.loop_run import LoopRun
from tests.processes import run_processes
from tests.run_folders import lines

GOLDEN = GoldenFile("paws")
ARCHITECTURES = {0: "wide_resnet28w2", 1: "resnet50", 2: "resnet101", 3: "resnet50w2", 4: "resnet50w4"}


def close(found: Tensor, case: str, name: str, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    expected = GOLDEN.tensor(f"{case}/out/{name}").reshape(found.shape)
    torch.testing.assert_close(found.detach(), expected, rtol=rtol, atol=atol, msg=lambda m: f"{case} {name}: {m}")


# --- Losses -----------------------------------------------------------------------------------------------------------


def paws(inputs: dict[str, Tensor], tau: float, sharpening: float, me_max: bool) -> dict[str, Tensor]:
    """Losses, gradients and distributions under the names of the file."""
    anchors, supports = (inputs[name].requires_grad_() for name in ("anchors", "supports"))
    targets, target_supports, labels = (inputs[name] for name in ("target_views", "target_supports", "labels"))
    views = (anchors, supports, targets, target_supports)
    ploss, rloss, sharpened = losses.paws_loss(*views, labels, tau, sharpening, me_max)
    (ploss + rloss).backward()
    gathered, gathered_targets = (losses.distributed.all_gather(s) for s in (supports, target_supports))
    anchor_probs = losses.soft_nearest_neighbours(anchors, gathered, labels, tau)
    target_probs = losses.soft_nearest_neighbours(targets, gathered_targets, labels, tau)
    found = {
        "ploss": ploss,
        "me_max_loss": rloss,
        "total": ploss + rloss,
        "grad_anchors": anchors.grad,
        "grad_supports": supports.grad,
        "anchor_probs": anchor_probs,
        "target_probs": target_probs,
        "sharpened_target_probs": losses.sharpen(target_probs, sharpening),
        "sharpened_anchor_probs": sharpened,
    }
    return {name: value.detach() for name, value in found.items()}


def paws_parameters(case: str, large_rows: int, rows: int) -> tuple[float, float, bool]:
    assert rows == (2 + GOLDEN.number(case, "multicrop")) * large_rows // 2
    return GOLDEN.number(case, "tau"), GOLDEN.number(case, "T"), bool(GOLDEN.number(case, "me_max"))


@pytest.mark.parametrize("case", GOLDEN.families("paws"))
def test_paws(case):
    names = ("labels", "anchors", "supports", "target_views", "target_supports")
    inputs = {name: GOLDEN.tensor(f"{case}/in/{name}") for name in names}
    parameters = paws_parameters(case, len(inputs["target_views"]), len(inputs["anchors"]))
    for name, value in paws(inputs, *parameters).items():
        close(value, case, name)


def of_rank(case: str, rank: int) -> dict[str, Tensor]:
    """Inputs of a rank; those without a rank are the same for all."""
    names = [key.removeprefix(f"{case}/in/") for key in GOLDEN.keys(f"{case}/in/")]
    mine = {name.removesuffix(f"_r{rank}"): name for name in names if name.endswith(f"_r{rank}")}
    if "labels" in names:
        mine["labels"] = "labels"
    return {name: GOLDEN.tensor(f"{case}/in/{stored}") for name, stored in mine.items()}


def world_of(case: str) -> int:
    return len({name.rpartition("_r")[2] for name in GOLDEN.cases(f"{case}/in/") if "_r" in name})


def check_ranks(case: str, results: list[dict[str, Tensor]]) -> None:
    for rank, found in enumerate(results):
        for name, value in found.items():
            close(value, case, f"r{rank}_{name}")


def all_distributed(rank: int, jobs: list[tuple]) -> list[dict[str, Tensor]]:
    return [CALLS[kind](inputs[rank], *parameters) for kind, inputs, parameters in jobs]


def test_losses_of_several_processes():
    jobs = []
    for case in GOLDEN.families("paws_dist", "suncet_dist", "simclr_dist"):
        inputs = [of_rank(case, rank) for rank in range(world_of(case))]
        if case.startswith("paws"):
            parameters = paws_parameters(case, len(inputs[0]["target_views"]), len(inputs[0]["anchors"]))
        else:
            parameters = (GOLDEN.number(case, "temperature"), *sizes_of(case))
        jobs.append((case, case.split("_")[0], inputs, parameters))
    for world in {len(inputs) for _, _, inputs, _ in jobs}:
        mine = [job for job in jobs if len(job[2]) == world]
        results = run_processes(all_distributed, world, [job[1:] for job in mine])
        for (case, *_), *found in zip(mine, *results, strict=True):
            check_ranks(case, found)


def sizes_of(case: str) -> tuple[int, ...]:
    """The sizes that the file states besides the arrays."""
    return tuple(GOLDEN.number(case, name) for name in ("num_classes", "batch_size") if f"{case}/in/{name}" in GOLDEN)


def suncet(inputs: dict[str, Tensor], temperature: float, num_classes: int, batch_size: int) -> dict[str, Tensor]:
    z = inputs["z"].requires_grad_()
    assert len(z) == num_classes * batch_size
    loss = losses.suncet_loss(z, inputs["labels"], temperature)
    loss.backward()
    return {"loss": loss.detach(), "grad": z.grad}


def simclr(inputs: dict[str, Tensor], temperature: float, batch_size: int) -> dict[str, Tensor]:
    z = inputs["z"].requires_grad_()
    assert len(z) == 2 * batch_size
    loss = losses.simclr_loss(z, temperature)
    loss.backward()
    return {"loss": loss.detach(), "grad": z.grad}


CALLS = {"paws": paws, "suncet": suncet, "simclr": simclr}


@pytest.mark.parametrize("case", GOLDEN.families("suncet", "simclr"))
def test_suncet_and_simclr(case):
    kind = case.split("/")[0]
    inputs = {name: GOLDEN.tensor(f"{case}/in/{name}") for name in ("z", "labels") if f"{case}/in/{name}" in GOLDEN}
    for name, value in CALLS[kind](inputs, GOLDEN.number(case, "temperature"), *sizes_of(case)).items():
        close(value, case, name)


@pytest.mark.parametrize("case", GOLDEN.families("labels"))
def test_support_labels(case):
    matrix = losses.support_labels(
        GOLDEN.number(case, "s_batch_size"),
        GOLDEN.number(case, "num_classes"),
        GOLDEN.number(case, "world_size"),
        bool(GOLDEN.number(case, "unique_classes")),
        GOLDEN.number(case, "smoothing"),
    )
    assert matrix.shape == GOLDEN[f"{case}/out/M"].shape
    close(matrix, case, "M", atol=1e-7)


@pytest.mark.parametrize("case", GOLDEN.families("snn"))
def test_classifier_of_the_evaluation(case):
    labels = GOLDEN.tensor(f"{case}/in/labels").long()
    found = classify(
        GOLDEN.tensor(f"{case}/in/queries"),
        GOLDEN.tensor(f"{case}/in/train_embs"),
        labels,
        GOLDEN.number(case, "num_classes"),
        GOLDEN.number(case, "temp"),
    )
    close(found, case, "probs", atol=1e-6)


# --- Sampler, optimiser, schedule -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN.families("sampler"))
def test_supports_of_every_rank_and_epoch(case):
    labels, epochs = GOLDEN[f"{case}/in/targets"].astype(int), GOLDEN[f"{case}/in/outer_epochs"].astype(int)
    world_size, inner_epochs = GOLDEN.numbers(case, "world_size", "inner_epochs")
    assert labels.max() + 1 == GOLDEN.number(case, "num_classes")
    for rank in range(world_size):
        sampler = SupportSampler(
            labels,
            GOLDEN.number(case, "batch_size"),
            GOLDEN.number(case, "classes_per_batch"),
            steps_per_epoch=1,
            seed=GOLDEN.number(case, "seed"),
            rank=rank,
            world_size=world_size,
            unique_classes=bool(GOLDEN.number(case, "unique_classes")),
            inner_epochs=inner_epochs,
        )
        assert sampler.batches_per_iteration == GOLDEN.scalar(f"{case}/out/len_r{rank}")
        for iteration, epoch in enumerate(epochs.tolist()):
            batches = [batch for inner in range(inner_epochs) for batch in sampler.round(iteration, inner, epoch)]
            np.testing.assert_array_equal(batches, GOLDEN[f"{case}/out/r{rank}_iter_epoch{epoch}"])


@pytest.mark.parametrize("case", GOLDEN.families("lars"))
def test_lars(case):
    count, steps = GOLDEN.numbers(case, "n", "steps")
    params = [nn.Parameter(GOLDEN.tensor(f"{case}/in/p{k}")) for k in range(count)]
    excluded = GOLDEN[f"{case}/in/excluded"].astype(bool)
    weight_decay = GOLDEN.number(case, "wd")
    GOLDEN.number(case, "lr")  # the rate before the schedule
    optimizer = LARS(
        [
            {"params": [p for p, e in zip(params, excluded, strict=True) if not e], "weight_decay": weight_decay},
            {"params": [p for p, e in zip(params, excluded, strict=True) if e], "LARS_exclude": True},
        ],
        momentum=GOLDEN.number(case, "momentum"),
        nesterov=bool(GOLDEN.number(case, "nesterov")),
        trust_coefficient=GOLDEN.number(case, "trust") if GOLDEN.number(case, "use_lars") else 0.0,
    )
    GOLDEN.number(case, "trust")
    for step, lr in enumerate(GOLDEN[f"{case}/in/lrs"].tolist()):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for k, p in enumerate(params):
            p.grad = GOLDEN.tensor(f"{case}/in/g{k}_s{step}")
        optimizer.step()
        for k, p in enumerate(params):
            close(p, case, f"p{k}_after_s{step}", atol=1e-6)
    assert steps == step + 1


@pytest.mark.parametrize("case", GOLDEN.families("sched"))
def test_learning_rate_of_every_step(case):
    found = lr_schedule(*GOLDEN.numbers(case, "start_lr", "lr", "final_lr", "warmup", "epochs", "ipe"))
    np.testing.assert_allclose(found, GOLDEN[f"{case}/out/lr"], rtol=1e-5, atol=1e-6)


# --- Networks ---------------------------------------------------------------------------------------------------------


def small_encoder(case: str) -> Encoder:
    kind, depth, widen, embed_dim, output_dim, use_pred = GOLDEN[f"{case}/in/arch"].astype(int).tolist()
    assert kind == 0
    encoder = WideResNetEncoder(depth, widen, output_dim=output_dim, use_pred_head=bool(use_pred))
    assert encoder.embed_dim == embed_dim
    encoder.load_state_dict(seed_filled(encoder.state_dict(), GOLDEN.number(case, "sd_base")))
    return encoder


def shares_of_files_names(encoder: Encoder, case: str) -> None:
    stored = GOLDEN.state_dict(f"{case}/in/sd/")
    if stored:
        state = encoder.state_dict()
        assert list(stored) == list(state)
        for name, value in stored.items():
            torch.testing.assert_close(state[name].float(), value, rtol=0, atol=1e-7)


@pytest.mark.parametrize("case", GOLDEN.families("wrn"))
def test_wide_resnet(case):
    encoder = small_encoder(case)
    shares_of_files_names(encoder, case)
    large, small = GOLDEN.tensor(f"{case}/in/x"), GOLDEN.tensor(f"{case}/in/x_small")
    views = [large, large.flip(0), small]
    with torch.no_grad():
        for name, value in zip(("eval_h", "eval_z"), encoder.eval()(views), strict=True):
            close(value, case, name, atol=2e-5)
        close(encoder.forward_backbone(large), case, "eval_backbone", atol=2e-5)
        for name, value in zip(("train_h", "train_z"), encoder.train()(views), strict=True):
            close(value, case, name, atol=1e-3)
    state = encoder.state_dict()
    statistics = {name for name in state if name.endswith(("running_mean", "running_var"))}
    assert statistics == set(GOLDEN.state_dict(f"{case}/out/train_buf/"))
    for name in statistics:
        close(state[name], case, f"train_buf/{name}", atol=1e-4)


@pytest.mark.parametrize("case", GOLDEN.families("proc"))
def test_published_networks(case):
    name = ARCHITECTURES[GOLDEN.number(case, "arch_id")]
    encoder = build_encoder(name, GOLDEN.number(case, "output_dim"), bool(GOLDEN.number(case, "use_pred")))
    encoder.load_state_dict(seed_filled(encoder.state_dict(), GOLDEN.number(case, "base_seed")))
    encoder.eval()
    seed = GOLDEN.number(case, "x_seed")
    large, small = (
        torch.from_numpy(np.random.RandomState(seed + i).standard_normal((2, 3, side, side)).astype(np.float32))
        for i, side in enumerate(GOLDEN.numbers(case, "size", "small"))
    )
    with torch.no_grad():
        h, z = encoder([large, small])
        found = {"h": h, "z": z, "backbone": encoder.forward_backbone(large)}
    for output, value in found.items():
        largest = np.abs(GOLDEN[f"{case}/out/{output}"]).max().item()
        close(value, case, output, rtol=0, atol=1e-4 * largest)


# --- Training ---------------------------------------------------------------------------------------------------------


def close_in_norm(found: Tensor, key: str, tolerance: float) -> None:
    """Relative L2 error; of large tensors the file may hold [sum, sum of magnitudes] only."""
    expected = GOLDEN.tensor(key).double()
    found = found.detach().double()
    if expected.shape != found.shape:
        assert expected.shape == (2,) and found.numel() >= 2000
        sums = torch.stack([found.sum(), found.abs().sum()])
        assert (sums - expected).abs().max() <= 1e-3 * expected[1], key
        return
    assert (found - expected).norm() <= tolerance * expected.norm() + 1e-6, key


@pytest.mark.parametrize("case", GOLDEN.families("train"))
def test_training_follows_the_reference_step_by_step(case, tmp_path):
    encoder = small_encoder(case)
    epochs, ipe = GOLDEN.numbers(case, "epochs", "ipe")
    small, views = GOLDEN.numbers(case, "multicrop", "supervised_views")
    batches, supports = [], []
    for i in range(ipe):
        u = [GOLDEN.tensor(f"{case}/in/u/s{i}_v{j}") for j in range(2 + small)]
        assert len(u[0]) == GOLDEN.number(case, "unsupervised_batch_size")
        batches.append(batch_of(u))
        s = [GOLDEN.tensor(f"{case}/in/s/s{i}_v{j}") for j in range(views)]
        supports.append(([torch.cat(s)], None, None))
    labels = losses.support_labels(
        GOLDEN.number(case, "supervised_imgs_per_class"),
        GOLDEN.number(case, "classes_per_batch"),
        unique_classes=bool(GOLDEN.number(case, "unique_classes")),
        smoothing=GOLDEN.number(case, "label_smoothing"),
        views=views,
    )
    criterion = partial(
        losses.paws_loss,
        labels=labels,
        temperature=GOLDEN.number(case, "tau"),
        sharpen_temperature=GOLDEN.number(case, "T"),
        me_max=bool(GOLDEN.number(case, "me_max")),
    )
    optimizer = LARS(
        parameter_groups(encoder, GOLDEN.number(case, "wd")), nesterov=bool(GOLDEN.number(case, "nesterov"))
    )
    rates = lr_schedule(*GOLDEN.numbers(case, "start_lr", "lr", "final_lr", "warmup", "epochs", "ipe"))
    np.testing.assert_allclose(rates, GOLDEN[f"{case}/out/lr"], atol=1e-6)

    def look() -> dict[str, Tensor]:
        gradients = {f"grad/{name}": p.grad.clone() for name, p in encoder.named_parameters()}
        return gradients | {name: value.clone() for name, value in encoder.state_dict().items()}

    states = []
    for epoch in range(epochs):
        run = LoopRun(tmp_path, ipe, epochs, epoch, look=look, encoder=encoder)
        both = zip(batches, supports, strict=True)
        train_one_epoch(encoder, both, criterion, optimizer, rates, choose_recipe("digits", normalize=False), run)
        states += run.seen
    found = torch.tensor([[line["ploss"], line["me_max"]] for line in lines(tmp_path)])
    expected = GOLDEN.tensor(f"{case}/out/losses")
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)  # rounding grows from step to step
    for name, _ in encoder.named_parameters():
        gradient, key = states[0][f"grad/{name}"], f"{case}/out/step1/grad/{name}"
        if GOLDEN.tensor(key).norm() < 1e-5:  # a bias before a batch norm: rounding
            assert gradient.norm() < 1e-4
        else:
            close_in_norm(gradient, key, 1e-3)
    for step in GOLDEN[f"{case}/in/snap_steps"].astype(int).tolist():
        for name in encoder.state_dict():
            close_in_norm(states[step - 1][name], f"{case}/out/step{step}/{name}", 5e-3)


def test_every_array_was_compared():
    assert GOLDEN.unread() == []
