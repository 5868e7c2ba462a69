"""The report of an evaluation: rungs with intervals, paired differences, a verdict; as JSON, a page and a table."""

import html
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dnd_jax import files, harm, logs
from dnd_jax.scoring.kinds import Scores
from dnd_jax.statistics import nested_interval

LABEL_FREE = ("base", "mean_adapter", "mean_product", "best_single", "nearest", "weighted_topk", "ridge",
              "ridge_wide", "random", "multi_task")
ORDER = ("base", "in_context", *LABEL_FREE[1:], "dnd", "dnd_shuffled", "dnd_random_text", "in_task")
WHY_LEFT_OUT = {"no validation tasks are there to choose on": ("best_single", "weighted_topk", "ridge", "ridge_wide"),
                "the adapters are more than products": ("mean_product",)}
FEW_TASKS = 6  # with fewer the bootstrap over tasks finds an advantage where there is none once in ten times and more
ABOUT_ZERO = 0.05  # an interval that includes zero and ends below this counts as about zero


def summarise(found: Mapping[str, Sequence[Sequence[Scores]]], notes: Mapping[str, str], tasks: Sequence[str]) -> dict[str, Any]:
    """Compare the rungs by the metric that counts; others are means beside it.

    Args:
      found: scores by rung, task and prompt draw.
      notes: what a rung chose on the validation tasks.
      tasks: names of the test tasks.

    Returns:
      What `report.json` holds, to which `evaluate.climb` adds form, harm, cost, audit and checkpoint; a rung that is left out is
      absent:

        {"scoring": "exact_match", "best_label_free": "ridge", "verdict": "...",
         "rungs": {"ridge": {"mean": 0.73, "ci95": [0.62, 0.83], "unparsable": 0.27, "per_task": {"zib_roman": 0.8},
                             "metrics": {other means}, "chosen": "penalty 0.01"}},
         "differences": {"dnd-ridge": {"mean": 0.19, "ci95": [0.07, 0.31], "won": 9, "lost": 2}}}
    """
    metric, *others = found["dnd"][0][0].metrics
    scores = {name: [np.mean([draw.main for draw in task], axis=0) for task in rung] for name, rung in found.items()}
    rungs: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    for name in (name for name in ORDER if name in found):
        mean, interval = nested_interval(scores[name])
        strange = float(np.mean([[draw.unparsable.mean() for draw in task] for task in found[name]]))
        rungs[name] = {"mean": mean, "ci95": interval, "unparsable": strange,
                       "per_task": {t: float(s.mean()) for t, s in zip(tasks, scores[name], strict=True)}}
        if others:
            rungs[name]["metrics"] = {other: float(np.mean([[d.metrics[other].mean() for d in task] for task in found[name]]))
                                      for other in others}
        if name in notes:
            rungs[name]["chosen"] = notes[name]
        if name != "dnd":
            gaps = [a - b for a, b in zip(scores["dnd"], scores[name], strict=True)]
            mean, interval = nested_interval(gaps)
            signs = [np.sign(round(float(gap.mean()), 9)) for gap in gaps]
            differences[f"dnd-{name}"] = {"mean": mean, "ci95": interval, "won": signs.count(1), "lost": signs.count(-1)}
    best = max((name for name in LABEL_FREE if name in found), key=lambda name: float(rungs[name]["mean"]))
    return {"scoring": metric, "rungs": rungs, "differences": differences, "best_label_free": best,
            "verdict": verdict(rungs, differences, best)}


def verdict(rungs: dict[str, Any], differences: dict[str, Any], best: str) -> str:
    """Say in words what the intervals allow to claim."""
    rival, shuffled = differences[f"dnd-{best}"], differences["dnd-dnd_shuffled"]
    condition = (f"given another task's prompts it loses {shuffled['mean']:.1%} "
                 f"({shuffled['ci95'][0]:.1%} to {shuffled['ci95'][1]:.1%})")
    beaten = (f"best label-free rung is {best} at {rungs[best]['mean']:.1%}; DnD is {rival['mean']:+.1%} away "
              f"({rival['ci95'][0]:+.1%} to {rival['ci95'][1]:+.1%})")
    if len(rungs["dnd"]["per_task"]) == 1:
        return f"One held-out task says nothing about others: the {beaten}; {condition}."
    if "in_task" in rungs and rungs["in_task"]["mean"] <= rungs["base"]["mean"]:
        return (f"Nothing to generate: adapters trained on a task's own labels reach {rungs['in_task']['mean']:.1%}, the base "
                f"{rungs['base']['mean']:.1%}; collect longer, or other tasks. The {beaten}.")
    if shuffled["ci95"][1] < 0:
        return f"The condition does harm: {condition}; the {beaten}."
    if shuffled["ci95"][0] <= 0 and shuffled["ci95"][1] < ABOUT_ZERO:
        return f"The condition does not matter, the generator is an averager: {condition}; the {beaten}."
    if shuffled["ci95"][0] <= 0:
        return f"Not shown that the condition matters: {condition}; the {beaten}."
    if rival["ci95"][0] <= 0:
        return f"Not shown to generalise beyond its rivals: the {beaten}; {condition}."
    if (count := len(rungs["dnd"]["per_task"])) < FEW_TASKS:
        return f"Better than its rivals on {count} held-out tasks, too few to say that it generalises: the {beaten}; {condition}."
    return f"Generalises to held-out tasks: the {beaten}; {condition}."


def table(result: dict[str, Any]) -> str:
    """Return the ladder as text."""
    others = list(result["rungs"]["dnd"].get("metrics", {}))
    lines = [f"{'rung':<16}{'mean':>7}  {'95% interval':<16}{'unparsable':>10}  {'DnD minus rung':<26}{'won-lost':>8}"
             + "".join(f"  {other}" for other in others)]
    for name, rung in result["rungs"].items():
        line = f"{name:<16}{rung['mean']:>7.1%}  {_interval(rung['ci95']):<16}{rung['unparsable']:>10.1%}  "
        if difference := result["differences"].get(f"dnd-{name}"):
            gap = f"{difference['mean']:+.1%} ({_interval(difference['ci95'])})"
            line += f"{gap:<26}{difference['won']:>4}-{difference['lost']}"
        if others:
            line = f"{line:<87}" + "".join(f"  {rung['metrics'][other]:>{len(other)}.1%}" for other in others)
        lines.append(line.rstrip())
    for reason, names in WHY_LEFT_OUT.items():
        if left_out := [name for name in names if name not in result["rungs"]]:
            lines.append(f"left out, as {reason}: {', '.join(left_out)}")
    if (form := result["form"]) != "prompt":
        lines.append(f"conditions of form {form!r}: DnD and the rungs by similarity see responses of the test tasks")
    lines += [f"finding of the audit: {finding}" for finding in result["audit"]["findings"]]
    return "\n".join([*lines, "", _labels_line([result["audit"]["tasks"][name] for name in result["rungs"]["dnd"]["per_task"]]),
                      *harm.lines(result["harm"]), _cost_line(result["cost"]), result["verdict"]])


def _labels_line(facts: Sequence[Mapping[str, Any]]) -> str:
    """Say what answers that see no question would have, of tasks with few distinct responses."""
    found = [(task["majority"], task["chance"]) for task in facts if "majority" in task]
    if not found:
        return "no task has few distinct responses"
    (majority, chance), most = np.mean(found, axis=0), max(found)[0]
    return (f"the most frequent response alone {majority:.1%}, at most {most:.1%}, chance {chance:.1%}, in the mean of "
            f"{len(found)} of {len(facts)} tasks")


def _cost_line(cost: Mapping[str, float | None]) -> str:
    stages = {"collecting": "collect_s", "training": "train_s", "generating": "generate_s", "in-task training": "in_task_s"}
    said = [f"{name} {'unknown' if (s := cost[key]) is None else f'{s:.3g} s'}" for name, key in stages.items()]
    pays = cost["adapters_to_break_even"]
    return f"{', '.join(said)}; {'not known to pay back' if pays is None else f'pays back after {pays:.0f} adapters'}"


# --- page ------------------------------------------------------------------------------------------------------------


def write(result: dict[str, Any], workdir: pathlib.Path) -> None:
    """Write `report.json` and the self-contained `report.html`."""
    files.write_json(workdir / "report.json", result)
    pictures = [("The ladder", _ladder(result)), ("By test task", _per_task(result))]
    if (workdir / logs.NAME).exists():
        pictures.append(("Training", _curve(logs.read_metrics(workdir))))
    body = "".join(f"<h2>{title}</h2>\n{picture}\n" for title, picture in pictures)
    files.write_text(workdir / "report.html", f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>dnd_jax: held-out tasks</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}}
svg{{max-width:100%;height:auto}}pre{{overflow-x:auto;background:#f6f6f6;padding:1rem;font-size:13px}}</style></head><body>
<h1>Adapters generated for held-out tasks</h1>
<p><strong>{html.escape(result["verdict"])}</strong></p>
{body}<h2>Table</h2>
<p>Scored by {result["scoring"].replace("_", " ")}; intervals by bootstrap over tasks and items; differences are paired.
<em>in_context</em> sees labelled examples of the task, <em>in_task</em> is trained on its labels, the other rungs see none.</p>
<pre>{html.escape(table(result))}</pre></body></html>
""")


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", bbox_inches="tight")
    text = out.getvalue()
    return text[text.index("<svg") :]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _color(name: str) -> str:
    return {"dnd": "#c03a2b", "in_task": "#444444"}.get(name, "#e3a39b" if name.startswith("dnd_") else "#7f9db9")


def _ladder(result: dict[str, Any]) -> str:
    figure, axes = _figure(8, 4.6)
    names = list(result["rungs"])[::-1]
    rungs = [result["rungs"][name] for name in names]
    means = np.array([r["mean"] for r in rungs])
    reach = np.abs(np.array([r["ci95"] for r in rungs]).T - means).clip(0)
    axes.barh(names, means, color=[_color(n) for n in names], xerr=reach, error_kw={"elinewidth": 1, "capsize": 2.5})
    for y, (mean, high) in enumerate(zip(means, [r["ci95"][1] for r in rungs], strict=True)):
        axes.text(high + 0.012, y, f"{mean:.0%}", va="center", fontsize=9)
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"{result['scoring'].replace('_', ' ')} on held-out tasks, 95% interval")
    return _svg(figure)


def _per_task(result: dict[str, Any]) -> str:
    shown = ("in_task", "dnd", result["best_label_free"], "dnd_shuffled")
    tasks = list(result["rungs"]["dnd"]["per_task"])
    figure, axes = _figure(8, 0.34 * len(tasks) + 1)
    for marker, size, name in zip("|oDx", (14, 6, 10, 7), shown, strict=True):
        axes.plot([result["rungs"][name]["per_task"][t] for t in tasks], range(len(tasks)), marker, color=_color(name),
                  label=name, ms=size, mew=2, zorder=4 if name == "dnd" else 3)  # where two agree, both are to be seen
    axes.set_yticks(range(len(tasks)), tasks)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel(result["scoring"].replace("_", " "))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)
    return _svg(figure)


def _curve(metrics: Sequence[dict[str, Any]]) -> str:
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, axes = _figure(8, 3)
    for key, label, color in (("loss", "training tasks", "#7f9db9"), ("validation_loss", "validation tasks", "#c03a2b")):
        if points := [(m["step"], m[key]) for m in metrics if key in m]:
            axes.plot(*zip(*points, strict=True), color=color, label=label)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if len(ticks := [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5) if low <= tick <= high]) > 1:
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.set_yticks(ticks)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(loc="upper right", frameon=False)
    return _svg(figure)


def _interval(bounds: Sequence[float]) -> str:
    return f"{bounds[0]:.1%} to {bounds[1]:.1%}"
