"""Train the segmenter and write weights.safetensors and metrics.json.

Run once, the results are committed: `python examples/digit-segmentation/train.py`, some minutes on two cores.
Deterministic on one machine and torch version; another may round differently, which is why the weights are committed and
not made in CI.
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
from data import CLASSES, IGNORED, SIZES, evaluation, labelled
from model import WEIGHTS, DigitSegmenter, load
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

EPOCHS = 18
BATCH = 32
SEED = 7
TRAINING_SEED = 3
BACKGROUND_WEIGHT = 0.3


def train() -> DigitSegmenter:
    """The trained model in eval mode."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(mode=True)
    generator = torch.Generator().manual_seed(SEED)
    model = DigitSegmenter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1e-2)
    count = SIZES["train"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=4e-3, total_steps=EPOCHS * -(-count // BATCH), pct_start=0.2
    )
    # Most pixels are background: of full weight it would be all that is learned at first.
    weight = torch.ones(len(CLASSES))
    weight[CLASSES.index("background")] = BACKGROUND_WEIGHT
    for number in range(EPOCHS):
        began, total = time.perf_counter(), 0.0
        made = labelled("train", number * count, (number + 1) * count, seed=TRAINING_SEED)
        images, maps = torch.from_numpy(made.inputs["images"]), torch.from_numpy(np.stack(made.targets))
        for chosen in torch.randperm(count, generator=generator).split(BATCH):
            loss = cross_entropy(model(images[chosen]), maps[chosen], weight=weight, ignore_index=IGNORED)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        print(f"epoch {number + 1}: loss {total / count:.4f}, {time.perf_counter() - began:.1f} s", flush=True)
    return model.eval()


@torch.inference_mode()
def scores(model: torch.nn.Module) -> dict[str, float]:
    """`mean_iou` over the classes, and `pixel_accuracy`, over all evaluation canvases together."""
    made = evaluation()
    confusion = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    for first in range(0, len(made.targets), 32):
        answers = model(torch.from_numpy(made.inputs["images"][first : first + 32])).argmax(1).numpy()
        truth = np.stack(made.targets[first : first + 32])
        scored = truth != IGNORED
        np.add.at(confusion, (truth[scored], answers[scored]), 1)
    hits = np.diagonal(confusion)
    unions = confusion.sum(0) + confusion.sum(1) - hits
    return {"mean_iou": float((hits / unions).mean()), "pixel_accuracy": float(hits.sum() / confusion.sum())}


def _halved(value: torch.Tensor) -> torch.Tensor:
    return (value.half() if value.is_floating_point() else value).contiguous()


def main() -> None:
    """Train, measure, write."""
    halved = {name: _halved(value) for name, value in train().state_dict().items()}
    save_file(halved, WEIGHTS)
    measured = scores(load())  # of what was written
    Path(__file__).with_name("metrics.json").write_text(json.dumps(measured) + "\n", encoding="utf-8")
    shown = ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
    print(f"{shown} on {SIZES['evaluation']} canvases, {WEIGHTS.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
