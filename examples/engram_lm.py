"""Train a small language model with an Engram and one without, of the same cost, and serve the first from three tiers.

    python examples/engram_lm.py                 # one seed, a few minutes on two cores
    python examples/engram_lm.py --seeds 3       # the committed table
    python examples/engram_lm.py --quick         # half a minute: everything runs, the figures say little

The baseline is the paper's: the parameters that the Engram has in its table are experts, so that both models have the same
parameters and the same multiply-adds a token, which are counted and printed. Both read the same ids, in the same order: the
shipped text with its rare ids as one, and the n-grams are hashed of those, so that the table knows nothing of a text that the
baseline cannot see. The held-out loss is of documents that are not trained on.

Then the trained model is served with its table on disk, behind a tier of a tenth of it in host memory and a smaller one that
stands in for a device's; its logits are those of the resident model to the bit, and its tokens a second stand beside them.

Written to --out: results.json, results.md, loss.png, serving.png, and model.safetensors for gate_heatmap.py. Needs safetensors,
which the extra `[dev]` brings.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from lm.model import LanguageModel, Sizes, baseline, cost_of, load_model, save_model, with_engram
from lm.plots import plot_losses, plot_serving
from lm.serving import KINDS, Served, Traffic, serve
from lm.text import Text, load_text
from lm.training import Schedule, train
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

FORMS: dict[str, Callable[[Sizes], LanguageModel]] = {"baseline": baseline, "engram": with_engram}


QUICK: dict[str, Any] = {
    "schedule": Schedule(steps=24, looks=4, windows=16),
    "traffic": Traffic(sequences=48, prompt=16, steps=8, rounds=1),
}


def main(
    out: Path,
    *,
    seeds: int = 1,
    jobs: int = 2,
    sizes: Sizes | None = None,
    schedule: Schedule | None = None,
    traffic: Traffic | None = None,
    serve_only: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train (or find what was trained in `out`), serve, and write the results, which are returned.

    jobs: models that train at the same time, on one thread each.
    """
    console = console or Console()
    schedule, traffic = schedule or Schedule(), traffic or Traffic()
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    if serve_only:
        results: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
        model = load_model(out / "model.safetensors")
        text = load_text(model.sizes.vocabulary)
    else:
        sizes = sizes or Sizes()
        text = load_text(sizes.vocabulary)
        results, model = _train_all(text, sizes, schedule, seeds, jobs, console)
        save_model(model, out / "model.safetensors")
    results["serving"] = _serve(model, text, traffic, out, console)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    _report(results, out, console)
    return results


def _train_all(
    text: Text, sizes: Sizes, schedule: Schedule, seeds: int, jobs: int, console: Console
) -> tuple[dict[str, Any], LanguageModel]:
    """(what to report of the training, the first seed's model with an Engram)."""
    models = {}
    for form, make in FORMS.items():
        for seed in range(seeds):
            torch.manual_seed(seed)
            models[form, seed] = make(sizes)
    costs = {form: cost_of(models[form, 0], sizes) for form in FORMS}
    for count, expected in zip(costs["engram"], costs["baseline"], strict=True):
        assert abs(count / expected - 1) < 0.01, f"the two models do not cost the same: {costs}"
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
    began = time.process_time()
    with progress, ThreadPoolExecutor(jobs) as pool:

        def run(form: str, seed: int) -> tuple[list[float], list[tuple[int, float]]]:
            task = progress.add_task(f"{form}, seed {seed}", total=schedule.steps)
            return train(models[form, seed], text, schedule, seed, lambda: progress.advance(task))

        # Both forms of a seed side by side.
        runs = {(form, seed): pool.submit(run, form, seed) for seed in range(seeds) for form in FORMS}
        seen = {form: [runs[form, seed].result()[1] for seed in range(seeds)] for form in FORMS}
    return {
        "training": {
            **_circumstances(),
            "cpu_seconds": round(time.process_time() - began),
            "seeds": seeds,
            "sizes": asdict(sizes),
            "schedule": asdict(schedule),
            "tokens": {"train": sum(map(len, text.train)), "held_out": sum(map(len, text.held_out))},
            "table_rows": models["engram", 0].engram.hasher.num_rows,  # type: ignore[union-attr]
            "costs": {form: cost._asdict() for form, cost in costs.items()},
            "held_out_loss": seen,
        }
    }, models["engram", 0]


def _serve(model: LanguageModel, text: Text, traffic: Traffic, out: Path, console: Console) -> dict[str, Any]:
    """What to report of the serving."""
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console) as progress:
        task = progress.add_task("serving, rounds", total=traffic.warm + traffic.rounds)
        served, num_bytes = serve(model, text, traffic, out, lambda: progress.advance(task))
    (out / "table.safetensors").unlink()
    return {
        **_circumstances(),
        "traffic": asdict(traffic),
        "bytes": num_bytes,
        "logits": "equal to the bit in every step",
        "kinds": {kind: _figures(served[kind], served[KINDS[0]], traffic) for kind in KINDS},
    }


def _figures(served: Served, resident: Served, traffic: Traffic) -> dict[str, float]:
    """Medians, and the resident model's over them."""

    def relative(times: list[float], wholes: list[float]) -> float:
        return round(median(wholes) / median(times), 4)

    steps = len(served.decode)
    return {
        "decode_tokens_per_s": round(traffic.sequences / median(served.decode)),
        "decode_of_resident": relative(served.decode, resident.decode),
        "decode_cpu_of_resident": relative(served.decode_cpu, resident.decode_cpu),
        "prefill_tokens_per_s": round(traffic.sequences * traffic.chunk / median(served.prefill)),
        "prefill_of_resident": relative(served.prefill, resident.prefill),
        "step_ms": round(1e3 * median(served.decode), 3),
        "asking_ms": round(1e3 * median(served.asking or [0]), 3),
        "taking_ms": round(1e3 * median(served.taking or [0]), 3),
        "rows_a_step": round(served.rows / steps, 1),
        "reads_a_step": round(served.reads / steps, 1),
    }


def _circumstances() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return {
        "command": " ".join(["python", *sys.argv]) if sys.argv[0].endswith("engram_lm.py") else "from a test",
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{cpu}, {len([line for line in lines if line.startswith('processor')])} cores, one thread a model",
        "torch": torch.__version__,
    }


def _report(results: dict[str, Any], out: Path, console: Console) -> None:
    """Pictures, results.md and the terminal."""
    training, serving = results["training"], results["serving"]
    costs, seen, schedule = training["costs"], training["held_out_loss"], training["schedule"]
    cost = costs["engram"]
    plot_losses(
        out / "loss.png",
        seen,
        schedule["batch"] * schedule["length"],
        f"{cost['parameters'] / 1e6:.1f} M parameters, {cost['multiply_adds'] / 1e6:.2f} M multiply-adds a token, both",
    )
    kinds = serving["kinds"]
    plot_serving(
        out / "serving.png",
        {phase: {kind: kinds[kind][f"{phase}_tokens_per_s"] for kind in KINDS} for phase in ("decode", "prefill")},
        f"{serving['traffic']['sequences']} sequences; table of {serving['bytes']['table'] / 2**20:.1f} MiB on disk, "
        f"host tier of {serving['bytes']['host'] / 2**20:.1f} MiB",
    )
    tables = [_costs(costs), _losses(seen), _rates(kinds)]
    parts = [f"# Results of engram_lm.py\n\nTraining: {_line(training)}, {training['cpu_seconds']} s of CPU."]
    parts.append(f"Serving: {_line(serving)}. Logits are {serving['logits']}.")
    for title, head, rows in tables:
        table = Table(*head, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
        parts.append(f"**{title}**\n\n" + "\n".join(lines))
    (out / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    console.print(f"results.json, results.md, loss.png, serving.png, model.safetensors: {out}", soft_wrap=True)


def _line(part: dict[str, Any]) -> str:
    return f"`{part['command']}`, {part['date']}, {part['hardware']}, torch {part['torch']}"


def _costs(costs: dict[str, dict[str, int]]) -> tuple[str, list[str], list[list[str]]]:
    rows = [[form, f"{cost['parameters']:,}", f"{cost['multiply_adds']:,}"] for form, cost in costs.items()]
    return "What the models cost", ["model", "parameters", "multiply-adds a token"], rows


def _losses(seen: dict[str, list[list[tuple[int, float]]]]) -> tuple[str, list[str], list[list[str]]]:
    last = {form: [run[-1][1] for run in runs] for form, runs in seen.items()}
    last["difference"] = [engram - other for engram, other in zip(last["engram"], last["baseline"], strict=True)]
    seeds = len(last["engram"])
    head = ["model", *(f"seed {seed}" for seed in range(seeds)), "mean", "standard deviation"]
    rows = [
        [form, *(f"{loss:.3f}" for loss in losses), f"{mean(losses):.3f}", f"{stdev(losses):.3f}" if seeds > 1 else "-"]
        for form, losses in last.items()
    ]
    return "Held-out loss, nats a token", head, rows


def _rates(kinds: dict[str, dict[str, float]]) -> tuple[str, list[str], list[list[str]]]:
    wanted = {
        "decode, tokens/s": ("decode_tokens_per_s", "{:,.0f}"),
        "decode, of resident": ("decode_of_resident", "{:.1%}"),
        "the same, caller's CPU": ("decode_cpu_of_resident", "{:.1%}"),
        "prefill, tokens/s": ("prefill_tokens_per_s", "{:,.0f}"),
        "prefill, of resident": ("prefill_of_resident", "{:.1%}"),
        "a decode step": ("step_ms", "{:.2f} ms"),
        "of it, asking for rows": ("asking_ms", "{:.2f} ms"),
        "of it, taking them": ("taking_ms", "{:.2f} ms"),
        "rows a step": ("rows_a_step", "{:.0f}"),
        "of them from disk": ("reads_a_step", "{:.0f}"),
    }
    rows = [[name, *(shape.format(each[key]) for each in kinds.values())] for name, (key, shape) in wanted.items()]
    return "Serving, medians of steps that alternate", ["", *kinds], rows


def options(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Of the command line, as `main` takes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("engram_lm"), help="a folder for the results (%(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="models that train at once (%(default)s)")
    parser.add_argument("--serve-only", action="store_true", help="serve the model that --out holds")
    parser.add_argument("--quick", action="store_true", help="few steps of training and of serving")
    chosen = vars(parser.parse_args(arguments))
    return chosen | QUICK if chosen.pop("quick") else chosen


if __name__ == "__main__":
    main(**options())
