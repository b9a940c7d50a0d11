"""Deep clustering: train a convnet on the clusters of its own features.

Caron et al., "Deep Clustering for Unsupervised Learning of Visual Features", ECCV 2018.

    python main.py                                                        # embedded materials, minutes on a CPU
    python main.py /path/to/imagenet/train --arch alexnet --sobel --lr 0.05 --wd -5 --k 10000 \\
        --exp /path/to/run --verbose --workers 12                         # VOC07 fc6-8: 72.0 mAP after 500 epochs

Again and again: compute the features of all images, cluster them, take the clusters as labels, put a new top layer on
the network, and train it for an epoch. Running the same command again resumes the run.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from deepcluster.checkpoints import NETWORK_FLAGS, from_official, to_official
from deepcluster.clustering import ClusteringState, Clusters, check_components, cluster, pca_whiten
from deepcluster.convnets import ClusterNetwork, new_top_layer
from deepcluster.hub import MEAN, STD, build_network
from deepcluster.report import HEALTH_RULES, report
from deepcluster.sampling import (
    SAMPLERS,
    draw_epoch,
    open_training_data,
    pseudo_labels,
)
from shared import distributed
from shared.evaluation.features import check_features
from shared.evaluation.knn_monitor import KNNMonitor
from shared.evaluation.partitions import describe_partition
from shared.images.channels import add_channel_flags
from shared.images.cluster_draws import cluster_lists
from shared.multicrop import normalize_views
from shared.networks.backbones import Through
from shared.networks.batchnorm import synchronize_batchnorm
from shared.networks.compiling import compile_network
from shared.optimisation.accumulation import accumulate, add_accumulation_flag
from shared.optimisation.optim import clip_grad_norm_per_tensor_
from shared.optimisation.precision import Precision
from shared.run.checkpoint import load_latest_or_given
from shared.run.flags import (
    Parser,
    add_bad_image_flags,
    add_own_images_flags,
    add_reading_flags,
    add_run_flags,
    parse_with_embedded_defaults,
    tell_embedded_defaults,
)
from shared.run.health import HealthMonitor
from shared.run.randomness import derive_seed
from shared.run.run import Run

# What replaces the official defaults when no DIR is given: images of 32 pixels, for which AlexNet is too large.
EMBEDDED_DATA_DEFAULTS = {
    "arch": "test_resnet",  # timm's smallest ResNet, 0.4 million weights
    "sobel": True,
    "crop_size": 32,
    "crop_scale": (0.4, 1.0),
    "nmb_cluster": 60,
    "pca_dim": 64,
    "batch": 32,
    "epochs": 8,
    "output_dir": "runs/materials",
}
MINIMUM = {"epochs": 1, "batch": 1, "nmb_cluster": 2, "pca_dim": 1, "crop_size": 1, "log_freq": 1, "checkpoints": 0}
CLUSTERING, DRAWING, TOP_LAYER = range(3)  # what is drawn once per epoch


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    images = "training images: folder, .txt list or torchvision name; default: the embedded ones"
    add("data_path", metavar="DIR", nargs="?", default=None, help=images)
    add("--val_path", default=None, help="images for the k-NN evaluation; by default those that belong to DIR")
    add_reading_flags(add)
    add_channel_flags(add)
    add("--cache", default="none", help="decoded images: none, memory, or a folder for a memory-mapped file")
    add_bad_image_flags(add)
    add("--workers", "--num_workers", dest="num_workers", type=int, default=4, help="loader processes per rank")

    add = parser.add_argument_group("views").add_argument
    add("--crop_size", type=int, default=224, help="side in pixels of the images that the network sees")
    add("--crop_scale", type=float, nargs=2, default=(0.08, 1.0), help="area range of the random crops")

    add_own_images_flags(parser, __file__)

    add = parser.add_argument_group("network").add_argument
    add("--arch", "-a", default="alexnet", help="alexnet, vgg16, or any torchvision or timm model name")
    add("--sobel", action="store_true", help="look at Sobel gradients of the channels' mean instead of colours")
    add("--compile", action="store_true", help="torch.compile the network")
    add_accumulation_flag(add)

    add = parser.add_argument_group("clustering").add_argument
    add("--clustering", default="Kmeans", choices=("Kmeans", "PIC"))
    add("--nmb_cluster", "--k", type=int, default=10000, help="clusters of k-means; PIC finds their number itself")
    backends = "who computes k-means; auto: torch on a GPU, else faiss where it is installed"
    add("--kmeans", default="auto", choices=("auto", "faiss", "torch"), help=backends)
    add("--pca_dim", type=int, default=256, help="dimensions to which features are reduced before clustering")
    samplers = "uniform: over the clusters, as in the paper; official: as in the released code"
    add("--sampler", default="uniform", choices=SAMPLERS, help=samplers)
    add("--reassign", type=float, default=1.0, help="epochs of training between two clusterings")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=200, help="rounds of clustering and training")
    add("--start_epoch", type=int, default=0, help="first epoch, where there is no checkpoint")
    add("--batch", type=int, default=256, help="images per step, of all processes together")
    add("--lr", type=float, default=0.05, help="learning rate")
    add("--momentum", type=float, default=0.9, help="momentum of everything but the top layer")
    add("--wd", type=float, default=-5, help="weight decay, as a power of ten")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "fp32"), help="auto: bf16 where it is fast")
    add("--seed", type=int, default=31)

    add = add_run_flags(parser)
    add("--exp", "--output_dir", dest="output_dir", default="", help="folder for checkpoints, logs and pictures")
    add("--resume", default="", metavar="PATH", help="checkpoint to go on from, where --exp has none")
    add("--checkpoints", type=int, default=25000, help="steps between numbered checkpoints; 0: none")
    add("--verbose", action="store_true", help="also print the sizes of the clusters")
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse and check the command line, of ``parser`` if further flags are in it.

    Without ``DIR`` the defaults are those of the embedded data.
    """
    parser = parser or get_args_parser()
    args = parse_with_embedded_defaults(parser, arguments, EMBEDDED_DATA_DEFAULTS, MINIMUM)
    if args.reassign <= 0:
        parser.error(f"--reassign {args.reassign}: must be more than 0")
    if args.wd > 0:
        parser.error(f"--wd {args.wd}: must be at most 0; it is a power of ten, -5 means 1e-5")
    return args


def train_deepcluster(args: argparse.Namespace) -> None:
    """Train from the newest checkpoint in ``args.output_dir``, or from scratch if there is none."""
    run = Run(args, args.amp, "checkpoint.pth.tar", subfolder="checkpoints")
    device = run.device
    data, images_in_order = open_training_data(args, run.output_dir, device)
    source = data.dataset.source
    tell_embedded_defaults(args.data_path, EMBEDDED_DATA_DEFAULTS, "DIR")

    # the network without a top layer, and its optimiser
    network = build_network(args.arch, args.sobel, img_size=args.crop_size, in_chans=args.in_chans)
    check_components(args.pca_dim, network.dim, len(source))
    network = synchronize_batchnorm(network, device).to(device)
    if args.compile:
        compile_network(network)
    accumulate(network, args.accumulate)
    body = distributed.wrap(network, device)
    weight_decay = 10**args.wd
    optimizer = build_sgd(network, args.lr, args.momentum, weight_decay)

    # checkpoints under the names of the official ones, monitoring
    state = ClusteringState(network.dim, data.checksum, device)
    run.epoch = args.start_epoch  # unless a checkpoint says where to go on
    run.resume(
        data,
        args.epochs * data.steps_per_epoch,
        NETWORK_FLAGS,
        checkpoint=load_latest_or_given(run.path, args.resume, "--model of an evaluation"),
        to_official=to_official,
        from_official=from_official,
        scheduled=(),
        network=network,
        optimizer=optimizer,
        clustering=state,
    )
    run.health = HealthMonitor(HEALTH_RULES)
    knn, clustered = KNNMonitor(run, args.crop_size, MEAN, STD, args.num_workers), Through(network, "embed")
    how = (args.pca_dim, args.clustering, args.nmb_cluster, args.kmeans)

    with run:
        if not state.evaluated_before:
            knn.evaluate(-1, clustered)
        state.evaluated_before = True
        for epoch in run.epochs():
            if state.epoch != epoch:  # else the run goes on inside of it
                # 1. cluster the features: the clusters are labels that nobody had to give
                state.clusters = cluster_images(network, images_in_order, run, state.clusters, *how)
                if args.verbose:
                    sizes = state.clusters.sizes().sort(descending=True)
                    distributed.print_once(f"sizes of the clusters: {sizes.values.tolist()}")
                # 2. a new top layer: nothing says that cluster 7 of this epoch is cluster 7 of the one before
                seed = derive_seed(args.seed, epoch, TOP_LAYER)
                state.top_layer = new_top_layer(network.dim, state.clusters.num_clusters, seed).to(device)
                state.epoch = epoch
                run.save_if_due()
            clusters, top_layer = state.clusters, state.top_layer
            run.guard.watch(top_layer=top_layer)
            # 3. train: every cluster is drawn equally often, whatever its size
            lists = cluster_lists(clusters.assignments.numpy(), clusters.num_clusters)
            drawn = draw_epoch(lists, data.sampler.num_draws, derive_seed(args.seed, epoch, DRAWING), args.sampler)
            data.sampler.set_epoch(epoch, drawn, run.step_in_epoch)
            train_one_epoch(
                body,
                distributed.wrap(top_layer, device),
                pseudo_labels(clusters.assignments, clusters.num_clusters),
                data.loader,
                # the top layer's own optimiser: no momentum, it has no past
                (optimizer, build_sgd(top_layer, args.lr, 0, weight_decay)),
                run,
                numbered_every=args.checkpoints,
            )
            knn.evaluate(epoch, clustered)
            averages = run.log_epoch(bad_images=data.bad_images.count())
            run.check_health({"clusters": clusters.num_filled, **averages})
            run.end_epoch()
        # what the network makes of the images in the end
        clusters = cluster_images(network, images_in_order, run, state.clusters, *how)
    if distributed.is_main_process():
        report(run, source, clusters, knn)


def cluster_images(
    network: ClusterNetwork,
    loader: DataLoader,
    run: Run,
    previous: Clusters | None,
    pca_dim: int,
    algorithm: str,
    num_clusters: int,
    backend: str,
) -> Clusters:
    """Clusters of all images as the network sees them now; the log says what they are like."""
    features = compute_features(network, loader, run.precision, run.stop_if_asked)
    whitened, with_variance = pca_whiten(features, pca_dim, run.device)
    if with_variance < pca_dim:
        distributed.print_once(f"the features vary in {with_variance} directions only, fewer than --pca_dim {pca_dim}")
    seed = derive_seed(run.args.seed, run.epoch, CLUSTERING)
    clusters = cluster(whitened, algorithm, num_clusters, seed, backend)
    before = None if previous is None else previous.assignments
    line = describe_partition(clusters.assignments, clusters.num_clusters, before, loader.dataset.source)
    run.log_evaluation(clustering_loss=clusters.loss, **line)
    run.check_health({"images": len(clusters.assignments), **line})
    return clusters


def build_sgd(module: nn.Module, lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD on everything in ``module`` that learns; weight decay spares nothing."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr, momentum, weight_decay=weight_decay, fused=True)
    if momentum:
        # from 0 it is the same update; torch's fused SGD keeps garbage if the first one is skipped
        for p in parameters:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


@torch.no_grad()
def compute_features(
    network: ClusterNetwork, loader: Iterable, precision: Precision, between_batches: Callable[[], None]
) -> Tensor:
    """Features of this process's share of the images (every W-th one), in evaluation mode: (n, D), float32, on the CPU.

    Args:
        loader: Yields (uint8 images, labels, indices); every rank has as many batches, the last image may be repeated.
        between_batches: Called after every batch, equally often on every process; may raise to stop.

    Raises:
        ValueError: If a feature is not finite or all zeros.
    """
    num_images = len(loader.dataset)
    mine = len(range(distributed.get_rank(), num_images, distributed.get_world_size()))
    features = torch.empty(len(loader.sampler), network.dim)
    network.eval()
    done = 0
    for images, *_ in loader:
        (images,) = normalize_views([images], precision.device, MEAN, STD)
        with precision.autocast():
            features[done : done + len(images)] = network.embed(images).float().cpu()
        done += len(images)
        between_batches()
    check_features(features)
    return features[:mine]


def train_one_epoch(
    body: nn.Module,
    top_layer: nn.Module,
    labels: Tensor,
    loader: Iterable,
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    run: Run,
    *,
    numbered_every: int,
) -> None:
    """Learn the pseudo-labels of the images that were drawn for this epoch (eq. 1).

    Args:
        body: The network without its top layer.
        labels: Pseudo-label of every image, (N,).
        loader: Yields (one uint8 batch of random crops in a list, true labels that nobody looks at, indices).
        optimizers: Of the body and of the top layer.
        numbered_every: Steps between numbered checkpoints; 0: none.
    """
    parameters = [*body.parameters(), *top_layer.parameters()]
    body.train()
    for step, (views, _, indices) in run.steps(loader):
        (images,) = normalize_views(views, run.device, MEAN, STD)
        targets = labels[indices].to(run.device, non_blocking=True)

        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        with run.precision.autocast():
            scores = top_layer(body(images))
        loss = F.cross_entropy(scores.float(), targets)
        run.backward(loss, *optimizers)
        run.update(clip_grad_norm_per_tensor_(parameters, max_norm=0), *optimizers)

        run.end_step(len(targets), {"loss": loss})
        if numbered_every and (step + 1) % numbered_every == 0:
            run.save(keep_as=f"checkpoints/checkpoint_{(step + 1) // numbered_every}.pth.tar")


def main() -> None:
    distributed.run_script(train_deepcluster, parse_args)


if __name__ == "__main__":
    main()
