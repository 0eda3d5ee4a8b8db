"""Fine-tune a network at all widths: `accelerate launch recipes/finetune.py --network TAG --data.root PHOTOS`."""

from slimclr_hub.finetune.job import main

if __name__ == '__main__':
    main()
