// Layouts made from random bytes, some broken: packing must refuse the broken ones without reading outside of their arrays,
// and what it accepts must run in bounds on every tier and unpack to the same bytes.
//
// With clang, -fsanitize=fuzzer drives LLVMFuzzerTestOneInput (define SPINFER_LIBFUZZER); otherwise main() does:
//   fuzz_cpu [runs] [seed]
#include "layout.h"

namespace {

struct Bytes {
  const uint8_t* data;
  size_t size, at = 0;
  uint32_t next() {  // the bytes over and over, changed each time round
    if (!size) return 0;
    const uint32_t byte = data[at % size] + 31 * uint32_t(at / size);
    ++at;
    return byte & 0xff;
  }
  uint32_t word() {
    uint32_t bytes = 0;
    for (int i = 0; i < 4; ++i) bytes = bytes << 8 | next();
    return bytes;
  }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes bytes{data, size};
  const int64_t rows = 1 + bytes.next() % 140, cols = 1 + bytes.next() % 200, tokens = 1 + bytes.next() % 30;
  const int type = int(bytes.next() % 3), x_type = int(bytes.next() % 3), threads = 1;
  const uint32_t density = bytes.next();
  Storage s = make_storage(
      rows, cols, type, [&](int64_t, int64_t) { return bytes.next() <= density; },
      [&](int64_t, int64_t) { return bytes.word(); });

  for (uint32_t change = bytes.next() % 4; change; --change) {
    const uint32_t where = bytes.word(), value = bytes.word();
    switch (bytes.next() % 5) {
      case 0:
        s.bitmap[where % s.bitmap.size()] ^= uint64_t(1) << (value % 64);
        break;
      case 1:
        s.offsets[where % s.offsets.size()] = int32_t(value);
        break;
      case 2:
        s.offsets[where % s.offsets.size()] += int32_t(value % 5) - 2;
        break;
      case 3:
        s.nnz += int64_t(value % 17) - 8;
        break;
      default:
        if (s.values.size()) s.values[where % s.values.size()] = uint8_t(value);
    }
  }

  for (int tier = 0; tier < spinfer_cpu_tiers(); ++tier) {
    if (!spinfer_cpu_tier_supported(tier)) continue;
    int result = 0;
    const auto p = pack(tier, s, threads, &result);
    if (result) continue;
    check_unpacks(s, *p, threads);
    const int64_t x_size = x_type == SPINFER_F32 ? 4 : 2;
    Array<uint8_t> x(tokens * cols * x_size), y(tokens * rows * x_size), bias(rows * x_size);
    for (int64_t i = 0; i < x.size(); ++i) x[i] = uint8_t(bytes.next());
    CHECK(spinfer_cpu_linear(tier, p->values.data(), p->masks.data(), p->offsets.data(), rows, cols, type, x.data(), cols,
                             tokens, x_type, bias.data(), y.data(), threads) == 0);
  }
  return 0;
}

#ifndef SPINFER_LIBFUZZER
int main(int argc, char** argv) {
  const long runs = argc > 1 ? atol(argv[1]) : 20000;
  std::mt19937_64 random(argc > 2 ? uint64_t(atoll(argv[2])) : std::random_device{}());
  for (long run = 0; run < runs; ++run) {
    std::vector<uint8_t> data(16 + random() % 500);
    for (uint8_t& byte : data) byte = uint8_t(random());
    LLVMFuzzerTestOneInput(data.data(), data.size());
  }
  printf("%ld layouts\n", runs);
  return 0;
}
#endif
