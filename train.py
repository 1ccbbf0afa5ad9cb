"""`python train.py` is `dsc train`: without a configuration it trains on scikit-learn's handwritten digits."""

import sys

from dsc.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
