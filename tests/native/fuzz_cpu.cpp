// Calls the CPU engines of every instruction set that this CPU has, with random shapes and formats, each tensor in a heap
// block of exactly its size, and compares with cpu_model.h. `make sanitize` runs it under sanitizers, which see a stray
// byte read or written and threads that meet. Without Python, so without a pool of OpenMP: threads are std::thread.
//
//   fuzz_cpu [seconds per instruction set] [seed of the first case]        the seed that failed, run first, fails again
#include <algorithm>
#include <chrono>
#include <cstdio>

#include "cpu/isa.h"
#include "cpu_model.h"

namespace {

using namespace model;

struct Failure {
  std::string what;
};

class Random {
 public:
  explicit Random(std::uint64_t seed) : source_(seed) {}
  std::int64_t upto(std::int64_t most) { return std::uniform_int_distribution<std::int64_t>(0, most)(source_); }
  bool chance(int in) { return upto(in - 1) == 0; }
  double normal() { return std::normal_distribution<double>()(source_); }
  template <class T>
  T one_of(std::initializer_list<T> choices) {
    return choices.begin()[upto(static_cast<std::int64_t>(choices.size()) - 1)];
  }

  // Sizes at which something begins or ends, and others.
  std::int64_t size(std::int64_t most) {
    const auto edge = one_of<std::int64_t>({0, 1, 2, 4, 5, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 127, 128, 129});
    return chance(2) ? std::min(edge, most) : upto(most);
  }
  Type type() { return one_of({Type::f32, Type::bf16, Type::f16}); }

  Numbers numbers(Type type, std::int64_t count, double spread = 1) {
    Numbers out(type, count);
    for (std::int64_t i = 0; i < count; i++) put(out, i, normal() * spread);
    return out;
  }
  Numbers positive(Type type, std::int64_t count) {
    Numbers out(type, count);
    for (std::int64_t i = 0; i < count; i++) put(out, i, 0.25 + static_cast<double>(upto(1000)) / 1000);
    return out;
  }
  Block bytes(std::int64_t count) {
    Block out(static_cast<std::size_t>(count));
    for (std::int64_t i = 0; i < count; i++) out.as<std::uint8_t>()[i] = static_cast<std::uint8_t>(upto(255));
    return out;
  }
  // Any bits at all: NaN, infinities, subnormal and huge numbers.
  void spoil(const Block& block) {
    for (std::size_t i = 0; i < block.size; i++) block.as<std::uint8_t>()[i] = static_cast<std::uint8_t>(upto(255));
  }

 private:
  static void put(Numbers& out, std::int64_t i, double v) {
    const auto wide = static_cast<float>(rounded(out.kind, v));  // normal in each type
    std::uint32_t bits;
    std::memcpy(&bits, &wide, 4);
    if (out.kind.bytes() == 2) {
      const std::uint32_t rest = bits & 0x7FFFFFFF;
      const std::uint32_t half = rest < 0x38800000 ? 0 : (rest >> 13) - (112u << 10);
      bits = (bits >> 16 & 0x8000) | (out.kind.exponent_bits == 8 ? rest >> 16 : half);
    }
    std::memcpy(out.block.as<char>() + i * out.kind.bytes(), &bits, static_cast<std::size_t>(out.kind.bytes()));
  }
  std::mt19937_64 source_;
};

void expect(bool holds, const std::string& what) {
  if (!holds) throw Failure{what};
}

Array array(const Numbers& n) {
  const Type type = n.kind.bytes() == 4 ? Type::f32 : n.kind.exponent_bits == 8 ? Type::bf16 : Type::f16;
  return {n.block.as<void>(), type};
}

constexpr double unit = 0x1p-24;

// ----------------------------------------------------------------------------------------------------------- quantizing
struct QuantizeCase {
  const Engine& engine;
  QuantizeArguments a;
  Numbers x, inv_smooth, down, weight, scale, shift, h;
  Block qx, sx;

  QuantizeCase(const Engine& e, Random& random, bool norm)
      : engine(e), a(shape(random, norm)), x(random.numbers(a.x.type, a.m * a.k)),
        inv_smooth(random.positive(Type::f32, a.k)),
        down(random.numbers(a.x.type, a.r * a.k)), weight(random.numbers(random.type(), norm ? a.k : 0)),
        scale(random.numbers(random.type(), norm ? a.samples * a.k : 0)),
        shift(random.numbers(random.type(), norm ? a.samples * a.k : 0)), h(random.numbers(Type::f32, a.m * a.r)),
        qx(random.bytes(codes_bytes(a))), sx(random.bytes(scales_bytes(a))) {
    a.x.data = x.block.as<void>(), a.inv_smooth = inv_smooth.block.as<float>(), a.down = down.block.as<void>();
    a.norm_weight = array(weight), a.scale = array(scale), a.modulate_shift = array(shift);
    a.qx = qx.as<void>(), a.sx = sx.as<void>(), a.h = h.block.as<float>();
  }

  static QuantizeArguments shape(Random& random, bool norm) {
    QuantizeArguments a;
    a.m = random.size(60), a.k = random.size(300), a.r = random.size(70);
    a.threads = static_cast<int>(random.upto(2) + 1);
    a.x.type = random.type();
    a.format = random.one_of({Format::none, Format::int4, Format::uint4, Format::nvfp4, Format::int8});
    const bool whole = a.format == Format::none || a.format == Format::int8;
    a.group = whole ? 0 : random.one_of<std::int64_t>({16, 32, 48, 64, 128, 0});
    a.shift = random.one_of({0.0f, 0.171875f, -0.25f});
    if (!norm) return a;
    a.norm = random.one_of({Norm::layer, Norm::rms});
    a.eps = 1e-6f;
    a.samples = a.m && a.m % 3 == 0 ? 3 : 1;
    return a;
  }
  static std::int64_t codes_bytes(const QuantizeArguments& a) {
    if (a.format == Format::none) return a.m * a.k * kind_of(a.x.type).bytes();
    return a.m * (a.format == Format::int8 ? a.k : (a.k + 1) / 2);
  }
  static Kind scale_kind(const QuantizeArguments& a) {
    return a.format == Format::nvfp4 ? e4m3 : kind_of(a.format == Format::int8 ? Type::f32 : a.x.type);
  }
  static std::int64_t scales_bytes(const QuantizeArguments& a) {
    return a.format == Format::none ? 0 : a.m * group_count(a.k, a.group) * scale_kind(a).bytes();
  }

  void run() const { engine.quantize_act(a); }

  // Rows of x as the codes are made of them: with a norm, what the engine itself makes of them, if that is near.
  std::vector<std::vector<double>> rows() const {
    const std::vector<double> none(static_cast<std::size_t>(a.k));
    std::vector<std::vector<double>> result(static_cast<std::size_t>(a.m), none);
    for (std::int64_t m = 0; m < a.m; m++)
      for (std::int64_t k = 0; k < a.k; k++) result[m][k] = x[m * a.k + k];
    if (a.norm == Norm::none) return result;
    Numbers plain(a.x.type, a.m * a.k), ones(Type::f32, a.k);
    for (std::int64_t k = 0; k < a.k; k++) ones.block.as<float>()[k] = 1;
    QuantizeArguments b = a;
    b.format = Format::none, b.group = 0, b.shift = 0, b.r = 0;
    b.inv_smooth = ones.block.as<float>(), b.qx = plain.block.as<void>(), b.sx = nullptr, b.h = nullptr;
    engine.quantize_act(b);
    for (std::int64_t m = 0; m < a.m; m++) {
      check_norm(result[m], m, plain);
      for (std::int64_t k = 0; k < a.k; k++) result[m][k] = plain[m * a.k + k];
    }
    return result;
  }
  void check_norm(const std::vector<double>& row, std::int64_t m, const Numbers& plain) const {
    double mean = 0, square = 0;
    for (const double v : row) mean += a.norm == Norm::layer ? v / static_cast<double>(a.k) : 0;
    for (const double v : row) square += (v - mean) * (v - mean) / static_cast<double>(a.k);
    const std::int64_t sample = m / (a.m / a.samples) * a.k;
    for (std::int64_t k = 0; k < a.k; k++) {
      const double normed = (row[k] - mean) / std::sqrt(square + a.eps) * weight[k] * (1 + scale[sample + k]);
      // Numbers of a few units: the roundings of sums, and a variance that may be as small as eps.
      const double slack = 2e-4 * (std::fabs(normed) + std::fabs(shift[sample + k]) + std::fabs(weight[k]));
      expect(near(plain[m * a.k + k], plain.kind, {normed + shift[sample + k], slack}), "normalized value");
    }
  }

  void check() const {
    const auto all = rows();
    for (std::int64_t m = 0; m < a.m; m++) {
      std::vector<float> xhat;
      for (std::int64_t k = 0; k < a.k; k++) {
        const float moved = static_cast<float>(all[m][k]) + a.shift;
        xhat.push_back(moved * inv_smooth.block.as<float>()[k]);
      }
      check_codes(m, xhat);
      for (std::int64_t r = 0; r < a.r; r++) {
        double sum = 0, size = 0;
        for (std::int64_t k = 0; k < a.k; k++) {
          sum += all[m][k] * down[r * a.k + k];
          size += std::fabs(all[m][k] * down[r * a.k + k]);
        }
        expect(near(h[m * a.r + r], h.kind, {sum, static_cast<double>(a.k + 8) * unit * size + 1e-36}), "h");
      }
    }
  }
  void check_codes(std::int64_t m, const std::vector<float>& xhat) const {
    if (a.format == Format::none) {
      for (std::int64_t k = 0; k < a.k; k++) {
        std::uint32_t bits = 0;
        const Kind kind = kind_of(a.x.type);
        std::memcpy(&bits, qx.as<char>() + (m * a.k + k) * kind.bytes(), static_cast<std::size_t>(kind.bytes()));
        expect(decode(kind, bits) == rounded(kind, xhat[k]), "x̂");
      }
      return;
    }
    const QuantizedRow want(xhat, a.format, a.group, scale_kind(a));
    const auto groups = static_cast<std::int64_t>(want.scales.size());
    for (std::int64_t g = 0; g < groups; g++) {
      std::uint32_t bits = 0;
      const int bytes = scale_kind(a).bytes();
      std::memcpy(&bits, sx.as<char>() + (m * groups + g) * bytes, static_cast<std::size_t>(bytes));
      expect(decode(scale_kind(a), bits) == want.scales[g], "scale");
    }
    for (std::int64_t k = 0; k < a.k; k++)
      if (a.format == Format::int8)
        expect(qx.as<std::int8_t>()[m * a.k + k] == want.codes[k], "int8 code");
      else
        expect(nibble(qx.as<std::uint8_t>() + m * ((a.k + 1) / 2), k) == (want.codes[k] & 15), "4-bit code");
    if (a.k % 2 && a.format != Format::int8)
      expect(qx.as<std::uint8_t>()[m * ((a.k + 1) / 2) + a.k / 2] < 16, "the unused nibble");
  }
  void spoil(Random& random) const {
    for (const Numbers* n : {&x, &inv_smooth, &down, &weight, &scale, &shift}) random.spoil(n->block);
  }
  std::string describe() const {
    char text[200];
    std::snprintf(text, sizeof text, "m %lld k %lld r %lld type %d format %d group %lld shift %g norm %d threads %d",
                  static_cast<long long>(a.m), static_cast<long long>(a.k), static_cast<long long>(a.r),
                  static_cast<int>(a.x.type), static_cast<int>(a.format), static_cast<long long>(a.group),
                  static_cast<double>(a.shift), static_cast<int>(a.norm), a.threads);
    return text;
  }
};

#include "fuzz_cpu_linear.h"
#include "fuzz_cpu_rounding.h"

// -------------------------------------------------------------------------------------------------------------- driving
template <class Case>
void one(Case& c, Random& random) {
  try {
    c.run();
    c.check();
    if (random.chance(8)) {  // whatever comes of it, memory is left alone
      c.spoil(random);
      c.run();
    }
  } catch (Failure& f) {
    f.what += " is wrong: " + c.describe();
    throw;
  }
}

std::int64_t drive(const Isa& isa, double seconds, std::uint64_t seed) {
  const auto begin = std::chrono::steady_clock::now();
  std::int64_t cases = 0;
  for (;; cases++, seed++) {
    if (std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() > seconds) return cases;
    Random random(seed);
    try {
      if (const std::int64_t kind = random.upto(7); kind < 2) {
        QuantizeCase c(*isa.engine, random, kind == 1);
        one(c, random);
      } else if (kind == 2) {
        SweepCase c(*isa.engine, random);
        one(c, random);
      } else if (kind == 3) {
        RoundCase c(*isa.engine, random);
        one(c, random);
      } else {
        LinearCase c(isa, random, cases == 0);
        one(c, random);
      }
    } catch (const Failure& f) {
      std::printf("%s: seed %llu: %s\n", isa.name, static_cast<unsigned long long>(seed), f.what.c_str());
      std::exit(1);
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  const double seconds = count > 1 ? std::atof(arguments[1]) : 5;
  const std::uint64_t seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  for (const auto& isa : isas()) {
    if (!isa.obstacle.empty())
      std::printf("%s: not run, %s\n", isa.name, isa.obstacle.c_str());
    else
      std::printf("%s: %lld cases agree\n", isa.name, static_cast<long long>(drive(isa, seconds, seed)));
  }
}
