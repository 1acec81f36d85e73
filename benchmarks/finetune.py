"""Fine-tuning on her2st: seconds, peak memory, validation loss, and whether a stopped run goes on to the same result.

Run as `python -m benchmarks.finetune [--extractor NAME] [--weights FILE] [--input-px N] [--epochs N]`; of resnet50
without `--weights`, random weights are written and used, which the result says. Each run is a process of its own, so
that its peak memory is its own: one straight through, one that is killed in its last epoch and then goes on.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SECTIONS = ("C2", "C3")


def random_resnet50(path: Path) -> None:
    """Write ResNet-50 with random weights under torchvision's names."""
    from flax import nnx
    from safetensors.numpy import save_file

    from stimage_sd.models._weights import resnet50_names
    from stimage_sd.nn.resnet import ResNet50

    random = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for layer, convolution, norm in resnet50_names(nnx.eval_shape(lambda: ResNet50(rngs=nnx.Rngs(0)))):
        height, width, inputs, outputs = layer.kernel.shape
        deviation = (2 / (height * width * inputs)) ** 0.5
        arrays[f"{convolution}.weight"] = random.normal(0, deviation, (outputs, inputs, height, width))
        # blocks that add little to what they add to keep the values from growing from block to block
        arrays[f"{norm}.weight"] = np.full(outputs, 0.25 if norm.endswith("bn3") else 1.0)
        arrays[f"{norm}.bias"] = np.zeros(outputs)
        arrays[f"{norm}.running_mean"], arrays[f"{norm}.running_var"] = np.zeros(outputs), np.ones(outputs)
    save_file({name: array.astype(np.float32) for name, array in arrays.items()}, path)


def run(options: argparse.Namespace) -> None:
    """Train once, and print what came of it."""
    import stimage_sd as sti

    cohort = {name: sti.datasets.her2st(name) for name in SECTIONS}
    sti.pp.tile(cohort)
    genes = sti.pp.select_genes(cohort, n_top=options.genes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    begin = time.perf_counter()
    model = sti.tl.finetune_nb(
        cohort,
        genes=genes,
        extractor=options.extractor,
        weights=options.weights,
        unfreeze=options.unfreeze,
        input_px=options.input_px,
        max_epochs=options.epochs,
        validation=SECTIONS[-1:],
        learning_rate=options.learning_rate,
        checkpoint=options.checkpoint,
    )
    seconds = time.perf_counter() - begin
    model.save(options.model)
    print(
        json.dumps(
            {
                "n_tiles": model.training["n_tiles"],
                "n_genes": len(genes),
                "seconds": round(seconds, 1),
                "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
                "mb_before": round(before),
                "history": model.training["history"],
            }
        )
    )


def child(options: argparse.Namespace, checkpoint: Path, model: Path, *, kill_after: int | None = None) -> Any:
    """Run in a process of its own; `kill_after` seconds after its first epoch's checkpoint, where that is given."""
    command = [sys.executable, "-m", "benchmarks.finetune", "--child", "--checkpoint", checkpoint, "--model", model]
    for name in ("extractor", "weights", "unfreeze", "input_px", "epochs", "genes", "learning_rate"):
        if getattr(options, name) is not None:
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([str(part) for part in command], stdout=output)
        if kill_after is not None:
            wait_for_epoch(checkpoint, options.epochs - 1, process)
            time.sleep(kill_after)
            process.send_signal(signal.SIGKILL)
        code = process.wait()
        if kill_after is not None:
            return code
        if code:
            raise SystemExit(f"{command} ended with {code}")
        output.seek(0)
        return json.loads(output.read().splitlines()[-1])


def wait_for_epoch(checkpoint: Path, epoch: int, process: subprocess.Popen) -> None:
    """Wait until a checkpoint holds an epoch."""
    from safetensors import safe_open

    file = checkpoint / "state.safetensors"
    while process.poll() is None:
        if file.exists():
            with safe_open(file, framework="numpy") as opened:
                if json.loads(opened.metadata()["about"])["history"][-1]["epoch"] >= epoch:
                    return
        time.sleep(0.5)


def differences(one: Path, other: Path) -> list[str]:
    """Name what is not the same in two models, bit for bit: arrays, and the history."""
    from stimage_sd.models._files import read_model

    (config, arrays), (others, theirs) = read_model(one), read_model(other)
    found = [
        name
        for name in sorted(arrays.keys() | theirs.keys())
        if not (name in arrays and name in theirs and np.array_equal(arrays[name], theirs[name]))
    ]
    return found + ["history"] * (config["training"]["history"] != others["training"]["history"])


def main() -> None:
    """Run the three runs and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extractor", default="resnet50")
    parser.add_argument("--weights")
    parser.add_argument("--unfreeze", default="last_stage")
    parser.add_argument("--input-px", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--genes", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--child", action="store_true")
    parser.add_argument("--checkpoint")
    parser.add_argument("--model")
    options = parser.parse_args()
    if options.child:
        run(options)
        return
    from benchmarks.measure import machine, report

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        is_random = options.extractor == "resnet50" and options.weights is None
        if is_random:
            options.weights = str(folder / "random.safetensors")
            random_resnet50(Path(options.weights))
        straight = child(options, folder / "straight", folder / "straight.model")
        code = child(options, folder / "stopped", folder / "stopped.model", kill_after=5)
        resumed = child(options, folder / "stopped", folder / "stopped.model")
        result = {
            "extractor": options.extractor,
            "random_weights": is_random,
            "unfreeze": options.unfreeze,
            "input_px": options.input_px,
            "learning_rate": options.learning_rate,
            "sections": list(SECTIONS),
            **straight,
            "stopped_run_ended_with": code,
            "seconds_after_resuming": resumed["seconds"],
            "resumed_differs_in": differences(folder / "straight.model", folder / "stopped.model"),
            "resumed_history": resumed["history"],
            "machine": machine(),
        }
    report(Path(__file__).parent / "results" / f"finetune_{options.extractor}_{options.input_px}px.json", result)


if __name__ == "__main__":
    main()
