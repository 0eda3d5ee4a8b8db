"""COCO and the coins, as data sets of MMDetection that name missing files, and classes that are not those of a file."""

from pathlib import Path
from typing import Any, ClassVar

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS

from slimclr_hub.detection.coco import check_annotations, check_classes, check_files, class_names, in_format
from slimclr_hub.detection.coins import write_coins
from slimclr_hub.errors import InputError

__all__ = ['CocoFolder', 'CoinsFolder', 'class_names']  # configs call the last one


@DATASETS.register_module()
class CocoFolder(CocoDataset):
    """Data set in COCO's format that first checks its files and classes, unless `lazy_init` asks for names alone.

    MMDetection itself numbers classes in the order of the file whatever that of `metainfo` is, and drops the boxes of
    those that it does not name.

    Args:
        data_root: Folder of the data set.
        ann_file: Annotations, from there.
        data_prefix: Folder of the images, from there, under `img`.
        lazy_init: Read nothing.
        some_classes: True if `metainfo` may leave out classes of the file; their boxes are then background.
        kwargs: Further ones of MMDetection's `CocoDataset`.

    Raises:
        InputError: A file is missing, the classes of `metainfo` are not those of the file, in its order, or an
            annotation lacks something.
    """

    remedy = 'COCO 2017 lies in the folder COCO_ROOT (environment); `slimclr-hub doctor` lists what is missing'

    def __init__(
        self,
        *,
        data_root: str,
        ann_file: str,
        data_prefix: dict[str, str],
        lazy_init: bool = False,
        some_classes: bool = False,
        **kwargs: Any,
    ) -> None:
        self.some_classes = some_classes
        self.masks = any(step.get('with_mask') for step in kwargs.get('pipeline', ()))
        if not lazy_init:
            check_files(Path(data_root), (ann_file, data_prefix['img']), self.remedy)
        super().__init__(data_root=data_root, ann_file=ann_file, data_prefix=data_prefix, lazy_init=lazy_init, **kwargs)

    def COCOAPI(self, annotations: str) -> Any:  # noqa: N802 - what MMDetection calls to read the file
        """Read annotations and check them."""
        with in_format(self.ann_file):
            coco = CocoDataset.COCOAPI(annotations)
            names = [category['name'] for category in coco.dataset['categories']]
            check_classes(self.ann_file, names, self.metainfo['classes'], self.some_classes)
            check_annotations(self.ann_file, coco.dataset, Path(self.data_prefix['img']), self.masks)
        return coco

    def filter_data(self) -> list[dict[str, Any]]:
        """Leave out images as `filter_cfg` says; an InputError if none is left."""
        if not (kept := super().filter_data()):
            raise InputError(f'{self.ann_file}: filter_cfg={self.filter_cfg} leaves none of its images')
        return kept


@DATASETS.register_module()
class CoinsFolder(CocoFolder):
    """The coins of scikit-image, written to `data_root` if it does not exist, except with `lazy_init`."""

    METAINFO: ClassVar[dict[str, Any]] = {'classes': ('coin',), 'palette': [(220, 160, 40)]}
    remedy = 'delete this folder to have the coins written again'

    def __init__(self, *, data_root: str, lazy_init: bool = False, **kwargs: Any) -> None:
        if not lazy_init and not Path(data_root).exists():
            write_coins(Path(data_root))
        super().__init__(data_root=data_root, lazy_init=lazy_init, **kwargs)
