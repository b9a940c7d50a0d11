"""Scripts that submit jobs take every flag of their training, with its default, and those of the job."""

import importlib

import pytest

from msn import main_distributed as msn
from paws import main_distributed as paws
from swav import run_with_submitit as swav
from tests.tiny_training import trainings

TRAININGS = {name: training for name, training in trainings().items() if training.launcher}
PLACES = dict.fromkeys(("images", "tokens", "encoder"), "data")


@pytest.mark.parametrize("has_data", [True, False])
@pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS)
def test_a_job_has_the_flags_of_its_training_and_the_defaults_of_its_data(training, has_data, submitted):
    data = list(training.data_flags(PLACES)) if has_data else []
    training.launch([*data, "--nodes", "4", "--comment", "deadline"])
    ((function, args),) = submitted
    expected = importlib.import_module(training.module).parse_args(data)
    assert function.__module__ == training.module and vars(expected).items() <= vars(args).items()
    assert (args.nodes, args.comment) == (4, "deadline") and not hasattr(args, "method")


@pytest.mark.parametrize(
    ("launcher", "flags"),
    [(msn, "--linear"), (swav, "--meth deepclusterv2"), (paws, "--batch-l"), (paws, "--batch_launch")],
)
def test_flags_that_choose_the_training_cannot_be_abbreviated(launcher, flags, submitted, capsys):
    with pytest.raises(SystemExit) as end:
        launcher.main([*flags.split(), "--data_path", "images"])
    assert end.value.code == 2 and not submitted and flags.split()[0][:6] in capsys.readouterr().err
