#!/bin/sh
# Everything that needs a GPU, in under 8 minutes: prints one JSON object (scripts/gpu_check.py). --dry-run needs no GPU.
# Nothing is downloaded. Of what is needed, a machine with PyTorch, transformers and pytest may lack pydantic; then .whl/ must hold
# its wheel and those of pydantic-core, annotated-types and typing-inspection:
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 -d .whl NAME==VERSION
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
if ls .whl/*.whl > /dev/null 2>&1; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$packages" .whl/*.whl
fi
export PYTHONPATH="$PWD/src:$PWD/benchmarks:$packages${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
"$python" scripts/gpu_check.py "$@"
