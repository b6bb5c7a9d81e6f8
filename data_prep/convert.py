"""Convert records and images to shards, or `merge OUT`: `composer-path`, also in a clone that isn't installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from composer_path.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] if sys.argv[1:2] == ["merge"] else ["convert", *sys.argv[1:]]))
