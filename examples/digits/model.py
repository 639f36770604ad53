"""A small CNN for 8 x 8 images of digits: three convolutions, global average pooling, one linear layer."""

from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

WEIGHTS = Path(__file__).with_name("weights.safetensors")


def _block(channels_in: int, channels_out: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=stride, padding=1, bias=False),
            norm=nn.BatchNorm2d(channels_out),
            act=nn.SiLU(),
        )
    )


class DigitsNet(nn.Module):
    """Classifies digits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _block(1, 24)
        self.down = _block(24, 48, stride=2)
        self.body = _block(48, 64)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class scores.

        Args:
            images: float32 [N, 1, 8, 8], 0 to 1.

        Returns:
            Logits, float32 [N, 10].
        """
        features = self.pool(self.body(self.down(self.stem(images))))
        logits: torch.Tensor = self.head(features.flatten(1))
        return logits


def load() -> nn.Module:
    """The trained model in eval mode: the factory that gate.toml names."""
    model = DigitsNet()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()
