"""The training of ViT-22B's recipe on one process, its monitor and its pictures; meshes: test_mesh.py."""

import math

import pytest
import torch

from shared.optimisation.optim import decay_groups
from shared.run.health import HealthMonitor
from tests.run_folders import state_of, stopped_after
from tests.vit22b.tiny import train
from vit22b.main import NOT_DECAYED, parse_args
from vit22b.monitor import AttentionMonitor, health_rules
from vit22b.report import save_entropy
from vit22b.scaled_vit import ScaledViT, Switches

FEW = ("--data_path", "digits", "--batch_size", "360")


def test_a_network_learns_and_its_log_has_the_attention_of_every_block(tmp_path, drawn, capsys):
    flags = "--batch_size 48 --loss softmax --lr 0.004 --epochs 3 --timescale 1000 --crop_scale 0.7 1".split()
    found = train(tmp_path, *FEW[:2], *flags)
    following = capsys.readouterr().out.partition("Next ")[2]
    assert "--qk_norm false" in following
    assert "--warmup_steps 2 --cooldown_steps 2 --timescale 1000 --seed 0" in following  # as it was
    assert found[0]["test_acc1"] < 20 and found[-1]["test_acc1"] > 28
    steps = [line for line in found if "loss" in line]
    assert steps[-1]["loss"] < steps[0]["loss"] and steps[-1]["lr"] < 0.004
    for line in steps:
        assert line["ln_n"] == pytest.approx(math.log(16)) and 0 < line["entropy_1"] <= line["ln_n"] + 1e-6
        assert line["max_logit"] == max(line["logit_0"], line["logit_1"])
        assert line["min_entropy"] == min(line["entropy_0"], line["entropy_1"])
    save_entropy(found, tmp_path / "entropy.png", "Entropy")
    entropy, logits = drawn[-1].axes
    assert logits.lines[0].get_label() == f"step {steps[0]['step']}"
    assert list(logits.lines[-1].get_ydata()) == [steps[-1]["logit_0"], steps[-1]["logit_1"]]
    assert list(entropy.lines[0].get_ydata()) == [steps[0]["entropy_0"], steps[0]["entropy_1"]]
    with pytest.raises(ValueError, match="holds no entropies"):
        save_entropy(found[:1], tmp_path / "entropy.png", "Entropy")


def test_an_interrupted_run_goes_on_as_it_would_have(tmp_path):
    train(tmp_path / "whole", *FEW)
    with stopped_after(5):
        train(tmp_path / "parts", *FEW)
    train(tmp_path / "parts", *FEW, "--num_workers", "1")
    whole, parts = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    assert all(torch.equal(tensor, parts["model"][name]) for name, tensor in whole["model"].items())
    with pytest.raises(ValueError, match="--block sequential does not fit the checkpoint"):
        train(tmp_path / "parts", *FEW, "--block", "sequential")
    with pytest.raises(ValueError, match="--mesh 1 1 is of 1 processes, and there are 1; one needs no --mesh"):
        train(tmp_path / "mesh", *FEW, "--mesh", "1", "1")
    torch.save(parts | {"model": {"cls_token": torch.zeros(1)}}, tmp_path / "parts" / "checkpoint.pth")
    with pytest.raises(ValueError, match="the checkpoint's model does not fit this run"):
        train(tmp_path / "parts", *FEW)


def test_the_monitor_measures_what_a_slow_loop_does():
    torch.manual_seed(0)
    network = ScaledViT(16, 2, 24, 2, 4, 8, switches=Switches(qk_norm=False))
    images, monitor, seen = 3 * torch.randn(3, 3, 8, 8), AttentionMonitor(network), []
    hook = network.blocks[1].attend.register_forward_pre_hook(lambda module, args: seen.append(args))
    with monitor.watching(), torch.no_grad():
        network(images)
    found = monitor.values()
    hook.remove()
    (q, k, _), logits, entropies = seen[0], [], []
    for image in range(3):
        for head in range(2):
            for query in q[image, head]:
                row = [float(query @ key) / math.sqrt(8) for key in k[image, head]]
                weights = [math.exp(logit - max(row)) for logit in row]
                shares = [weight / sum(weights) for weight in weights]
                logits += map(abs, row)
                entropies.append(-sum(share * math.log(share) for share in shares))
    assert float(found["logit_1"]) == pytest.approx(max(logits), rel=1e-5)
    assert float(found["entropy_1"]) == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    assert float(found["ln_n"]) == pytest.approx(math.log(4))
    with monitor.watching(False):
        network(images)
    assert monitor.values() == {}


def test_logits_that_run_away_are_told_once():
    healthy = {"max_logit": 30.0, "min_entropy": 2.0, "ln_n": 4.16}
    away = {"max_logit": 5000.0, "min_entropy": 0.01, "ln_n": 4.16}
    monitor = HealthMonitor(health_rules(qk_norm=False))
    lines = [healthy, away, healthy, away, away, away]
    told = [monitor.check({"step": step, **line}) for step, line in enumerate(lines)]
    assert told[:4] == [None] * 4 and told[5] is None
    assert told[4] == (
        "step 4: attention logits run away (the largest is 5000, the least entropy of a block 0.010 of ln N = 4.16): "
        "train with --qk_norm true, or lower --lr"
    )


def test_the_classifier_decays_by_itself_and_vectors_do_not():
    network = ScaledViT(16, 1, 24, 2, 4, 8, 5)
    groups = decay_groups(network, NOT_DECAYED, 0.03, 3.0)
    names = {parameter: name for name, parameter in network.named_parameters()}
    body, head, rest = ({names[p] for p in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.03, 3.0, 0.0] and head == {"head.weight"}
    assert {"blocks.0.weight_in", "blocks.0.weight_out", "patches.weight", "pool.kv.weight"} <= body
    assert {"patches.positions", "pool.probe", "head.bias", "blocks.0.q_norm.scale"} <= rest
    assert len(body | head | rest) == len(names)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--patch_size", "17", "--input_size", "16"], "--input_size 16 is no multiple"),
        (["--patch_size", "14", "--input_size", "48"], "the last 6 pixels of every side would not be seen"),
        (["--mesh", "0", "2"], "--mesh 0 2 needs at least 1 process on each axis"),
        (["--mesh", "1", "2", "--amp", "fp16"], "and not --amp fp16"),
        (["--lr", "0"], "--lr 0.0 is not positive"),
        (["--clip_grad", "-1"], "--clip_grad -1.0 is not positive"),
    ],
)
def test_flags_that_make_no_sense_are_named(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--data_path", "digits", *flags])
    assert message in capsys.readouterr().err
