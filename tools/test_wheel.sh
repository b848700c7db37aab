#!/usr/bin/env bash
# Build the packages, check them, and run the tests of the source package on the installed wheel.
# The packages stay in dist/. Arguments go to pytest: tools/test_wheel.sh -m exhaustive
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python3 -m venv "$folder/environment"
source "$folder/environment/bin/activate"
pip install --quiet build twine
rm -rf dist
python -m build --quiet
twine check --strict dist/*

pip install --quiet -c constraints.txt "$(echo dist/*.whl)[test]"
tar -xzf dist/*.tar.gz -C "$folder"
cd "$folder"/lossfns-*
rm -r lossfns pytest_lossfns.py
pytest tests README.md docs "$@"
