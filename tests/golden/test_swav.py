"""SwAV's network, assignments, training and evaluations against arrays measured on the reference.

Every size and case name comes from the file. The file does not hold temperature, epsilon, iterations and weight decay,
which are the same in all cases of the training.
"""

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shared.evaluation.linear import validate
from shared.images.views import ViewParams, ViewRecipe, apply_fast, apply_pil
from shared.optimisation.larc import LARC
from shared.optimisation.schedules import cosine_schedule
from shared.sinkhorn import sinkhorn_knopp
from swav import losses, main_swav
from swav.eval_linear import RegLog, pool_windows
from swav.losses import EmbeddingQueue, PrototypeUsage, SwappedPrediction
from swav.resnet50 import ResNet, resnet50
from tests import run_folders
from tests.golden.golden_file import GoldenFile, batch_of
from tests.golden.hash_fill import hash_filled, hash_input
from tests.golden.small_resnet import StoredEmbeddings, small_resnet
from tests.loop_run import LoopRun
from tests.processes import run_processes

GOLDEN = GoldenFile("swav")
TEMPERATURE, EPSILON, SINKHORN_ITERATIONS, TRAIN_WEIGHT_DECAY = 0.1, 0.05, 3, 1e-4

assert_close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-5)


# --- Network ----------------------------------------------------------------------------------------------------------


STATE = GOLDEN.state_dict("resnet_small/sd/")
CROPS = GOLDEN.tensors("resnet_small/in/x")


def expected(name: str) -> Tensor:
    return GOLDEN.tensor(f"resnet_small/out/{name}")


@pytest.mark.parametrize("crops", [CROPS, batch_of(CROPS)[0]], ids=["one by one", "joined per size"])
def test_embeddings_and_scores_of_all_crops(crops):
    embeddings, scores = small_resnet(STATE).eval()(crops)
    assert_close(embeddings, expected("emb_eval"))
    assert_close(scores, expected("scores_eval"))


def test_one_tensor_is_a_list_of_one():
    embeddings, _ = small_resnet(STATE).eval()(CROPS[0])
    assert_close(embeddings, expected("emb_eval_single"))


def test_backbone_gives_pooled_features_or_the_map():
    network = small_resnet(STATE).eval()
    assert_close(network.forward_backbone(CROPS[0]), expected("pooled"))
    trunk = {key: value for key, value in STATE.items() if not key.startswith(("projection_head", "prototypes"))}
    bare = ResNet([1, 1, 1, 1], width_per_group=len(STATE["conv1.weight"]), eval_mode=True).eval()
    bare.load_state_dict(trunk)
    assert_close(bare(CROPS[0]), expected("layer4_map"))


def test_training_mode_has_statistics_per_resolution():
    network = small_resnet(STATE).train()
    embeddings, scores = network(CROPS)
    assert_close(embeddings, expected("emb_train"))
    assert_close(scores, expected("scores_train"))
    assert_close(network.bn1.running_mean, expected("bn1_running_mean_after"))
    assert_close(network.bn1.running_var, expected("bn1_running_var_after"))
    assert_close(network.projection_head[1].running_mean, expected("head_bn_running_mean_after"))


def test_only_neighbours_of_equal_size_are_joined():
    embeddings, _ = small_resnet(STATE).train()([CROPS[0], CROPS[2], CROPS[1]])
    assert_close(embeddings, expected("emb_train_mixed_order"))


def test_resnet50_with_weights_made_from_their_names():
    assert GOLDEN.scalar("resnet50_hash/in/dummy") == 0
    dim = GOLDEN["resnet50_hash/out/emb"].shape[1]
    network = resnet50(output_dim=dim, hidden_mlp=2048, nmb_prototypes=3000, normalize=True)
    assert sum(p.numel() for p in network.parameters()) == GOLDEN.scalar("resnet50_hash/out/nparams")
    network.load_state_dict(hash_filled(network.state_dict()))
    crops = [hash_input(f"crop{i}", (1, 3, side, side)) for i, side in enumerate((64, 64, 48))]
    with torch.no_grad():
        embeddings, scores = network.eval()(crops)
        pooled = network.forward_backbone(crops[0])
    first_scores = GOLDEN.tensor("resnet50_hash/out/scores64")
    for found, wanted in (
        (embeddings, GOLDEN.tensor("resnet50_hash/out/emb")),
        (scores[:, : first_scores.shape[1]], first_scores),
        (pooled, GOLDEN.tensor("resnet50_hash/out/pooled")),
    ):
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-4)


def blur_difference(case: str, apply) -> np.ndarray:
    """Grey levels between the stored blurred image and ours, far from edges (ours are square, so it has others)."""
    image = GOLDEN[f"{case}/in/image"]
    side = min(image.shape[:2])  # views are square
    radius = GOLDEN.scalar(f"{case}/in/radius")
    view = ViewParams(0, 0, side, side, flip=False, jitter=(), grey=False, blur_radius=radius, solarize=False)
    out = np.empty((side, side, 3), dtype=np.uint8)
    apply(image, view, ViewRecipe(side, (1.0, 1.0)), out)
    margin = 2 + int(3 * radius)
    inside = slice(margin, side - margin)
    return np.abs(out[inside, inside].astype(int) - GOLDEN[f"{case}/out/image"][inside, inside])


@pytest.mark.parametrize("case", GOLDEN.cases("", "blur"))
def test_blur(case):
    assert blur_difference(case, apply_pil).max() <= 1
    assert blur_difference(case, apply_fast).mean() < 1.5  # its weights are multiples of 1/256; the image is noise


# --- Assignments ------------------------------------------------------------------------------------------------------


def arguments(case: str) -> tuple[float, int]:
    """Epsilon and the number of iterations."""
    return GOLDEN.number(case, "epsilon"), GOLDEN.scalar(f"{case}/in/iters")


def test_assignments_of_one_process():
    found = [case for case in GOLDEN.cases("", "sinkhorn") if f"{case}/in/scores" in GOLDEN]
    assert found
    for case in found:
        assignments = sinkhorn_knopp(GOLDEN.tensor(f"{case}/in/scores"), *arguments(case))
        torch.testing.assert_close(assignments, GOLDEN.tensor(f"{case}/out/q"), rtol=1e-4, atol=1e-7)


def balance(rank: int, scores_of_ranks: list[list[Tensor]], given: list[tuple[float, int]]):
    return [sinkhorn_knopp(scores[rank], *a) for scores, a in zip(scores_of_ranks, given, strict=True)]


def test_assignments_of_several_processes():
    found = [case for case in GOLDEN.cases("", "sinkhorn") if f"{case}/in/scores_rank0" in GOLDEN]
    by_ranks = {case: GOLDEN.tensors(f"{case}/in/scores_rank") for case in found}
    for ranks in {len(scores) for scores in by_ranks.values()}:
        cases = [case for case in found if len(by_ranks[case]) == ranks]
        results = run_processes(balance, ranks, [by_ranks[case] for case in cases], [arguments(case) for case in cases])
        for case, *assignments in zip(cases, *results, strict=True):
            torch.testing.assert_close(assignments, GOLDEN.tensors(f"{case}/out/q_rank"), rtol=1e-4, atol=1e-7)


# --- Training ---------------------------------------------------------------------------------------------------------


def train(
    case: str, network: nn.Module, optimizer, batches: list[list[Tensor]], tmp_path, monkeypatch
) -> dict[str, Tensor]:
    """The real train_one_epoch on one epoch of ``batches``; what the arrays of the case are compared with, by name."""
    steps, codes_per_step, batch_size, nmb_prototypes = GOLDEN[f"{case}/out/q"].shape
    frozen = [not gradient.any() for gradient in GOLDEN[f"{case}/out/grad_prototypes"]]
    queue = EmbeddingQueue(codes_per_step, 0, 1)  # never used
    if f"{case}/out/queue_after" in GOLDEN:
        queue = EmbeddingQueue(*GOLDEN[f"{case}/out/queue_after"].shape[1:])
    queue.has_started = True

    rows, codes = [], []
    sinkhorn = losses.sinkhorn_knopp

    def recorded(scores: Tensor, *args, **kwargs) -> Tensor:
        assert args == (EPSILON, SINKHORN_ITERATIONS)
        rows.append(len(scores))
        codes.append(sinkhorn(scores, *args, **kwargs))
        return codes[-1]

    monkeypatch.setattr(losses, "sinkhorn_knopp", recorded)

    def look() -> dict[str, Tensor]:
        weight = network.prototypes.weight
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        seen = {"grad_prototypes": gradient, "prototypes_after": weight.detach().clone()}
        return seen | ({"queue_after": queue.embeddings.clone()} if queue.is_used else {})

    run = LoopRun(tmp_path, steps, look=look, network=network)
    main_swav.train_one_epoch(
        network,
        SwappedPrediction(range(codes_per_step), TEMPERATURE, EPSILON, SINKHORN_ITERATIONS),
        queue,
        PrototypeUsage(nmb_prototypes),
        [(views, torch.zeros(batch_size), torch.arange(batch_size)) for views in batches],
        optimizer,
        GOLDEN[f"{case}/in/lr"],
        run,
        freeze_prototypes_niters=frozen.index(False) if False in frozen else steps,
    )
    found = {name: torch.stack([seen[name] for seen in run.seen]) for name in run.seen[0]}
    found |= {"loss": torch.tensor(run_folders.losses(tmp_path)), "sinkhorn_rows": torch.tensor(rows)}
    return found | {"q": torch.stack([q[-batch_size:] for q in codes]).unflatten(0, (steps, codes_per_step))}


def compare(case: str, found: dict[str, Tensor], loss_rtol: float, codes_atol: float, rtol: float, atol: float) -> None:
    tolerances = {"loss": (loss_rtol, 0), "q": (1e-4, codes_atol), "sinkhorn_rows": (0, 0)}
    for name, value in found.items():
        of_name = dict(zip(("rtol", "atol"), tolerances.get(name, (rtol, atol)), strict=True))
        torch.testing.assert_close(value, GOLDEN.tensor(f"{case}/out/{name}"), **of_name)


@pytest.mark.parametrize("case", GOLDEN.cases("", "loss_"))
def test_loss_codes_queue_and_gradients(case, tmp_path, monkeypatch):
    outputs, weight = GOLDEN.tensors(f"{case}/in/z"), GOLDEN.tensor(f"{case}/in/prototypes")
    network = StoredEmbeddings(outputs, nn.Linear(*reversed(weight.shape), bias=False))
    network.prototypes.weight.data.copy_(weight)
    optimizer = torch.optim.SGD(network.prototypes.parameters(), lr=0.0, fused=True)
    batches = [[torch.zeros(1)]] * len(outputs)  # the stub looks at nothing
    found = train(case, network, optimizer, batches, tmp_path, monkeypatch)
    compare(case, found, loss_rtol=1e-4, codes_atol=1e-6, rtol=1e-3, atol=1e-6)
    for i, output in enumerate(network.outputs):
        expected = GOLDEN.tensor(f"{case}/out/grad_z{i}")
        torch.testing.assert_close(output.grad, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("case", GOLDEN.cases("", "train_"))
def test_training_follows_the_reference_step_by_step(case, tmp_path, monkeypatch):
    network = small_resnet(GOLDEN.state_dict("resnet_small/sd/"))
    optimizer = LARC(network.parameters(), lr=0.0, weight_decay=TRAIN_WEIGHT_DECAY)
    steps = len(GOLDEN[f"{case}/in/lr"])
    batches = [GOLDEN.tensors(f"{case}/in/x{step}_") for step in range(steps)]
    found = train(case, network, optimizer, batches, tmp_path, monkeypatch)
    compare(case, found, loss_rtol=1e-3, codes_atol=5e-3, rtol=2e-3, atol=1e-4)
    head = network.projection_head
    columns = GOLDEN[f"{case}/out/head0_after"].shape[1]
    for name, value in {
        "conv1_after": network.conv1.weight,
        "head0_after": head[0].weight[:, :columns],
        "head_bn_bias_after": head[1].bias,
        "param_norms_after": torch.stack([p.norm() for p in network.parameters()]),
        "bn1_running_var_after": network.bn1.running_var,
    }.items():
        expected = GOLDEN.tensor(f"{case}/out/{name}")
        torch.testing.assert_close(
            value.detach(), expected, rtol=2e-3, atol=1e-4, msg=lambda m, name=name: f"{name} {m}"
        )


@pytest.mark.parametrize("case", GOLDEN.cases("", "lr_schedule"))
def test_learning_rate_of_every_step(case):
    names = ("base_lr", "final_lr", "epochs", "iters_per_epoch", "warmup_epochs", "start_warmup")
    values = cosine_schedule(*(GOLDEN.scalar(f"{case}/in/{name}") for name in names))
    for name in ("lr", "lr_dcv2"):
        np.testing.assert_allclose(values, GOLDEN[f"{case}/out/{name}"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", GOLDEN.cases("", "larc_"))
def test_larc(case):
    prefix = f"{case}/in/p_"
    names = [key.removeprefix(prefix) for key in GOLDEN.keys(prefix)]
    parameters = {name: nn.Parameter(GOLDEN.tensor(prefix + name)) for name in names}
    weight_decay = GOLDEN.scalar(f"{case}/in/weight_decay")
    optimizer = LARC(parameters.values(), lr=0.0, weight_decay=weight_decay, clip=case.endswith("clip1"))
    for step, lr in enumerate(GOLDEN[f"{case}/in/lr"].tolist()):
        optimizer.param_groups[0]["lr"] = lr
        for name, parameter in parameters.items():
            gradient = GOLDEN.tensor(f"{case}/in/g{step}_{name}")
            parameter.grad = None if name == "none_g" and step < 2 else gradient
        optimizer.step()
        for name, parameter in parameters.items():
            expected = GOLDEN.tensor(f"{case}/out/p{step}_{name}")
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-7)


# --- Evaluation -------------------------------------------------------------------------------------------------------


MODES = {"global": (False, False), "avg6": (True, False), "avg6_bn": (True, True)}  # windows, batch norm


def test_linear_probe_with_and_without_windows_and_batch_norm():
    feature_map = hash_input("reglog_input", (2, 2048, 7, 7)).relu()
    num_labels = GOLDEN["reglog/out/global"].shape[1]
    GOLDEN["reglog/in/dummy"]
    for mode, (windows, use_bn) in MODES.items():
        features = pool_windows(feature_map) if windows else feature_map.mean(dim=(2, 3))
        classifier = RegLog(features.shape[1:], num_labels, use_bn)
        classifier.load_state_dict(hash_filled(classifier.state_dict(), salt=f"{mode}:"))
        with torch.no_grad():
            assert_close(classifier.eval()(features), GOLDEN.tensor(f"reglog/out/{mode}"))
            if use_bn:
                assert_close(classifier.train()(features), GOLDEN.tensor(f"reglog/out/{mode}_train"))


def test_accuracies():
    logits, targets = GOLDEN.tensor("accuracy/in/logits"), GOLDEN.tensor("accuracy/in/target")
    result = validate(nn.Identity(), nn.Identity(), TensorDataset(logits, targets), torch.device("cpu"), batch_size=4)
    for name in ("acc1", "acc5"):
        torch.testing.assert_close(
            torch.tensor([result[name]]), GOLDEN.tensor(f"accuracy/out/{name}"), rtol=0, atol=1e-4
        )


def test_every_array_was_compared():
    assert GOLDEN.unread() == []
