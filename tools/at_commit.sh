#!/usr/bin/env bash
# Runs today's tests against the product as it was at a commit: what fails is what was wrong there.
#
#     tools/at_commit.sh COMMIT tests/server/test_interceptors.py -k holds_on
set -euo pipefail
cd "$(dirname "$0")/.."
commit=$1
shift
folder=build/at-$commit
if [ ! -d "$folder/site" ]; then
    mkdir -p "$folder"
    git archive --prefix=source/ "$commit" | tar -x -C "$folder"
    .venv/bin/pip install -qq --disable-pip-version-check --no-deps --target "$folder/site" "$folder/source"
fi
rm -rf "$folder/source/tests"
cp -r tests "$folder/source/tests"
cd "$folder/source"
PYTHONSAFEPATH=1 PYTHONPATH="$OLDPWD/$folder/site" "$OLDPWD/.venv/bin/python" -P -m pytest -q -p no:cacheprovider "$@"
