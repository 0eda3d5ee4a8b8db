"""Train linear classifiers on a frozen network: `accelerate launch recipes/linear_eval.py --network runs/NAME`."""

from slimclr_hub.evaluate.linear_eval.evaluation import main

if __name__ == '__main__':
    main()
