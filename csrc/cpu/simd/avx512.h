// The same operations as in portable.h on 512-bit registers. Needs AVX-512 F, BW, VL and VNNI.
#include <immintrin.h>

#include <cstdint>

namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA {

// As std::bit_cast, which is compiled for the instruction set of the standard library's header.
template <class To, class From>
inline To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct Simd {
  static constexpr int W = 16;
  using F = __m512;
  using I = __m512i;

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F zero() { return _mm512_setzero_ps(); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static float reduce_max(F a) { return _mm512_reduce_max_ps(a); }
  static float reduce_add(F a) { return _mm512_reduce_add_ps(a); }
  static F power_of_two(F a) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(to_int(a), _mm512_set1_epi32(127)), 23));
  }
  static I to_int(F a) { return _mm512_cvtps_epi32(a); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }

  static F as_float(I a) { return _mm512_castsi512_ps(a); }

  static void hide([[maybe_unused]] I& a) {  // from the optimizer, which would take products out of loops
#if defined(__GNUC__)
    asm volatile("" : "+v"(a));
#endif
  }

  static I zero_int() {
    return _mm512_setzero_si512();
  }
  static I load_int(const std::int32_t* p) {
    return _mm512_loadu_si512(p);
  }
  static void store_int(std::int32_t* p, I a) {
    _mm512_storeu_si512(p, a);
  }
  static I set1_int(std::int32_t x) {
    return _mm512_set1_epi32(x);
  }
  static I abs_bits(F a) {
    return _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7FFFFFFF));
  }
  static I max_int(I a, I b) {
    return _mm512_max_epi32(a, b);
  }
  static std::int32_t reduce_max_int(I a) {
    return _mm512_reduce_max_epi32(a);
  }
  static I sub_int(I a, I b) {
    return _mm512_sub_epi32(a, b);
  }

  static F load_bf16(const std::uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static I bf16_of(F a) {  // vcvtneps2bf16 would flush subnormal numbers to zero
    const I bits = _mm512_castps_si512(a), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), set1_int(1));
    const I rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, set1_int(0x7FFF))), 16);
    return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), set1_int(0x7FC0));
  }
  static F round_bf16(F a) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(bf16_of(a), 16));
  }
  static void store_bf16(std::uint16_t* p, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bf16_of(a)));
  }
  static F load_f16(const std::uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F round_f16(F a) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_f16(std::uint16_t* p, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }

  static void store_int8(std::int8_t* p, I a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
  }
  static I load_int8(const std::int8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I load_nibbles(const std::uint8_t* p) {
    std::int64_t eight;
    std::memcpy(&eight, p, 8);
    const I bytes = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(_mm_cvtsi64_si128(eight), _mm_cvtsi64_si128(eight >> 4)));
    return _mm512_and_si512(bytes, _mm512_set1_epi32(15));
  }
  static void load_pairs(const std::uint8_t* p, I& low, I& high) {
    low = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    high = _mm512_srli_epi32(low, 4);
  }
  using Table = __m512;
  static Table table(const float* sixteen) {
    return load(sixteen);
  }
  static F lookup(Table table, I index) {
    return _mm512_permutexvar_ps(index, table);
  }

  using Tables = __m512i;
  static Tables load_tables(const std::int8_t* four) {
    return _mm512_loadu_si512(four);
  }
  static Tables repeat_table(const std::int8_t* one) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(one)));
  }
  static void lookup_bytes(std::int8_t* out, const std::uint8_t* nibbles, Tables tables) {
    const I words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(nibbles)));
    const I index = _mm512_and_si512(_mm512_or_si512(words, _mm512_slli_epi16(words, 4)), _mm512_set1_epi8(15));
    _mm512_storeu_si512(out, _mm512_shuffle_epi8(tables, index));
  }
  static I add_bytes(I acc, const std::int8_t* p) {
    return _mm512_dpbusd_epi32(acc, _mm512_set1_epi8(1), _mm512_loadu_si512(p));
  }
  static std::int32_t reduce_add_int(I a) {
    return _mm512_reduce_add_epi32(a);
  }
  static void transpose(std::int32_t* out, std::int64_t out_stride, const std::int32_t* in, std::int64_t in_stride) {
    I a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = load_int(in + i * in_stride);
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; i++) {  // now lane l of a[4g + i] holds column 4l + i of rows 4g … 4g+3
      const I low01 = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88), high01 = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xDD);
      const I low23 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
      const I high23 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xDD);
      store_int(out + i * out_stride, _mm512_shuffle_i32x4(low01, low23, 0x88));
      store_int(out + (i + 8) * out_stride, _mm512_shuffle_i32x4(low01, low23, 0xDD));
      store_int(out + (i + 4) * out_stride, _mm512_shuffle_i32x4(high01, high23, 0x88));
      store_int(out + (i + 12) * out_stride, _mm512_shuffle_i32x4(high01, high23, 0xDD));
    }
  }

  static I dot_int16(I acc, I b, std::int32_t a) {
    return _mm512_dpwssd_epi32(acc, b, _mm512_set1_epi32(a));
  }
  // b unsigned, a signed.
  static I dot_uint8(I acc, I b, std::int32_t a) {
    return _mm512_dpbusd_epi32(acc, b, _mm512_set1_epi32(a));
  }
#if defined(NUNCHAKU_PY_AVX512_BF16)
  // Sixteen bf16 twice, for the words of 32 codes in 16 bytes.
  using HalfTable = __m512i;
  static HalfTable half_table(F sixteen) {
    return _mm512_broadcast_i64x4(same_bits<__m256i>(_mm512_cvtneps_pbh(sixteen)));
  }
  static I lookup_half(HalfTable table, const std::uint8_t* nibbles) {
    const I bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(nibbles)));
    // byte·4097: the low nibble in the low word, the high one in the high word; of a word five bits count, and the
    // fifth tells equal halves of the table apart.
    return _mm512_permutexvar_epi16(_mm512_madd_epi16(bytes, _mm512_set1_epi32(4097)), table);
  }
  // The same for two groups of 64 codes in 64 bytes, in their order: a word holds four neighbours, so part i has every
  // fourth code from the i-th on, sixteen of the first group before sixteen of the second.
  struct Quads {
    I part0, part1, part2, part3;
  };
  static HalfTable half_tables(F first, F second) {
    return same_bits<I>(_mm512_cvtne2ps_pbh(second, first));
  }
  static Quads lookup_quads(HalfTable tables, const std::uint8_t* nibbles) {
    const I words = _mm512_loadu_si512(nibbles), low = _mm512_set1_epi16(15);
    const I second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);  // the table's other half
    const auto values = [&](I shifted) {
      constexpr int either = 0xEA;  // (shifted & low) | second
      return _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(shifted, low, second, either), tables);
    };
    return {values(words), values(_mm512_srli_epi16(words, 4)), values(_mm512_srli_epi16(words, 8)),
            values(_mm512_srli_epi16(words, 12))};
  }
  static F dot_words(F acc, I a, I b) {
    return _mm512_dpbf16_ps(acc, same_bits<__m512bh>(a), same_bits<__m512bh>(b));
  }
  // Two products are added at once and subnormal numbers count as zero.
  static F dot_bf16(F acc, I b, std::int32_t a) {
    return _mm512_dpbf16_ps(acc, same_bits<__m512bh>(b), same_bits<__m512bh>(_mm512_set1_epi32(a)));
  }
#endif
};

}  // namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA
