// The workspace of sparse attention of many queries: all entries that they can see, dense.
#pragma once

#include "attention_tiles.cuh"

namespace dsv4 {

struct PrefillProblem {
  Attention a;
  uint16_t* workspace;   // [sequences, WorkspaceRows, 512]
  int tiles, num_items;  // of 64 heads
  uint16_t* o;
};

// Of a sequence: the tokens that the chunk's windows reach, then its compressed entries.
DSV4_HOST_DEVICE int64_t WorkspaceRows(const Attention& a) {
  return int64_t{a.window} - 1 + a.tokens + a.capacity();
}

// The workspace's row of a slot, -1 for an empty one.
__device__ __forceinline__ int64_t WorkspaceRow(const Attention& a, const Query& query, int slot) {
  const int64_t first = query.sequence * WorkspaceRows(a);
  if (slot >= query.num_slots) return -1;
  if (slot < a.window) {
    const bool exists = query.position - (a.window - 1) + slot >= 0;
    return exists ? first + query.row % a.tokens + slot : -1;
  }
  int id = slot - a.window;
  if (a.num_ids != 0) id = __ldg(a.ids + int64_t{query.row} * a.num_ids + id);
  return id >= 0 && id < a.capacity() ? first + a.window - 1 + a.tokens + id : -1;
}

}  // namespace dsv4
