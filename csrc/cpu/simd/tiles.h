// The matrix registers of AMX: eight tiles of 16 rows of 64 bytes. With NUNCHAKU_PY_AMX_EMULATED the same operations
// are done in memory as the instruction reference describes them, so that what is built on tiles can run on any CPU.
#include <cstdint>
#include <cstring>

namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA {

#if defined(NUNCHAKU_PY_AMX_EMULATED)

struct Tiles {
  static std::uint8_t (&memory())[8][1024] {
    static thread_local std::uint8_t tiles[8][1024];
    return tiles;
  }
  template <int t>
  static void zero() {
    std::memset(memory()[t], 0, 1024);
  }
  template <int t>
  static void load(const void* from, std::int64_t stride) {
    for (int row = 0; row < 16; row++)
      std::memcpy(memory()[t] + 64 * row, static_cast<const char*>(from) + row * stride, 64);
  }
  template <int t>
  static void store(void* to, std::int64_t stride) {
    for (int row = 0; row < 16; row++) std::memcpy(static_cast<char*>(to) + row * stride, memory()[t] + 64 * row, 64);
  }
  // c[m][n] += Σ_k a[m][k]·b[k / 4][4n + k % 4], signed bytes
  template <int c, int a, int b>
  static void dot_int8() {
    const auto* left = reinterpret_cast<const std::int8_t*>(memory()[a]);
    const auto* right = reinterpret_cast<const std::int8_t*>(memory()[b]);
    for (int m = 0; m < 16; m++)
      for (int n = 0; n < 16; n++) {
        std::int32_t sum;
        std::memcpy(&sum, memory()[c] + 64 * m + 4 * n, 4);
        for (int k = 0; k < 64; k++) sum += left[64 * m + k] * right[64 * (k / 4) + 4 * n + k % 4];
        std::memcpy(memory()[c] + 64 * m + 4 * n, &sum, 4);
      }
  }
  // The same for pairs of bf16 and sums in fp32; subnormal numbers count as zero.
  template <int c, int a, int b>
  static void dot_bf16() {
    const auto value = [](int tile, int row, int place) {
      std::uint16_t bits;
      std::memcpy(&bits, memory()[tile] + 64 * row + 2 * place, 2);
      return bits & 0x7F80 ? bf16_value(bits) : 0.0f;
    };
    for (int m = 0; m < 16; m++)
      for (int n = 0; n < 16; n++) {
        float sum;
        std::memcpy(&sum, memory()[c] + 64 * m + 4 * n, 4);
        for (int k = 0; k < 32; k++) sum += value(a, m, k) * value(b, k / 2, 2 * n + k % 2);
        std::memcpy(memory()[c] + 64 * m + 4 * n, &sum, 4);
      }
  }
};

struct TileScope {};

#else

// As assembler, because GCC 12's intrinsics take literal numbers only and do not say that they read memory.
struct Tiles {
  template <int t>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(t));
  }
  template <int t>
  static void load(const void* from, std::int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(t) : "memory");
  }
  template <int t>
  static void store(void* to, std::int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(t) : "memory");
  }
  template <int c, int a, int b>
  static void dot_int8() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
  template <int c, int a, int b>
  static void dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
};

// Tiles as we use them, for as long as it lives; then as they were: oneDNN keeps a configuration of its own.
class TileScope {
 public:
  TileScope() {
    asm volatile("sttilecfg %0" : "=m"(before_)::"memory");
    Configuration whole{};
    whole.palette = 1;
    for (int t = 0; t < 8; t++) {
      whole.row_bytes[t] = 64;
      whole.rows[t] = 16;
    }
    asm volatile("ldtilecfg %0" ::"m"(whole) : "memory");
  }
  ~TileScope() {
    if (before_.palette)
      asm volatile("ldtilecfg %0" ::"m"(before_) : "memory");
    else
      asm volatile("tilerelease" ::: "memory");
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  struct alignas(64) Configuration {
    std::uint8_t palette, start_row, reserved[14];
    std::uint16_t row_bytes[16];
    std::uint8_t rows[16];
  };
  Configuration before_;
};

#endif

}  // namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA
