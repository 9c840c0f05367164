"""How products are cut into tiles and clusters: for the launch, as a host compiler compiles it."""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest

from tests.ptx import nvfp4_gemm, nvrtc

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")

_SOURCE = """
#include "dsv4/nvfp4_plan_sm100.h"
extern "C" void make_plan(const int* problem, int num_multiprocessors, int* plan) {
  dsv4::sm100::Plan made = dsv4::sm100::MakePlan(
      {problem[0], problem[1], problem[2], problem[3]}, num_multiprocessors);
  plan[0] = made.tile_tokens;
  plan[1] = made.cluster_size;
  plan[2] = made.num_blocks;
}
"""


@pytest.fixture(scope="module")
def make_plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    (folder / "plan.cc").write_text(_SOURCE)
    library = folder / "plan.so"
    include = f"-I{nvfp4_gemm.FFI / 'include'}"
    command = [COMPILER, "-std=c++17", "-shared", "-fPIC", include, "plan.cc", "-o", library]
    subprocess.run(command, cwd=folder, check=True)
    function = ctypes.CDLL(str(library)).make_plan

    def plan(num_tokens, num_features, width, num_groups, num_multiprocessors):
        problem = (ctypes.c_int * 4)(num_tokens, num_features, width, num_groups)
        made = (ctypes.c_int * 3)()
        function(problem, num_multiprocessors, made)
        return tuple(made)

    return plan


def test_every_plan_is_one_that_the_kernel_can_run(make_plan):
    rng = np.random.default_rng(0)
    for _ in range(3000):
        num_tokens = int(2 ** rng.uniform(0, 13))
        num_features, width = int(2 ** rng.uniform(0, 15)), 32 * int(2 ** rng.uniform(0, 9))
        num_groups = int(rng.choice([1, 1, 2, 256, 384]))
        multiprocessors = int(rng.choice([1, 7, 132, 148, 160]))
        tile, cluster, blocks = make_plan(
            num_tokens, num_features, width, num_groups, multiprocessors
        )
        assert tile in nvfp4_gemm.TILE_SIZES
        assert 1 <= blocks <= multiprocessors and blocks % cluster == 0
        if num_groups > 1:
            assert tile >= 64 and cluster == 1
        if tile == 32:
            assert num_tokens <= 32
        if cluster > 1:
            tiles = -(-num_tokens // tile) * -(-num_features // 128)
            assert cluster in (2, 4, 8) and tile <= 64 and blocks == tiles * cluster
            assert cluster <= -(-width // 256)


@pytest.mark.parametrize(
    ("num_tokens", "num_features", "width", "num_groups", "plan"),
    [
        (1, 4096, 4096, 1, (32, 4, 128)),
        (64, 1536, 4096, 1, (64, 8, 96)),
        (1, 32768, 1024, 1, (32, 1, 148)),
        (1024, 4096, 4096, 1, (192, 1, 148)),
        (6, 4096, 4096, 256, (64, 1, 148)),
        (6144, 4096, 4096, 256, (64, 1, 148)),
    ],
)
def test_plans_of_model_sizes(make_plan, num_tokens, num_features, width, num_groups, plan):
    assert make_plan(num_tokens, num_features, width, num_groups, 148) == plan


@pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))
@pytest.mark.parametrize(
    ("num_tokens", "num_features", "width", "group_sizes", "multiprocessors"),
    [
        (5, 130, 1056, None, 9),
        (60, 100, 608, None, 4),
        (100, 260, 352, None, 4),
        (250, 130, 96, None, 3),
        (100, 140, 160, [40, 0, 60], 4),
        (250, 140, 160, [100, 0, 150], 4),
    ],
)
def test_plan_runs(make_plan, num_tokens, num_features, width, group_sizes, multiprocessors):
    num_groups = len(group_sizes or [1])
    tile, cluster, blocks = make_plan(num_tokens, num_features, width, num_groups, multiprocessors)
    problem = nvfp4_gemm.random_problem(num_tokens, num_features, width, group_sizes)
    out = nvfp4_gemm.run(problem, tile, num_blocks=blocks, cluster=cluster)
    wrong, error = nvfp4_gemm.difference(problem, out)
    assert wrong <= 1e-4 and error <= 2e-3
