"""Draw docs/assets/neighbours.png: the nearest garments at two widths of the network in the package."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import timm
import torch
from PIL import Image

from slimclr_hub.data.sources import read_embedded
from slimclr_hub.inference.embed import embed
from slimclr_hub.models import SlimmableResNet

NEAREST = 5
SHOWN = (0, 2, 3, 6, 7)  # T-shirt, pullover, dress, shirt, sneaker: the first test image of each


def main() -> None:
    """Print the share of the five nearest that are of the same class, by width; draw the first of some classes."""
    images, labels = read_embedded('test')
    model = timm.create_model('slimclr_resnet20', pretrained=True)
    assert isinstance(model, SlimmableResNet)
    found = {'raw pixels': search(images.reshape(len(images), -1).astype(np.float32))}
    for width in model.widths:
        model.set_width(width)
        features = embed(model, [Image.fromarray(image) for image in images], progress=False).features
        found[f'width {width:g}'] = search(features.numpy())
    for name, nearest in found.items():
        print(f'{name}: {100 * (labels[nearest] == labels[:, None]).mean():.1f} % of the {NEAREST} nearest')

    sides = ('width 1', 'width 0.25')
    figure, axes = plt.subplots(len(SHOWN), 1 + len(sides) * (NEAREST + 1), figsize=(9, 3.6))
    for row, label in zip(axes, SHOWN, strict=True):
        query = int(np.flatnonzero(labels == label)[0])
        columns = [query, *(i for side in sides for i in (-1, *found[side][query]))]
        for axis, index in zip(row, columns, strict=True):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(color='tab:orange', linewidth=2, visible=index >= 0 and labels[index] != label)
            if index >= 0:
                axis.imshow(images[index], cmap='gray_r')
    axes[0][0].set_title('query', fontsize=9)
    for number, side in enumerate(sides):
        axes[0][2 + number * (NEAREST + 1) + NEAREST // 2].set_title(side, fontsize=9)
    figure.tight_layout(pad=0.3)
    figure.savefig(Path(__file__).parent / 'assets' / 'neighbours.png', dpi=110)


def search(vectors: np.ndarray) -> np.ndarray:
    """The nearest [N, NEAREST] of others by cosine similarity, of vectors [N, D]."""
    unit = torch.nn.functional.normalize(torch.from_numpy(vectors), dim=1)
    return (unit @ unit.T).fill_diagonal_(-2).topk(NEAREST).indices.numpy()


if __name__ == '__main__':
    main()
