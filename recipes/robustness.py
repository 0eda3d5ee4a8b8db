"""Accuracy on corrupted images at every width: `accelerate launch recipes/robustness.py --network FOLDER`."""

from slimclr_hub.evaluate.robustness import main

if __name__ == '__main__':
    main()
