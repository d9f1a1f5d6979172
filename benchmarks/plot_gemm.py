"""Plot what gemm.py measured: our time as a part of cuBLAS's by M, one line a model, one panel a dtype.

    python benchmarks/plot_gemm.py [results/<device>/gemm.json]...

Writes gemm.svg and gemm.png beside each file; all under results/ if none is named. Needs `pip install '.[bench]'`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def model_of(name: str) -> str:
    """The model of a shape's name, with its tensor-parallel size: `Llama-3.1-70B TP8 qkv` is of `Llama-3.1-70B TP8`."""
    words = name.split()
    return " ".join(words[: 2 if len(words) > 1 and words[1].startswith("TP") else 1])


def lines_of(rows: Sequence[Mapping[str, Any]], dtype: str) -> dict[str, list[tuple[int, float]]]:
    """For each model, (M, geometric mean of ours / cuBLAS over its shapes), by rising M."""
    ratios: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row["dtype"] == dtype:
            for model in {model_of(name) for name in row["names"]}:
                at = ratios.setdefault(model, {}).setdefault(row["m"], [])
                at.append(row["ours_us"] / row["peers"]["cublas"])
    return {
        model: [(m, statistics.geometric_mean(values)) for m, values in sorted(by_m.items())]
        for model, by_m in sorted(ratios.items())
    }


def plot(source: Path) -> list[Path]:
    """Draw one file's plots; return what was written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    content = json.loads(source.read_text(encoding="utf-8"))
    rows = content["rows"]
    dtypes = [dtype for dtype in SHORT if any(row["dtype"] == dtype for row in rows)]
    figure, panels = pyplot.subplots(1, len(dtypes), figsize=(5.5 * len(dtypes), 4.2), sharey=True, squeeze=False)
    for panel, dtype in zip(panels[0], dtypes, strict=True):
        for model, points in lines_of(rows, dtype).items():
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=model)
        panel.axhline(1.0, color="black", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("M (rows)")
        panel.set_title(f"gemm {SHORT[dtype]}, {content['environment']['device']}")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("time, ours / stock cuBLAS")
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    written = [source.with_suffix(suffix) for suffix in (".svg", ".png")]
    for path in written:
        figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    files = parser.parse_args().files or sorted((HERE / "results").glob("*/gemm.json"))
    if not files:
        parser.error("no results/*/gemm.json; `python benchmarks/gemm.py` makes one")
    for source in files:
        print(*plot(source))
    return 0


if __name__ == "__main__":
    sys.exit(main())
