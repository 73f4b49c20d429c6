"""The decode benchmark beside its peers: a table for the terminal and a picture."""

import pathlib
from typing import Any

from apr_jax.bench.peers import doubt
from apr_jax.files import writing
from apr_jax.paths import path_of


def peers_table(figures: dict[str, Any]) -> str:
    """Compare tokens per second of ours and of every peer's every mode by lane count, and ours over theirs.

    Ours is measured twice, before the peers and after them. Their difference shows how much a ratio can be trusted.
    Ratios are to the first. A peer without figures has its reason instead.
    """
    ours, lanes = figures["lanes"], figures["workload"]["lanes"]
    lines = [f"{'tokens/s at lanes':<20}" + "".join(f"{count:>20}" for count in lanes)]
    for label, rows in (("apr_jax", ours), ("apr_jax, after peers", figures.get("lanes_after_peers", {}))):
        if rows:
            lines.append(
                f"{label:<20}" + "".join(f"{rows[str(count)]['tokens_per_second']:>20,.1f}" for count in lanes)
            )
    for name, report in figures["peers"].items():
        modes = report.get("modes") or {"": {}}
        for number, (mode, rows) in enumerate(modes.items()):
            cells = []
            for count in map(str, lanes):
                theirs = rows[count]["tokens_per_second"] if count in rows else None
                ratio = "-" if theirs is None else f"{theirs:,.1f} ({ours[count]['tokens_per_second'] / theirs:.2f}x)"
                cells.append(f"{ratio:>20}")
            said = doubt(report) if number == len(modes) - 1 else ""
            lines.append((f"{f'{name} {mode}':<20}" + "".join(cells) + f"  {said}").rstrip())
    return "\n".join(lines)


def write_plot(path: str | pathlib.Path, figures: dict[str, Any]) -> None:
    """Draw tokens per second by lane count, ours, the roofline's and the peers', in the format of the file's name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    lanes = [int(count) for count in figures["lanes"]]
    rows = list(figures["lanes"].values())
    limit = [count / row["roofline_ms"] * 1e3 for count, row in zip(lanes, rows, strict=True)]
    axes.plot(lanes, limit, linestyle="--", color="grey", label="measured roofline")
    axes.plot(lanes, [row["tokens_per_second"] for row in rows], marker="o", linewidth=2, label="apr_jax")
    for name, report in figures.get("peers", {}).items():
        theirs = report.get("lanes", {})
        if theirs:
            counts = sorted(map(int, theirs))
            rates = [theirs[str(count)]["tokens_per_second"] for count in counts]
            axes.plot(counts, rates, marker="s", markersize=4, linewidth=1, label=report.get("name", name))
    axes.set(xscale="log", yscale="log", xlabel="lanes", ylabel="output tokens/s")
    axes.set_xticks(lanes, [str(count) for count in lanes])
    axes.minorticks_off()
    axes.set_title(f"Decode, {figures['model']['num_params'] / 1e6:.0f}M parameters, {figures['device']}", fontsize=9)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    with writing(path_of(path)) as file:
        figure.savefig(file, format=pathlib.PurePath(path).suffix[1:])
