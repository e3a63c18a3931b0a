# SPDX-License-Identifier: Apache-2.0
"""Prefill amplification against cache size."""

from pathlib import Path

from benchmarks.policy.policies import POLICIES


def save_plot(path: Path, results: dict[str, dict[float, dict[str, float]]]) -> None:
    """One panel per stream of turns, one line per policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(results), figsize=(5 * len(results), 4), squeeze=False)
    for panel, (title, rows) in zip(panels[0], results.items(), strict=True):
        for name in POLICIES:
            shares = [100 * share for share in rows]
            panel.plot(shares, [row[name] for row in rows.values()], marker=".", label=name)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("cache, % of the working set")
        panel.set_yscale("log")
    panels[0][0].set_ylabel("prefill: computed / new")
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
