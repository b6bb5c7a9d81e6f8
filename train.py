"""Train a model: `composer -n 8 train.py yamls/pretrain.yaml key=value ...` is `composer-path train` on 8 GPUs."""

import sys

from composer_path.train import main

if __name__ == "__main__":
    sys.exit(main())
