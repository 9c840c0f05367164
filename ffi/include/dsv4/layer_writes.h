// The arguments of layer_writes: those of append_swa, flush_csa or flush_hca and indexer_queries.
#pragma once

#include "dsv4/cache_append.h"
#include "dsv4/cache_flush.h"
#include "dsv4/indexer_queries.h"

namespace dsv4 {

// Beyond, the calls that it joins are faster one after the other.
constexpr int kMaxWriteTokens = 4;

// Operands q, kv, weight, start, length, frequencies as of append_swa, the window's planes,
// block_table, the streams as of the flush, perhaps q, weights and positions of indexer_queries.
// Results: rotated q, the window's planes, the streams' tails and planes, codes and weights.
struct WritesCall {
  AppendCall append;
  FlushCall flush;
  QueriesCall queries;
  bool overlapping;
};

inline ffi::Error CheckWrites(const ffi::RemainingArgs& arguments, const ffi::RemainingRets& rets,
                              int64_t num_planes, int64_t num_streams, int64_t layer,
                              int64_t pool_layer, float eps, float query_scale,
                              WritesCall* call) {
  const std::vector<ffi::AnyBuffer> operands = Buffers(arguments), results = Buffers(rets);
  if (num_planes < 1 || num_planes > 2 || num_streams < 1 || num_streams > 2) {
    return Invalid("streams", std::to_string(num_streams) + " of " + std::to_string(num_planes) +
                                  " planes", "1 or 2 of each");
  }
  const size_t first_stream = 7 + num_planes, num_states = num_streams * (1 + num_planes);
  const size_t first_query = first_stream + 4 * num_streams + num_states;
  const size_t first_codes = 1 + num_planes + num_states;
  const bool has_queries = operands.size() == first_query + 3;
  if ((operands.size() != first_query && !has_queries) ||
      results.size() != first_codes + (has_queries ? 2 : 0)) {
    return Invalid("operands", std::to_string(operands.size()),
                   std::to_string(first_query) + ", or 3 more for queries");
  }
  const std::vector<ffi::AnyBuffer> window(results.begin() + 1, results.begin() + 1 + num_planes);
  DSV4_CHECK(CheckAppend(operands[0], operands[1], operands[2], operands[3], operands[4],
                         operands[5], num_planes, results[0], window, layer, eps, &call->append));
  call->overlapping = num_streams == 2;
  const std::vector<int> widths =
      call->overlapping ? std::vector<int>{kHeadDim, kKeyDim} : std::vector<int>{kHeadDim};
  DSV4_CHECK(CheckFlush(operands[6 + num_planes], operands[3], operands[4], operands[5],
                        {operands.begin() + first_stream, operands.begin() + first_query},
                        {results.begin() + 1 + num_planes, results.begin() + first_codes},
                        pool_layer, eps, widths, call->overlapping, &call->flush));
  const int num_tokens = call->append.num_tokens;
  if (num_tokens > kMaxWriteTokens || call->flush.num_tokens != num_tokens) {
    return Invalid("q", std::to_string(num_tokens) + " tokens",
                   "as many as of the streams, up to " + std::to_string(kMaxWriteTokens));
  }
  if (call->append.ring.format != call->flush.streams[0].pool.format) {
    return Invalid("pool", "another format", "the window's");
  }
  call->queries = {};
  if (!has_queries) return ffi::Error::Success();
  return CheckQueries(operands[first_query], operands[first_query + 1], operands[first_query + 2],
                      operands[5], results[first_codes], results[first_codes + 1], query_scale,
                      &call->queries);
}

}  // namespace dsv4
