"""The calls of the library: "dsv4_<call>" is the handler's symbol and the FFI target's name."""

CALLS = (
    "timestamp",
    "nvfp4_quantize",
    "nvfp4_gemm",
    "nvfp4_grouped_gemm",
    "topk_select",
    "gemm",
    "activation_topk",
    "dense_router",
    "hash_router",
    "route_plan",
    "indexer_scores",
    "moe_ffn",
    "grouped_gemm",
)
