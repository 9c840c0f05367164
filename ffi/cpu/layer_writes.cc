// layer_writes: what append_swa, a flush and indexer_queries do.

#include "dsv4/layer_writes.h"

#include "cache_append.h"
#include "cache_flush.h"
#include "indexer_queries.h"

namespace dsv4 {
namespace {

ffi::Error LayerWrites(ffi::RemainingArgs arguments, ffi::RemainingRets results,
                       int64_t num_planes, int64_t num_streams, int64_t layer, int64_t pool_layer,
                       float eps, float query_scale) {
  WritesCall call;
  DSV4_CHECK(CheckWrites(arguments, results, num_planes, num_streams, layer, pool_layer, eps,
                         query_scale, &call));
  Append(call.append);
  call.overlapping ? FlushCsa(call.flush) : FlushHca(call.flush);
  PrepareQueries(call.queries);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_layer_writes, LayerWrites,
                              ffi::Ffi::Bind()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("num_planes")
                                  .Attr<int64_t>("num_streams")
                                  .Attr<int64_t>("layer")
                                  .Attr<int64_t>("pool_layer")
                                  .Attr<float>("eps")
                                  .Attr<float>("query_scale"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
