// A query of sparse attention, and which record each of its slots stands for.
//
// A query's slots are those of its window, the oldest first, and then those of its compressed
// entries. A slot may be empty: before the sequence's first token, or an id below 0.
#pragma once

#include <cstdint>

#include "dsv4/divisor.h"
#include "dsv4/formats.h"

namespace dsv4 {

constexpr int kGroupChannels = 64;  // that share a scale
constexpr int kScaleBytes = 8;      // of a record

// Quantised entries: E4M3 channels followed by BF16 rotary ones, and E8M0 scales.
struct Records {
  const uint8_t* bodies;
  const uint8_t* scales;
};

struct Attention {
  const void* q;
  const float* sink;
  const float* frequencies;
  Records ring, recent, pool;  // the layer's
  const int32_t* block_table;
  const int32_t* ids;
  const int32_t* start;
  const int32_t* length;
  float scale;
  int num_queries;  // of all sequences
  int tokens, heads, width, rotary_width;
  int window;
  Divisor ring_size;
  bool has_recent;           // the ring is that of before the chunk
  int num_ids;               // 0: all complete entries
  Divisor ratio;             // 0: none
  Divisor per_block;
  int table_width;

  DSV4_HOST_DEVICE int body_bytes() const { return width + rotary_width; }
  DSV4_HOST_DEVICE int capacity() const { return table_width * per_block; }
};

struct Query {
  int row, sequence, start, position;
  int num_slots;  // 0 for a query that does not count
};

DSV4_HOST_DEVICE Query QueryOf(const Attention& a, int sequence, int token) {
  Query query;
  query.row = sequence * a.tokens + token;
  query.sequence = sequence;
  query.start = a.start[sequence];
  query.position = query.start + token;
  const int complete = (query.position + 1) / a.ratio;
  const int seen = complete < a.capacity() ? complete : a.capacity();
  const int num_entries = a.num_ids != 0 ? a.num_ids : seen;
  query.num_slots = token < a.length[sequence] ? a.window + num_entries : 0;
  return query;
}

DSV4_HOST_DEVICE Query QueryOf(const Attention& a, int row) {
  return QueryOf(a, row / a.tokens, row % a.tokens);
}

// Null for an empty slot.
struct Location {
  const uint8_t *body, *scales;
};

DSV4_HOST_DEVICE Location RecordAt(const Attention& a, const Records& records, int64_t index) {
  return {records.bodies + index * a.body_bytes(), records.scales + index * kScaleBytes};
}

// A slot on its way to its record. What one step loads only the next one looks at, so that the
// loads of many slots can be under way at once.
struct Search {
  Location at;
  int sequence, id, block;
  bool in_pool;
};

DSV4_HOST_DEVICE Search FindSlot(const Attention& a, const Query& query, int slot) {
  Search search = {{}, query.sequence, slot - a.window, 0, false};
  if (slot >= query.num_slots) return search;
  if (slot >= a.window) {
    search.in_pool = true;
    if (a.num_ids != 0) search.id = a.ids[int64_t{query.row} * a.num_ids + search.id];
    return search;
  }
  const int position = query.position - (a.window - 1) + slot;
  const int after = position - query.start;
  if (a.has_recent && after >= 0) {
    search.at = RecordAt(a, a.recent, int64_t{query.sequence} * a.tokens + after);
  } else if (position >= 0) {
    search.at =
        RecordAt(a, a.ring, int64_t{query.sequence} * a.ring_size + position % a.ring_size);
  }
  return search;
}

DSV4_HOST_DEVICE void FindBlock(const Attention& a, Search* search) {
  search->in_pool = search->in_pool && search->id >= 0 && search->id < a.capacity();
  if (!search->in_pool) return;
  const int64_t row = int64_t{search->sequence} * a.table_width;
  search->block = a.block_table[row + search->id / a.per_block];
}

DSV4_HOST_DEVICE Location Found(const Attention& a, const Search& search) {
  if (!search.in_pool) return search.at;
  const int64_t block = search.block < 0 ? 0 : search.block;
  return RecordAt(a, a.pool, block * a.per_block + search.id % a.per_block);
}

// Splits of a query's blocks of slots over thread blocks: at most `max_splits` and each of at least
// `min_blocks`, whatever else is computed beside it.
struct SplitRule {
  int max_splits, min_blocks;

  DSV4_HOST_DEVICE int BlocksPerSplit(int num_blocks) const {
    const int blocks = (num_blocks + max_splits - 1) / max_splits;
    return blocks > min_blocks ? blocks : min_blocks;
  }
};

}  // namespace dsv4
