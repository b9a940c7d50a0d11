"""Of every method: settings that 240 images make senseless are named, those for the embedded images are not."""

from types import SimpleNamespace

import numpy as np
import pytest

import contriever.report
import contriever.train
import dino.main_dino
import dino.report
import msn.main
import msn.report
import paws.paws_train
import paws.suncet_train
import resmlp.main
import swav.main_deepclusterv2
import swav.main_swav
import swav.report
import xcit.main
from shared.images.materials import NUMBERS

OWN = ["--data_path", "pictures"]


def steps(num_images, batch_size):
    return num_images // batch_size


def tell_dino(arguments, num_images):
    args = dino.main_dino.parse_args(arguments)
    batch_size = args.batch_size_per_gpu
    schedules = dino.main_dino.Schedules.from_args(args, batch_size, steps(num_images, batch_size))
    dino.report.tell_unsuitable_settings(args, num_images, schedules.momentum)


def tell_msn(arguments, num_images):
    args = msn.main.parse_args(arguments)
    schedules = msn.main.Schedules.from_args(args, steps(num_images, args.batch_size))
    msn.report.tell_unsuitable_settings(args, num_images, schedules.momentum)


def tell_swav(arguments, num_images, script=swav.main_swav):
    args = script.parse_args(arguments)
    data = SimpleNamespace(dataset=range(num_images), batch_size=args.batch_size)
    swav.report.tell_unsuitable_settings(args, data, args.epochs * steps(num_images, args.batch_size))


def tell_deepclusterv2(arguments, num_images):
    tell_swav(arguments, num_images, swav.main_deepclusterv2)


def tell_contriever(arguments, num_chunks):
    args = contriever.train.parse_args([flag.replace("--data_path", "--train_data") for flag in arguments])
    contriever.report.tell_unsuitable_settings(args, num_chunks, args.per_gpu_batch_size)


KEPT = np.prod([1 - 0.002 * (1 + np.cos(np.pi * t / 300)) for t in range(300)])  # of DINO's teacher, in 300 steps
KEEPS = "of its initial weights: take"
TEACHER = f"--momentum_teacher 0.996: after 300 steps the teacher still keeps {KEPT:.0%} {KEEPS} "
TEACHER += "--momentum_teacher 0.97"
OUTPUTS = "is more than the 240 images: take"
NAMED = [
    (tell_dino, "", [TEACHER, f"--out_dim 65536 {OUTPUTS} --out_dim 24"]),
    (tell_dino, "--momentum_teacher 0.97 --out_dim 24", []),
    (
        tell_swav,
        "--queue_length 3840",
        [
            f"--nmb_prototypes 3000 {OUTPUTS} --nmb_prototypes 24",
            "--freeze_prototypes_niters 313 is more than a tenth of the 300 steps: take --freeze_prototypes_niters 30",
            f"--queue_length 3840 {OUTPUTS} --queue_length 64",
        ],
    ),
    (tell_deepclusterv2, "", [f"--nmb_prototypes 3000 3000 3000 {OUTPUTS} --nmb_prototypes 24 24 24"]),
    (tell_msn, "", [f"--num_proto 1024 {OUTPUTS} --num_proto 24"]),
    (
        tell_contriever,
        "--total_steps 100 --warmup_steps 50",
        [
            "--warmup_steps 50 is a warm-up for 50% of the 100 steps: take --warmup_steps 10",
            f"--momentum 0.999: after 100 steps the key encoder still keeps 90% {KEEPS} --momentum 0.91",
            "--queue_size 65536 is more than the 240 chunks of text: take --queue_size 64",
        ],
    ),
]


@pytest.mark.parametrize(("tell", "flags", "expected"), NAMED)
def test_settings_that_make_no_sense_for_240_images_are_named(tell, flags, expected, capsys):
    tell([*OWN, *flags.split()], 240)
    assert capsys.readouterr().out.splitlines() == [f"NOTE: {sentence}" for sentence in expected]


@pytest.mark.parametrize("tell", [tell_dino, tell_swav, tell_deepclusterv2, tell_msn, tell_contriever])
def test_nothing_is_said_of_the_settings_for_the_embedded_data(tell, capsys):
    tell([], NUMBERS["train"])
    assert capsys.readouterr().out == ""


SHORTENED = [
    (dino.main_dino, "warmup_epochs", 5, 0.5),
    (swav.main_swav, "warmup_epochs", 1, 0.1),
    (swav.main_deepclusterv2, "warmup_epochs", 1, 0.1),
    (msn.main, "warmup", 1, 0.1),
    (paws.paws_train, "warmup", 5, 0),
    (paws.suncet_train, "warmup", 1, 0),
    (xcit.main, "warmup_epochs", 1, 0),
    (resmlp.main, "warmup_epochs", 1, 0),
]


@pytest.mark.parametrize(("script", "flag", "epochs", "expected"), SHORTENED)
def test_a_warmup_longer_than_the_run_is_shortened_where_nobody_set_it(script, flag, epochs, expected, capsys):
    args = script.parse_args([*OWN, "--epochs", str(epochs)])
    assert getattr(args, flag) == expected
    assert f"--{flag} is {expected}, a tenth of --epochs {epochs}: the default of" in capsys.readouterr().out
    unset = script.parse_args([*OWN, "--epochs", "50"])
    assert getattr(unset, flag) == script.get_args_parser().get_default(flag)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("script", "flag", "epochs", "_"), SHORTENED[:6])
def test_a_warmup_that_was_set_and_is_longer_than_the_run_is_an_error(script, flag, epochs, _, capsys):
    with pytest.raises(SystemExit):
        script.parse_args([*OWN, "--epochs", str(epochs), f"--{flag}", "10"])
    assert f"--epochs {epochs} is less than --{flag} 10" in capsys.readouterr().err


@pytest.mark.parametrize("script", [msn.main, paws.paws_train])
def test_a_warmup_that_a_file_sets_counts_as_set(script, tmp_path, capsys):
    file = tmp_path / "flags.yaml"
    file.write_text(f"optimization:\n  warmup: {script.get_args_parser().get_default('warmup')}\n")
    with pytest.raises(SystemExit):
        script.parse_args([*OWN, "--fname", str(file), "--epochs", "1"])
    assert "--epochs 1 is less than --warmup" in capsys.readouterr().err
