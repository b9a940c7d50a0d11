"""End-of-run report: curves, entropy and logits of the attention by block, and what to run next."""

from pathlib import Path

from shared.pictures.curves import Curve, Panel, save_panels
from shared.pictures.report import SUPERVISED_PLOTS, Plot, Report
from shared.run.run import Run
from shared.supervised.data import LabelledImages

from .monitor import per_block

LOGITS = Plot("Attention logits", "largest of all blocks", {"max_logit": ""})


def save_entropy(lines: list[dict], path: Path, heading: str) -> Path:
    """Entropy and largest logit of the attention over the blocks: at the start, a third, two thirds, the end."""
    most = max((len(per_block(line, "entropy")) for line in lines), default=0)
    measured = [line for line in lines if most and len(per_block(line, "entropy")) == most]  # others were not finite
    if not measured:
        raise ValueError("the log holds no entropies")
    chosen = dict.fromkeys(round(i * (len(measured) - 1) / 3) for i in range(4))
    panels = []
    for name, label in (("entropy", "mean entropy (nats)"), ("logit", "largest |logit|")):
        blocks = range(1, 1 + len(per_block(measured[-1], name)))
        curves = [Curve(blocks, per_block(measured[i], name), f"step {measured[i]['step']}") for i in chosen]
        if name == "entropy":
            curves.append(Curve(blocks, [measured[-1]["ln_n"]] * len(blocks), "ln N, uniform attention", "reference"))
        panels.append(Panel(label.split(" (")[0].capitalize(), "block", label, curves, 0.5))
    return save_panels(panels, path, heading)


def report(run: Run, images: LabelledImages) -> None:
    """Draw, and print the text."""
    args, ending = run.args, Report(run, "vit22b/main.py")
    ending.draw_curves("ViT-22B's network, supervised training", [*SUPERVISED_PLOTS, LOGITS])
    ending.draw("entropy.png", lambda path: save_entropy(ending.lines, path, "Entropy of the attention by block"))
    learned = ending.top1(images.train, images.val)
    last = next((line for line in reversed(ending.lines) if line.get("max_logit") is not None), None)
    if last is not None:
        entropies = ", ".join(f"{value:.2f}" for value in per_block(last, "entropy"))
        learned.append(
            f"entropy by block: {entropies} (uniform {last['ln_n']:.2f}); largest logit {last['max_logit']:.1f}"
        )
    same = "arch patch_size input_size loss epochs batch_size lr warmup_steps cooldown_steps timescale seed".split()
    flags = {"qk_norm": "false", "output_dir": f"{run.output_dir}_plain"}
    ending.then("vit22b/main.py", **flags, **{name: getattr(args, name) for name in same if args.data_path})
    ending.finish(learned)
