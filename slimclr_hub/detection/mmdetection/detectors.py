"""MMDetection's detectors with a slimmable backbone: one iteration trains every width.

Any other detector with a neck becomes slimmable by a class of two bases, as those at the end of this file.
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
from torch import nn

from slimclr_hub.detection.mmdetection.backbone import SlimmableResNet
from slimclr_hub.detection.precision import width_name
from slimclr_hub.detection.widths import WidthMixin, run_widths
from slimclr_hub.errors import InputError


def train_widths(
    model: nn.Module, detector: 'SlimmableDetector', data: Any, optim_wrapper: OptimWrapper
) -> dict[str, torch.Tensor]:
    """Train all widths in one iteration: losses summed, one clip, one step; images are preprocessed once.

    Zhao et al., section 4.3, after Yu et al. 2019 (https://arxiv.org/abs/1812.08928), algorithm 1. `model` is the
    detector or DDP around it; accumulation of the optimizer counts iterations, not widths.

    Returns:
        `loss`, summed over widths, and for each width `width_0.50/loss` and its terms.
    """
    data = detector.data_preprocessor(data, True)

    def run(last: bool) -> dict[str, torch.Tensor]:
        with optim_wrapper.optim_context(model):
            loss, log = detector.parse_losses(model(**data, mode='loss'))
        if last:
            optim_wrapper.update_params(loss)
        else:
            count = optim_wrapper.inner_count
            optim_wrapper.backward(optim_wrapper.scale_loss(loss))
            # Gradient accumulation counts calls of backward, and there is one for each width.
            optim_wrapper._inner_count = count
        return log

    detector.training_widths = True
    try:
        logs = run_widths(model, detector.set_width, detector.widths, run)
    finally:
        detector.training_widths = False
    total = torch.stack([log['loss'].detach() for log in logs.values()]).sum()
    terms = {f'{width_name(w)}/{name}': term.detach() for w in detector.widths for name, term in logs[w].items()}
    return {'loss': total, **terms}


class SlimmableDetector(WidthMixin, BaseDetector):
    """Base class of detectors with a `SlimmableResNet` and a `SlimmableFPN`; all widths share neck and heads.

    Predictions are those of the active width.

    Raises:
        InputError: The backbone is not slimmable.
    """

    switched = 'backbone'
    training_widths = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.backbone, SlimmableResNet):
            kinds = f'{type(self).__name__} is a {type(self.backbone).__name__}'
            raise InputError(f'the backbone of {kinds} of one width; its type must be SlimmableResNet')

    def train_step(self, data: Any, optim_wrapper: OptimWrapper) -> dict[str, torch.Tensor]:
        """Train all widths in one iteration; see `train_widths`."""
        return train_widths(self, self, data, optim_wrapper)

    def forward(self, inputs: torch.Tensor, data_samples: Any = None, mode: str = 'tensor') -> Any:
        """Run MMDetection's forward at the active width.

        Raises:
            InputError: A distributed run would train one width only.
        """
        if mode == 'loss' and is_distributed() and not self.training_widths:
            raise InputError(
                'this distributed run would train one width only: set '
                "model_wrapper_cfg=dict(type='SlimmableDistributedDataParallel') in the config"
            )
        return super().forward(inputs, data_samples, mode)


@MODEL_WRAPPERS.register_module()
class SlimmableDistributedDataParallel(MMDistributedDataParallel):
    """DDP around a slimmable detector; the loop calls its `train_step`, never the detector's.

    `find_unused_parameters` is on, since no width uses all parameters.

    Raises:
        InputError: `static_graph` or `detect_anomalous_params` is set; the parameters in use differ between widths.
    """

    def __init__(self, module: SlimmableDetector, **kwargs: Any) -> None:
        for key in ('static_graph', 'detect_anomalous_params'):
            if kwargs.get(key):
                raise InputError(f'{key} does not work with several widths; leave it out of model_wrapper_cfg')
        if next(module.parameters()).device.type == 'cpu':
            kwargs.pop('device_ids', None)  # mmengine passes them in any case
        super().__init__(module, **{'broadcast_buffers': False, **kwargs, 'find_unused_parameters': True})

    def train_step(self, data: Any, optim_wrapper: OptimWrapper) -> dict[str, torch.Tensor]:
        """Train all widths in one iteration; see `train_widths`."""
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
