"""Fine-tune torchvision's Mask R-CNN with a slimmable ResNet at all widths in one run, without MMDetection.

    python -m slimclr_hub.detection.coins data/coins
    accelerate launch transfer/torchvision_mask_rcnn.py --data data/coins --weights slimclr_resnet50.mocov2_800e_in1k

DATA is COCO 2017, or has train/, val/, annotations/train.json and annotations/val.json in its format.
"""

import logging
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import DistributedDataParallelKwargs
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm
from typer import Option

from slimclr_hub.data.batches import on_one_line
from slimclr_hub.detection.precision import precision_table
from slimclr_hub.detection.torchvision_backbone import backward_widths, slimmable_mask_rcnn
from slimclr_hub.detection.torchvision_coco import CocoInstances, evaluate_widths
from slimclr_hub.distributed import average_batchnorm
from slimclr_hub.errors import InputError
from slimclr_hub.runs.command_line import run_script
from slimclr_hub.runs.launcher import launched
from slimclr_hub.weights.tensor_file import save_tensors

MAX_NORM = 35.0  # of the gradient summed over widths
WARM_UP = 500  # steps, or a tenth of the run if that is less
DECAYS = (8 / 12, 11 / 12)  # fractions of the run, Detectron's schedule


def collate(batch: list[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    """Collect images and targets in lists, since images differ in size."""
    images, targets = zip(*batch, strict=True)
    return [image.as_subclass(torch.Tensor) for image in images], list(targets)


def learning_rate(step: int, steps: int) -> float:
    """Return the factor of the learning rate: a linear warm-up, then a tenth after each decay."""
    warm_up = min(1.0, (step + 1) / max(1, min(WARM_UP, steps // 10)))
    return warm_up * 0.1 ** sum(step >= decay * steps for decay in DECAYS)


def main(
    data: Annotated[Path, Option(help='Folder of the data set.')],
    weights: Annotated[str | None, Option(help='Tag, hf-hub:USER/NAME, folder or file; random unless given.')] = None,
    name: Annotated[str, Option(help="Name of the network in timm's registry.")] = 'slimclr_resnet50',
    widths: Annotated[str, Option(help='Widths to train, separated by commas.')] = '1.0,0.75,0.5,0.25',
    epochs: Annotated[int, Option(min=1)] = 12,
    lr: Annotated[float, Option(help='Learning rate; scale it with the batch size.')] = 0.0025,
    batch_size: Annotated[int, Option(min=1, help='Images per process.')] = 2,
    min_size: Annotated[int, Option(min=1, help='Shorter side of the images in pixels.')] = 800,
    workers: Annotated[int, Option(min=0, help='Processes that read images.')] = 2,
    seed: int = 0,
    out: Annotated[Path, Option(help='Folder of the result.')] = Path('work_dirs/torchvision_mask_rcnn'),
) -> None:
    """Train, save the detector of all widths to OUT/model.safetensors and evaluate every width."""
    result = out / 'model.safetensors'
    if result.exists():
        raise InputError(f'{result} is there already; choose another --out')
    try:
        held = [float(width) for width in widths.split(',')]
    except ValueError:
        raise InputError(f'--widths {widths!r} are not numbers separated by commas, such as 1.0,0.5') from None
    accelerator = launched(None, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    logging.basicConfig(level=logging.INFO if accelerator.is_main_process else logging.WARNING, format='%(message)s')
    set_seed(seed, device_specific=True)
    to_float = v2.ToDtype(torch.float32, scale=True)
    train_set = CocoInstances(data, 'train', v2.Compose([v2.RandomHorizontalFlip(), to_float]))
    val_set = CocoInstances(data, 'val', to_float, crowds=True)
    if train_set.names != val_set.names:
        raise InputError(f'{data}: train has the classes {train_set.names}, val {val_set.names}')
    loading: dict[str, Any] = {
        'batch_size': batch_size * accelerator.num_processes,
        'num_workers': workers,
        'collate_fn': collate,
    }

    model = slimmable_mask_rcnn(weights, held, len(train_set.names) + 1, name, min_size=min_size)
    if accelerator.num_processes > 1 and accelerator.device.type == 'cuda':
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-4)
    model, optimizer, train, val = accelerator.prepare(
        model, optimizer, DataLoader(train_set, shuffle=True, **loading), DataLoader(val_set, **loading)
    )
    steps = epochs * len(train)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: learning_rate(step, steps))

    with tqdm(total=steps, disable=not accelerator.is_main_process, unit='step') as bar:
        for _ in range(epochs):
            model.train()
            for step, (images, targets) in enumerate(on_one_line(train)):
                losses = backward_widths(model, images, targets, backward=accelerator.backward)
                accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                if step % 10 == 0 and accelerator.is_main_process:  # reading losses synchronises the device
                    bar.set_postfix({f'loss {w:g}': f'{float(sum(of.values())):.3f}' for w, of in losses.items()})
                bar.update()

    average_batchnorm(accelerator.unwrap_model(model))  # without SyncBN each process has its own statistics
    if accelerator.is_main_process:
        save_tensors(accelerator.unwrap_model(model).state_dict(), result)
    results = evaluate_widths(model, on_one_line(val))
    if accelerator.is_main_process:
        print(f'{precision_table(results, accelerator.unwrap_model(model).backbone.body)}\n{result}')
    accelerator.end_training()


if __name__ == '__main__':
    run_script(lambda: typer.run(main))
