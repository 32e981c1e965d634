// The kernel against sums in double: every tier, type and thread count, outputs filled with NaN before.
#include <math.h>

#include <thread>

#include "layout.h"

namespace {

std::mt19937_64 g_random(20260101);

// A pool of its own instead of torch's.
void pool(void (*body)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i) others.emplace_back(body, data);
  body(data);
  for (std::thread& other : others) other.join();
}

// Values that all three types hold exactly.
float exact_value() { return float(int(g_random() % 255) - 127) / 64; }

uint32_t to_bits(float value, int type) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (type == SPINFER_F32) return bits;
  if (type == SPINFER_BF16) return bits >> 16;
  if (value == 0) return bits >> 16 & 0x8000;
  return (bits >> 16 & 0x8000) | ((bits >> 13 & 0x3ffff) - (112u << 10));
}

void put(Array<uint8_t>& to, int64_t i, float value, int type) {
  const uint32_t bits = to_bits(value, type);
  if (type == SPINFER_F32) {
    memcpy(to.data() + 4 * i, &bits, 4);
  } else {
    const uint16_t half = uint16_t(bits);
    memcpy(to.data() + 2 * i, &half, 2);
  }
}

void check(int tier, int64_t rows, int64_t cols, int64_t tokens, int type, double density, int threads) {
  std::vector<float> dense(size_t(rows * cols));
  for (float& w : dense) {
    const float value = exact_value();
    w = double(g_random() % 1000) < density * 1000 && value != 0 ? value : 0;
  }
  const auto at = [&](int64_t row, int64_t col) { return dense[size_t(row * cols + col)]; };
  const Storage s = make_storage(
      rows, cols, type, [&](int64_t r, int64_t c) { return at(r, c) != 0; },
      [&](int64_t r, int64_t c) { return to_bits(at(r, c), type); });
  const auto p = pack(tier, s, threads);
  CHECK(p);
  check_unpacks(s, *p, threads);

  // fp32 activations, rows further apart than they are long; sums are compared before any rounding.
  const int64_t stride = cols + 3;
  Array<uint8_t> x(4 * ((tokens - 1) * stride + cols)), bias(4 * rows), y(4 * tokens * rows);
  std::vector<float> xs(size_t(tokens * cols)), bs(static_cast<size_t>(rows));
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t k = 0; k < cols; ++k) put(x, t * stride + k, xs[size_t(t * cols + k)] = exact_value(), SPINFER_F32);
  }
  for (int64_t r = 0; r < rows; ++r) put(bias, r, bs[size_t(r)] = exact_value(), SPINFER_F32);
  memset(y.data(), 0xff, size_t(y.size()));
  CHECK(spinfer_cpu_linear(tier, p->values.data(), p->masks.data(), p->offsets.data(), rows, cols, type, x.data(), stride,
                           tokens, SPINFER_F32, bias.data(), y.data(), threads) == 0);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t r = 0; r < rows; ++r) {
      double sum = bs[size_t(r)], size = fabs(sum);
      for (int64_t k = 0; k < cols; ++k) {
        const double product = double(at(r, k)) * double(xs[size_t(t * cols + k)]);
        sum += product;
        size += fabs(product);
      }
      float got;
      memcpy(&got, y.data() + 4 * (t * rows + r), 4);
      CHECK(fabs(double(got) - sum) <= 1e-6 * size);
    }
  }

  // 16-bit activations: small integers, whose sums both types hold exactly when they are few.
  for (int x_type : {SPINFER_BF16, SPINFER_F16}) {
    Array<uint8_t> x16(2 * tokens * cols), y16(2 * tokens * rows);
    for (int64_t t = 0; t < tokens; ++t) put(x16, t * cols + t % cols, 1.0f, x_type);
    memset(y16.data(), 0xff, size_t(y16.size()));
    CHECK(spinfer_cpu_linear(tier, p->values.data(), p->masks.data(), p->offsets.data(), rows, cols, type, x16.data(), cols,
                             tokens, x_type, nullptr, y16.data(), threads) == 0);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t r = 0; r < rows; ++r) {
        uint16_t got;
        memcpy(&got, y16.data() + 2 * (t * rows + r), 2);
        CHECK((got & 0x7fff ? got : 0) == to_bits(at(r, t % cols), x_type));
      }
    }
  }
}

}  // namespace

int main() {
  spinfer_cpu_set_pool(pool);
  int64_t checks = 0;
  for (int tier = 0; tier < spinfer_cpu_tiers(); ++tier) {
    if (!spinfer_cpu_tier_supported(tier)) {
      printf("%s: not on this CPU\n", spinfer_cpu_tier_name(tier));
      float none = 0;
      CHECK(spinfer_cpu_linear(tier, &none, nullptr, nullptr, 1, 1, 0, &none, 1, 1, 0, nullptr, &none, 1) != 0);
      continue;
    }
    for (int type : {SPINFER_BF16, SPINFER_F16, SPINFER_F32}) {
      for (int64_t tokens = 1; tokens <= 17; ++tokens) check(tier, 33, 65, tokens, type, .5, 1), ++checks;
      for (int64_t size = 1; size <= 70; ++size) {
        check(tier, size, 1 + size * 37 % 70, 1 + size % 5, type, .4, 1 + int(size % 3)), ++checks;
      }
      for (double density : {0.0, 0.01, 1.0}) check(tier, 130, 1100, 3, type, density, 2), ++checks;
      check(tier, 600, 300, 150, type, .5, 3), ++checks;
      for (int64_t tokens : {33, 48, 530}) check(tier, 40, 300, tokens, type, .5, 2), ++checks;
    }
    printf("%s: ok\n", spinfer_cpu_tier_name(tier));
  }
  printf("%lld problems\n", static_cast<long long>(checks));
  return 0;
}
