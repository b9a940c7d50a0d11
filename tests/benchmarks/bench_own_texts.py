"""How the search over own texts grows with the length of a text: each character must take about the same time.

    python tests/benchmarks/bench_own_texts.py [--megabytes 0.05 0.1 0.2] [--out FILE]
    python tests/benchmarks/bench_own_texts.py --shapes prose --megabytes 8 100 --rounds 1

Every shape is cut into passages by the packaged encoder's tokenizer, and its snippet and its marked words are made, at
every length; the ratio is that of the times per character at the last two lengths, best of ``--rounds``.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import tokenizers

import shared.run.passive_threads  # noqa: F401
from contriever.encoder import Retriever, find_model, read_tokenizer
from contriever.own_texts.folder import Limits, read_pieces, snippet
from contriever.own_texts.rendering import mark
from tests.benchmarks import harness

QUERY = "wing stall a 東京"
MOST_RATIO = 2.0
SHAPES = {  # to a text of about n characters
    "prose": lambda n: "the wing of a plate \nwith stall.\n\n" * (n // 34),
    "blanks": lambda n: "# a" + " " * n + "b",
    "newlines": lambda n: "a" + "\n" * n + "b",
    "commas": lambda n: "wing,stall," * (n // 11),
    "one word": lambda n: "a" * n,
    "marks": lambda n: "a" + "\u0300\u0323" * (n // 2),  # combining ones, which normalisation sorts
    "no blanks": lambda n: "東京の天気は晴れです。" * (n // 11),
    "headings": lambda n: "# wing\n## a\n" * (n // 12),
    "headings and fences": lambda n: "# wing\n```\n# no\n```\n~~~\n\n" * (n // 24),
    "long heading": lambda n: "# " + "wing " * (n // 10) + "\n" + "## b\nstall\n" * (n // 22),
    "underlined": lambda n: "\na\n---\n" * (n // 7),
    "long fence": lambda n: "`" * (n // 2) + "\n" + "```\n" * (n // 8),
}


def main() -> None:
    parser = harness.get_args_parser(__doc__, rounds=3)
    lengths = "of the texts, in million characters, at least two"
    parser.add_argument("--megabytes", type=float, nargs="+", default=[0.05, 0.1, 0.2], help=lengths)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    args = parser.parse_args()
    retriever = Retriever(None, read_tokenizer(find_model(None)), "the packaged encoder")
    limits = Limits(120, 500, retriever.token_ends)
    result, worst = {}, 0.0
    for shape in args.shapes:
        times: harness.Times = {"passages": [], "snippet": [], "marks": []}
        for megabytes in args.megabytes:
            text = SHAPES[shape](int(1e6 * megabytes))
            ways = {
                "passages": lambda text=text: read_pieces(Path("a.md"), text.encode(), limits),
                "snippet": lambda text=text: snippet(text, QUERY),
                "marks": lambda text=text: mark(text, QUERY),
            }
            for name, seconds in harness.alternate(ways, args.rounds, warm_up=0).items():
                times[name].append(min(seconds))
        # what takes less than a tenth of a second says nothing about growth
        longer = args.megabytes[-1] / args.megabytes[-2]
        ratios = {name: seconds[-1] / max(seconds[-2], 0.1) / longer for name, seconds in times.items()}
        worst = max(worst, *ratios.values())
        result[shape] = {"seconds": times, "ratios": ratios}
        line = "  ".join(f"{name} {seconds[-1]:7.3f} s, x {ratios[name]:.2f}" for name, seconds in times.items())
        print(f"{shape:20} {line}", flush=True)
    target = f"a character takes at most {MOST_RATIO} times as long in a longer text"
    harness.finish(args, {"shapes": result}, {target: worst <= MOST_RATIO}, packages=(tokenizers,))


if __name__ == "__main__":
    main()
