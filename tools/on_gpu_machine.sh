#!/usr/bin/env bash
# Tests and measures on a machine with a GPU and without a network, with the packages of the Python that is there:
#
#   tools/on_gpu_machine.sh tests              what `make test-gpu` runs, kernels first
#   tools/on_gpu_machine.sh bench [OPTION...]  what `make bench-gpu` runs, with these options
#
# Packages that it lacks are unpacked from wheels in build/wheels. Logs and results go to $OUT, or to build/gpu.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
export OUT=${OUT:-build/gpu}
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export PYTHONPATH=$PWD/.typing:$PWD/build/wheels/unpacked

prepare() {
    mkdir -p "$OUT"
    for wheel in build/wheels/*.whl; do
        [[ ! -e $wheel ]] || "$python" -m zipfile -e "$wheel" build/wheels/unpacked
    done
    "$python" -P tools/link_tree.py
}

# The kernels that all else needs, steps launched ahead, copies on a stream of their own; then the rest.
test_files() {
    {
        grep -rl --include='test_*.py' 'mark\.gpu' tests/kernels | sort
        echo tests/engine/test_triton_serving.py
        echo tests/adapters/test_pool.py
        grep -rl --include='test_*.py' 'mark\.gpu' tests | sort
    } | awk '!seen[$0]++'
}

# Interrupted when its time is up, so that what has ended is reported. A test that hangs ends its worker, not the run.
run_tests() {
    # Compiled once, and not by every worker.
    "$python" -P -c 'from fusionserve.kernels.native_library import native_library; native_library()'
    mapfile -t files < <(test_files)
    timeout --foreground --signal INT --kill-after 20 "${SECONDS_OF_TESTS:-240}" \
        "$python" -P -m pytest -q -m gpu -n "${WORKERS:-10}" -W default --timeout 90 --timeout-method thread \
        --tb short --durations 15 --junitxml "$OUT/tests.xml" "${files[@]}" 2>&1 | tee "$OUT/tests.log"
}

run_bench() {
    "$python" -P -m fusionserve.loadtest.gpu "$@" 2>&1 | tee "$OUT/bench.log"
}

case ${1:-} in
    tests) prepare && run_tests ;;
    bench) prepare && run_bench "${@:2}" ;;
    *) sed -n '2,7s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
