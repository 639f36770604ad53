"""A small one-stage detector without anchors: a convolutional backbone, and per cell of 8 x 8 pixels scores and a box."""

from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

WEIGHTS = Path(__file__).with_name("weights.safetensors")
CLASSES = 10
STRIDE = 8
SIDE = 128
CELLS = (SIDE // STRIDE) ** 2


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


def cell_centres() -> torch.Tensor:
    """Each cell's centre, x and y in input pixels, row by row: float32 [256, 2]."""
    middle = (torch.arange(SIDE // STRIDE, dtype=torch.float32) + 0.5) * STRIDE
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    return torch.stack([x, y], -1).reshape(-1, 2)


class DigitDetector(nn.Module):
    """Finds digits and says which they are."""

    centres: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            OrderedDict(
                stem=_block(3, 16, stride=2),
                down4=_block(16, 32, stride=2),
                at4=_block(32, 32),
                down8=_block(32, 56, stride=2),
                near=_block(56, 56),
                far=_block(56, 56, dilation=2),
                farther=_block(56, 56, dilation=2),
            )
        )
        self.score_tower = _block(56, 56)
        self.score = nn.Conv2d(56, CLASSES, kernel_size=1)
        self.box_tower = _block(56, 56)
        self.box = nn.Conv2d(56, 4, kernel_size=1)
        # A cell is background until something speaks against it (RetinaNet, section 4.1).
        nn.init.constant_(self.score.bias, -4.6)
        nn.init.constant_(self.box.bias, 1.0)
        self.register_buffer("centres", cell_centres(), persistent=False)

    def raw(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What training works on.

        Args:
            images: float32 [N, 3, 128, 128], RGB, 0 to 1.

        Returns:
            Boxes float32 [N, 256, 4], xyxy, input pixels; logits float32 [N, 256, 10].
        """
        features = self.backbone(images)
        logits = self.score(self.score_tower(features)).flatten(2).transpose(1, 2)
        reach = torch.relu(self.box(self.box_tower(features))).flatten(2).transpose(1, 2) * STRIDE
        boxes = torch.cat([self.centres - reach[..., :2], self.centres + reach[..., 2:]], -1)
        return boxes, logits

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Boxes and scores, many of the same digit: suppress all but the best.

        Args:
            images: float32 [N, 3, 128, 128], RGB, 0 to 1.

        Returns:
            `boxes`, float32 [N, 256, 4], xyxy, input pixels; `scores`, float32 [N, 256, 10], 0 to 1.
        """
        boxes, logits = self.raw(images)
        return boxes, torch.sigmoid(logits)


def load() -> nn.Module:
    """The trained model in eval mode: the factory that gate.toml names."""
    model = DigitDetector()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()
