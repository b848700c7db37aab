#!/usr/bin/env bash
# Mutation tests of the core, on a copy of the working tree: tools/mutation/run.sh [session.sqlite]
set -euo pipefail
cd "$(dirname "$0")/../.."
session=$(realpath "${1:-${TMPDIR:-/tmp}/lossfns-mutation.sqlite}")
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -coz --exclude-standard | xargs -0 cp --parents -t "$copy"
cd "$copy"
export CI=1 OMP_NUM_THREADS=1 PYTHONPATH="$copy"
unset PYTHONDONTWRITEBYTECODE

python -m pytest -q -n0 -p no:cacheprovider --collect-only > collected.txt  # leaves the compiled modules behind
cosmic-ray baseline tools/mutation/focused.toml
cosmic-ray baseline tools/mutation/rest.toml

cosmic-ray init tools/mutation/focused.toml "$session"
cr-filter-operators "$session" tools/mutation/focused.toml
python -m lossfns_mutation.skip "$session"
cosmic-ray exec tools/mutation/focused.toml "$session"

# Survivors have no result again, so that the next `exec` takes them up.
python -c "import sqlite3, sys
with sqlite3.connect(sys.argv[1]) as db: db.execute('DELETE FROM work_results WHERE test_outcome = \"SURVIVED\"')" "$session"
cosmic-ray exec tools/mutation/rest.toml "$session"
python -m lossfns_mutation.report "$session"
