"""Supervised training as DeiT does it (Touvron et al. 2021), for any classifier.

:func:`train_classifier` is the whole training after a method has built its network, views and loss. A method with
another step or other batches writes a loop of its own from the same pieces: those of this file, batches and Mixup of
:mod:`shared.supervised.data`, moving average, losses, optimiser and schedule of the modules beside it.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor, nn

from shared import distributed
from shared.images.labelled import check_classes
from shared.multicrop import channels_last
from shared.networks.batchnorm import synchronize_batchnorm
from shared.networks.compiling import compile_network
from shared.optimisation.accumulation import accumulate
from shared.optimisation.optim import clip_total_grad_norm_
from shared.run.checkpoint import load_latest_or_given
from shared.run.run import Run
from shared.run.settings import long_warmup, slow_average, tell_settings

from .data import LabelledImages, build_mixup, train_batches
from .ema import NetworkEMA
from .optimizer import build_timm_optimizer, build_timm_schedule, counters_of, set_learning_rate


@dataclass
class BestAccuracy:
    """The best top-1 of a run so far, part of its checkpoints.

    Attributes:
        file: Name of the copy of the checkpoint that reached it.
        keeps_ties: Whether a later epoch of equal accuracy replaces that copy.
    """

    file: str
    keeps_ties: bool = False
    acc1: float = 0.0

    def file_for(self, acc1: float) -> str | None:
        """Take note of an accuracy; the name of the copy if it is the best one, else None."""
        is_best = acc1 >= self.acc1 if self.keeps_ties else acc1 > self.acc1
        self.acc1 = max(self.acc1, acc1)
        return self.file if is_best else None

    def state_dict(self) -> dict[str, float]:
        return {"acc1": self.acc1}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.acc1 = state["acc1"]


def train_classifier(
    args: argparse.Namespace,
    run: Run,
    images: LabelledImages,
    transform: Callable[[np.ndarray], Tensor],
    network: nn.Module,
    criterion: Callable[[nn.Module, Tensor, Tensor], Tensor],
    best: BestAccuracy,
    *,
    peak_lr: float,
    network_flags: tuple[str, ...],
    weights_flag: str,
) -> None:
    """Train from the newest checkpoint in the output folder, from ``--resume``, or from the start.

    Args:
        args: Flags of :mod:`shared.supervised.flags` and :func:`shared.run.flags.add_run_flags`.
        transform: Maps pixels to a training view, see :class:`shared.supervised.data.LabelledViews`.
        network: Trains in the mode, module by module, in which it is given.
        criterion: See :func:`train_one_epoch`.
        peak_lr: Learning rate after the warm-up.
        network_flags: Flags that shape the network: a checkpoint with other ones is refused.
        weights_flag: The flag for weights to start from, for messages.
    """
    # views, mixed labels
    data = train_batches(args, images, transform, run.device)
    mixup = build_mixup(args, images.num_classes)
    check_classes("--teacher-path", args.teacher_path, images.train.classes)
    num_parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    distributed.print_once(
        f"{images.train.describe()}: {data.steps_per_epoch} steps per epoch; {num_parameters:,} parameters"
    )

    # network, moving average, optimiser, schedule
    network = synchronize_batchnorm(network, run.device).to(run.device)
    tell_settings(args, long_warmup("--warmup-epochs", args.warmup_epochs, args.epochs))
    ema = None
    if args.model_ema:
        decays = np.full(args.epochs * data.steps_per_epoch, args.model_ema_decay)
        tell_settings(args, slow_average("--model-ema-decay", decays, "moving average"))
        ema = NetworkEMA(network, args.model_ema_decay, "cpu" if args.model_ema_force_cpu else None)
    if args.compile:
        compile_network(network)
    accumulate(network, args.accumulate)
    options = (args.weight_decay, args.momentum, args.opt_eps, args.opt_betas)
    optimizer = build_timm_optimizer(network, args.opt, peak_lr, *options)
    scheduler = build_timm_schedule(args, optimizer)
    network = distributed.wrap(network, run.device)

    run.epoch, run.classes = args.start_epoch, images.train.classes
    run.resume(
        data,
        args.epochs * data.steps_per_epoch,
        (*network_flags, "opt"),  # the state of one optimiser is none of another
        checkpoint=load_latest_or_given(run.path, args.resume, weights_flag),
        to_official=to_official,
        from_official=from_official,
        scheduled=counters_of(optimizer),
        model=network,
        optimizer=optimizer,
        best=best,
        **({} if ema is None else {"model_ema": ema}),
    )
    with run:
        for epoch in run.epochs():
            data.sampler.set_epoch(epoch, run.step_in_epoch)
            lr = set_learning_rate(scheduler, optimizer, epoch)
            train_one_epoch(run, network, criterion, data.loader, mixup, optimizer, lr, args.clip_grad, ema)
            tested, keep_as = {}, None
            if (epoch + 1) % args.test_freq == 0 or epoch + 1 == args.epochs:
                tested = evaluate_epoch(run, images, network, ema if args.eval_ema else None)
                keep_as = best.file_for(tested["test_acc1"])
            run.log_epoch(**tested, n_parameters=num_parameters, bad_images=images.bad_images.count())
            run.end_epoch(keep_as)


def train_one_epoch(
    run: Run,
    network: nn.Module,
    criterion: Callable[[nn.Module, Tensor, Tensor], Tensor],
    loader: Iterable,
    mixup: Mixup | None,
    optimizer: torch.optim.Optimizer,
    lr: float,
    clip_grad: float | None,
    ema: NetworkEMA | None,
) -> None:
    """One epoch.

    Args:
        criterion: Maps the network, images (B, C, H, W) and targets, class numbers (B,) or probabilities (B, classes),
            to the loss.
        loader: Yields (views, labels, indices).
        mixup: Mixes images and labels of a batch.
        lr: Of the epoch; the optimiser has it already.
        clip_grad: Cap of the norm of all gradients together; None: no cap.
        ema: Follows the network after every step.
    """
    parameters = list(network.parameters())
    for _, (views, labels, _) in run.steps(loader):
        images = channels_last(views.to(run.device, non_blocking=True))
        targets = labels.to(run.device, non_blocking=True)
        if mixup is not None:
            images, targets = mixup(images, targets)
        optimizer.zero_grad(set_to_none=True)

        with run.precision.autocast():
            loss = criterion(network, images, targets)

        run.backward(loss, optimizer)
        run.update(clip_total_grad_norm_(parameters, clip_grad), optimizer)
        if ema is not None:
            ema.update(distributed.unwrap(network))
        run.end_step(len(labels), {"loss": loss, "lr": lr})


def evaluate_epoch(
    run: Run, images: LabelledImages, network: nn.Module, ema: NetworkEMA | None = None
) -> dict[str, float]:
    """Accuracy between epochs, also of the moving average where it is given; written to the log.

    Returns:
        ``test_loss``, ``test_acc1`` and ``test_acc5``, and ``ema_acc1``.
    """
    result = images.evaluate(distributed.unwrap(network), between_batches=run.stop_if_asked)
    tested = {f"test_{name}": value for name, value in result.items()}
    if ema is not None:
        home = next(ema.network.parameters()).device  # the host with --model-ema-force-cpu
        tested["ema_acc1"] = images.evaluate(ema.network.to(run.device), between_batches=run.stop_if_asked)["acc1"]
        ema.network.to(home)
    run.log_evaluation(**tested)
    return tested


def to_official(state: dict) -> dict:
    """The state of a run under DeiT's names, and the best accuracy as a number."""
    state = {"model_ema": None, **state, "scaler": state["fp16_scaler"], "best_acc1": state["best"]["acc1"]}
    return {name: value for name, value in state.items() if name not in ("fp16_scaler", "best")}


def from_official(checkpoint: dict) -> dict:
    """The way back. The official code writes the number of the finished epoch, and no best accuracy."""
    if "step_in_epoch" not in checkpoint:
        checkpoint = checkpoint | {"epoch": checkpoint["epoch"] + 1}
    return checkpoint | {"fp16_scaler": checkpoint.get("scaler"), "best": {"acc1": checkpoint.get("best_acc1", 0.0)}}
