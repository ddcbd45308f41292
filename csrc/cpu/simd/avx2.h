// The same operations as in portable.h on 256-bit registers. Needs AVX2, FMA and F16C.
#include <immintrin.h>

#include <cstdint>

namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA {

struct Simd {
  static constexpr int W = 8;
  using F = __m256;
  using I = __m256i;

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static F set1(float x) { return _mm256_set1_ps(x); }
  static F zero() { return _mm256_setzero_ps(); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static float reduce_max(F a) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
  }
  static float reduce_add(F a) {
    __m128 m = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_add_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_add_ss(m, _mm_shuffle_ps(m, m, 1)));
  }
  static F power_of_two(F a) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(to_int(a), _mm256_set1_epi32(127)), 23));
  }
  static I to_int(F a) { return _mm256_cvtps_epi32(a); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }

  static F as_float(I a) { return _mm256_castsi256_ps(a); }

  static void hide([[maybe_unused]] I& a) {  // from the optimizer, which would take products out of loops
#if defined(__GNUC__)
    asm volatile("" : "+x"(a));
#endif
  }

  static I zero_int() {
    return _mm256_setzero_si256();
  }
  static I load_int(const std::int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static void store_int(std::int32_t* p, I a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a);
  }
  static I set1_int(std::int32_t x) {
    return _mm256_set1_epi32(x);
  }
  static I abs_bits(F a) {
    return _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7FFFFFFF));
  }
  static I max_int(I a, I b) {
    return _mm256_max_epi32(a, b);
  }
  static std::int32_t reduce_max_int(I a) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1)));
  }
  static I sub_int(I a, I b) {
    return _mm256_sub_epi32(a, b);
  }

  static F load_bf16(const std::uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static I bf16_of(F a) {
    const I bits = _mm256_castps_si256(a), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), set1_int(1));
    const I rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, set1_int(0x7FFF))), 16);
    const I invalid = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, set1_int(0x7FC0), invalid);
  }
  static F round_bf16(F a) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(bf16_of(a), 16));
  }
  static void store_bf16(std::uint16_t* p, F a) {
    const I rounded = bf16_of(a);
    const I pairs = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(pairs));
  }
  static F load_f16(const std::uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static F round_f16(F a) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_f16(std::uint16_t* p, F a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }

  static void store_int8(std::int8_t* p, I a) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
  }
  static I load_int8(const std::int8_t* p) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static I load_nibbles(const std::uint8_t* p) {
    std::int32_t four;
    std::memcpy(&four, p, 4);
    const I shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    return _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(four), shifts), _mm256_set1_epi32(15));
  }
  static void load_pairs(const std::uint8_t* p, I& low, I& high) {
    low = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    high = _mm256_srli_epi32(low, 4);
  }
  struct Table {
    F low, high;
  };
  static Table table(const float* sixteen) {
    return {load(sixteen), load(sixteen + 8)};
  }
  static F lookup(const Table& table, I index) {
    const F low = _mm256_permutevar8x32_ps(table.low, index), high = _mm256_permutevar8x32_ps(table.high, index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }

  struct Tables {
    I half[2];
  };
  static Tables load_tables(const std::int8_t* four) {
    const auto* p = reinterpret_cast<const __m256i*>(four);
    return {{_mm256_loadu_si256(p), _mm256_loadu_si256(p + 1)}};
  }
  static Tables repeat_table(const std::int8_t* one) {
    const I t = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(one)));
    return {{t, t}};
  }
  static void lookup_bytes(std::int8_t* out, const std::uint8_t* nibbles, const Tables& tables) {
    for (int half = 0; half < 2; half++) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(nibbles + 16 * half));
      const I words = _mm256_cvtepu8_epi16(bytes);
      const I index = _mm256_and_si256(_mm256_or_si256(words, _mm256_slli_epi16(words, 4)), _mm256_set1_epi8(15));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * half), _mm256_shuffle_epi8(tables.half[half], index));
    }
  }
  static I add_bytes(I sum, const std::int8_t* p) {
    for (int half = 0; half < 2; half++) {
      const I bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * half));
      sum = _mm256_add_epi32(sum,
                             _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes), _mm256_set1_epi16(1)));
    }
    return sum;
  }
  static std::int32_t reduce_add_int(I sum) {
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xB1)));
  }
  static void transpose(std::int32_t* out, std::int64_t out_stride, const std::int32_t* in, std::int64_t in_stride) {
    I a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = load_int(in + i * in_stride);
    for (int i = 0; i < 8; i += 2) {
      b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
      store_int(out + i * out_stride, _mm256_permute2x128_si256(a[i], a[i + 4], 0x20));
      store_int(out + (i + 4) * out_stride, _mm256_permute2x128_si256(a[i], a[i + 4], 0x31));
    }
  }

  static I dot_int16(I acc, I b, std::int32_t a) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(b, _mm256_set1_epi32(a)));
  }
#if defined(NUNCHAKU_PY_AVX_VNNI)
  // b unsigned, a signed.
  static I dot_uint8(I acc, I b, std::int32_t a) {
    return _mm256_dpbusd_avx_epi32(acc, b, _mm256_set1_epi32(a));
  }
#endif
};

}  // namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA
