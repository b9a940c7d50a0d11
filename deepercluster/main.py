"""DeeperCluster: learn features of uncurated images from their clusters and their rotations together.

Caron, Bojanowski, Mairal, Joulin, "Unsupervised Pre-Training of Image Features on Non-Curated Data", ICCV 2019.

    python main.py                                                        # embedded materials, minutes on a CPU
    torchrun --nproc_per_node=8 --nnodes=8 main.py --data_path /path/to/yfcc100m --image_ids flickr_unique_ids.npy \\
        --size_dataset 100000000 --sobel 1 --super_classes 16 --k 320000 --pretrained /path/to/rotnet.pth \\
        --dump_path /path/to/run --workers 10                             # the published recipe, 64 processes

Every third epoch all images are clustered, first into super-clusters, then each of these into sub-clusters. A
super-class is a super-cluster with a rotation; a group of processes trains it, on its own images, to tell the
super-class and the sub-cluster. One process can take the places of all groups. Running the same command again resumes
the run.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from deepercluster.clustering import (
    ClusteringState,
    Clusters,
    GroupBatches,
    Groups,
    Heads,
    Layout,
    Place,
    epoch_sizes,
    find_clusters,
    images_for_pca,
    whiten,
)
from deepercluster.hub import ARCH, MEAN, NETWORK_FLAGS, STD, build, fill_body, from_official, to_official
from deepercluster.report import HEALTH_RULES, report
from deepercluster.vgg16 import OFFICIAL_SIZE, OFFICIAL_WIDTH, VGG16
from shared import distributed
from shared.evaluation.features import RankSampler, check_features
from shared.evaluation.knn_monitor import KNNMonitor
from shared.evaluation.partitions import describe_partition
from shared.images.loading import EvalDataset, EvalTransform, make_loader
from shared.images.training_data import TrainingData, open_images, write_recipes
from shared.images.views import ViewRecipe
from shared.images.zipped import ZippedImages
from shared.multicrop import MultiCropDataset, normalize_views
from shared.networks.batchnorm import synchronize_batchnorm
from shared.networks.compiling import compile_network
from shared.optimisation.optim import build_optimizer, clip_grad_norm_per_tensor_
from shared.run.flags import (
    AnyDashParser,
    add_data_flags,
    add_run_flags,
    bool_flag,
    parse_with_embedded_defaults,
    tell_embedded_defaults,
)
from shared.run.health import HealthMonitor
from shared.run.randomness import derive_seed
from shared.run.run import Run

EMBEDDED_DATA_DEFAULTS = {
    "sobel": True,
    "image_size": 32,
    "crop_scale": (0.4, 1.0),
    "width": 16,
    "super_classes": 4,
    "k": 128,
    "dim_pca": 64,
    "batch_size": 8,
    "epochs": 16,
    "reassignment": 4,
    "lr": 0.05,
    "checkpoint_freq": 0,
    "num_workers": 4,
    "output_dir": "runs/materials",
}
MINIMUM = {"epochs": 1, "batch_size": 1, "k": 1, "dim_pca": 1, "reassignment": 1, "niter": 0, "size_dataset": 1}
MINIMUM |= {"image_size": 30, "width": 1, "super_classes": 1, "log_freq": 1, "checkpoint_freq": 0}
FINDING, HEADS = range(2)  # what is drawn once per clustering


def get_args_parser() -> argparse.ArgumentParser:
    parser = AnyDashParser(__doc__)
    add = add_data_flags(parser)
    ids = "numbers (.npy) of images in zips below --data_path: ABCDEFGH is FGH.jpg of AB/CDE.zip, as in YFCC100M"
    add("--image_ids", default=None, help=ids)
    add("--size_dataset", type=int, default=10_000_000, help="take at most so many images, the first ones")
    add("--no_labels", action="store_true", help="class folders are no classes")

    add = parser.add_argument_group("network and views").add_argument
    add("--sobel", type=bool_flag, default=False, help="look at Sobel gradients of the channels' mean, not at colours")
    add("--width", type=int, default=OFFICIAL_WIDTH, help="channels of the first convolution")
    add("--image_size", type=int, default=OFFICIAL_SIZE, help="side in pixels of what the network sees")
    add("--crop_scale", type=float, nargs=2, default=(0.08, 1.0), help="area range of the random crops")
    add("--pretrained", default="", help="weights of the body to start from: file, run or release")
    add("--compile", action="store_true", help="torch.compile the network")

    add = parser.add_argument_group("clustering").add_argument
    add("--reassignment", type=int, default=3, help="epochs between clusterings")
    add("--dim_pca", type=int, default=4096, help="dimensions of the whitened features")
    add("--k", type=int, default=10_000, help="clusters of all super-clusters together")
    add("--super_classes", type=int, default=4, help="super-clusters, times four rotations with --rotnet")
    add("--rotnet", type=bool_flag, default=True, help="predict rotations as well")
    add("--niter", type=int, default=10, help="updates of the centroids")
    add("--use_faiss", type=bool_flag, default=True, help="not used: the search here takes no longer")
    rules = "released: sizes, empty clusters and leftover images as in the released code, with its faults"
    add("--rules", default="fixed", choices=("fixed", "released"), help=rules)

    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=float, default=0.1, help="learning rate, constant")
    add("--wd", type=float, default=1e-5, help="weight decay")
    add("--nepochs", "--epochs", dest="epochs", type=int, default=100)
    each = "images of a step for each process, or for each super-class where one process trains several"
    add("--batch_size", type=int, default=48, help=each)
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "fp32"), help="auto: bf16 where it is fast")
    add("--seed", type=int, default=1993)

    add = add_run_flags(parser)
    add("--dump_path", "--output_dir", dest="output_dir", default="./exp", help="checkpoints, logs and pictures")
    add("--checkpoint_freq", type=int, default=1, help="epochs between copies of the checkpoint; 0: none")
    links = "write a folder of links to its images for each sub-cluster, if there are at most so many images"
    add("--cluster_folders", type=int, default=10_000, help=links)
    for name in ("--epoch", "--start_iter"):
        add(name, type=int, default=0, help="not used, as in the official code: the checkpoint tells")
    for name in ("--rank", "--world-size"):
        add(name, type=int, default=None, help="ignored: read from the environment")
    add("--debug_slurm", type=bool_flag, default=False, help="not needed: outside of srun its variables are not read")
    add("--warm_restart", type=bool_flag, default=False, help="not used, as in the official code")
    parser.set_defaults(arch=ARCH, num_workers=8)
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse and check the command line; without ``--data_path`` the defaults are those of the embedded data."""
    parser = parser or get_args_parser()
    args = parse_with_embedded_defaults(parser, arguments, EMBEDDED_DATA_DEFAULTS, MINIMUM)
    super_clusters = max(1, args.super_classes // (4 if args.rotnet else 1))
    if args.k % super_clusters:
        parser.error(f"--k {args.k} is not divisible by the {super_clusters} super-clusters of --super_classes")
    if args.image_ids and not args.data_path:
        parser.error(f"--image_ids {args.image_ids}: say the folder of the zips with --data_path")
    if args.image_ids and args.eval_knn_freq is None:
        args.eval_knn_freq = 0  # images in zips have no classes
    args.dist_url = args.dist_url or "env://"
    return args


def train_deepercluster(args: argparse.Namespace) -> None:
    """Train from the newest checkpoint in ``args.output_dir``, or from the start if there is none."""
    run = Run(args, args.amp, "checkpoint.pth.tar", subfolder="checkpoints")
    device = run.device
    groups = Groups(Layout(distributed.get_world_size(), args.super_classes, args.rotnet))
    data, images_in_order = open_training_data(args, run.output_dir, device, groups)
    source = data.dataset.source
    tell_embedded_defaults(args.data_path, EMBEDDED_DATA_DEFAULTS)

    # network, and three optimisers: its own, those of the scores of super- and of sub-classes
    network = build(ARCH, args.in_chans, args.image_size, sobel=args.sobel, width=args.width)
    if args.pretrained:
        fill_body(network, args.pretrained)
    network = synchronize_batchnorm(network, device).to(device)
    if args.compile:
        compile_network(network)
    trunk = distributed.wrap(network, device)
    build_sgd = partial(sgd, lr=args.lr, weight_decay=args.wd)
    optimizer = build_sgd(network)

    state = ClusteringState(network.dim, groups, data.checksum, build_sgd, device)
    run.resume(
        data,
        args.epochs * data.steps_per_epoch,
        NETWORK_FLAGS,
        to_official=to_official,
        from_official=from_official,
        scheduled=(),
        network=network,
        optimizer=optimizer,
        clustering=state,
    )
    run.health = HealthMonitor(HEALTH_RULES)
    knn = KNNMonitor(run, args.image_size, MEAN, STD, args.num_workers)

    with run:
        if not state.evaluated_before:
            knn.evaluate(-1, network)
        state.evaluated_before = True
        for epoch in run.epochs():
            # 1. cluster all images into super- and sub-clusters; their scores start afresh
            if state.epoch < 0 or (epoch % args.reassignment == 0 and state.epoch != epoch):
                clusters = cluster_images(run, network, images_in_order, groups, state.clusters)
                state.take(clusters, epoch, derive_seed(args.seed, epoch, HEADS))
                run.save_if_due()
            run.guard.watch(heads=state.heads)
            # 2. learn both levels; every sub-cluster is drawn equally often, whatever its size
            data.sampler.set_epoch(epoch, state.clusters, run.step_in_epoch)
            train_one_epoch(run, trunk, state, groups.places, data.loader, optimizer)
            knn.evaluate(epoch, network)
            run.check_health(run.log_epoch(bad_images=data.bad_images.count()))
            is_kept = args.checkpoint_freq and (epoch + 1) % args.checkpoint_freq == 0
            run.end_epoch(f"checkpoints/checkpoint{epoch}.pth.tar" if is_kept else None)
        # what the network makes of the images in the end
        clusters = cluster_images(run, network, images_in_order, groups, state.clusters)
    if distributed.is_main_process():
        report(run, source, clusters, groups.layout, knn)


def sgd(module: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """SGD with momentum on what learns in ``module``; weight decay spares nothing."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return build_optimizer("sgd", [{"params": parameters, "lr": lr, "weight_decay": weight_decay}])


def open_training_data(
    args: argparse.Namespace, output_dir: Path, device: torch.device, groups: Groups
) -> tuple[TrainingData, DataLoader]:
    """A loader of random crops for training, and one of centre crops of this process's images for clustering."""
    zips = None
    if args.image_ids:
        zips = ZippedImages(args.data_path, args.image_ids, args.size_dataset, round(1e6 * args.max_megapixels))
    source, checksum, bad_images = open_images(args, output_dir, args.image_size, "--image_size", source=zips)
    layout, released = groups.layout, args.rules == "released"
    used, shown = epoch_sizes(min(len(source), args.size_dataset), args.batch_size, layout, released)
    bad_images.num_images = used  # what takes the place of an unreadable image is in a cluster, too
    most = {"k": max(1, used // 20) * layout.super_clusters, "dim_pca": min(64, used)} if args.k > 1 else {}
    if large := [name for name in most if getattr(args, name) > used]:
        given, taken = (", ".join(f"--{n} {v[n]}" for n in large) for v in (vars(args), most))
        raise ValueError(f"{given}: there are {used} images; take {taken}")
    size, in_chans = args.image_size, args.in_chans
    recipe = ViewRecipe(size, tuple(args.crop_scale), interpolation="bilinear")
    write_recipes(output_dir, [recipe])
    views = MultiCropDataset(source, [recipe], args.seed, in_chans=in_chans, bad_images=bad_images)
    batches = GroupBatches(groups.places, layout.training_size, shown, args.batch_size, args.seed)
    workers = {"num_workers": args.num_workers, "device": device}
    loader = make_loader(views, batch_sampler=batches, **workers)
    centre = EvalTransform(round(size * 256 / 224), size, in_chans=in_chans, interpolation="bilinear")
    centres = EvalDataset(source, centre, bad_images)
    per_rank = args.batch_size * len(groups.places)
    in_order = make_loader(centres, sampler=RankSampler(used), batch_size=per_rank, **workers)
    distributed.print_once(f"{source.describe()}: {len(batches)} steps per epoch")
    batch_size = args.batch_size * layout.places
    return TrainingData(views, batches, loader, bad_images, checksum, batch_size, args.num_workers), in_order


# --- Clustering -------------------------------------------------------------------------------------------------------


def cluster_images(run: Run, network: VGG16, loader: DataLoader, groups: Groups, previous: Clusters | None) -> Clusters:
    """Clusters of all images as the network sees them now; the log says what they are like."""
    args, num_images, world_size = run.args, loader.sampler.num_samples, groups.layout.world_size
    if args.k == 1:  # rotations alone
        return Clusters(torch.zeros(num_images, dtype=torch.long), torch.zeros(num_images, dtype=torch.long), 1, 1)
    fitted = min(images_for_pca(network.dim, args.batch_size, groups.layout.places) or num_images, num_images)
    own = len(range(groups.rank, num_images, world_size))
    features = compute_features(run, network, loader, own)
    rows = whiten(features, -(-fitted // (world_size * loader.batch_size)), args.dim_pca)
    clusters = find_clusters(
        rows,
        num_images,
        groups,
        args.k,
        args.niter,
        derive_seed(args.seed, run.epoch, FINDING),
        fitted,
        args.batch_size if args.rules == "released" else None,
    )
    before = None if previous is None else previous.assignments()
    line = describe_partition(clusters.assignments(), args.k, before, loader.dataset.source)
    run.log_evaluation(**line)
    run.check_health({"images": num_images, **line})
    return clusters


@torch.no_grad()
def compute_features(run: Run, network: VGG16, loader: Iterable, number: int) -> Iterator[Tensor]:
    """Features of this process's images in evaluation mode, batch by batch, (B, D), ``number`` in all."""
    network.eval()
    for images, *_ in loader:
        (images,) = normalize_views([images], run.device, MEAN, STD)
        with run.precision.autocast():
            features = network(images).float()
        check_features(features)
        yield features[:number]
        number -= len(features[:number])
        run.stop_if_asked()


# --- Training ---------------------------------------------------------------------------------------------------------


def train_one_epoch(
    run: Run,
    trunk: nn.Module,
    state: ClusteringState,
    places: Sequence[Place],
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Learn the super-class and the sub-cluster of images that are turned by the rotation of their place (eq. 4).

    Args:
        trunk: Images to features; wrapped for several processes.
        loader: Yields (one uint8 batch of crops in a list, the places' one after another; true labels that nobody looks
            at; indices).
        optimizer: Of the trunk.
    """
    heads, clusters = state.heads, state.clusters
    optimizers = (optimizer, *state.optimizers)
    parameters = [*trunk.parameters(), *heads.parameters()]
    trunk.train()
    for _, (views, _, indices) in run.steps(loader):
        (images,) = normalize_views(views, run.device, MEAN, STD)
        images = torch.cat([turn(part, place) for part, place in zip(images.chunk(len(places)), places, strict=True)])
        for each in optimizers:
            each.zero_grad(set_to_none=True)

        with run.precision.autocast():
            hidden = F.relu(trunk(images)).chunk(len(places))
            scores = [(heads.super_class(h), head(h)) for h, head in zip(hidden, heads.sub_class, strict=True)]
        results = []
        for (of_super, of_sub), place, chosen in zip(scores, places, indices.chunk(len(places)), strict=True):
            results.append(hierarchical_loss(of_super.float(), of_sub.float(), place, clusters, chosen))
        averages = {name: sum(result[name] for result in results) / len(places) for name in results[0]}

        run.backward(averages["loss"], *optimizers)
        average_gradients(heads, state.groups)
        norms = clip_grad_norm_per_tensor_(parameters, max_norm=0)
        run.update(distributed.all_reduce_sum(norms.sum()[None]), *optimizers)  # what one leaves out, all leave out
        run.precision.share_scale()
        run.end_step(len(indices), averages)


def turn(images: Tensor, place: Place) -> Tensor:
    """Images (B, C, H, W) turned counter-clockwise by the place's quarter turns."""
    return images.rot90(place.rotation, (2, 3)) if place.rotation else images


def hierarchical_loss(
    of_super: Tensor, of_sub: Tensor, place: Place, clusters: Clusters, indices: Tensor
) -> dict[str, Tensor]:
    """Cross-entropy of the super-class plus that of the sub-cluster, and per cent of right predictions.

    An image of another super-cluster, which takes the place of one that cannot be read, has no sub-cluster here.

    Args:
        of_super, of_sub: Scores (B, S) and (B, sub-clusters).
        indices: Of the images, (B,).

    Returns:
        ``loss``, the same of both parts, and ``prec``, for which both predictions have to be right; 0-d.
    """
    belongs = clusters.super_clusters[indices] == place.super_cluster
    sub = clusters.sub_clusters[indices].where(belongs, -1).to(of_sub.device, non_blocking=True)
    super_class = torch.full_like(sub, place.super_class)
    losses = F.cross_entropy(of_super, super_class), F.cross_entropy(of_sub, sub, ignore_index=-1)
    hits = of_super.argmax(dim=1) == super_class, of_sub.argmax(dim=1) == sub
    per_cent = [100 * hit.double().mean() for hit in (*hits, hits[0] & hits[1])]
    names = ("loss_super_class", "loss_sub_class", "prec_super_class", "prec_sub_class", "prec")
    return {"loss": losses[0] + losses[1], **dict(zip(names, (*(x.detach() for x in losses), *per_cent), strict=True))}


@torch.no_grad()
def average_gradients(heads: Heads, groups: Groups) -> None:
    """Gradients of the scores of super-classes averaged over all processes, of sub-classes within a training group.

    The loss is a mean over the places of a process, of which each has sub-classes of its own.
    """
    for parameter in heads.super_class.parameters():
        parameter.grad = distributed.all_reduce_mean(parameter.grad)
    for parameter in heads.sub_class.parameters():
        parameter.grad *= len(heads.sub_class)
        if (size := groups.layout.training_size) > 1:
            parameter.grad = distributed.all_reduce_sum(parameter.grad, groups.training) / size


def main() -> None:
    distributed.run_script(train_deepercluster, parse_args)


if __name__ == "__main__":
    main()
