// The vector operations that the CPU ops are written in, in plain C++: for every CPU, and as the model of the others.
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA {

struct Simd {
  static constexpr int W = 8;
  struct F {
    float v[W];
  };
  struct I {
    std::int32_t v[W];
  };

  template <class Op>
  static F each(Op op) {
    F r;
    for (int i = 0; i < W; i++) r.v[i] = op(i);
    return r;
  }
  template <class Op>
  static I each_int(Op op) {
    I r;
    for (int i = 0; i < W; i++) r.v[i] = op(i);
    return r;
  }

  static F load(const float* p) {
    return each([=](int i) { return p[i]; });
  }
  static void store(float* p, F a) { std::memcpy(p, a.v, sizeof a.v); }
  static F set1(float x) {
    return each([=](int) { return x; });
  }
  static F zero() { return set1(0); }
  static F add(F a, F b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  static F sub(F a, F b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
  }
  static F mul(F a, F b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  static F div(F a, F b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
  }
  static F fma(F a, F b, F c) { return add(mul(a, b), c); }
  // As the instructions do: the second operand where either is NaN.
  static F max(F a, F b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F min(F a, F b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F abs(F a) {
    return each([&](int i) { return std::fabs(a.v[i]); });
  }
  static F round(F a) {
    return each([&](int i) { return std::nearbyint(a.v[i]); });
  }
  static float reduce_max(F a) {
    float r = a.v[0];
    for (int i = 1; i < W; i++) r = r > a.v[i] ? r : a.v[i];
    return r;
  }
  static float reduce_add(F a) {
    float r = 0;
    for (int i = 0; i < W; i++) r += a.v[i];
    return r;
  }
  // 2^a for whole a in [−126, 127], and ∞ for 128.
  static F power_of_two(F a) {
    return each([&](int i) { return std::bit_cast<float>((static_cast<std::int32_t>(a.v[i]) + 127) << 23); });
  }
  static I to_int(F a) {
    return each_int([&](int i) { return static_cast<std::int32_t>(std::nearbyint(a.v[i])); });
  }
  static F to_float(I a) {
    return each([&](int i) { return static_cast<float>(a.v[i]); });
  }

  static F as_float(I a) { return std::bit_cast<F>(a); }

  static void hide(I&) {}

  static I zero_int() {
    return each_int([](int) { return 0; });
  }
  static I load_int(const std::int32_t* p) {
    return each_int([=](int i) { return p[i]; });
  }
  static void store_int(std::int32_t* p, I a) { std::memcpy(p, a.v, sizeof a.v); }
  static I set1_int(std::int32_t x) {
    return each_int([=](int) { return x; });
  }
  static I abs_bits(F a) {
    return each_int([&](int i) { return std::bit_cast<std::int32_t>(a.v[i]) & 0x7FFFFFFF; });
  }
  static I max_int(I a, I b) {
    return each_int([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static std::int32_t reduce_max_int(I a) {
    std::int32_t r = a.v[0];
    for (int i = 1; i < W; i++) r = r > a.v[i] ? r : a.v[i];
    return r;
  }
  static I sub_int(I a, I b) {
    return each_int([&](int i) { return a.v[i] - b.v[i]; });
  }

  static F load_bf16(const std::uint16_t* p) {
    return each([=](int i) { return std::bit_cast<float>(static_cast<std::uint32_t>(p[i]) << 16); });
  }
  static void store_bf16(std::uint16_t* p, F a) {
    for (int i = 0; i < W; i++) p[i] = bf16_bits(a.v[i]);
  }
  static F load_f16(const std::uint16_t* p) {
    return each([=](int i) { return f16_value(p[i]); });
  }
  static F round_bf16(F a) {
    return each([&](int i) { return bf16_value(bf16_bits(a.v[i])); });
  }
  static F round_f16(F a) {
    return each([&](int i) { return f16_value(f16_bits(a.v[i])); });
  }
  static void store_f16(std::uint16_t* p, F a) {
    for (int i = 0; i < W; i++) p[i] = f16_bits(a.v[i]);
  }

  static void store_int8(std::int8_t* p, I a) {
    for (int i = 0; i < W; i++) p[i] = static_cast<std::int8_t>(a.v[i]);
  }
  static I load_int8(const std::int8_t* p) {
    return each_int([=](int i) { return std::int32_t{p[i]}; });
  }
  // W nibbles from W/2 bytes, the low one first.
  static I load_nibbles(const std::uint8_t* p) {
    return each_int([=](int i) { return p[i / 2] >> (i % 2 * 4) & 15; });
  }
  // Of W bytes, the low nibbles and the high ones; bits above the lowest four mean nothing.
  static void load_pairs(const std::uint8_t* p, I& low, I& high) {
    low = each_int([=](int i) { return std::int32_t{p[i]}; });
    high = each_int([=](int i) { return p[i] >> 4; });
  }
  // Sixteen numbers, and the ones of them that the low four bits of each index name.
  struct Table {
    float v[16];
  };
  static Table table(const float* sixteen) {
    Table t;
    std::memcpy(t.v, sixteen, sizeof t.v);
    return t;
  }
  static F lookup(const Table& table, I index) {
    return each([&](int i) { return table.v[index.v[i] & 15]; });
  }

  // Sixteen int8 for each sixteen places of a block of 64.
  struct Tables {
    std::int8_t v[64];
  };
  static Tables load_tables(const std::int8_t* four) {
    Tables t;
    std::memcpy(t.v, four, 64);
    return t;
  }
  static Tables repeat_table(const std::int8_t* one) {
    Tables t;
    for (int i = 0; i < 4; i++) std::memcpy(t.v + 16 * i, one, 16);
    return t;
  }
  // 64 nibbles, in 32 bytes, through their tables.
  static void lookup_bytes(std::int8_t* out, const std::uint8_t* nibbles, const Tables& tables) {
    for (int i = 0; i < 64; i++) out[i] = tables.v[i / 16 * 16 + (nibbles[i / 2] >> (i % 2 * 4) & 15)];
  }
  // acc + partial sums of 64 int8, in no order that matters.
  static I add_bytes(I acc, const std::int8_t* p) {
    for (int i = 0; i < 64; i++) acc.v[i % W] += p[i];
    return acc;
  }
  static std::int32_t reduce_add_int(I a) {
    std::int32_t sum = 0;
    for (int i = 0; i < W; i++) sum += a.v[i];
    return sum;
  }
  static void transpose(std::int32_t* out, std::int64_t out_stride, const std::int32_t* in, std::int64_t in_stride) {
    for (int i = 0; i < W; i++)
      for (int j = 0; j < W; j++) out[j * out_stride + i] = in[i * in_stride + j];
  }

  static I dot_int16(I acc, I b, std::int32_t a) {
    const std::int32_t low = static_cast<std::int16_t>(a), high = a >> 16;
    return each_int([&](int i) { return acc.v[i] + low * static_cast<std::int16_t>(b.v[i]) + high * (b.v[i] >> 16); });
  }
};

}  // namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA
