"""Tables of the networks with weights: the authors', and those that this package ships. Needs no PyTorch.

Accuracies of the authors' are those of tables 1 and 2 of Zhao et al., https://arxiv.org/abs/2209.15525; the others'
were measured, as their cards tell.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimclr_hub.text import GARMENTS, human

ARCHITECTURE = 'slimclr_resnet50'
WIDTHS = (1.0, 0.75, 0.5, 0.25)
ORGANISATION = 'slimclr-hub'
"""Account on the Hub; the environment variable `SLIMCLR_HUB_ORG` replaces it."""

RELEASE = '1.0.0'
RELEASE_URL = f'https://github.com/mzhaoshuai/SlimCLR/releases/download/{RELEASE}'
"""Address of the authors' files; the environment variable `SLIMCLR_RELEASE_URL` names a mirror."""

AUTHORS_REPOSITORY = 'https://github.com/mzhaoshuai/SlimCLR'
PAPER = 'Slimmable Networks for Contrastive Self-supervised Learning'
PAPER_ID = 'arXiv:2209.15525'
LICENSE_NOTE = f'The authors publish these weights without naming a licence; see {AUTHORS_REPOSITORY}.'


@dataclass(frozen=True)
class WidthFacts:
    """Parameters of the network at one width, and its multiply-adds for an image (convolutions and linear layers)."""

    width: float
    parameters: int
    multiply_adds: int

    @property
    def cells(self) -> dict[str, str]:
        """Title -> text, for a row of a table."""
        counts = {'parameters': human(self.parameters), 'multiply-adds': human(self.multiply_adds)}
        return {'width': f'{self.width:g}', **counts}


@dataclass(frozen=True)
class Reported:
    """Accuracies that the paper reports for one width.

    They are those of the linear probe on ImageNet in percent (table 1), and, where reported, the AP of boxes and masks
    on COCO val2017 of a Mask R-CNN fine-tuned from it (table 2).
    """

    top1: float
    top5: float
    box_ap: float | None = None
    mask_ap: float | None = None


@dataclass(frozen=True)
class Published:
    """A network of the authors'; `tag` is its tag in timm's registry, `file` the name of the authors' file.

    `num_classes` are those of its switchable probe, 0 for a backbone alone. `recipe` is one of `recipes/configs/` with
    the same values, and `reported` has the accuracies that the paper reports for this backbone by width.
    """

    tag: str
    file: str
    method: str
    epochs: int
    num_classes: int
    recipe: str
    reported: Mapping[float, Reported] = field(repr=False)

    @property
    def name(self) -> str:
        """Name for `timm.create_model`, which is also that of the repository on the Hub."""
        return f'{ARCHITECTURE}.{self.tag}'


_COSTS = {
    ARCHITECTURE: (
        (1.0, 2048, 23_508_032, 4_087_136_256),
        (0.75, 1536, 13_234_992, 2_321_141_760),
        (0.5, 1024, 5_892_640, 1_051_287_552),
        (0.25, 512, 1_480_976, 277_573_632),
    ),
    'slimclr_resnet20': (
        (1.0, 64, 271_824, 31_247_104),
        (0.75, 48, 153_276, 17_640_000),
        (0.5, 32, 68_456, 7_896_448),
        (0.25, 16, 17_364, 2_016_448),
    ),
}
"""Width, features, parameters of the backbone and its multiply-adds for one image of the size that it is made for."""


def published_facts(num_classes: int, architecture: str = ARCHITECTURE) -> list[WidthFacts]:
    """Parameters and multiply-adds of each width of a published network, without a head (0) or with a linear probe."""
    return [
        WidthFacts(width, parameters + (features + 1) * num_classes, multiply_adds + features * num_classes)
        for width, features, parameters, multiply_adds in _COSTS[architecture]
    ]


_MOCOV2_200 = {
    1.0: Reported(67.4, 87.9),
    0.75: Reported(65.5, 87.0),
    0.5: Reported(62.5, 84.8),
    0.25: Reported(55.1, 79.5),
}
_MOCOV2_800 = {
    1.0: Reported(70.4, 89.6, 38.6, 35.7),
    0.75: Reported(68.8, 88.8, 37.7, 34.9),
    0.5: Reported(65.6, 87.2, 35.8, 33.2),
    0.25: Reported(57.6, 81.5, 31.1, 29.1),
}
_MOCOV3_300 = {
    1.0: Reported(72.3, 90.8),
    0.75: Reported(69.7, 89.4),
    0.5: Reported(67.6, 88.2),
    0.25: Reported(62.4, 84.4),
}


def _of_run(
    prefix: str, method: str, epochs: int, probe_hash: str, backbone_hash: str, reported: Mapping[float, Reported]
) -> list[Published]:
    # Each run of the authors gave two files, with and without the linear probe.
    name, recipe = f'{prefix}_{epochs}e', f'{prefix}_resnet50_imagenet_{epochs}e'
    file = f'slimclr-{prefix}-ep{epochs}'
    return [
        Published(f'{name}_lincls_in1k', f'{file}-lincls-{probe_hash}.pth.tar', method, epochs, 1000, recipe, reported),
        Published(f'{name}_in1k', f'{file}-{backbone_hash}.pth.tar', method, epochs, 0, recipe, reported),
    ]


PUBLISHED: Mapping[str, Published] = {
    published.tag: published
    for published in (
        *_of_run('mocov3', 'MoCo v3', 300, 'e35321e95c', '57e298e9cd', _MOCOV3_300),
        *_of_run('mocov2', 'MoCo v2', 800, '35600f623f', 'eda810a6a9', _MOCOV2_800),
        *_of_run('mocov2', 'MoCo v2', 200, '789b1a3b17', '48213217', _MOCOV2_200),
    )
}
"""Tag -> network of the authors', the default first."""


# Networks in the package


@dataclass(frozen=True)
class Shipped:
    """A network in the package.

    Args:
        architecture: Name in timm's registry, without a tag.
        tag: Tag in timm's registry.
        run: That of the pre-training run, which gave a file with and one without a probe.
        classes: Names of the classes of its switchable probe; none for a backbone alone.
        sha256: Hash of its file.
        method: Name of the method, in words.
        epochs: Epochs of pre-training.
        data: Name of the images.
        recipe: The one of `recipes/configs/` that trained it.
        size: Height and width of the images that it was evaluated on, in pixels.
        mean: Mean of their pixels.
        std: Standard deviation of their pixels.
        made: Hardware, versions and hours of pre-training, in words.
    """

    architecture: str
    tag: str
    run: str
    classes: tuple[str, ...]
    sha256: str
    method: str
    epochs: int
    data: str
    recipe: str
    size: int
    mean: float
    std: float
    made: str

    @property
    def name(self) -> str:
        """Name for `timm.create_model`."""
        return f'{self.architecture}.{self.tag}'

    @property
    def num_classes(self) -> int:
        """Classes of its switchable probe, 0 for a backbone alone."""
        return len(self.classes)

    @property
    def weights(self) -> Path:
        """Its tensors, of which dense networks read slices."""
        return _FOLDER / f'{self.name}.safetensors'

    @property
    def results(self) -> Path:
        """What pre-training and evaluations of both files wrote; `runs.result.load` reads it."""
        return _FOLDER / f'{self.architecture}.{self.run}.json'


_FOLDER = Path(__file__).parent / 'shipped'

_FASHION_MNIST: dict[str, Any] = {
    'architecture': 'slimclr_resnet20',
    'run': 'mocov3_fashionmnist',
    'method': 'MoCo v3',
    'epochs': 8,
    'data': 'Fashion-MNIST',
    'recipe': 'mocov3_resnet20_fashionmnist',
    'size': 28,
    'mean': 0.286,
    'std': 0.353,
    'made': (
        'Seed 0, one process, 59 minutes on one core of an Intel Xeon with AVX-512 (float32, torch 2.14.1,\n'
        'timm 1.0.31), in one go.'
    ),
}

SHIPPED: Mapping[str, Shipped] = {
    shipped.tag: shipped
    for shipped in (
        Shipped(
            tag='mocov3_lincls_fashionmnist',
            classes=tuple(GARMENTS),
            sha256='03e0cfb966a403ab2fe0af5328aca4ee7941c0870b0e914adc0bd59479022e3d',
            **_FASHION_MNIST,
        ),
        Shipped(
            tag='mocov3_fashionmnist',
            classes=(),
            sha256='68c33e2c7ebe079a9fc7c8eeeba8512b482f47a2ec803ecd8ff8810f463d2381',
            **_FASHION_MNIST,
        ),
    )
}
"""Tag -> network in the package, the default first."""


def hub_name(tag: str, organisation: str = ORGANISATION) -> str:
    """Name of a published network's repository on the Hub."""
    return f'{organisation}/{PUBLISHED[tag].name}'


def published_names() -> list[str]:
    """Names of all networks with weights, for `timm.create_model`."""
    return [*(network.name for network in PUBLISHED.values()), *(network.name for network in SHIPPED.values())]
