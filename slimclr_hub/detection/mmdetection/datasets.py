"""COCO and the coins, as data sets of MMDetection that say what is missing."""

from pathlib import Path
from typing import Any, ClassVar

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS

from slimclr_hub.detection.coins import write_coins
from slimclr_hub.errors import InputError


@DATASETS.register_module()
class CocoFolder(CocoDataset):
    """A data set in COCO's format, whose files are looked for before anything else is done.

    Args:
        data_root: Its folder.
        ann_file: File of annotations in it.
        data_prefix: `img`, folder of the images in it.
        lazy_init: As in `CocoDataset`; nothing is looked for then, since only the classes are wanted.
        kwargs: As in `CocoDataset`.

    Raises:
        InputError: Annotations or images are not there.
    """

    remedy = 'the environment variable COCO_ROOT names the folder of COCO, and `slimclr-hub doctor` shows what it lacks'

    def __init__(
        self, *, data_root: str, ann_file: str, data_prefix: dict[str, str], lazy_init: bool = False, **kwargs: Any
    ) -> None:
        missing = [part for part in (ann_file, data_prefix['img']) if not (Path(data_root) / part).exists()]
        if missing and not lazy_init:
            raise InputError(f'no {" and no ".join(missing)} in {data_root}; {self.remedy}')
        super().__init__(data_root=data_root, ann_file=ann_file, data_prefix=data_prefix, lazy_init=lazy_init, **kwargs)


@DATASETS.register_module()
class CoinsFolder(CocoFolder):
    """The coins of scikit-image, written to `data_root` if there is nothing yet.

    Args:
        data_root: Their folder.
        lazy_init: As in `CocoFolder`; nothing is written then.
        kwargs: As in `CocoFolder`.
    """

    METAINFO: ClassVar[dict[str, Any]] = {'classes': ('coin',), 'palette': [(220, 160, 40)]}
    remedy = 'delete this folder, and the coins are written anew'

    def __init__(self, *, data_root: str, lazy_init: bool = False, **kwargs: Any) -> None:
        if not lazy_init and not Path(data_root).exists():
            write_coins(Path(data_root))
        super().__init__(data_root=data_root, lazy_init=lazy_init, **kwargs)
