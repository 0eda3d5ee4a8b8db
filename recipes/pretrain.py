"""Pre-train a slimmable network: `accelerate launch recipes/pretrain.py`; `--help` explains every option."""

from pathlib import Path

from slimclr_hub.train.pretraining import main

if __name__ == '__main__':
    main(Path(__file__).parent / 'configs' / 'mocov3_resnet20_fashionmnist6k.yaml')
