// Storage layouts for the C++ tests, in heap arrays of exactly the right size, so that AddressSanitizer sees every
// access outside.
#pragma once
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <random>
#include <vector>

#include "spinfer_cpu.h"

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) {                                                         \
      fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);   \
      abort();                                                                  \
    }                                                                           \
  } while (0)

template <class T>
class Array {  // no spare capacity, unlike std::vector
 public:
  explicit Array(int64_t size) : data_(new T[size_t(size)]()), size_(size) {}
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[size_t(i)]; }
  const T& operator[](int64_t i) const { return data_[size_t(i)]; }

 private:
  std::unique_ptr<T[]> data_;
  int64_t size_;
};

struct Storage {
  int64_t rows, cols, nnz = 0;
  int type;
  Array<uint64_t> bitmap;
  Array<int32_t> offsets;
  Array<uint8_t> values;  // bytes

  static int64_t tiles(int64_t rows, int64_t cols) { return ((rows + 63) / 64) * ((cols + 63) / 64); }
  int64_t size() const { return type == SPINFER_F32 ? 4 : 2; }
};

// FORMAT.md, straight: where word w of a GroupTile lies.
inline void place(int w, int& row, int& col) {
  row = (w / 16) * 16 + (w % 2) * 8;
  col = (w / 4 % 4) * 16 + (w / 2 % 2) * 8;
}

// A valid layout; is_set(row, col) decides, bits(row, col) is the value.
template <class IsSet, class Bits>
Storage make_storage(int64_t rows, int64_t cols, int type, IsSet is_set, Bits bits) {
  const int64_t tiles = Storage::tiles(rows, cols), tile_cols = (cols + 63) / 64;
  const int64_t size = type == SPINFER_F32 ? 4 : 2;
  Array<uint64_t> bitmap(tiles * 64);
  Array<int32_t> offsets(tiles + 1);
  std::vector<uint8_t> values;
  int64_t nnz = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int w = 0; w < 64; ++w) {
      int row0, col0;
      place(w, row0, col0);
      for (int bit = 0; bit < 64; ++bit) {
        const int64_t row = tile / tile_cols * 64 + row0 + bit / 8, col = tile % tile_cols * 64 + col0 + bit % 8;
        if (row >= rows || col >= cols || !is_set(row, col)) continue;
        bitmap[tile * 64 + w] |= uint64_t(1) << bit;
        const uint32_t value = bits(row, col);
        for (int64_t byte = 0; byte < size; ++byte) values.push_back(uint8_t(value >> (8 * byte)));
        ++nnz;
      }
    }
    while (values.size() % size_t(8 * size)) values.push_back(0);
    offsets[tile + 1] = int32_t(int64_t(values.size()) / size / 8);
  }
  Array<uint8_t> exact(int64_t(values.size()));
  if (!values.empty()) memcpy(exact.data(), values.data(), values.size());
  return Storage{rows, cols, nnz, type, std::move(bitmap), std::move(offsets), std::move(exact)};
}

struct Packed {
  Array<int64_t> offsets;
  Array<uint8_t> values;
  Array<uint32_t> masks;
};

// Both steps of packing; null when the plan refuses.
inline std::unique_ptr<Packed> pack(int tier, const Storage& s, int threads, int* result = nullptr) {
  const int64_t panels = (s.rows + 31) / 32;
  Array<int64_t> offsets(panels + 1);
  const int plan = spinfer_cpu_pack_plan(s.bitmap.data(), s.offsets.data(), s.values.size() / s.size(), s.nnz, s.rows, s.cols,
                                         offsets.data(), threads);
  if (result) *result = plan;
  if (plan) return nullptr;
  std::unique_ptr<Packed> p(new Packed{std::move(offsets), Array<uint8_t>(s.nnz * s.size() + SPINFER_TAIL_BYTES),
                                       Array<uint32_t>(panels * ((s.cols + 1) / 2) * 2)});
  const int packed = spinfer_cpu_pack(tier, s.values.data(), s.bitmap.data(), s.offsets.data(), s.rows, s.cols, s.type,
                                      p->offsets.data(), p->values.data(), p->masks.data(), threads);
  if (result) *result = packed;
  return p;
}

inline void check_unpacks(const Storage& s, const Packed& p, int threads) {
  Array<uint64_t> bitmap(s.bitmap.size());
  Array<int32_t> offsets(s.offsets.size());
  CHECK(spinfer_cpu_unpack_plan(p.masks.data(), s.rows, s.cols, s.type, bitmap.data(), offsets.data(), threads) == 0);
  CHECK(memcmp(bitmap.data(), s.bitmap.data(), size_t(bitmap.size()) * 8) == 0);
  CHECK(memcmp(offsets.data(), s.offsets.data(), size_t(offsets.size()) * 4) == 0);
  Array<uint8_t> values(s.values.size());
  CHECK(spinfer_cpu_unpack(p.values.data(), p.masks.data(), p.offsets.data(), s.rows, s.cols, s.type, bitmap.data(),
                           offsets.data(), values.data(), threads) == 0);
  CHECK(memcmp(values.data(), s.values.data(), size_t(values.size())) == 0);
}
