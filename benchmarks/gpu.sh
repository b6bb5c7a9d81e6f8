#!/usr/bin/env bash
# Measures a GPU: benchmarks/gpu.sh --results DIR [--stage 1|2 ...] [--cells] [--loader] [--save]; all options: --help.
#
# The machine needs Python 3.12, torch 2.11 and transformers 5, and no network. What else is needed is brought along as
# wheels, which `benchmarks/gpu.sh --fetch-wheels` downloads where there is a network. They are unpacked to a folder of
# their own, where Composer isn't installed or --wheels names them; the machine's own packages stay as they are.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
wheels="" fetch="" words=()
while (($#)); do
  case $1 in
    --wheels) wheels=$2; shift 2 ;;
    --fetch-wheels) fetch=1; shift ;;
    *) words+=("$1"); shift ;;
  esac
done

if [[ $fetch ]]; then
  platforms=()
  for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
  done
  exec "$python" -m pip download --no-deps --only-binary=:all: --implementation cp --python-version 3.12 \
    "${platforms[@]}" --dest "${wheels:-$root/benchmarks/wheels}" --requirement "$root/benchmarks/gpu/wheels.txt"
fi

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}"
if [[ $wheels ]] || ! "$python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("composer"))'; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" - "${wheels:-$root/benchmarks/wheels}" "$site" <<'UNPACK'
import pathlib, sys, zipfile
folder, site = map(pathlib.Path, sys.argv[1:])
wheels = sorted(folder.glob("*.whl"))
if not wheels:
    sys.exit(f"{folder}: must hold the wheels of benchmarks/gpu/wheels.txt, found none; benchmarks/gpu.sh --fetch-wheels")
for wheel in wheels:
    zipfile.ZipFile(wheel).extractall(site)
UNPACK
  export PYTHONPATH="$PYTHONPATH:$site"
fi
"$python" -m benchmarks.gpu ${words[@]+"${words[@]}"}
