"""Weighted k-NN at every width: `accelerate launch recipes/knn_eval.py --network runs/NAME`; `--help` explains more."""

from slimclr_hub.evaluate.knn_eval import main

if __name__ == '__main__':
    main()
