// Cases of the quantizer's own loops, for fuzz_cpu.cpp: GPTQ's columns, and rounding with what it costs.
struct SweepCase {
  const Engine& engine;
  SweepArguments a;
  std::int64_t groups;
  Numbers original, columns, errors, upper, step, inverse;
  Block group;

  SweepCase(const Engine& e, Random& random)
      : engine(e), a(shape(random)), groups(random.upto(3) + 1), original(random.numbers(Type::f32, a.k * a.n)),
        columns(Type::f32, a.k * a.n), errors(Type::f32, a.k * a.n), upper(random.numbers(Type::f32, a.k * a.k, 0.1)),
        step(random.positive(Type::f32, groups * a.n)), inverse(Type::f32, groups * a.n),
        group(static_cast<std::size_t>(8 * a.k)) {
    for (std::int64_t j = 0; j < a.k; j++) {
      upper.block.as<float>()[j * a.k + j] = 0.5f + static_cast<float>(random.upto(100)) / 100;
      group.as<std::int64_t>()[j] = random.upto(groups - 1);
    }
    for (std::int64_t i = 0; i < groups * a.n; i++) {
      if (random.chance(20)) step.block.as<float>()[i] = 0;
      const float s = step.block.as<float>()[i];
      inverse.block.as<float>()[i] = s > 0 ? 1 / s : 0;
    }
    a.stride = a.error_stride = a.n, a.upper_stride = a.k;
    a.columns = columns.block.as<float>(), a.errors = errors.block.as<float>(), a.upper = upper.block.as<float>();
    a.step = step.block.as<float>(), a.inverse = inverse.block.as<float>(), a.group = group.as<std::int64_t>();
  }

  static SweepArguments shape(Random& random) {
    SweepArguments a;
    a.n = random.size(100), a.k = random.size(sweep_columns);
    a.format = random.one_of({Format::int4, Format::nvfp4});
    a.threads = static_cast<int>(random.upto(2) + 1);
    return a;
  }

  void run() const {
    if (original.block.size) std::memcpy(a.columns, original.block.as<float>(), original.block.size);
    engine.sweep(a);
  }
  // What is left of c_j once the earlier errors are taken up is its value and its own error; the value is a code's.
  void check() const {
    for (std::int64_t n = 0; n < a.n; n++)
      for (std::int64_t j = 0; j < a.k; j++) {
        double left = original[j * a.n + n], size = std::fabs(left);
        for (std::int64_t i = 0; i < j; i++) {
          const double taken = upper[i * a.k + j] * errors[i * a.n + n];
          left -= taken, size += std::fabs(taken);
        }
        const double q = columns[j * a.n + n], e = errors[j * a.n + n] * upper[j * a.k + j];
        const double slack = static_cast<double>(a.k + 8) * unit * (size + std::fabs(q));
        expect(std::fabs(left - q - e) <= slack, "what a column and its error add up to");
        const double by = step[group.as<std::int64_t>()[j] * a.n + n], most = a.format == Format::nvfp4 ? 6 : 7;
        const double code = by > 0 ? q / by : 0, wide = a.format == Format::nvfp4 && std::fabs(code) > 3.9 ? 1 : 0.5;
        expect(std::fabs(code) <= most * (1 + 4 * unit) && (by > 0 || q == 0), "a value beyond the last code");
        if (by > 0 && std::fabs(left) < most * by)
          expect(std::fabs(left - q) <= wide * by + slack + 8 * unit * most * by, "a value that is not the nearest");
      }
  }
  void spoil(Random& random) const {
    for (const Numbers* n : {&original, &upper, &step, &inverse}) random.spoil(n->block);
  }
  std::string describe() const {
    return "sweep n " + std::to_string(a.n) + " k " + std::to_string(a.k) + " format " +
           std::to_string(static_cast<int>(a.format)) + " threads " + std::to_string(a.threads);
  }
};

struct RoundCase {
  const Engine& engine;
  RoundArguments a;
  Numbers original, r, weight, smooth, signal, rounding;
  Block cost;

  RoundCase(const Engine& e, Random& random)
      : engine(e), a(shape(random)), original(random.numbers(Type::f32, a.n * a.k)), r(Type::f32, a.n * a.k),
        weight(random.numbers(random.type(), a.n * a.k)), smooth(random.positive(Type::f32, a.k)),
        signal(random.positive(Type::f32, a.k)), rounding(random.positive(Type::f32, a.k)),
        cost(static_cast<std::size_t>(8 * a.n)) {
    a.r = r.block.as<float>(), a.weight = array(weight), a.smooth = smooth.block.as<float>();
    a.signal = signal.block.as<float>(), a.rounding = rounding.block.as<float>(), a.cost = cost.as<double>();
  }

  static RoundArguments shape(Random& random) {
    RoundArguments a;
    a.n = random.size(60), a.k = random.size(300);
    a.format = random.one_of({Format::int4, Format::nvfp4});
    a.group = random.one_of<std::int64_t>({16, 32, 48, 64, 128});
    a.scales = random.one_of({Type::bf16, Type::f16});
    a.threads = static_cast<int>(random.upto(2) + 1);
    return a;
  }

  void run() const {
    if (original.block.size) std::memcpy(a.r, original.block.as<float>(), original.block.size);
    engine.round_rows(a);
  }
  // Bits are compared with the torch code by tests/methods/test_fast.py; here that rounding is rounding, and its sum.
  void check() const {
    for (std::int64_t n = 0; n < a.n; n++) {
      double sum = 0;
      for (std::int64_t k = 0; k < a.k; k++) {
        const std::int64_t i = n * a.k + k, begin = k / a.group * a.group;
        double top = 0;
        for (std::int64_t j = begin; j < std::min(begin + a.group, a.k); j++)
          top = std::max(top, std::fabs(original[n * a.k + j]));
        const double exact = weight[i] * smooth[k], error = exact - r[i] - original[i];
        const double slack = 4 * unit * (std::fabs(exact) + top);
        expect(std::fabs(error) <= top / 4 + slack, "rounding");  // of e2m1 half the last step is top/6, scales vary
        sum += signal[k] * error * error + rounding[k] * original[i] * original[i];
      }
      const double slack = 1e-5 * sum + 1e-4;  // fp32 sums, and errors known to a few units of Ŵ only
      expect(std::fabs(cost.as<double>()[n] - sum) <= slack, "the cost of a row");
    }
  }
  void spoil(Random& random) const {
    for (const Numbers* n : {&original, &weight, &smooth, &signal, &rounding}) random.spoil(n->block);
  }
  std::string describe() const {
    return "round_rows n " + std::to_string(a.n) + " k " + std::to_string(a.k) + " format " +
           std::to_string(static_cast<int>(a.format)) + " group " + std::to_string(a.group) + " scales " +
           std::to_string(static_cast<int>(a.scales)) + " threads " + std::to_string(a.threads);
  }
};
