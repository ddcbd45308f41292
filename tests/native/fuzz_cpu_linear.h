// The linears of fuzz_cpu.cpp; included there, inside its namespace.
#pragma once

struct LinearCase {
  const Isa& isa;
  LinearArguments a;
  std::int64_t width;  // columns of y
  Numbers x, h, up, bias, gate, residual, y, kept;
  Numbers act_scales, weight_scales, aux;
  Block codes, weights;

  LinearCase(const Isa& i, Random& random, bool many)
      : isa(i), a(shape(random, many)), width(a.ending == Ending::glu ? a.n / 2 : a.n),
        x(random.numbers(a.x, a.act == Format::none ? a.m * a.k : 0)), h(random.numbers(Type::f32, a.m * a.r)),
        up(random.numbers(a.up.type, a.n * a.r)), bias(random.numbers(random.type(), a.n)),
        gate(random.numbers(random.type(), a.ending == Ending::gate_residual ? a.samples * a.n : 0)),
        residual(random.numbers(a.out, a.ending == Ending::gate_residual ? a.m * a.n : 0)),
        y(random.numbers(a.out, a.m * width)), kept(Type::f32, a.n),
        act_scales(scales(random, a.act, a.act_scales, a.m)),
        weight_scales(scales(random, a.weight, a.weight_scales, a.n)), aux(auxiliary(random)),
        codes(random.bytes(a.act == Format::none ? 0 : a.m * row_bytes(a.act))),
        weights(random.bytes(a.n * row_bytes(a.weight))) {
    a.qx = a.act == Format::none ? x.block.as<void>() : codes.as<void>(), a.sx = act_scales.block.as<void>();
    a.qw = weights.as<std::uint8_t>(), a.sw = weight_scales.block.as<void>(), a.aux = array(aux);
    a.h = h.block.as<float>(), a.up = array(up), a.bias = array(bias), a.y = y.block.as<void>();
    a.gate = array(gate), a.residual = residual.block.as<void>();
    without_128(a.act, codes), without_128(a.weight, weights);
    if (a.act != Format::int8 || a.weight == Format::int8) return;
    LinearArguments b = a;
    b.y = kept.block.as<void>(), b.m = 0, b.qx = b.sx = nullptr;
    isa.engine->row_scales(b);
    if (random.chance(2)) a.row_scales = kept.block.as<float>();
  }

  static LinearArguments shape(Random& random, bool many) {
    LinearArguments a;
    a.m = random.size(50), a.k = random.size(300), a.n = random.size(80), a.r = random.size(70);
    a.threads = static_cast<int>(random.upto(2) + 1);
    a.act = random.one_of({Format::int8, Format::none, Format::int4, Format::uint4, Format::nvfp4});
    a.weight = random.one_of({Format::int4, Format::uint4, Format::nvfp4, Format::int8});
    const bool four = a.act != Format::int8 && a.act != Format::none;
    if (four && a.weight == Format::int8) a.weight = Format::nvfp4;
    if (many) a.act = Format::int8, a.m = 600, a.k = 33001, a.n = 3;  // more than are packed at a time; split
    a.group = a.weight == Format::int8 ? 0 : random.one_of<std::int64_t>({16, 32, 48, 64, 128, 0});
    a.x = random.type(), a.out = random.chance(4) ? Type::f32 : a.x, a.up.type = a.x;
    a.act_scales = random.type(), a.weight_scales = random.type();
    a.ending = random.one_of({Ending::store, Ending::activate, Ending::glu, Ending::gate_residual});
    a.activation = random.one_of({Activation::none, Activation::gelu_tanh, Activation::gelu, Activation::silu});
    a.gate_first = random.chance(2);
    a.n += a.ending == Ending::glu ? a.n % 2 : 0;
    a.samples = a.m && a.m % 3 == 0 ? 3 : 1;
    return a;
  }
  std::int64_t row_bytes(Format format) const { return format == Format::int8 ? a.k : (a.k + 1) / 2; }
  Numbers scales(Random& random, Format format, Type type, std::int64_t rows) const {
    if (format == Format::none) return Numbers(Type::f32, 0);
    if (format == Format::int8) return random.positive(Type::f32, rows);
    const std::int64_t count = rows * group_count(a.k, a.group);
    if (format != Format::nvfp4) return random.positive(type, count);
    Numbers out(e4m3, count);
    auto* bits = out.block.as<std::uint8_t>();
    for (std::int64_t i = 0; i < count; i++) bits[i] = static_cast<std::uint8_t>(random.upto(0x60));
    return out;
  }
  Numbers auxiliary(Random& random) const {
    if (a.weight == Format::nvfp4) return random.numbers(Type::f32, a.n);
    if (a.weight == Format::uint4) return random.numbers(random.type(), a.n * group_count(a.k, a.group));
    return Numbers(Type::f32, 0);
  }
  static void without_128(Format format, const Block& block) {  // −128 is no INT8 code
    for (std::size_t i = 0; format == Format::int8 && i < block.size; i++)
      if (block.as<std::int8_t>()[i] == -128) block.as<std::int8_t>()[i] = 127;
  }

  void run() const { isa.engine->linear(a); }

  WeightRow weight_row(std::int64_t n) const {
    WeightRow row;
    std::vector<float> sizes, scales;  // of nvfp4
    const auto* packed = weights.as<std::uint8_t>() + n * row_bytes(a.weight);
    for (std::int64_t k = 0; k < a.k; k++) {
      if (a.weight == Format::int8) {
        row.w8.push_back(static_cast<std::int8_t>(packed[k]));
        row.s_ch = static_cast<float>(weight_scales[n]);
        row.w.push_back(static_cast<float>(row.w8.back()) * row.s_ch);
        row.size.push_back(std::fabs(row.w.back()));
        continue;
      }
      const std::int64_t place = n * group_count(a.k, a.group) + group_of(k, a.group);
      const auto code = static_cast<float>(code_value(a.weight, nibble(packed, k)));
      float w = code * static_cast<float>(weight_scales[place]);
      double size = std::fabs(w);
      if (a.weight == Format::uint4) {
        size += std::fabs(aux[place]);
        w = w + static_cast<float>(aux[place]);
      }
      if (a.weight == Format::nvfp4) {
        sizes.push_back(std::fabs(code));
        scales.push_back(static_cast<float>(weight_scales[place]));
        w = w * static_cast<float>(aux[n]);
        size = std::fabs(w);
      }
      row.w.push_back(w);
      row.size.push_back(size);
    }
    if (a.weight == Format::nvfp4) row.fold_nvfp4(sizes, scales, static_cast<float>(aux[n]));
    if (a.weight == Format::int4 || a.weight == Format::uint4) row.fold();
    return row;
  }

  // The value of token m at place k, W4A8: its code.
  double token(std::int64_t m, std::int64_t k) const {
    if (a.act == Format::none) return x[m * a.k + k];
    if (a.act == Format::int8) return codes.as<std::int8_t>()[m * a.k + k];
    const double code = code_value(a.act, nibble(codes.as<std::uint8_t>() + m * row_bytes(a.act), k));
    return code * act_scales[m * group_count(a.k, a.group) + group_of(k, a.group)];
  }

  // y before its ending.
  Value sum(std::int64_t m, const std::vector<double>& tokens, const WeightRow& row, std::int64_t n) const {
    double acc = 0, size = 0, branch = 0, branch_size = 0;
    for (std::int64_t k = 0; k < a.k; k++) {
      const double w = a.act == Format::int8   ? row.w8[k]
                       : a.act == Format::none ? rounded(kind_of(a.x), row.w[k])
                                               : row.w[k];
      acc += tokens[k] * w;
      size += std::fabs(tokens[k]) * (a.act == Format::int8 ? 0 : std::max(row.size[k], std::fabs(w)));
    }
    if (a.act == Format::int8) acc = static_cast<float>(acc) * static_cast<float>(act_scales[m]) * row.s_ch;
    for (std::int64_t r = 0; r < a.r; r++) {
      branch += h[m * a.r + r] * up[n * a.r + r];
      branch_size += std::fabs(h[m * a.r + r] * up[n * a.r + r]);
    }
    const double all = size + std::fabs(acc) + branch_size + std::fabs(bias[n]);
    const bool halves = std::strncmp(isa.name, "amx", 3) == 0 && a.up.type == Type::bf16;  // h in two bf16
    return {acc + branch + bias[n],
            (2 * static_cast<double>(a.k) * unit * size + static_cast<double>(2 * a.r + 8) * unit * all) * 1.01 +
                (halves ? 0x1p-17 * branch_size : 0) + 1e-35};
  }
  Value activated(const Value& v) const {
    const double own = a.activation == Activation::none ? 0 : 0x1p-18 * std::fabs(v.exact);
    return {activate(v.exact, a.activation), 1.13 * v.slack + own};
  }
  Value product_of(const Value& v, const Value& w) const {
    const double exact = v.exact * w.exact;
    const double slack = std::fabs(v.exact) * w.slack + std::fabs(w.exact) * v.slack + v.slack * w.slack;
    return {exact, slack + unit * std::fabs(exact)};
  }

  void check() const {
    std::vector<WeightRow> rows;
    for (std::int64_t n = 0; n < a.n; n++) {
      rows.push_back(weight_row(n));
      if (a.act == Format::int8 && a.weight != Format::int8)
        expect(kept[n] == rows.back().s_ch, "s_ch");
    }
    std::vector<double> tokens(static_cast<std::size_t>(a.k));
    for (std::int64_t m = 0; m < a.m; m++) {
      for (std::int64_t k = 0; k < a.k; k++) tokens[k] = token(m, k);
      for (std::int64_t n = 0; n < width; n++) {
        const std::int64_t first = a.ending == Ending::glu && a.gate_first ? n + width : n;
        Value v = sum(m, tokens, rows[first], first);
        if (a.ending == Ending::activate) v = activated(v);
        if (a.ending == Ending::glu) {
          const std::int64_t second = a.gate_first ? n : n + width;
          v = product_of(v, activated(sum(m, tokens, rows[second], second)));
        }
        if (a.ending == Ending::gate_residual) {
          v = product_of(v, {gate[m / (a.m / a.samples) * a.n + n], 0});
          v.exact += residual[m * a.n + n];
          v.slack += unit * std::fabs(v.exact);
        }
        expect(near(y[m * width + n], y.kind, v), "y[" + std::to_string(m) + ", " + std::to_string(n) + "]");
      }
    }
  }
  void spoil(Random& random) const {
    for (const Numbers* n : {&x, &h, &up, &bias, &gate, &residual, &act_scales, &weight_scales, &aux, &kept})
      random.spoil(n->block);
    random.spoil(codes), random.spoil(weights);
  }
  std::string describe() const {
    char text[300];
    std::snprintf(text, sizeof text,
                  "m %lld n %lld k %lld r %lld act %d weight %d group %lld x %d out %d scales %d %d kept %d ending %d "
                  "activation %d gate first %d threads %d",
                  static_cast<long long>(a.m), static_cast<long long>(a.n), static_cast<long long>(a.k),
                  static_cast<long long>(a.r), static_cast<int>(a.act), static_cast<int>(a.weight),
                  static_cast<long long>(a.group), static_cast<int>(a.x), static_cast<int>(a.out),
                  static_cast<int>(a.act_scales), static_cast<int>(a.weight_scales), a.row_scales != nullptr,
                  static_cast<int>(a.ending), static_cast<int>(a.activation), a.gate_first, a.threads);
    return text;
  }
};
