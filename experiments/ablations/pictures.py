"""The pictures of the notebooks, each a matplotlib figure of what other modules have computed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas
from matplotlib.figure import Figure

from dnd_jax import anatomy, baselines

RED, PALE_RED, DARK, BLUE, GREY = "#c03a2b", "#e3a39b", "#444444", "#7f9db9", "#cccccc"
RUNGS = {"in_task": DARK, "dnd": RED, "ridge_wide": "#244b73", "ridge": "#4f7fb0", "nearest": BLUE, "mean_adapter": "#b9cbdb",
         "dnd_shuffled": PALE_RED}


def _open_corners(figure: Figure) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)


# --- runs of a sweep -------------------------------------------------------------------------------------------------


def curves(table: pandas.DataFrame, labels: Mapping[str, str]) -> Figure:
    """Draw every run's loss on training tasks, and on validation tasks where there are any, over steps; `labels` by run."""
    titles = {"loss": "training tasks", "validation_loss": "validation tasks"}
    columns = [column for column in titles if column == "loss" or table[column].notna().any()]
    figure, ((*found,),) = plt.subplots(1, len(columns), figsize=(5 * len(columns), 3.6), sharey=True, squeeze=False,
                                        layout="constrained")
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(labels)))
    for axes, column in zip(found, columns, strict=True):
        for (run, label), color in zip(labels.items(), colors, strict=True):
            line = table[table["run"] == run].dropna(subset=[column])
            axes.plot(line["step"].astype(int), line[column], color=color, label=label, marker="." if len(line) < 12 else None)
        axes.set(title=titles[column], xlabel="step")
    losses = table[columns].stack()
    if losses.max() > 3 * losses.min():
        found[0].set_yscale("log")
    found[0].set_ylabel("loss")
    figure.legend(*found[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    _open_corners(figure)
    return figure


# --- anatomy of an adapter -------------------------------------------------------------------------------------------


def layer_norms(s: anatomy.Specimens, task: str) -> Figure:
    """Draw the norm of every module's product: of all training adapters, of the task's trained and of its generated adapter."""
    found = anatomy.norms(anatomy.gram([*s.train.values(), s.held_out[task], s.generated[task]]))
    figure, axes = plt.subplots(figsize=(10, 3.6), layout="constrained")
    places = np.arange(len(found))
    axes.plot(places, found[:, :-2], "_", color=GREY, ms=16)
    axes.plot([], [], "_", color=GREY, ms=12, label="training tasks' adapters")
    axes.plot(places, found[:, -2], "|", color=DARK, ms=16, mew=2.5, label=f"{task}, trained")
    axes.plot(places, found[:, -1], "o", color=RED, label=f"{task}, generated")
    axes.set_xticks(places, [short(module) for module in anatomy.modules(s.held_out[task])], rotation=45, ha="right")
    axes.set(ylabel="norm of B A", ylim=(0, None))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    _open_corners(figure)
    return figure


def short(module: str) -> str:
    """Return a module's layer number and name: `model/layers/3/self_attn/q_proj` is `3 q_proj`."""
    *path, name = module.split("/")
    return " ".join([*(part for part in path if part.isdigit()), name])


def distances(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw `anatomy.neighbours`: how far each generated adapter is from the trained one, the mean and its nearest."""
    table = pandas.DataFrame(rows)
    figure, axes = plt.subplots(figsize=(10, 0.32 * len(table) + 1.6), layout="constrained")
    for column, marker, color, label in (
            ("generated_trained", "o", RED, "generated to trained"), ("generated_mean", "D", BLUE, "generated to mean"),
            ("generated_nearest", "x", DARK, "generated to its nearest training adapter"),
            ("trained_nearest", "|", GREY, "trained to its nearest training adapter")):
        axes.plot(table[column], table["task"], marker, color=color, label=label, mew=2)
    axes.axvline(1, color=GREY, lw=1)
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.set(xlim=(0, None), xlabel="distance; 1 (the line) is from the trained adapter to the mean of the training adapters")
    axes.grid(axis="y", color="#eeeeee")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    _open_corners(figure)
    return figure


def spectra(s: anatomy.Specimens, task: str) -> Figure:
    """Draw singular values of every module's product: trained, generated, and the mean of the training adapters' A and B."""
    mean = baselines.weighted_mean(list(s.train.values()), np.ones(len(s.train)))
    found = {"trained": (anatomy.spectrum(s.held_out[task]), DARK), "generated": (anatomy.spectrum(s.generated[task]), RED),
             "mean adapter": (anatomy.spectrum(mean), BLUE)}
    modules = anatomy.modules(s.held_out[task])
    figure, axes = plt.subplots(figsize=(10, 3.6), layout="constrained")
    for i, (label, (values, color)) in enumerate(found.items()):
        for number in range(values.shape[1]):
            places = np.arange(len(modules)) + 0.25 * (i - 1)
            axes.bar(places, values[:, number], 0.22, color=color, alpha=(1 + number) / values.shape[1],
                     label=label if number == values.shape[1] - 1 else None)
    axes.set_xticks(range(len(modules)), [short(module) for module in modules], rotation=45, ha="right")
    axes.set_ylabel("singular values of B A")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    _open_corners(figure)
    return figure


# --- conditions ------------------------------------------------------------------------------------------------------


def table_of(reports: Mapping[str, Mapping[str, Any]]) -> pandas.DataFrame:
    """Return mean exact match by variant (rows) and rung (columns)."""
    return pandas.DataFrame({name: {rung: r["rungs"][rung]["mean"] for rung in r["rungs"]} for name, r in reports.items()}).T


def _of_all(reports: Mapping[str, Mapping[str, Any]], rungs: Iterable[str]) -> list[str]:
    """Return the rungs that every report has; without validation tasks some are left out."""
    return [rung for rung in rungs if all(rung in report["rungs"] for report in reports.values())]


def ladders(reports: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw, for each variant, the rungs that a condition could matter to, as far as all have them, with 95% intervals."""
    figure, axes = plt.subplots(figsize=(10, 0.9 * len(reports) + 1.4), layout="constrained")
    rungs = _of_all(reports, RUNGS)
    step = 0.8 / len(rungs)
    for i, rung in enumerate(rungs):
        found = [report["rungs"][rung] for report in reports.values()]
        means = np.array([r["mean"] for r in found])
        reach = np.abs(np.array([r["ci95"] for r in found]).T - means)
        places = np.arange(len(found)) + step * (i - (len(rungs) - 1) / 2)
        axes.barh(places, means, step * 0.9, color=RUNGS[rung], label=rung,
                  xerr=reach, error_kw={"elinewidth": 1, "ecolor": "#888888"})
    axes.set_yticks(range(len(reports)), list(reports))
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="exact match on held-out tasks, 95% interval")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(rungs), frameon=False)
    _open_corners(figure)
    return figure


def by_count(reports: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw rungs over the number of prompts of a condition, of the variants whose conditions are prompts only."""
    counts = sorted((report["prompts"], name) for name, report in reports.items() if report["form"] == "prompt")
    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for rung in _of_all(reports, ("in_task", "dnd", "ridge_wide", "ridge", "nearest", "dnd_shuffled")):
        found = [reports[name]["rungs"][rung] for _, name in counts]
        means = np.array([r["mean"] for r in found])
        reach = np.abs(np.array([r["ci95"] for r in found]).T - means)
        axes.errorbar([count for count, _ in counts], means, reach, color=RUNGS[rung], label=rung, marker="o", capsize=2.5)
    axes.set_xscale("log", base=2)
    axes.set_xticks([count for count, _ in counts], [str(count) for count, _ in counts])
    axes.set(ylim=(-0.03, 1.03), xlabel="prompts in a condition", ylabel="exact match on held-out tasks")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    _open_corners(figure)
    return figure
