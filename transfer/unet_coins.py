"""Train a U-Net of segmentation_models_pytorch at four widths on scikit-image's coins; print IoU by width.

    pip install -e ".[transfer]" segmentation-models-pytorch
    python transfer/unet_coins.py               # the encoder begins from the network in the package
    python transfer/unet_coins.py --random      # from random weights

The lower two rows of coins are for training, the 12 coins of the upper two for the IoU.
"""

from typing import Annotated, Any

import numpy as np
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
import typer
from skimage import data

import slimclr_hub  # noqa: F401 - registers the networks in timm
from slimclr_hub.detection.coins import coin_masks

ROW = 152  # between the rows of coins for validation and those for training
SIZE = 96  # pixels of a side of the training crops


def crops(images: torch.Tensor, masks: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random crops, turned and mirrored, of a picture [C, H, W] and its masks [1, H, W]."""
    both, taken = torch.cat([images, masks]), []
    for _ in range(count):
        top, left = (int(torch.randint(side - SIZE + 1, ())) for side in both.shape[1:])
        turns, mirror = int(torch.randint(4, ())), bool(torch.randint(2, ()))
        crop = both[:, top : top + SIZE, left : left + SIZE].rot90(turns, (1, 2))
        taken.append(crop.flip(2) if mirror else crop)
    batch = torch.stack(taken)
    return batch[:, :-1], batch[:, -1:]


def train(seed: int, steps: int, batch: int, lr: float, random: bool) -> dict[float, float]:
    """Train all widths, losses summed, and return the IoU of each on the coins for validation."""
    torch.manual_seed(seed)
    model: Any = smp.Unet(
        'tu-slimclr_resnet20',
        encoder_weights=None if random else True,
        encoder_depth=3,
        decoder_channels=(64, 32, 16),
        decoder_use_norm={'type': 'instancenorm', 'affine': True},  # no statistics that widths would have to share
        pad_channels=True,  # so that the decoder takes the maps of any width
    )
    encoder = model.encoder.model
    about = encoder.pretrained_cfg
    grey = data.coins()
    image = torch.from_numpy(grey / np.float32(255)).expand(3, -1, -1)
    image = (image - torch.tensor(about['mean']).view(3, 1, 1)) / torch.tensor(about['std']).view(3, 1, 1)
    mask = torch.from_numpy(coin_masks(grey).any(axis=0)).float().unsqueeze(0)

    optimizer = torch.optim.AdamW(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    model.train()
    for _ in range(steps):
        x, target = crops(image[:, ROW:], mask[:, ROW:], batch)
        for width in encoder.widths:
            with encoder.set_width(width):
                F.binary_cross_entropy_with_logits(model(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    model.eval()
    coins, ious = mask[:, :ROW].bool(), {}
    for width in encoder.widths:
        with encoder.set_width(width), torch.inference_mode():
            found = model(image[None, :, :ROW])[0] > 0
        ious[width] = float((found & coins).sum() / (found | coins).sum())
    return ious


def main(
    steps: int = 100,
    batch: Annotated[int, typer.Option(help='Crops of a step.')] = 4,
    lr: Annotated[float, typer.Option(help='Highest learning rate.')] = 0.002,
    seeds: Annotated[int, typer.Option(help='Runs, each with its own seed.')] = 1,
    random: Annotated[bool, typer.Option('--random', help='Begin from random weights.')] = False,
) -> None:
    """Train, and print the IoU (%) of each width on the 12 coins that were left out, by run."""
    for seed in range(seeds):
        ious = train(seed, steps, batch, lr, random)
        print(f'seed {seed}: ' + ', '.join(f'{width:g}: {100 * iou:.1f}' for width, iou in ious.items()), flush=True)


if __name__ == '__main__':
    typer.run(main)
