"""ResNet-50 with seeded weights and seeded BatchNorm statistics: a network of real size, made from nothing.

It has learnt nothing, so its answers mean nothing; what is checked is whether an engine gives the same ones. The last
bias takes away what the logits of all images have in common, so that different images get different answers, and adds
one large number to all of them. Cosine then says little, and the cosine without the per-class mean says much.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

BLOCKS = (3, 4, 6, 3)
WIDTHS = (64, 128, 256, 512)
EXPANSION = 4
CLASSES = 1000
SEED = 50
OFFSET = 56.0
SCALE = 0.1375  # brings what tells images apart to a standard deviation of 1
BIAS = Path(__file__).with_name("bias.safetensors")


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1, and the way around them.

    Source: He et al., Deep Residual Learning for Image Recognition; the stride stands as in torchvision's v1.5.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * EXPANSION
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [N, C, H, W] to [N, 4 width, H / stride, W / stride]."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class ResNet50(nn.Module):
    """The stem, four stages of bottlenecks, the mean over the image, and one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1)
        channels, stages = WIDTHS[0], []
        for index, (count, width) in enumerate(zip(BLOCKS, WIDTHS, strict=True)):
            blocks = []
            for block in range(count):
                blocks.append(Bottleneck(channels, width, 2 if index and not block else 1))
                channels = width * EXPANSION
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [N, 1000], of normalised images, float32 [N, 3, 224, 224]."""
        y = self.stages(self.pool(self.relu(self.bn1(self.conv1(image)))))
        return self.fc(y.mean((2, 3)))


def load() -> nn.Module:
    """The network with every weight and statistic drawn from one seed."""
    model = ResNet50()
    random = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                fan = module.weight[0].numel()
                module.weight.normal_(0.0, (2.0 / fan) ** 0.5, generator=random)
            elif isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0.0, 0.1, generator=random)
                module.running_var.uniform_(0.5, 1.5, generator=random)
                module.weight.uniform_(0.8, 1.2, generator=random)
                module.bias.normal_(0.0, 0.1, generator=random)
        for module in model.modules():
            if isinstance(module, Bottleneck):
                module.bn3.weight.mul_(0.4)
        model.fc.weight.normal_(0.0, SCALE * CLASSES**-0.5, generator=random)
        model.fc.bias.zero_()
        if BIAS.exists():
            model.fc.bias.copy_(load_file(BIAS)["bias"])
    return model.eval()


def write_bias() -> None:
    """Measure the bias on images of their own, and write it beside this file."""
    from data import Images

    BIAS.unlink(missing_ok=True)
    model, images = load(), Images(128, seed=3)
    with torch.inference_mode():
        logits = torch.cat([model(torch.from_numpy(images[index]["image"])[None]) for index in range(len(images))])
    save_file({"bias": OFFSET - logits.mean(0)}, BIAS)


if __name__ == "__main__":
    write_bias()
