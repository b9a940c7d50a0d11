"""Encode the passages of a file (Contriever, section 3.1), in shards that can be made by many processes and resumed.

    python generate_passage_embeddings.py --model_name_or_path facebook/contriever --passages psgs_w100.tsv \\
        --output_dir contriever_embeddings                                  # one process, one shard
    torchrun --nproc_per_node=8 generate_passage_embeddings.py ...          # eight shards, one per process
    python generate_passage_embeddings.py --num_shards 64 --shard_id 3 ...  # a job of your own for each shard

Run the same command again after an interruption: finished shards are left alone, others go on after the last chunk
that is on the disk, and the files come out the same, bit for bit.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

from contriever.encoder import Retriever
from contriever.flags import add_encoder_flags, check_minimum, load_encoder
from contriever.index.embeddings import ShardWriter
from contriever.index.passages import PassageFile
from contriever.text.normalize import clean
from shared import distributed
from shared.run.flags import Parser


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument_group("passages").add_argument
    add("--passages", required=True, help=".tsv (id, text, title) or .jsonl (id, text, title) file")
    add("--output_dir", default="wikipedia_embeddings", help="folder for the shards")
    add("--prefix", default="passages", help="shards are called <prefix>_<number>")
    add("--num_shards", type=int, default=None, help="contiguous parts of the file; by default one per process")
    add("--shard_id", type=int, default=None, help="make this shard only; None: all, shared out over the processes")
    add("--chunk_size", type=int, default=16384, help="passages between two saves")

    add = add_encoder_flags(parser, ("passage",))
    add("--per_gpu_batch_size", type=int, default=512, help="passages per forward pass")
    add("--passage_maxlength", type=int, default=512, help="tokens; what is longer is cut")
    add("--norm_doc", action="store_true", help="divide vectors by their length; not for Contriever")

    add = parser.add_argument_group("text").add_argument
    add("--no_title", action="store_true", help="encode the text only")
    add("--lowercase", action="store_true", help="first")
    add("--normalize_text", action="store_true", help="one form for dashes, quotation marks and the like")
    return parser


def generate_passage_embeddings(args: argparse.Namespace) -> list[Path]:
    """Write the shards that fall to this process; their folders."""
    check_minimum(args, num_shards=1, chunk_size=1, per_gpu_batch_size=1, passage_maxlength=3)
    device = distributed.init(device=args.device)
    num_shards = args.num_shards or distributed.get_world_size()
    numbers = shards_of_process(num_shards, args.shard_id)
    passages = PassageFile(args.passages)
    if num_shards > len(passages):
        raise ValueError(f"--num_shards {num_shards} is more than the {len(passages)} passages of {args.passages}")
    distributed.print_once(f"{args.passages}: {len(passages)} passages, {passages.num_empty} of them empty")
    retriever = load_encoder(args, device, args.norm_doc)
    settings = {
        **retriever.identity(),
        "normalized": args.norm_doc,
        "max_length": retriever.length("--passage_maxlength", args.passage_maxlength),
        "with_title": not args.no_title,
        "lowercase": args.lowercase,
        "normalize_text": args.normalize_text,
        "passages": passages.crc,
        "num_shards": num_shards,
    }
    amp = retriever.amp(args.no_fp16)
    dtype = "float32" if args.no_fp16 else "float16"
    folders = []
    for number in numbers:
        start, end = shard_range(len(passages), number, num_shards)
        folder = Path(args.output_dir) / f"{args.prefix}_{number:02d}"
        writer = ShardWriter(folder, end - start, retriever.dim, dtype, settings | {"shard_id": number})
        write_shard(writer, passages, start, retriever, args.chunk_size, args.per_gpu_batch_size, amp)
        folders.append(writer.folder)
    distributed.barrier()
    return folders


def shards_of_process(num_shards: int, shard_id: int | None) -> list[int]:
    """Numbers of the shards that this process makes."""
    if shard_id is None:
        return list(range(distributed.get_rank(), num_shards, distributed.get_world_size()))
    if not 0 <= shard_id < num_shards:
        raise ValueError(f"--shard_id {shard_id} is not one of the {num_shards} shards of --num_shards")
    if distributed.get_world_size() > 1:
        raise ValueError("--shard_id is for one process: without it each process makes shards of its own")
    return [shard_id]


def shard_range(count: int, number: int, num_shards: int) -> tuple[int, int]:
    """First passage of a shard, and the one after its last: all of equal size, the last takes the rest."""
    size = count // num_shards
    return number * size, count if number == num_shards - 1 else (number + 1) * size


def write_shard(
    writer: ShardWriter,
    passages: PassageFile,
    start: int,
    retriever: Retriever,
    chunk_size: int,
    batch_size: int,
    amp: str,
) -> None:
    """Encode what is missing of a shard whose first passage is number ``start`` of the file."""
    if writer.finished:
        print(f"{writer.folder} is complete", flush=True)
        return
    total, settings = writer.description["count"], writer.description["settings"]
    began, already = time.time(), writer.done
    if already:
        print(f"{writer.folder}: going on after {already} of {total} passages", flush=True)
    remaining = itertools.islice(passages.read(start + writer.done), total - writer.done)
    while chunk := list(itertools.islice(remaining, chunk_size)):
        texts = [passage.full_text() if settings["with_title"] else passage.text for passage in chunk]
        vectors = retriever.encode(
            clean(texts, settings["lowercase"], settings["normalize_text"]),
            batch_size,
            settings["max_length"],
            normalize=settings["normalized"],
            amp=amp,
            kind="passage",
        )
        writer.append([passage.id for passage in chunk], vectors)
        rate = (writer.done - already) / (time.time() - began)
        print(f"{writer.folder}: {writer.done} of {total} passages, {rate:.0f} per second", flush=True)
    writer.finish()


def main() -> None:
    distributed.run_script(generate_passage_embeddings, get_args_parser().parse_args)


if __name__ == "__main__":
    main()
