"""The training benchmark as a whole: what was measured, as one object, a table and a picture."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from apr_jax.bench.decode import about, datasheet
from apr_jax.bench.roofline import measure_limits
from apr_jax.bench.training import OURS, Session, benchmark_grpo, benchmark_sft
from apr_jax.config import Config
from apr_jax.files import writing
from apr_jax.parallel.fit import fit_to
from apr_jax.parallel.mesh import make_mesh
from apr_jax.paths import path_of

_TITLES = {"sft": "SFT", "grpo": "GRPO step"}


def measure(config: Config, phases: Sequence[str], session: Session) -> dict[str, Any]:
    """Measure the phases, and the machine's limits before and after each (the better ones count)."""
    mesh = make_mesh(config.mesh)
    config = fit_to(config, mesh)
    limits = measure_limits(mesh, config.model.compute_dtype)
    figures: dict[str, Any] = about(config, mesh)
    for phase in phases:
        benchmark = benchmark_sft if phase == "sft" else benchmark_grpo
        figures[phase] = benchmark(config, mesh, session)
        limits = limits.better(measure_limits(mesh, config.model.compute_dtype))
    sheet = datasheet(mesh)
    figures["limits"], figures["datasheet"] = dataclasses.asdict(limits), sheet and dataclasses.asdict(sheet)
    for row in figures.get("sft", {}).get("contestants", {}).values():
        if "median_seconds" in row:
            rate = figures["sft"]["flops_per_step"] / row["median_seconds"]
            row["flops_share"] = rate / limits.flops_per_second
            if sheet is not None:
                row["datasheet_share"] = rate / sheet.flops_per_second
    return figures


def table(figures: dict[str, Any]) -> str:
    """Write the figures for people."""
    limits, sheet = figures["limits"], figures["datasheet"]
    lines = [
        f"{figures['device']}, {figures['model']['num_params']:,} parameters in {figures['model']['compute_dtype']}, "
        f"mesh {' x '.join(map(str, figures['mesh'].values()))}; limit measured in this run: "
        f"{limits['flops_per_second'] / 1e9:,.0f} GFLOP/s"
        + (f"; by the datasheet: {sheet['flops_per_second'] / 1e9:,.0f} GFLOP/s" if sheet else "")
    ]
    for phase in [name for name in _TITLES if name in figures]:
        part = figures[phase]
        if phase == "sft":
            lines.append(f"SFT: {part['tokens_per_step']:,.0f} tokens a step, rows {part['packing']:.1%} full")
        else:
            lines.append(
                f"GRPO: {part['rollouts']} rollouts of {part['tokens_per_rollout']['mean']:,.0f} tokens on average, "
                f"{part['tokens_per_rollout']['max']:,} at most"
            )
        references = next((tuple(row["over"]) for row in part["contestants"].values() if "over" in row), ())
        than = "".join(f"{f'{reference} is faster by':>36}" for reference in references)
        lines.append(f"{'':<24}{'tokens/s':>10}{'ms a step':>12}{'FLOP limit':>12}{than}")
        lines += [_line(name, row) for name, row in part["contestants"].items()]
        lines += [f"{name}: {part[name]['error']}" for name in ("hf", "trl") if "error" in part.get(name, {})]
    return "\n".join(lines)


def write_plot(path: str | pathlib.Path, figures: dict[str, Any]) -> None:
    """Draw tokens per second of every contestant, in the format of the file's name."""
    from matplotlib.figure import Figure

    phases = [name for name in _TITLES if name in figures]
    figure = Figure(figsize=(7, 1.2 + 1.6 * len(phases)), layout="constrained")
    for axes, phase in zip(figure.subplots(len(phases), squeeze=False)[:, 0], phases, strict=True):
        rows = {k: row for k, row in figures[phase]["contestants"].items() if "tokens_per_second" in row}
        names = list(rows)[::-1]
        colors = ["tab:blue" if name.startswith(OURS) else "tab:gray" for name in names]
        bars = axes.barh(names, [rows[name]["tokens_per_second"] for name in names], color=colors)
        axes.bar_label(bars, [f"{rows[name]['tokens_per_second']:,.0f}" for name in names], padding=3, fontsize=8)
        axes.set_title(f"{_TITLES[phase]}, tokens/s", fontsize=9)
        axes.margins(x=0.15)
        axes.tick_params(labelsize=8)
    with writing(path_of(path)) as file:
        figure.savefig(file, format=pathlib.PurePath(path).suffix[1:])


def _line(name: str, row: dict[str, Any]) -> str:
    if "median_seconds" not in row:
        return f"{name:<24}{row.get('error', 'not measured')}"
    shares = [f"{row[name]:.0%}" for name in ("flops_share", "datasheet_share") if name in row]
    times = "".join(
        f"{'' if name == reference else f'{median:.2f}x ({low:.2f} to {high:.2f})':>36}"
        for reference, (median, low, high) in row["over"].items()
    )
    doubt = "  ANOTHER MODEL: its losses are not ours" if row.get("same_model") is False else ""
    error = f"  {row['error']}" if "error" in row else ""
    rate, milliseconds = row["tokens_per_second"], row["median_seconds"] * 1e3
    return f"{name:<24}{rate:>10,.0f}{milliseconds:>12,.0f}{' / '.join(shares):>12}{times}{doubt}{error}"
