"""Data sets in COCO's format for torchvision's detectors, and their average precision at every width."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import pil_to_tensor

from slimclr_hub.detection.coco import check_annotations, check_files, in_format
from slimclr_hub.detection.precision import KINDS, METRICS
from slimclr_hub.detection.torchvision_backbone import slimmable_backbone
from slimclr_hub.detection.widths import unwrapped
from slimclr_hub.distributed import world_size
from slimclr_hub.errors import DataError
from slimclr_hub.models.mode import evaluating


class CocoInstances(torch.utils.data.Dataset):
    """Images of `FOLDER/SPLIT/` with the instances of `FOLDER/annotations/SPLIT.json`.

    Files may have the names of COCO 2017 instead: `SPLIT2017/` and `annotations/instances_SPLIT2017.json`.

    An item is an image, uint8 [3, H, W], and its target, both as torchvision's `tv_tensors`: `boxes` [n, 4] as x, y, x,
    y, `labels` [n] from 1 in the order of COCO's ids, `masks` [n, H, W], `iscrowd` [n], `image_id`.

    Args:
        folder: Folder of the data set.
        split: `train` or `val`.
        transform: Called with image and target, such as one of torchvision's v2.
        crowds: Include crowds, which evaluation needs and training cannot use.

    Raises:
        InputError: A file is missing or is not in COCO's format.
        DataError: An image, when it is asked for, cannot be read or is of another size than annotations say.
    """

    def __init__(
        self, folder: Path, split: str, transform: Callable[..., Any] | None = None, crowds: bool = False
    ) -> None:
        names = f'annotations/{split}.json', split
        remedy = f'a data set other than COCO 2017 has {" and ".join(names)}'
        if not (folder / names[0]).is_file():
            names = f'annotations/instances_{split}2017.json', f'{split}2017'
        check_files(folder, names, remedy)
        annotations, self.folder = (folder / name for name in names)
        with in_format(annotations):
            with redirect_stdout(StringIO()):
                self.coco = COCO(str(annotations))
            check_annotations(str(annotations), self.coco.dataset, self.folder, masks=True)
            self.image_ids = sorted(self.coco.imgs)
            self.labels = {number: label for label, number in enumerate(sorted(self.coco.cats), start=1)}
            self.names = tuple(self.coco.cats[number]['name'] for number in self.labels)
        self.transform = transform
        self.crowds = crowds

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        image_id = self.image_ids[index]
        entry = self.coco.imgs[image_id]
        path = self.folder / entry['file_name']
        try:
            with Image.open(path) as file:
                image = tv_tensors.Image(pil_to_tensor(file.convert('RGB')))
        except OSError as error:
            raise DataError(f'{path} cannot be read: {error}') from error
        size = tuple(image.shape[-2:])
        if size != (entry['height'], entry['width']):
            found, said = f'{size[1]} x {size[0]}', f'{entry["width"]} x {entry["height"]}'
            raise DataError(f'{path} is of {found} pixels, and annotations say {said}; correct either')
        known = [a for a in self.coco.imgToAnns[image_id] if self.crowds or not a['iscrowd']]
        known = [a for a in known if min(a['bbox'][2:]) >= 1]  # COCO has boxes of no area, which torchvision refuses
        boxes = torch.tensor([a['bbox'] for a in known]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = np.stack([np.zeros(size, np.uint8), *(self.coco.annToMask(a) for a in known)])[1:]
        target = {
            'boxes': tv_tensors.BoundingBoxes(boxes, format='XYXY', canvas_size=size, dtype=torch.float32),
            'labels': torch.tensor([self.labels[a['category_id']] for a in known], dtype=torch.int64),
            'masks': tv_tensors.Mask(torch.from_numpy(masks)),
            'iscrowd': torch.tensor([a['iscrowd'] for a in known], dtype=torch.int64),
            'image_id': image_id,
        }
        return (image, target) if self.transform is None else self.transform(image, target)


@torch.no_grad()
def evaluate_widths(
    model: nn.Module,
    loader: Iterable[tuple[Sequence[torch.Tensor], Sequence[Mapping[str, Any]]]],
    widths: Sequence[float] | None = None,
) -> dict[float, dict[str, float]]:
    """Evaluate COCO's average precision of boxes and masks, at every width on the same images.

    Processes may share the images; all return the same result. An image that comes twice, as at the end of an uneven
    share, counts once.

    Args:
        model: Detector of `slimmable_mask_rcnn`, itself or in DistributedDataParallel.
        loader: Batches of images [3, H, W] in [0, 1] and targets as in `CocoInstances`.
        widths: Widths to evaluate; all unless given.

    Returns:
        Width -> `bbox/AP`, `bbox/AP50`, `bbox/AP75` and the same of `segm`, from 0 to 1; nan without any instance.
    """
    backbone, detector = slimmable_backbone(model), unwrapped(model)
    widths = backbone.widths if widths is None else widths
    device = next(detector.parameters()).device
    truth: dict[int, Any] = {}
    found: dict[float, dict[int, Any]] = {width: {} for width in widths}
    with evaluating(detector):
        for images, targets in loader:
            images = [image.to(device) for image in images]
            for image, target in zip(images, targets, strict=True):
                truth[int(target['image_id'])] = tuple(image.shape[-2:]), _instances(target, target['masks'])
            for width in widths:
                with backbone.set_width(width):
                    outputs = detector(images)
                for target, output in zip(targets, outputs, strict=True):
                    masks = output['masks'].squeeze(1) > 0.5
                    found[width][int(target['image_id'])] = _instances(output, masks)
    truth = _of_all_processes(truth)
    return {width: _precision(truth, _of_all_processes(of_width)) for width, of_width in found.items()}


def _instances(about: Mapping[str, torch.Tensor], masks: torch.Tensor) -> list[dict[str, Any]]:
    """Convert the instances of one image to COCO's annotations without ids."""
    labels = about['labels']
    scores, crowds = about.get('scores', torch.ones(len(labels))), about.get('iscrowd', torch.zeros_like(labels))
    boxes = about['boxes'].clone().float()
    boxes[:, 2:] -= boxes[:, :2]
    columns = (column.tolist() for column in (boxes, labels, scores, crowds))
    return [
        {
            'bbox': box,
            'category_id': label,
            'score': score,
            'iscrowd': crowd,
            'segmentation': (code := coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))),
            'area': float(coco_mask.area(code)),
        }
        for box, label, score, crowd, mask in zip(*columns, masks.cpu().numpy(), strict=True)
    ]


def _of_all_processes(by_image: dict[int, Any]) -> dict[int, Any]:
    shares = [by_image] * world_size()
    if len(shares) > 1:
        torch.distributed.all_gather_object(shares, by_image)
    return {image_id: value for share in shares for image_id, value in share.items()}


def _precision(truth: Mapping[int, Any], found: Mapping[int, Any]) -> dict[str, float]:
    images = [{'id': image_id, 'height': size[0], 'width': size[1]} for image_id, (size, _) in truth.items()]
    labels = sorted({instance['category_id'] for _, instances in truth.values() for instance in instances})
    with redirect_stdout(StringIO()):
        annotated = _coco(images, labels, {image_id: instances for image_id, (_, instances) in truth.items()})
        detected = _coco(images, labels, found)
        precision: dict[str, float] = {}
        for kind in KINDS:
            evaluation = COCOeval(annotated, detected, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            for metric, value in zip(METRICS, evaluation.stats, strict=False):
                precision[f'{kind}/{metric}'] = float(value) if value >= 0 else float('nan')  # -1: nothing to find
    return precision


def _coco(images: list[dict[str, int]], labels: list[int], instances: Mapping[int, Any]) -> COCO:
    every = [{'image_id': image_id, **instance} for image_id, several in instances.items() for instance in several]
    annotations = [{'id': number, **instance} for number, instance in enumerate(every, start=1)]
    coco = COCO()
    coco.dataset = {'images': images, 'categories': [{'id': label} for label in labels], 'annotations': annotations}
    coco.createIndex()
    return coco
