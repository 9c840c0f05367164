// Block-scaled GEMMs that CUTLASS generates for sm_100, to check the emulator with:
// out[m, n] = a[m, k] b[n, k]^T in bfloat16. Operands are NVFP4 in the layouts of nvfp4_quantize,
// or E4M3 codes with power-of-two scales for 32 of k, swizzled likewise.
#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/util/packed_stride.hpp"

using Out = cutlass::bfloat16_t;
using RowMajor = cutlass::layout::RowMajor;
using OneBlock = cute::Shape<cute::_1, cute::_1, cute::_1>;
#if defined(MXFP8)
using Operand = cutlass::mx_float8_t<cutlass::float_e4m3_t>;
using Code = cutlass::float_e4m3_t;
using Scale = cutlass::float_ue8m0_t;
constexpr int kAlignment = 16;
using Tile = cute::Shape<cute::_128, cute::_128, cute::_128>;
using Cluster = OneBlock;
using MainloopSchedule = cutlass::gemm::KernelTmaWarpSpecialized1SmMxf8f6f4Sm100;
using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecialized1Sm;
#else
using Operand = cutlass::nv_float4_t<cutlass::float_e2m1_t>;
using Code = cutlass::float_e2m1_t;
using Scale = cutlass::float_ue4m3_t;
constexpr int kAlignment = 32;
#ifdef TWO_BLOCKS
using Tile = cute::Shape<cute::_256, cute::_128, cute::_256>;
using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
using MainloopSchedule = cutlass::gemm::KernelTmaWarpSpecialized2SmNvf4Sm100;
using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecialized2Sm;
#else
using Tile = cute::Shape<cute::_128, cute::_128, cute::_256>;
using Cluster = OneBlock;
using MainloopSchedule = cutlass::gemm::KernelTmaWarpSpecialized1SmNvf4Sm100;
using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecialized1Sm;
#endif
#endif

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm100, cutlass::arch::OpClassBlockScaledTensorOp, Tile, Cluster,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor, 8, Out,
    RowMajor, 8, EpilogueSchedule>::CollectiveOp;
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm100, cutlass::arch::OpClassBlockScaledTensorOp, Operand, RowMajor,
    kAlignment, Operand, cutlass::layout::ColumnMajor, kAlignment, float, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
        sizeof(typename Epilogue::SharedStorage))>,
    MainloopSchedule>::CollectiveOp;
using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop,
                                                    Epilogue, void>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

// Zero, or which step failed.
extern "C" int launch_cutlass(const void* a, const void* a_scales, const void* b,
                              const void* b_scales, void* out, void* workspace, int m, int n,
                              int k) {
  using Scales = typename Mainloop::Sm1xxBlkScaledConfig;
  const auto shape = cute::make_shape(m, n, k, 1);
  typename Gemm::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {m, n, k, 1},
      {static_cast<const Code*>(a),
       cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, {m, k, 1}),
       static_cast<const Code*>(b),
       cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, {n, k, 1}),
       static_cast<const Scale*>(a_scales), Scales::tile_atom_to_shape_SFA(shape),
       static_cast<const Scale*>(b_scales), Scales::tile_atom_to_shape_SFB(shape)},
      {{1.0f, 0.0f},
       nullptr,
       {},
       static_cast<Out*>(out),
       cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, {m, n, 1})}};
  Gemm gemm;
  if (gemm.can_implement(arguments) != cutlass::Status::kSuccess) return 1;
  if (gemm.initialize(arguments, workspace, nullptr) != cutlass::Status::kSuccess) return 2;
  return gemm.run(nullptr) == cutlass::Status::kSuccess ? 0 : 3;
}
