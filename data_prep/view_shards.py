"""Look into a set of shards: `composer-path shards`, also in a clone that isn't installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from composer_path.cli import main

if __name__ == "__main__":
    sys.exit(main(["shards", *sys.argv[1:]]))
