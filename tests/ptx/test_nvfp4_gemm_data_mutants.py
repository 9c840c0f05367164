"""Mistakes in what the NVFP4 kernel computes with are noticed on the emulator."""

import pytest

from tests.ptx import nvfp4_gemm, nvrtc
from tests.ptx.mutants import ids, survives

pytestmark = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))

# (what is wrong, source as it is, source as it would be)
MUTANTS = [
    (
        "scales of the tokens are not copied to tensor memory",
        "tcgen05::CopyScaleBlock(token_scales + step * T::kStepColumns + block * 4,",
        "if (false) tcgen05::CopyScaleBlock(token_scales + step * T::kStepColumns + block * 4,",
    ),
    (
        "scales of the weights of the first step serve all",
        "kInstruction, weight_scales + step * 4,",
        "kInstruction, weight_scales,",
    ),
    (
        "tiles within a block of scales use its first rows",
        "tile.first_token % kScaleRows / 32",
        "0",
    ),
    ("a warp loads the lanes of another", "threadIdx.x / 32 % 4 * 32",
     "threadIdx.x / 32 * 32 - 64"),
    ("a product is not added", "stage > slice.begin || step > 0", "step > 0"),
    ("the last tile's sums are added", "stage > slice.begin || step > 0", "true"),
    (
        "both operands step through K as one",
        "stages.Tokens(ring.slot) + step * kStepBytes",
        "stages.Tokens(ring.slot)",
    ),
    ("another stride of eight rows", "Weights(ring.slot) + step * kStepBytes, kSwizzleAtom,",
     "Weights(ring.slot) + step * kStepBytes, 512,"),
    ("the codes of the wrong K", "stage * T::kBoxBytes, tile.first_token", "0, tile.first_token"),
    ("an operand of the wrong format", "kE2m1 << 7 | kE2m1 << 10", "kE2m1 << 7 | 2 << 10"),
    ("scales of a swizzled layout", "MatrixDescriptor(block, 128, Swizzle::kNone)",
     "MatrixDescriptor(block, 128, Swizzle::k128Bytes)"),
    ("the first group's weights for all", "tile.group * problem.num_features + tile.first_feature",
     "tile.first_feature"),
    ("the first group's weight scales for all", "tile.group * row_blocks_of_weights + ", ""),
    ("the first group's global scale for all", "weight_global_scales[tile.group]",
     "weight_global_scales[0]"),
    ("stores beyond a group's first token", "token >= tile.tokens_begin && ", ""),
    ("stores beyond a group's last token", " && token < tile.tokens_end", ""),
    ("stores beyond the last feature", "if (inside && feature < problem.num_features)",
     "if (inside)"),
    ("tensor memory is not freed",
     "if (warp == kTensorWarp) tcgen05::Deallocate<T::kColumns>(shared.tensor_memory);", ""),
    ("values are used before they are loaded",
     '"tcgen05.wait::ld.sync.aligned;"', '""'),
    ("no fence after the accumulator's barrier",
     "accumulators.parity);\n    tcgen05::FenceAfterSync();", "accumulators.parity);"),
    ("no fence before the accumulator is given back",
     "tcgen05::FenceBeforeSync();\n    Arrive(", "Arrive("),
    ("every thread copies", "if (tcgen05::ElectOneThread()) Produce", "Produce"),
    ("every thread multiplies", "if (tcgen05::ElectOneThread()) Multiply", "Multiply"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), [m[1:] for m in MUTANTS], ids=ids(MUTANTS))
def test_mistake_in_the_data_is_noticed(old, new):
    problem = nvfp4_gemm.random_problem(150, 136, 352, group_sizes=[70, 30, 40])
    assert not survives(problem, 64, old, new, num_blocks=2)
