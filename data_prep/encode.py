"""Store vision features in place of a set's images: `composer-path encode`, also in a clone that isn't installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from composer_path.cli import main

if __name__ == "__main__":
    sys.exit(main(["encode", *sys.argv[1:]]))
