#!/usr/bin/env bash
# Packs the project, its wheels and the kit into one folder for a GPU machine without network:  pack.sh PROJECT_CHECKOUT REPO_ROOT
#   PROJECT_CHECKOUT  the trainer, whose HEAD (or, with WORK=1, whose working tree) is measured
#   REPO_ROOT         the checkout whose tree travels there; usually the same
# Makes REPO_ROOT/.whl (ignored there by .git/info/exclude): wheels, project.tgz, the scripts; then prints the calls.
set -euo pipefail
HERE="$(cd "$(dirname "$0")" && pwd)"; PROJECT="$(cd "$1" && pwd)"; ROOT="$(cd "$2" && pwd)"; TO="$ROOT/.whl"
mkdir -p "$TO/wheels"
grep -qx '/.whl/' "$(git -C "$ROOT" rev-parse --git-path info/exclude | sed "s#^\([^/]\)#$ROOT/\1#")" 2>/dev/null || (cd "$ROOT" && echo '/.whl/' >> "$(git rev-parse --git-path info/exclude)")
# 1. what that machine lacks: wheels for Python 3.12 on x86-64. pydantic asks for one version of pydantic-core.
if compgen -G "$HERE/wheels/deepspeed-*.whl" >/dev/null; then cp "$HERE"/wheels/*.whl "$TO/wheels/"; touch "$TO/wheels/.done"; fi
if [ ! -e "$TO/wheels/.done" ]; then
    platforms=(); for p in manylinux_2_28 manylinux_2_27 manylinux_2_17; do platforms+=(--platform "${p}_x86_64"); done
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 \
        --platform manylinux1_x86_64 -d "$TO/wheels" 'omegaconf>=2.4,<3' hjson annotated-types typing-inspection 'typing-extensions>=4.16' \
        pydantic==2.14.4 pydantic-core==2.50.5 liger-kernel cut-cross-entropy
    # only DeepSpeed's source is published; it builds in seconds without compiling anything, where torch is
    if [ -e "${DEEPSPEED_WHEEL:-}" ]; then cp "$DEEPSPEED_WHEEL" "$TO/wheels/"; else
        for py in "$PROJECT/.venv/bin/python" "${PYTHON_WITH_TORCH:-}" python3; do
            [ -n "$py" ] && "$py" -c 'import torch, setuptools, wheel' 2>/dev/null && break
        done
        "$py" -m pip wheel -q --no-deps --no-build-isolation -w "$TO/wheels" deepspeed==0.19.8
    fi
    touch "$TO/wheels/.done"
fi
# 2. the project, as a tarball of its own
cp "$HERE"/kit/*.py "$HERE"/kit/*.sh "$TO/"
commit="$(git -C "$PROJECT" rev-parse --short HEAD)"
stage="$(mktemp -d)"; trap 'rm -rf "$stage"' EXIT
if [ -n "${WORK:-}" ]; then (cd "$PROJECT" && git ls-files -z --cached --others --exclude-standard | tar c --null -T - | tar x -C "$stage"); commit="$commit+"
else git -C "$PROJECT" archive HEAD | tar x -C "$stage"; fi
echo "$commit" > "$stage/COMMIT"
tar czf "$TO/project.tgz" -C "$stage" .
# 3. every need of every wheel is there or on that machine
python3 - "$TO/wheels" <<'P'
import re, sys, zipfile
from pathlib import Path
there = set("""accelerate click einops filelock fsspec huggingface-hub jinja2 msgpack ninja numpy nvidia-ml-py packaging pillow psutil py-cpuinfo
pyarrow pyyaml regex requests safetensors setuptools sympy tokenizers torch tqdm transformers triton typer typing-extensions wheel""".split())
have = {re.sub(r"[-_.]+", "-", p.name.split("-")[0]).lower() for p in Path(sys.argv[1]).glob("*.whl")}
missing = set()
for wheel in Path(sys.argv[1]).glob("*.whl"):
    with zipfile.ZipFile(wheel) as z:
        meta = next(n for n in z.namelist() if n.endswith(".dist-info/METADATA"))
        for line in z.read(meta).decode().splitlines():
            if line.startswith("Requires-Dist:") and "extra ==" not in line:
                name = re.sub(r"[-_.]+", "-", re.match(r"Requires-Dist:\s*([\w.-]+)", line).group(1)).lower()
                if name not in have | there:
                    missing.add(f"{name} (of {wheel.name})")
print("wheels:", ", ".join(sorted(have)), "| missing:", ", ".join(sorted(missing)) or "nothing")
P
du -sh "$TO"; echo "commit $commit"
prefix='set -o pipefail; T="$(dirname "$(mktemp -u)")"; mkdir -p $T/p && tar xzf .whl/project.tgz -C $T/p && { [ -d $T/site/omegaconf ] || python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target $T/site .whl/wheels/*.whl || exit; }; export KIT=$PWD/.whl; cd $T/p &&'
echo; echo "carry: [\".whl\"]"
echo; echo "call 1, timeout_s 460:"; echo "nvidia-smi; $prefix bash \$KIT/run.sh ahead check train profile"
echo; echo "call 2, at once after it (the machine is kept 30 s), timeout_s 560:"; echo "$prefix bash \$KIT/run.sh table runs tests"
echo; echo "then give_back. If time is left (status), before it: ... bash \$KIT/run.sh compiled"
