// indexer_queries.

#include "indexer_queries.h"

namespace dsv4 {
namespace {

ffi::Error IndexerQueries(ffi::AnyBuffer q, ffi::AnyBuffer weights, ffi::AnyBuffer positions,
                          ffi::AnyBuffer frequencies, ffi::Result<ffi::AnyBuffer> codes,
                          ffi::Result<ffi::AnyBuffer> scaled_weights, float scale) {
  QueriesCall call;
  DSV4_CHECK(CheckQueries(q, weights, positions, frequencies, *codes, *scaled_weights, scale,
                          &call));
  PrepareQueries(call);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_indexer_queries, IndexerQueries,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
