"""Of every method on images: failures that a log shows are told with a flag to try, and printed commands run."""

import argparse
import importlib
import math
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

import dino.report
import msn.report
import paws.report
import swav.report
from dino.main_dino import parse_args as parse_dino
from shared.images.materials import draw_materials
from shared.run.health import HealthMonitor
from tests.tiny_training import trainings

# --- Health -----------------------------------------------------------------------------------------------------------

LN_64, LN_3000, LN_16, LN_10 = (math.log(k) for k in (64, 3000, 16, 10))
USAGE = {"assigned": 20000.0, "prototypes_used": 2900.0, "prototype_perplexity": 2500.0}
# healthy lines of runs whose first quarter ends after 50 steps
HEALTHY = {
    "dino": {"teacher_entropy": 2.0, "kl": 0.5, "loss": 2.5, "ln_k": LN_64},
    "SwAV": {"loss": 5.0, "code_entropy": 3.0, "ln_k": LN_3000, **USAGE},
    "DeepCluster-v2": {"loss": 5.0, "ln_k": LN_3000, **USAGE},
    "msn": {"msn": 2.0, "target_entropy": 1.0, "information": 1.5, "ln_k": LN_16},
    "paws": {"mean_entropy": math.log(9), "certainty": 0.8, "ln_k": LN_10},
}
UNIFORM = {"teacher_entropy": LN_64, "kl": 0.0, "loss": LN_64}
FEATURES = {"feature_spread": 0.01}
FAILURES = [
    ("dino", UNIFORM, 70, "uniform (entropy 4.159 of ln K = 4.159): raise --momentum_teacher, or lower --teacher_temp"),
    ("dino", {"teacher_entropy": 0.0, "kl": 0.0}, 50, "every image the same output (entropy 0.000): keep --center_mom"),
    ("dino", FEATURES, 50, "nearly the same feature (spread 0.0100): lower --lr"),
    ("dino", {"loss": LN_64}, 70, "the loss is still at ln K = 4.159, the value of a student that knows nothing"),
    ("SwAV", {"code_entropy": 8.0}, 50, "uniform (entropy 8.000 of ln K = 8.006), every image belongs to every"),
    ("SwAV", {"prototype_perplexity": 20.0}, 50, "2900 of 3000 got any of 20000 images): lengthen --freeze_prototypes"),
    ("SwAV", FEATURES, 50, "nearly the same embedding (spread 0.0100): lower --base_lr"),
    ("SwAV", {"loss": LN_3000}, 50, "the loss is still at ln K = 8.006, the value of a network that knows nothing"),
    ("DeepCluster-v2", FEATURES, 50, "embedding (spread 0.0100): lower --base_lr, or lengthen --warmup_epochs"),
    (
        "msn",
        {"target_entropy": 2.6, "information": 0.05},
        90,
        "spread over all prototypes (entropy 2.600 of ln K =",
    ),
    ("msn", {"information": 0.01}, 50, "the same assignment (0.0100 nats tell images apart): keep --me_max true"),
    ("msn", FEATURES, 50, "nearly the same embedding (spread 0.0100): lower --lr"),
    ("msn", {"msn": 2.77}, 90, "the cross-entropy is still at ln K = 2.773, the value of anchors that know nothing"),
    ("paws", FEATURES, 50, "nearly the same representation (spread 0.0100): lower --lr"),
    ("paws", {"mean_entropy": math.log(2)}, 50, "few of the 10 classes (entropy of their mean 0.69, of all classes"),
    ("paws", {"certainty": 0.11}, 50, "nearly uniform (largest probability 0.110): lower --sharpen"),
]


def monitor_of(method: str) -> HealthMonitor:
    if method == "dino":
        args = parse_dino("--data_path x --epochs 20 --warmup_epochs 2".split())
        return HealthMonitor(dino.report.health_rules(args, steps_per_epoch=10))
    if method == "msn":
        return HealthMonitor(msn.report.health_rules(argparse.Namespace(epochs=10, warmup=2), steps_per_epoch=20))
    if method == "paws":
        return HealthMonitor(paws.report.health_rules(10, total_steps=200))
    return HealthMonitor(swav.report.health_rules(method, 3000, epochs=20, steps_per_epoch=10))


@pytest.mark.parametrize(("method", "change", "first_step", "words"), FAILURES)
def test_each_failure_is_told_once_with_a_flag_and_not_for_a_slow_start(method, change, first_step, words):
    monitor = monitor_of(method)
    line = HEALTHY[method] | {"feature_spread": 0.9} | change
    assert monitor.check(line | {"step": first_step - 1}) is None
    sentence = monitor.check(line | {"step": first_step})
    assert sentence.startswith(f"step {first_step}: ") and words in sentence and "--" in sentence
    assert monitor.check(line | {"step": first_step + 1}) is None


@pytest.mark.parametrize("method", HEALTHY)
def test_healthy_lines_and_those_without_finite_steps_say_nothing(method):
    line = HEALTHY[method] | {"feature_spread": 0.9}
    for step in (100, 110):
        assert monitor_of(method).check(line | {"step": step}) is None
        assert monitor_of(method).check(dict.fromkeys(line, math.nan) | {"step": step}) is None


# --- Pictures and printed commands ------------------------------------------------------------------------------------

PICTURES = {
    "dino": "views.png neighbours.png curves.png attention",
    "seer": "views.png neighbours.png curves.png",
    "swav": "views.png neighbours.png curves.png",
    "deepclusterv2": "views.png neighbours.png curves.png",
    "msn": "views.png neighbours.png curves.png attention",
    "deepcluster": "clusters.png curves.png",
    "deepercluster": "super_00.png curves.png",
    "paws": "certainty.png views.png curves.png",
    "xcit": "views.png curves.png",
    "resmlp": "curves.png layers.png layer01.png layer02.png locality.png",
    "suncet": "views.png curves.png",
    "flexivit": "curves.png cost.png",
    "navit": "curves.png packed.png cost.png",
    "vit22b": "curves.png entropy.png",
}
# scripts that a tiny run offers for images with classes, and for those without
PRINTED = {
    "dino": ("eval_knn eval_linear visualize_attention", "visualize_attention"),
    "seer": ("eval_linear", None),
    "swav": ("clusters eval_linear", "clusters"),
    "deepclusterv2": ("clusters eval_linear", "clusters"),
    "msn": ("logistic_eval eval_knn visualize_attention", "visualize_attention"),
    "deepcluster": ("eval_linear activ_retrieval gradient_ascent", "activ_retrieval gradient_ascent"),
    "deepercluster": ("eval_linear export", "export"),
    "paws": ("snn_eval fine_tune", None),
    "xcit": ("main export", None),
    "resmlp": ("eval_knn export", None),
    "suncet": ("snn_eval fine_tune", None),
    "flexivit": ("eval_flexivit resize_patch", None),
    "navit": ("eval_resolutions", None),
    "vit22b": ("main", None),
}
SHORTER = {  # flags that make a printed command a matter of seconds
    "activ_retrieval": "--num_workers 0",
    "eval_linear": "--epochs 1 --num_workers 0",
    "fine_tune": "--epochs 1",
    "gradient_ascent": "--niter 1 --filters 2 --idim 32",
}
KINDS = ("labelled", "flat", "small", "embedded")
CASES = [(kind, name) for kind in KINDS for name in PRINTED if kind != "flat" or PRINTED[name][1]]
FAST = [("small", "swav"), ("labelled", "msn"), ("small", "suncet"), ("small", "navit")]
CARRIED = {"max_megapixels": "80.0", "max_bad_fraction": "0.02"}  # flags of the runs that the commands repeat


@pytest.fixture(scope="module")
def folders(images, tmp_path_factory):
    """Labelled images, in folders whose names are a formula to Matplotlib, lack a font, and are no UTF-8; a flat folder
    of the same images; a train and a val part of 9 pixels; None for the embedded images."""
    labelled = shutil.copytree(images, tmp_path_factory.mktemp("labelled") / "images")
    for i, name in enumerate(("$5_$10", "\u4e2d\u6587", "caf\udce9")):
        (labelled / f"class{i}").rename(labelled / name)
    flat = tmp_path_factory.mktemp("flat")
    for path in images.rglob("*.png"):
        shutil.copy(path, flat)
    small = tmp_path_factory.mktemp("small")
    for i, path in enumerate(sorted(images.rglob("*.png"))):
        file = small / ("val" if i % 4 == 0 else "train") / path.parent.name / path.name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).resize((9, 9)).save(file)
    return {"labelled": labelled, "flat": flat, "small": small, "embedded": None}


def train(name: str, folder: Path | None, output_dir: Path) -> None:
    """A tiny run with pictures."""
    training = trainings()[name]
    flags = " ".join(training.flags).replace("--eval_knn_freq 0", "").replace("--pictures off", "").split()
    flags += [*training.whole, "--epochs", "1", "--saveckp_steps", "0"]
    flags += [word for flag, value in CARRIED.items() for word in (f"--{flag}", value)]
    flags += ["--dump_path" if "swav." in training.module else "--output_dir", str(output_dir)]
    if folder is not None:
        flags += [str(folder)] if name == "deepcluster" else ["--data_path", str(folder)]
    run_script(Path(importlib.import_module(training.module).__file__), flags)


def run_script(script: Path, arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [str(script), *arguments])
        runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize(
    ("kind", "name"),
    [pytest.param(*case, marks=[] if case in FAST else [pytest.mark.slow]) for case in CASES],
)
def test_pictures_are_drawn_and_printed_commands_run(kind, name, folders, tmp_path, capsys, monkeypatch):
    few = draw_materials(60, seed=0) if kind == "embedded" else None
    monkeypatch.setattr("shared.images.sources.load_materials", lambda *_: few)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})  # one core: no processes that load images
    train(name, folders[kind], tmp_path / "run")
    assert {path.name for path in (tmp_path / "run/pictures").iterdir()} == set(PICTURES[name].split())
    printed = capsys.readouterr().out
    assert "could not be drawn" not in printed
    assert printed.splitlines()[-1].split() == ["Page", str(tmp_path / "run/report.html")]
    commands = [shlex.split(line)[1:] for line in printed.partition("\nNext ")[2].partition("\nPage ")[0].splitlines()]
    if kind == "embedded":
        _, *arguments = commands.pop()
        args = importlib.import_module(trainings()[name].module).parse_args(arguments)
        assert "YOUR_IMAGES" in vars(args).values()
    expected = PRINTED[name][kind == "flat"].split() + ([] if kind == "embedded" else ["extract_features"])
    assert [Path(script).stem for script, *_ in commands] == expected
    for script, *arguments in commands:
        known = vars(importlib.import_module(script[:-3].replace("/", ".")).get_args_parser().parse_args(arguments))
        assert all(f"--{flag} {value}" in shlex.join(arguments) for flag, value in CARRIED.items() if flag in known)
        arguments = ["dino/assets/views.png" if word == "YOUR_IMAGE" else word for word in arguments]
        run_script(Path(script), [*arguments, *SHORTER.get(Path(script).stem, "").split()])
