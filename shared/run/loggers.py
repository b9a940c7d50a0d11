"""Where the lines of ``metrics.jsonl`` go besides: TensorBoard, Weights & Biases, MLflow.

The two services are set up by their own environment variables (``WANDB_PROJECT``, ``WANDB_MODE=offline``,
``MLFLOW_TRACKING_URI``, ...) and need ``pip install -e '.[loggers]'``. A run that resumes goes on under its old name,
which is kept in ``loggers.json``; of steps that it repeats TensorBoard hides the first, and W&B the second value.
"""

import importlib.util
import json
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

from .files import atomic_file

IDENTITIES = "loggers.json"


class TensorBoard:
    """Event files in ``<folder>/tensorboard``."""

    def __init__(self, folder: Path, name: str, flags: Mapping, step: int):
        from torch.utils.tensorboard import SummaryWriter

        # hides what was drawn beyond the checkpoint that the run has gone back to
        self.writer = SummaryWriter(str(folder / "tensorboard" / name), purge_step=step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of W&B, online or, with ``WANDB_MODE=offline``, in ``<folder>/wandb``."""

    def __init__(self, folder: Path, name: str, flags: Mapping, step: int):
        import wandb

        names = identities(folder)
        identity = names.setdefault(f"wandb{name}", uuid.uuid4().hex)
        remember(folder, names)
        self.run = wandb.init(
            dir=str(folder), id=identity, name=title(folder, name), resume="allow", config=dict(flags)
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """A run of the tracking server, file store or database that ``MLFLOW_TRACKING_URI`` names."""

    def __init__(self, folder: Path, name: str, flags: Mapping, step: int):
        import mlflow

        names = identities(folder)
        known = names.get(f"mlflow{name}")
        run = mlflow.start_run(known, run_name=None if known else title(folder, name), nested=True)
        if not known:
            mlflow.log_params(flags)
        remember(folder, names | {f"mlflow{name}": run.info.run_id})
        self.log_metrics, self.end_run, self.run_id = mlflow.log_metrics, mlflow.end_run, run.info.run_id

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.log_metrics(dict(values), step=step, run_id=self.run_id)

    def close(self) -> None:
        self.end_run()


LOGGERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}


def check_installed(names: Iterable[str]) -> None:
    """Raise ``ValueError`` for a logger whose package is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--loggers {name}: there is no package {name} (pip install -e '.[loggers]')")


def title(folder: Path, name: str) -> str:
    return "-".join(filter(None, (folder.resolve().name, name)))


def identities(folder: Path) -> dict[str, str]:
    """Under which names services know the run of a folder."""
    path = folder / IDENTITIES
    return json.loads(path.read_text()) if path.exists() else {}


def remember(folder: Path, names: Mapping[str, str]) -> None:
    with atomic_file(folder / IDENTITIES) as temporary:
        temporary.write_text(json.dumps(dict(names)))
