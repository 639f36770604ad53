"""Train the digits classifier and write weights.safetensors and metrics.json.

Run once, the results are committed: `python examples/digits/train.py`. Deterministic on one machine and torch version;
another may round differently, which is why the weights are committed and not made in CI.
"""

import json
from pathlib import Path

import torch
from data import held_out, training
from model import WEIGHTS, DigitsNet
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy, pad

EPOCHS = 60
BATCH = 50
SEED = 7


def shifted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image moved by up to one pixel in each direction: float32 [N, 1, 8, 8]."""
    padded = pad(images, (1, 1, 1, 1))
    moves = torch.randint(0, 3, (len(images), 2), generator=generator).tolist()
    rows = [padded[i, :, y : y + 8, x : x + 8] for i, (y, x) in enumerate(moves)]
    return torch.stack(rows)


def train() -> DigitsNet:
    """The trained model in eval mode."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(mode=True)
    generator = torch.Generator().manual_seed(SEED)
    digits = training()
    images, labels = torch.from_numpy(digits.images), torch.from_numpy(digits.labels)
    model = DigitsNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=5e-2)
    steps = EPOCHS * len(labels) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(labels), generator=generator).split(BATCH):
            loss = cross_entropy(model(shifted(images[chosen], generator)), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.inference_mode()
def top1(model: DigitsNet) -> float:
    """Accuracy on the held-out samples."""
    digits = held_out()
    predicted = model(torch.from_numpy(digits.images)).argmax(1)
    return float((predicted == torch.from_numpy(digits.labels)).double().mean())


def main() -> None:
    """Train, measure, write."""
    model = train()
    accuracy = top1(model)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, WEIGHTS)
    Path(__file__).with_name("metrics.json").write_text(json.dumps({"top1": accuracy}) + "\n", encoding="utf-8")
    print(f"top-1 {accuracy:.4%} on {len(held_out().labels)} held-out samples, {WEIGHTS.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
