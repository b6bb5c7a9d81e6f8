"""Train a model: `composer train.py yamls/pretrain.yaml key=value ...` (add --check to only check the YAML)."""

import sys

from composer_path.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
