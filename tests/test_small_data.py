"""Of every method: settings that 240 images make senseless are named, those for the embedded images are not."""

import importlib
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import contriever.report
import contriever.train
import deepcluster.main
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
from shared.run.settings import tell_settings
from tests.tiny_training import trainings

OWN = ["--data_path", "pictures"]


def steps(num_images, batch_size):
    return num_images // batch_size


def tell_dino(arguments, num_images):
    args = dino.main_dino.parse_args(arguments)
    batch_size = args.batch_size_per_gpu
    schedules = dino.main_dino.Schedules.from_args(args, batch_size, steps(num_images, batch_size))
    dino.report.suit_settings(args, num_images, schedules.momentum)
    return args


def tell_msn(arguments, num_images):
    args = msn.main.parse_args(arguments)
    schedules = msn.main.Schedules.from_args(args, steps(num_images, args.batch_size))
    msn.report.suit_settings(args, num_images, schedules.momentum)
    return args


def tell_swav(arguments, num_images, script=swav.main_swav):
    args = script.parse_args(arguments)
    data = SimpleNamespace(dataset=range(num_images), batch_size=args.batch_size)
    swav.report.suit_settings(args, data, args.epochs * steps(num_images, args.batch_size))
    return args


def tell_deepclusterv2(arguments, num_images):
    return tell_swav(arguments, num_images, swav.main_deepclusterv2)


def tell_contriever(arguments, num_chunks):
    args = contriever.train.parse_args([flag.replace("--data_path", "--train_data") for flag in arguments])
    contriever.report.tell_unsuitable_settings(args, num_chunks, args.per_gpu_batch_size)


KEPT = np.prod([1 - 0.002 * (1 + np.cos(np.pi * t / 300)) for t in range(300)])  # of DINO's teacher, in 300 steps
KEEPS = "of its initial weights: take"
TEACHER = f"--momentum_teacher 0.996: after 300 steps the teacher still keeps {KEPT:.0%} {KEEPS} "
TEACHER += "--momentum_teacher 0.97"
OUTPUTS = "is more than the 240 images: take"
NAMED = [
    (tell_dino, "", [TEACHER, f"--out_dim 65536 {OUTPUTS} --out_dim 240"]),
    (tell_dino, "--momentum_teacher 0.97 --out_dim 240", []),
    (
        tell_dino,
        "--momentum_teacher 0.97 --out_dim 240 --teacher_temp 0.07",
        ["--teacher_temp 0.07: in 300 steps a teacher above 0.04 hardly tells images apart: take --teacher_temp 0.03"],
    ),
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
    hint = "" if tell is tell_contriever else ", or take --small_data"
    assert capsys.readouterr().out.splitlines() == [f"NOTE: {sentence}{hint}" for sentence in expected]


@pytest.mark.parametrize("tell", [tell_dino, tell_swav, tell_deepclusterv2, tell_msn, tell_contriever])
def test_nothing_is_said_of_the_settings_for_the_embedded_data(tell, capsys):
    tell([], NUMBERS["train"])
    assert capsys.readouterr().out == ""


AVERAGE = "--model-ema-decay 0.99996: after 10 steps the moving average still keeps 100% of its initial weights: take "
LONG = [
    "--warmup-epochs 4 is a warm-up longer than all 2 epochs: take --warmup-epochs 0",
    f"{AVERAGE}--model-ema-decay 0.5",
]
# of scripts whose advice needs images or text: the flags, and all that is said of 24 images in three folders
SAID = {
    "deepcluster": ("--batch 40", ["--batch 40 is more than the 24 images: take --batch 6, or take --small_data"]),
    "deepercluster": ("", []),
    "paws": ("--warmup 2", ["--warmup 2 is a warm-up for 100% of the 2 epochs: take --warmup 0, or take --small_data"]),
    "suncet": ("--warmup 2", ["--warmup 2 is a warm-up for 100% of the 2 epochs: take --warmup 0"]),
    "xcit": ("--warmup-epochs 4", LONG),
    "resmlp": ("--warmup-epochs 4", LONG),
    "flexivit": ("", []),
    "navit": ("", []),
    "vit22b": (
        "--warmup_steps 10000 --cooldown_steps 4",
        [
            "--warmup_steps 10000 is a warm-up longer than all 10 steps: take --warmup_steps 1",
            "--cooldown_steps 4 is a cooldown for 40% of the 10 steps: take --cooldown_steps 1",
        ],
    ),
    "translation": (
        "--warmup_steps 32000",
        ["--warmup_steps 32000 is a warm-up longer than all 12 steps: take --warmup_steps 1"],
    ),
}


class Stop(Exception):
    """Instead of the training."""


@pytest.mark.parametrize("name", SAID)
def test_scripts_say_before_the_first_step_what_few_images_in_folders_of_plates_make_senseless(
    name, images, tmp_path, monkeypatch, capsys
):
    def stop(*args, **kwargs):
        raise Stop

    monkeypatch.setattr("shared.run.run.Run.resume", stop)
    monkeypatch.setattr("resmlp.translation.main.GENERATED_PAIRS", {"train": 60, "valid": 4, "test": 2})
    shutil.copytree(images, tmp_path / "images")
    for i in range(3):
        (tmp_path / f"images/class{i}").rename(tmp_path / f"images/plate{i}")
    training, (flags, sentences) = trainings()[name], SAID[name]
    data = [flag.format(images=tmp_path / "images", tokens="", encoder="") for flag in training.data]
    script = importlib.import_module(training.module)
    arguments = [*data, *training.flags, *training.whole, "--output_dir", str(tmp_path / "run"), *flags.split()]
    (train,) = (f for key, f in vars(script).items() if key.startswith("train_") and f.__code__.co_argcount == 1)
    with pytest.raises(Stop):
        train(script.parse_args(arguments))
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NOTE: ")]
    asked = [line for line in told if line.startswith("NOTE: are plate0, plate1, plate2, ... classes?")]
    assert ["--no_labels" in line for line in asked] == ([] if name == "translation" else ["deep" in name])
    assert [line for line in told if line not in asked] == [f"NOTE: {sentence}" for sentence in sentences]


# --- With --small_data ------------------------------------------------------------------------------------------------

ON_IMAGES = {
    tell_dino: {"out_dim": 200, "momentum_teacher": 0.98, "warmup_epochs": 5.0, "arch": "vit_micro"},
    tell_msn: {"num_proto": 64, "ema": [0.98, 1.0], "warmup": 5.0, "model_name": "deit_micro"},
    tell_swav: {"nmb_prototypes": 60, "freeze_prototypes_niters": 60, "arch": "resnet18"},
    tell_deepclusterv2: {"nmb_prototypes": [30, 30, 30], "arch": "resnet18"},
}


@pytest.mark.parametrize("tell", ON_IMAGES)
def test_small_data_takes_what_suits_200_images_and_says_each_value(tell, capsys):
    args = tell([*OWN, "--small_data"], 200)
    assert {name: getattr(args, name) for name in ON_IMAGES[tell]} == ON_IMAGES[tell]
    told = capsys.readouterr().out.splitlines()
    assert all(line.startswith("--small_data: --") for line in told)
    official = args.unset
    changed = {name for name in official if getattr(args, name) != official[name]}
    assert {line.split("--")[2].split()[0] for line in told} == changed > {*ON_IMAGES[tell]} - {"ema"}
    tell_settings(args)
    assert capsys.readouterr().out.splitlines() == told


@pytest.mark.parametrize("tell", ON_IMAGES)
def test_small_data_changes_no_flag_that_was_set_and_nothing_of_the_embedded_data(tell, capsys):
    official = tell(OWN, 10**6)
    flags = {"epochs": 3, "batch_size_per_gpu" if tell is tell_dino else "batch_size": 40}
    set_flags = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    args = tell([*OWN, "--small_data", *set_flags], 200)
    assert {name: getattr(args, name) for name in flags} == flags
    outputs = {tell_dino: "out_dim", tell_msn: "num_proto"}.get(tell, "nmb_prototypes")
    capsys.readouterr()
    given = getattr(official, outputs)
    words = map(str, given if isinstance(given, list) else [given])
    args = tell([*OWN, "--small_data", f"--{outputs}", *words], 200)
    assert getattr(args, outputs) == given
    assert f"NOTE: --{outputs}" in capsys.readouterr().out
    without, embedded = tell([], NUMBERS["train"]), tell(["--small_data"], NUMBERS["train"])
    assert capsys.readouterr().out == ""
    assert {**vars(embedded), "small_data": False} == vars(without) | {"unset": embedded.unset}


def test_small_data_of_the_scripts_whose_advice_needs_images():
    args = deepcluster.main.parse_args(["pictures", "--small_data", "--batch", "7"])
    assert (args.nmb_cluster, args.batch, args.arch) == (60, 7, "resnet18")
    args = paws.paws_train.parse_args([*OWN, "--small-data", "--lr", "2"])
    assert (args.model_name, args.lr, args.image_size) == ("resnet18", 2.0, 128)


def test_a_file_of_flags_wins_over_small_data(tmp_path):
    file = tmp_path / "flags.yaml"
    file.write_text("criterion:\n  num_proto: 1024\n")
    args = tell_msn([*OWN, "--small_data", "--fname", str(file)], 200)
    assert args.num_proto == 1024 and args.model_name == "deit_micro"


# --- Warm-up ----------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("script", [msn.main, paws.paws_train])
def test_a_warmup_that_a_file_sets_counts_as_set(script, tmp_path, capsys):
    file = tmp_path / "flags.yaml"
    file.write_text(f"optimization:\n  warmup: {script.get_args_parser().get_default('warmup')}\n")
    with pytest.raises(SystemExit):
        script.parse_args([*OWN, "--fname", str(file), "--epochs", "1"])
    assert "--epochs 1 is less than --warmup" in capsys.readouterr().err
