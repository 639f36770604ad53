"""A small U-Net: three halvings, dilated convolutions that see a whole digit, and back.

The weights are kept in float16, half the file, and computed with in float32.
"""

from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import interpolate

WEIGHTS = Path(__file__).with_name("weights.safetensors")
CLASSES = 11


def _block(channels_in: int, channels_out: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(
                channels_in,
                channels_out,
                kernel_size=3,
                stride=stride,
                padding=dilation,
                dilation=dilation,
                bias=False,
            ),
            norm=nn.BatchNorm2d(channels_out),
            act=nn.ReLU(inplace=True),
        )
    )


class DigitSegmenter(nn.Module):
    """Says of each pixel which digit it is of."""

    def __init__(self) -> None:
        super().__init__()
        self.at1 = _block(3, 8)
        self.at2 = _block(8, 16, stride=2)
        self.at4 = _block(16, 24, stride=2)
        self.at8 = nn.Sequential(
            _block(24, 40, stride=2),
            _block(40, 40),
            _block(40, 40, dilation=2),
            _block(40, 40, dilation=3),
            _block(40, 40),
        )
        self.back4 = _block(40 + 24, 24)
        self.back2 = _block(24 + 16, 16)
        self.back1 = _block(16 + 8, 12)
        self.head = nn.Conv2d(12, CLASSES, kernel_size=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class scores of each pixel.

        Args:
            images: float32 [N, 3, 96, 96], RGB, 0 to 1.

        Returns:
            Logits, float32 [N, 11, 96, 96].
        """
        at1 = self.at1(images)
        at2 = self.at2(at1)
        at4 = self.at4(at2)
        deep = self.at8(at4)
        for before, back in ((at4, self.back4), (at2, self.back2), (at1, self.back1)):
            deep = back(torch.cat([interpolate(deep, scale_factor=2.0, mode="nearest"), before], 1))
        logits: torch.Tensor = self.head(deep)
        return logits


def load() -> nn.Module:
    """The trained model in eval mode: the factory that gate.toml names."""
    model = DigitSegmenter()
    model.load_state_dict(load_file(WEIGHTS))  # copied into float32 parameters
    return model.eval()
