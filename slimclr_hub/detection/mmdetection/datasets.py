"""COCO and the coins, as data sets of MMDetection that name missing files."""

from pathlib import Path
from typing import Any, ClassVar

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS

from slimclr_hub.detection.coco import check_files
from slimclr_hub.detection.coins import write_coins


@DATASETS.register_module()
class CocoFolder(CocoDataset):
    """Data set in COCO's format that first checks its files (InputError), unless `lazy_init` asks for classes alone."""

    remedy = 'COCO 2017 lies in the folder COCO_ROOT (environment); `slimclr-hub doctor` lists what is missing'

    def __init__(
        self, *, data_root: str, ann_file: str, data_prefix: dict[str, str], lazy_init: bool = False, **kwargs: Any
    ) -> None:
        if not lazy_init:
            check_files(Path(data_root), (ann_file, data_prefix['img']), self.remedy)
        super().__init__(data_root=data_root, ann_file=ann_file, data_prefix=data_prefix, lazy_init=lazy_init, **kwargs)


@DATASETS.register_module()
class CoinsFolder(CocoFolder):
    """The coins of scikit-image, written to `data_root` if it does not exist, except with `lazy_init`."""

    METAINFO: ClassVar[dict[str, Any]] = {'classes': ('coin',), 'palette': [(220, 160, 40)]}
    remedy = 'delete this folder to have the coins written again'

    def __init__(self, *, data_root: str, lazy_init: bool = False, **kwargs: Any) -> None:
        if not lazy_init and not Path(data_root).exists():
            write_coins(Path(data_root))
        super().__init__(data_root=data_root, lazy_init=lazy_init, **kwargs)
