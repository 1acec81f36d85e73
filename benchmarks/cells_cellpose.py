"""Cellpose's architecture on the real patches of ``benchmarks/cells.py``, from random weights, held out the same ways.

Run it where Cellpose 3 is, which wants an older numpy than the package, in an environment of its own:
``pip install torch==2.13.0 "cellpose>=3.1,<4" "numpy<2.1" lazy-loader numba scikit-image``, then
``PYTHONPATH=src python -m benchmarks.cells_cellpose --epochs 60``. Cellpose trains itself (AdamW, crops of 224 px, its
own augmentation) on the hematoxylin channel, as `pp.segment_nuclei` feeds it, at the learning rate of
``benchmarks/cells.py`` and a crop a step, so that it takes about as many steps and sees as many pixels as HoVer-Net
does there. Its scores are those of the label maps.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from cellpose import models, train

from stimage_sd.image.instance_scores import instance_scores
from stimage_sd.image.nuclear_contrast import hematoxylin

#: patches of the same tissue, as in ``benchmarks/cells.py``
FIELDS = ((0, 1, 2), (3, 4, 5), (6, 7, 8))
SHOWN = ("f1", "panoptic_quality", "aggregated_jaccard", "dice")


def contrast(image: np.ndarray) -> np.ndarray:
    """Hematoxylin from its 1st to its 99th percentile."""
    stain = hematoxylin(np.moveaxis(image, -1, 0))
    low, high = np.percentile(stain, (1, 99))
    return np.clip((stain - low) / (high - low), 0, 1).astype(np.float32)


def found(images: list[np.ndarray], truth: list[np.ndarray], held_out: tuple[int, ...], n_epochs: int) -> list:
    """Label maps of held-out patches by a network trained on the others."""
    model = models.CellposeModel(gpu=False, pretrained_model=False)
    rest = [n for n in range(len(images)) if n not in held_out]
    with tempfile.TemporaryDirectory() as folder:  # it writes its weights, asked or not
        train.train_seg(
            model.net, train_data=[images[n] for n in rest], train_labels=[truth[n] for n in rest], channels=[0, 0],
            normalize=False, n_epochs=n_epochs, learning_rate=2e-3, batch_size=1, save_path=folder,
        )  # fmt: skip
    return [model.eval(images[n], channels=[0, 0], normalize=False, diameter=None)[0] for n in held_out]


def main() -> None:
    """Leave out a field, then a patch, at a time; print a line of JSON each and the means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("STIMAGE_SD_DATA", ".")) / "nuclei")
    parser.add_argument("--epochs", type=int, default=60)
    options = parser.parse_args()
    nine = np.load(options.data / "patches.npz")
    images = [contrast(image) for image in nine["images"]]
    truth = [labels.astype(np.int32) for labels in nine["instances"]]
    for way, folds in (("a field", FIELDS), ("a patch", tuple((n,) for n in range(len(images))))):
        rows, started = [], time.perf_counter()
        for held_out in folds:
            for n, labels in zip(held_out, found(images, truth, held_out, options.epochs), strict=True):
                scores = instance_scores(truth[n], labels.astype(np.int32))
                rows.append([float(getattr(scores, name)) for name in SHOWN])
                line = {"held out": way, "patch": n, **dict(zip(SHOWN, np.round(rows[-1], 3).tolist(), strict=True))}
                print(json.dumps(line), flush=True)
        means = dict(zip(SHOWN, np.mean(rows, axis=0).round(3).tolist(), strict=True))
        seconds = round((time.perf_counter() - started) / len(folds), 1)
        print(
            json.dumps({"held out": way, "mean": means, "epochs": options.epochs, "seconds a fit": seconds}), flush=True
        )


if __name__ == "__main__":
    main()
