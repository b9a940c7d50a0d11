"""The commands behind the tables of the READMEs are understood by the scripts."""

import importlib

import pytest

from contriever import finetuning, train
from tests.evidence import (
    contriever,
    deepcluster,
    deepercluster,
    dino,
    flexivit,
    msn,
    navit,
    paws,
    resmlp,
    swav,
    vit22b,
    xcit,
)
from tests.evidence.runs import Variant

VARIANTS = [
    (module.__name__.split(".")[-1], variant)
    for module in (dino, swav, deepcluster, deepercluster, paws, resmlp, xcit)
    for variant in (*module.VARIANTS, *getattr(module, "CIFAR10_VARIANTS", ()))
]
VARIANTS += [("msn", Variant(name, f"{msn.DIGITS} {flags}")) for name, flags in msn.VARIANTS.items()]
VARIANTS += [
    *((method.lower(), Variant(f"{method} beside the other", flags)) for method, flags in msn.BOTH.items()),
    ("msn", Variant("MSN on CIFAR-10", f"{msn.CIFAR10} --data_path images --val_path images")),
    ("paws", Variant("PAWS on CIFAR-10", f"{paws.CIFAR10} --data_path images --val_path images")),
    ("paws", Variant("beside SwAV", f"{paws.BESIDE_SWAV_RUN} --data_path images --val_path images")),
    ("dino", Variant("ResMLP by DINO", resmlp.DINO, "main_dino.py")),
    *(("dino", variant) for variant in (*dino.MOMENTUM_VARIANTS, *dino.PATCHES, *xcit.SELF_SUPERVISED)),
    *(("swav", variant) for variant in swav.QUEUE_VARIANTS),
    *(("deepcluster", variant) for variant in deepcluster.TAIL_VARIANTS),
    *((module.__name__.split(".")[-1], variant) for module in (flexivit, navit, vit22b) for variant in module.VARIANTS),
]


@pytest.mark.parametrize(("method", "variant"), VARIANTS, ids=lambda value: getattr(value, "name", value))
def test_the_flags_of_a_variant_are_those_of_its_script(method, variant):
    name = {"dino": "main_dino.py", "swav": "main_swav.py"}.get(method) if variant.script == "main.py" else None
    script = importlib.import_module(f"{method}.{(name or variant.script)[:-3]}")
    args = script.parse_args([*variant.flags.split(), "--seed", "1", "--output_dir", "out"])
    assert (args.seed, args.output_dir, args.num_workers, args.pictures) == (1, "out", 0, False)


@pytest.mark.parametrize("flags", [contriever.CONTINUED, *contriever.VARIANTS.values()])
def test_the_flags_on_cranfield_are_those_of_its_script(flags):
    flags = flags if flags == contriever.CONTINUED else f"{contriever.SCRATCH} {flags}"
    paths = ["--train_data", "tokens", "--retriever_model_id", "model", "--output_dir", "out"]
    assert train.parse_args([*flags.split(), *paths]).num_workers == 0


@pytest.mark.parametrize("flags", [contriever.FINETUNING, contriever.FINETUNING_SCRATCH])
def test_the_flags_of_fine_tuning_on_cranfield_are_those_of_its_script(flags):
    paths = ["--train_data", "records", "--output_dir", "out"]
    assert finetuning.parse_args([*flags.split(), *paths]).num_workers == 0


def test_names_of_variants_are_names_of_folders():
    for module in (dino, swav, deepcluster, deepercluster, resmlp, xcit, flexivit, navit, vit22b):
        for variants in (module.VARIANTS, getattr(module, "CIFAR10_VARIANTS", [])):
            folders = {variant.name.replace(" ", "_") for variant in variants}
            assert len(folders) == len(variants) and not any("/" in folder for folder in folders)
