"""MMDetection's detectors with a slimmable backbone: every width is trained in one iteration.

Any other detector with a neck joins them by a class of two bases, as those at the end of this file.
"""

from typing import Any

import torch
from mmdet.models.detectors import FasterRCNN, MaskRCNN, RetinaNet
from mmdet.models.detectors.base import BaseDetector
from mmdet.registry import MODELS
from mmengine.dist import is_distributed
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.registry import MODEL_WRAPPERS

from slimclr_hub.detection.mmdetection.backbone import SlimmableResNet
from slimclr_hub.detection.mmdetection.widths import train_widths
from slimclr_hub.errors import InputError
from slimclr_hub.models.slimmable_resnet import WidthSwitch


class SlimmableDetector(BaseDetector):
    """What a detector gains from a slimmable backbone. Its neck and heads are shared by all widths.

    Predictions are those of the active width.

    Args:
        args: As of the detector.
        kwargs: As of the detector; the backbone's type is `SlimmableResNet`, the neck's `SlimmableFPN`.

    Raises:
        InputError: The backbone is not slimmable.
    """

    training_widths = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.backbone, SlimmableResNet):
            raise InputError(
                f'the backbone of {type(self).__name__} is a {type(self.backbone).__name__} of one width; its type has '
                'to be SlimmableResNet'
            )

    @property
    def widths(self) -> tuple[float, ...]:
        """The widths that the backbone holds, in descending order."""
        return self.backbone.widths

    @property
    def width(self) -> float:
        """The active width."""
        return self.backbone.width

    def set_width(self, width: float) -> WidthSwitch:
        """Switch the active width; as a context manager it switches back.

        Raises:
            InputError: The network does not hold `width`.
        """
        return self.backbone.set_width(width)

    def train_step(self, data: Any, optim_wrapper: OptimWrapper) -> dict[str, torch.Tensor]:
        """One iteration over all widths; see `train_widths`."""
        return train_widths(self, self, data, optim_wrapper)

    def forward(self, inputs: torch.Tensor, data_samples: Any = None, mode: str = 'tensor') -> Any:
        """As in MMDetection, at the active width.

        Raises:
            InputError: A distributed run is about to train one width only.
        """
        if mode == 'loss' and is_distributed() and not self.training_widths:
            raise InputError(
                'this distributed run would train one width only: set '
                "model_wrapper_cfg=dict(type='SlimmableDistributedDataParallel') in the config"
            )
        return super().forward(inputs, data_samples, mode)


@MODEL_WRAPPERS.register_module()
class SlimmableDistributedDataParallel(MMDistributedDataParallel):
    """DDP around a slimmable detector. The loop calls this one's `train_step`, never the detector's.

    Args:
        module: The detector.
        kwargs: As in `MMDistributedDataParallel`; `find_unused_parameters` is on, since no width uses all parameters.

    Raises:
        InputError: A static graph is asked for, which widths are not, or the search for anomalous parameters.
    """

    def __init__(self, module: SlimmableDetector, **kwargs: Any) -> None:
        for key in ('static_graph', 'detect_anomalous_params'):
            if kwargs.get(key):
                raise InputError(f'{key} is not for training of several widths; leave it out of model_wrapper_cfg')
        if next(module.parameters()).device.type == 'cpu':
            kwargs.pop('device_ids', None)  # mmengine gives one in any case
        super().__init__(module, **{'broadcast_buffers': False, **kwargs, 'find_unused_parameters': True})

    def train_step(self, data: Any, optim_wrapper: OptimWrapper) -> dict[str, torch.Tensor]:
        """One iteration over all widths; see `train_widths`."""
        return train_widths(self, self.module, data, optim_wrapper)


@MODELS.register_module()
class SlimmableMaskRCNN(SlimmableDetector, MaskRCNN):
    """Mask R-CNN (https://arxiv.org/abs/1703.06870), the detector of the paper."""


@MODELS.register_module()
class SlimmableFasterRCNN(SlimmableDetector, FasterRCNN):
    """Faster R-CNN (https://arxiv.org/abs/1506.01497)."""


@MODELS.register_module()
class SlimmableRetinaNet(SlimmableDetector, RetinaNet):
    """RetinaNet (https://arxiv.org/abs/1708.02002)."""
