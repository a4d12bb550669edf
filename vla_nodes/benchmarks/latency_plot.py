"""The benchmark's report as a table and as a plot."""

from __future__ import annotations

from pathlib import Path

PARTS = ("vision", "core", "head")


def pair(values: dict[str, float] | None) -> str:
    return f"{values['p50']:.2f}/{values['p99']:.2f}" if values else ""


def table(report: dict) -> str:
    """Every row of the report; ms as p50/p99."""
    sizes, limits = report["parameters"], report["limits"]
    lines = [
        f"{report['preset']} on {report['processor']}, {report['device']}, {report['threads']} threads, core in "
        f"{report['core_dtype']}, {report['tokens_per_tick']} tokens a tick, {report['ticks']} ticks a row, in turns",
        f"this machine reads {limits['read_gb_s']:.1f} GB/s at the core's size and computes {limits['gflop_s']:.0f} "
        f"GFLOP/s; peak memory of the whole run {report['peak_memory_mb']:.0f} MB; "
        f"language {pair(report['language'])} ms once per instruction",
        f"{'ms as p50/p99':26} {'params':>8} {'history':>8} {'tick':>13} {'vision':>13} {'core':>13} {'head':>11} "
        f"{'state MB':>9} {'of GB/s':>8} {'of peak':>8} {'error':>8}"]  # fmt: skip
    for row in report["results"]:
        name = row["name"]
        if "tick" not in row:
            lines.append(f"{name:26} {'':8} {row['history']:8} {'':13} {'':13} {pair(row['core']):>13}")
            continue
        lines.append(
            f"{name:26} {sizes[name] / 1e6:7.1f}M {row['history']:8} "
            + " ".join(f"{pair(row[part]):>13}" for part in ("tick", "vision", "core")) +
            f" {pair(row['head']):>11} {row['state_mb']:9.2f} {100 * row['bandwidth_share']:7.0f}% "
            f"{100 * row['peak_share']:7.0f}% {row['error_to_torch']:8.0e}")  # fmt: skip
    lines.append("head = token embedding and action head; error = largest difference to torch, of the largest value, "
                 "on made-up images; rows without a tick are cores alone")  # fmt: skip
    rows = [row for row in report["results"] if "filled" in row]
    filled = dict.fromkeys(f"{row['name']} {row['history']}: {row['filled']}" for row in rows)
    lines.append("history at the start of a row, run through the core or made up at that length: " + ", ".join(filled))
    lines += [f"ratio  {value:7.2f}  {name}" for name, value in report["ratios"].items()]
    return "\n".join(lines + [f"left out: {note}" for note in report["notes"]])


def plot(report: dict, path: Path) -> Path:
    """Left and middle: ms per tick, and of the core alone, over history. Right: where a tick's time goes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    results = report["results"]
    names = list(dict.fromkeys(row["name"] for row in results))
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    figure, (whole, core, split) = pyplot.subplots(1, 3, figsize=(16, 5.2), width_ratios=(3, 3, 2.4))
    for axis, part, title in ((whole, "tick", "whole tick, image to chunk"), (core, "core", "sequence core alone")):
        for name in names:
            own = [(row["history"], row[part]["p50"]) for row in results if row["name"] == name and part in row]
            if own:
                axis.plot(*zip(*own, strict=True), marker="o", color=colors[name], label=name,
                          linestyle="--" if name.startswith("transformer") else "-")  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="ticks of history already carried", ylabel="ms, p50", title=title)
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())
        for one in (axis.xaxis, axis.yaxis):
            one.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    shortest = min(row["history"] for row in results)
    first = {row["name"]: row for row in results if row["history"] == shortest and "tick" in row}
    left = [0.0] * len(first)
    for part, color in zip(PARTS, ("0.75", "0.5", "0.25"), strict=True):
        widths = [row[part]["p50"] for row in first.values()]
        split.barh(list(first), widths, left=left, label=part, color=color)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, row in enumerate(first.values()):
        split.text(left[i], i, f" {row['tick']['p50']:.1f}", va="center", fontsize=9)
    split.set(xlabel="ms, p50 (the number is the whole tick)", title=f"parts, after {shortest} ticks",
              xlim=(0, 1.15 * max([*left, *(row["tick"]["p50"] for row in first.values())])))  # fmt: skip
    split.tick_params(axis="y", labelsize=8)
    split.invert_yaxis()
    split.legend(fontsize=8, ncol=3, frameon=False, loc="upper right", bbox_to_anchor=(1.0, -0.14))
    figure.suptitle(f"{report['preset']}, {report['device']}, {report['threads']} threads, {report['processor']}")
    lines = {line.get_label(): line for axis in (whole, core) for line in axis.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="lower left", ncol=len(lines), fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
