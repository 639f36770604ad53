"""Train the detector and write weights.safetensors and metrics.json.

Run once, the results are committed: `python examples/digit-detector/train.py`, some minutes on two cores. Deterministic
on one machine and torch version; another may round differently, which is why the weights are committed and not made in CI.
Needs pycocotools.
"""

import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from canvases import canvas
from data import CATEGORIES, SIZES, evaluation, letterbox
from model import STRIDE, WEIGHTS, DigitDetector, cell_centres
from safetensors.torch import save_file
from torch.nn.functional import binary_cross_entropy_with_logits

EPOCHS = 32
BATCH = 32
SEED = 7
TRAINING_SEED = 1
KEPT_SCORE = 0.02
IOU_THRESHOLD = 0.5
MOST_DETECTIONS = 100


def epoch_of(number: int) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """1,500 canvases that no other epoch has: uint8 [N, 3, 128, 128], and of each its boxes (xyxy) and digits."""
    count = SIZES["train"]
    images, truth = [], []
    for index in range(number * count, (number + 1) * count):
        drawn = canvas("train", index, seed=TRAINING_SEED)
        boxed, record = letterbox(drawn.pixels)
        scale = np.array([record.scale_x, record.scale_y] * 2)
        corners = np.concatenate([drawn.boxes[:, :2], drawn.boxes[:, :2] + drawn.boxes[:, 2:]], 1)
        boxes = corners * scale + np.array([record.left, record.top] * 2)
        images.append(torch.from_numpy(boxed).permute(2, 0, 1))
        truth.append((torch.from_numpy(boxes).float(), torch.from_numpy(drawn.digits)))
    return torch.stack(images), truth


def assigned(boxes: torch.Tensor) -> torch.Tensor:
    """Which box each cell answers for, -1 for none: int64 [256].

    A cell answers for the smallest box whose middle is within 1.5 cells of its own and that holds the cell's centre, and
    the cell nearest to a box's middle always does. Source: FCOS, section 3, with centre sampling.
    """
    centres = cell_centres()
    owner = torch.full((len(centres),), -1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for index in areas.argsort(descending=True).tolist():
        box = boxes[index]
        from_middle = (centres - (box[:2] + box[2:]) / 2).abs().amax(1)
        inside = ((centres > box[:2]) & (centres < box[2:])).all(1)
        owner[(from_middle < 1.5 * STRIDE) & inside] = index
        owner[from_middle.argmin()] = index
    return owner


def overlaps(boxes: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """IoU and generalized IoU of boxes pair by pair, xyxy: float32 [n] each. Source: Rezatofighi et al. 2019."""
    shared = (torch.minimum(boxes[:, 2:], others[:, 2:]) - torch.maximum(boxes[:, :2], others[:, :2])).clamp(min=0)
    around = torch.maximum(boxes[:, 2:], others[:, 2:]) - torch.minimum(boxes[:, :2], others[:, :2])
    intersection, hull = shared.prod(1), around.prod(1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (others[:, 2:] - others[:, :2]).prod(1) - intersection
    iou = intersection / union.clamp(min=1e-6)
    return iou, iou - (hull - union) / hull.clamp(min=1e-6)


def loss_of(boxes: torch.Tensor, logits: torch.Tensor, truth: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Quality focal loss of the scores, whose target is the box's IoU, plus that of the boxes. Source: Li et al. 2020."""
    owners = [assigned(each) if len(each) else torch.full((boxes.shape[1],), -1) for each, _ in truth]
    image, cell = torch.nonzero(torch.stack(owners) >= 0, as_tuple=True)
    chosen = [truth[i][0][owners[i][c]] for i, c in zip(image.tolist(), cell.tolist(), strict=True)]
    digits = [int(truth[i][1][owners[i][c]]) for i, c in zip(image.tolist(), cell.tolist(), strict=True)]
    iou, generalized = overlaps(boxes[image, cell], torch.stack(chosen))
    quality = torch.zeros_like(logits)
    quality[image, cell, torch.tensor(digits)] = iou.detach().clamp(min=0)
    weight = (quality - logits.detach().sigmoid()).abs() ** 2
    scores = (binary_cross_entropy_with_logits(logits, quality, reduction="none") * weight).sum()
    return (scores + 2.0 * (1 - generalized).sum()) / len(image)


def train() -> DigitDetector:
    """The trained model in eval mode."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(mode=True)
    generator = torch.Generator().manual_seed(SEED)
    model = DigitDetector()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1e-2)
    steps = EPOCHS * -(-SIZES["train"] // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.2)
    for number in range(EPOCHS):
        began, total = time.perf_counter(), 0.0
        images, truth = epoch_of(number)
        for chosen in torch.randperm(len(images), generator=generator).split(BATCH):
            boxes, logits = model.raw(images[chosen].float() / 255)
            loss = loss_of(boxes, logits, [truth[i] for i in chosen.tolist()])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        print(f"epoch {number + 1}: loss {total / len(images):.4f}, {time.perf_counter() - began:.1f} s", flush=True)
    return model.eval()


def suppressed(boxes: npt.NDArray[np.float64], scores: npt.NDArray[np.float64]) -> list[int]:
    """Indices of the boxes that no better one overlaps by more than the threshold, best first."""
    kept: list[int] = []
    order = list(np.argsort(-scores, kind="stable"))
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    while order:
        best, rest = order[0], np.array(order[1:], dtype=np.int64)
        kept.append(int(best))
        shared = np.minimum(boxes[best, 2:], boxes[rest, 2:]) - np.maximum(boxes[best, :2], boxes[rest, :2])
        intersection = np.clip(shared, 0, None).prod(1)
        iou = intersection / np.maximum(areas[best] + areas[rest] - intersection, 1e-9)
        order = list(rest[iou <= IOU_THRESHOLD])
    return kept


@torch.inference_mode()
def results(model: torch.nn.Module) -> list[dict[str, Any]]:
    """What the model finds on the evaluation canvases, in COCO's results form, in pixels of the canvases."""
    found = evaluation()
    answers: list[dict[str, Any]] = []
    for first in range(0, len(found.targets), 64):
        batch = model(torch.from_numpy(found.inputs["images"][first : first + 64]))
        all_boxes, all_scores = (each.double().numpy() for each in batch)
        for target, boxes, scores in zip(found.targets[first : first + 64], all_boxes, all_scores, strict=True):
            record = target.image
            in_image = (boxes - [record.left, record.top] * 2) / ([record.scale_x, record.scale_y] * 2)
            in_image = np.clip(in_image, 0, [record.width, record.height] * 2)
            of_image: list[dict[str, Any]] = []
            for digit in range(scores.shape[1]):
                picked = np.flatnonzero(scores[:, digit] > KEPT_SCORE)
                for index in suppressed(in_image[picked], scores[picked, digit]):
                    x, y, right, bottom = in_image[picked[index]].tolist()
                    of_image.append(
                        {
                            "image_id": record.image_id,
                            "category_id": digit + 1,
                            "bbox": [x, y, right - x, bottom - y],
                            "score": float(scores[picked[index], digit]),
                        }
                    )
            answers += sorted(of_image, key=lambda one: -float(one["score"]))[:MOST_DETECTIONS]
    return answers


def mean_ap(model: torch.nn.Module) -> dict[str, float]:
    """`mean_ap`, `mean_ap_50` and `mean_ap_75` by pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    targets = evaluation().targets
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": one.image.image_id, "width": one.image.width, "height": one.image.height} for one in targets],
        "annotations": [dict(each) for one in targets for each in one.annotations],
        "categories": [{"id": key, "name": name} for key, name in CATEGORIES.items()],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        score = COCOeval(truth, truth.loadRes(results(model)), "bbox")
        score.evaluate()
        score.accumulate()
        score.summarize()
    return dict(zip(("mean_ap", "mean_ap_50", "mean_ap_75"), map(float, score.stats[:3]), strict=True))


def main() -> None:
    """Train, measure, write."""
    model = train()
    measured = mean_ap(model)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, WEIGHTS)
    Path(__file__).with_name("metrics.json").write_text(json.dumps(measured) + "\n", encoding="utf-8")
    shown = ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
    print(f"{shown} on {SIZES['evaluation']} canvases, {WEIGHTS.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
