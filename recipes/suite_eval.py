"""Logistic regression on several data sets: `accelerate launch recipes/suite_eval.py --network N --suite FILE`."""

from slimclr_hub.evaluate.suite_eval import main

if __name__ == '__main__':
    main()
