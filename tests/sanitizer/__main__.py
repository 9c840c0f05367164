"""All cases under the tools of compute-sanitizer: `python -m tests.sanitizer COMPUTE-SANITIZER`.

The library is one whose kernels are compiled with -DDSV4_LANES_ARRIVE, as `make sanitize` does:
racecheck does not see all that a warp's arrival at a transaction barrier orders (arrivals.cu).
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product

from tests.sanitizer.cases import SUBJECTS

TOOLS = ("memcheck", "racecheck")
ENVIRONMENT = {"JAX_PLATFORMS": "cpu,cuda", "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}


def options(tool: str, subject: str, known: str) -> list[str]:
    """Beside the common ones; `known` is the tool's description of all."""
    found = []
    if tool == "racecheck" and subject == "sparse_attention":
        # Of a pair of blocks it reports the copied queries, for which their threads wait before the
        # blocks meet and the other overwrites them. A small kernel of that form is not reported.
        found += ["--racecheck-memcpy-async", "no"]
    if tool == "racecheck" and "--racecheck-fence-proxy-async" in known:
        # Wants a fence before a bulk copy overwrites what was only read; the consumers' arrival
        # orders that.
        found += ["--racecheck-fence-proxy-async", "no"]
    return found


def check(sanitizer: str, tool: str, subject: str, known: str) -> bool:
    """Prints what happened, and everything that was said if it was no success."""
    begin = time.perf_counter()
    # Kernels of ours; XLA has some that copy.
    command = [sanitizer, "--tool", tool, *options(tool, subject, known)]
    command += ["--kernel-name", "kns=4dsv4", "--error-exitcode", "1"]
    command += [sys.executable, "-m", "tests.sanitizer.run", subject]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    said = done.stdout.splitlines()
    shown = "\n".join([*said, done.stderr]) if done.returncode else f"{said[1]}; {said[-1]}"
    print(f"{tool} {seconds:.0f} s: {shown}", flush=True)
    return done.returncode == 0


def main() -> None:
    (sanitizer,) = sys.argv[1:]
    known = subprocess.run([sanitizer, "--help"], capture_output=True, text=True, check=True).stdout
    with ThreadPoolExecutor((os.cpu_count() or 2) // 2) as pool:
        runs = [
            pool.submit(check, sanitizer, tool, subject, known)
            for tool, subject in product(TOOLS, SUBJECTS)
        ]
    sys.exit(not all(run.result() for run in runs))


if __name__ == "__main__":
    main()
