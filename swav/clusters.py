"""Cluster images with the prototypes of a trained network, and look at the clusters.

    python -m swav.clusters --data_path /path/to/pictures --output_dir clusters        # released SwAV, 3000 prototypes
    cd swav && python clusters.py                            # embedded materials, weights of the run in runs/materials

Every image goes to the prototype that is nearest to its embedding; no labels are needed. Writes into --output_dir:

    assignments.csv      path, cluster and confidence of every image
    clusters.csv         size and mean confidence of every cluster
    summary.json         prototype usage; with class folders also NMI, ARI and purity
    overview.png         the largest clusters, usage.png how the images spread over the prototypes
    sheets/cluster_*.png a contact sheet per cluster
"""

import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import torch.nn.functional as F
from torch import Tensor

from shared import distributed
from shared.evaluation.features import extract_features
from shared.evaluation.flags import add_process_flags, parse_evaluation
from shared.evaluation.frozen import eval_transform
from shared.images.loading import LEFT_OUT, BadImages, EvalDataset
from shared.images.sources import ImageSource, open_source, reading
from shared.images.tables import write_table
from shared.run.flags import add_bad_image_flags, add_reading_flags
from swav import evaluation
from swav.cluster_pictures import save_overview, save_sheets, save_usage
from swav.clustering import Clustering, assign, describe, summarise
from swav.hub import CARD, load_network
from swav.resnet50 import MultiPrototypes, PrototypeNetwork


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation.evaluation_parser(__doc__)
    add = parser.add_argument_group("images").add_argument
    images = "a folder of images, with or without class folders, .txt list or torchvision name; default: embedded ones"
    add("--data_path", default=None, help=images)
    add_reading_flags(add)
    add("--split", default="all", choices=("all", "train", "val"), help="part of a data set that has several")
    size = "side of the centre crop in pixels, 7/8 of the short side; None: that of the training, else 224"
    add("--image_size", type=int, default=None, help=size)
    add_bad_image_flags(add, "skip", "error", max_fraction=1.0)
    add("--batch_size", type=int, default=64, help="images per process")

    add = parser.add_argument_group("clusters").add_argument
    add("--head", type=int, default=0, help="which set of prototypes, for networks with several (DeepCluster-v2: 0-2)")
    add("--merge_into", type=int, default=0, help="merge the prototypes in use into so many clusters; 0: none")
    add("--temperature", type=float, default=0.1, help="of the softmax that makes the confidence; that of the training")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="clusters", help="where the files go")
    add("--images_per_sheet", type=int, default=60, help="images on a contact sheet")
    add("--max_sheets", type=int, default=None, help="only sheets of so many clusters, the largest (default: all)")
    add_process_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    return parse_evaluation(
        get_args_parser(), arguments, pretrained=CARD.embedded_run, output_dir="runs/materials/clusters"
    )


def cluster_images(args: argparse.Namespace) -> dict | None:
    """Assign, measure, write and draw; the summary on rank 0."""
    if args.temperature <= 0:
        raise ValueError(f"--temperature {args.temperature} is not positive")
    device = distributed.init(args.dist_url, args.device)
    evaluation.choose_network(args)
    source = open_source(args.data_path, args.split, **reading(args))
    distributed.print_once(source.describe())
    network = load_network(args.arch, args.pretrained, args.allow_partial).to(device)
    prototypes = take_prototypes(network, args.head)

    transform = eval_transform(CARD, args.image_size, network)
    output_dir = Path(args.output_dir)
    policy = (output_dir / "unreadable.txt", args.on_bad_image, args.max_bad_fraction)
    images = EvalDataset(source, transform, BadImages.with_new_list(len(source), *policy))
    embeddings, labels = extract_features(network, images, device, args.batch_size, args.num_workers)
    if not distributed.is_main_process():
        return None
    indices = (labels != LEFT_OUT).nonzero().flatten()
    clustering = assign(embeddings[indices], prototypes, args.temperature, args.merge_into)
    clustering.indices = indices.cpu().numpy()
    clustering.labels = None if source.classes is None else labels[indices].cpu().numpy()
    summary = summarise(clustering)
    write_assignments(source, clustering, output_dir / "assignments.csv")
    write_clusters(source, clustering, output_dir / "clusters.csv")
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(describe(summary), flush=True)

    usage = save_usage(clustering, output_dir / "usage.png")
    overview = save_overview(source, clustering, output_dir / "overview.png")
    sheets = save_sheets(source, clustering, output_dir / "sheets", args.images_per_sheet, args.max_sheets)
    print(f"assignments: {output_dir / 'assignments.csv'}")
    print(f"pictures:    {overview}, {usage}, {len(sheets)} sheets in {output_dir / 'sheets'}", flush=True)
    return summary


# --- Embeddings -------------------------------------------------------------------------------------------------------


def take_prototypes(network: PrototypeNetwork, head: int) -> Tensor:
    """Prototypes (K, D) as unit vectors, which they are in training when scores are computed but not in files.

    Without them the network gives embeddings alone.
    """
    if network.prototypes is None:
        raise ValueError("--pretrained: the file holds no prototypes; clusters need that of a training run")
    heads = network.prototypes.heads() if isinstance(network.prototypes, MultiPrototypes) else [network.prototypes]
    if not 0 <= head < len(heads):
        raise ValueError(f"--head {head}: the network has {len(heads)} set(s) of prototypes, counted from 0")
    network.prototypes = None
    return F.normalize(heads[head].weight.detach(), dim=1)


# --- Tables -----------------------------------------------------------------------------------------------------------


def write_assignments(source: ImageSource, clustering: Clustering, path: Path) -> None:
    """One row per image, in the order of the source."""
    confidences = [f"{confidence:.4f}" for confidence in clustering.confidences]
    columns = [map(source.path, clustering.indices.tolist()), clustering.clusters.tolist(), confidences]
    heading = ["path", "cluster", "confidence"]
    if clustering.labels is not None:
        columns.append([source.classes[label] for label in clustering.labels])
        heading.append("class")
    write_table(path, heading, zip(*columns, strict=True))


def write_clusters(source: ImageSource, clustering: Clustering, path: Path) -> None:
    """One row per cluster that has images, the largest first."""
    sizes, heading, rows = clustering.sizes(), ["cluster", "images", "mean_confidence"], []
    for cluster in clustering.largest_first():
        rows.append([cluster, sizes[cluster], f"{clustering.confidences[clustering.clusters == cluster].mean():.4f}"])
        if clustering.labels is not None:
            label, share = clustering.majority(cluster)
            rows[-1] += [source.classes[label], f"{share:.4f}"]
    write_table(path, [*heading, *(["class", "share_of_class"] if clustering.labels is not None else [])], rows)


def main() -> None:
    distributed.run_script(cluster_images, parse_args)


if __name__ == "__main__":
    main()
