"""Analyse runs: `python recipes/analyze.py gradients runs/NAME ...`; `--help` lists the analyses."""

from slimclr_hub.analysis.entry import main

if __name__ == '__main__':
    main(prog='python recipes/analyze.py')
