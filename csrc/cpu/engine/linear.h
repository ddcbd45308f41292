// The loop around a product: tokens are packed once, then every thread takes panels of output channels, expands their
// weights once and goes over all tokens with them.
#pragma once
#include "../parallel.h"
#include "branch.h"
#include "loops.h"

namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA {

constexpr std::int64_t panel_bytes = 256 << 10;  // an expanded panel stays in the second-level cache
constexpr std::int64_t columns_bytes = 6 << 20;  // packed tokens in the third, beside what else is used
constexpr std::int64_t most_panel_rows = 64;
constexpr std::int64_t fewest_split_tokens = 256;  // a panel is expanded anew by each thread that shares it

inline std::int64_t panel_rows(std::int64_t stride) {
  const std::int64_t fit = panel_bytes / (4 * stride) / (2 * W) * (2 * W);
  return fit < 2 * W ? 2 * W : smaller(fit, most_panel_rows);
}

template <class T>
T* carve(char*& memory, std::int64_t count) {
  T* result = reinterpret_cast<T*>(memory);
  memory += round_up(count * static_cast<std::int64_t>(sizeof(T)), 64);
  return result;
}

// Tokens [first, first + count) as columns, with their scales and the branch's h.
struct Tokens {
  std::int64_t first, count, vectors;
  std::int32_t* columns;
  float* scales;    // (vectors / tile_vectors, token_scales, token_step)
  std::int32_t* h;  // (vectors, rank, W)
};

template <class Loop>
class Linear {
 public:
  explicit Linear(const LinearArguments& arguments)
      : a(arguments), loop(a), branch(a), rank(branch.words), rows(panel_rows(loop.stride)) {}

  void run() const {
    if (a.m == 0 || a.n == 0) return;
    const std::int64_t fit = columns_bytes / (4 * loop.depth) / token_step * token_step;
    const std::int64_t step = fit < token_step ? token_step : fit;
    for (std::int64_t m = 0; m < a.m; m += step) {
      const Tokens tokens = pack(m, smaller(step, a.m - m));
      const std::int64_t panels = panel_count(a, rows), parts = split(panels, tokens.count);
      const std::int64_t blocks = (tokens.vectors + tile_vectors - 1) / tile_vectors;
      parallel(a.threads, panels * parts, [&](std::int64_t item) {
        const std::int64_t part = item % parts;
        panel(item / parts, tokens, blocks * part / parts * tile_vectors,
              smaller(blocks * (part + 1) / parts * tile_vectors, tokens.vectors));
      });
    }
  }

 private:
  // Parts that the tokens are split in, so that every thread finds work.
  std::int64_t split(std::int64_t panels, std::int64_t tokens) const {
    const std::int64_t wanted = (2 * a.threads + panels - 1) / panels;
    const std::int64_t possible = tokens / fewest_split_tokens;
    return wanted < 2 || possible < 2 ? 1 : smaller(wanted, possible);
  }

  Tokens pack(std::int64_t first, std::int64_t count) const {
    static thread_local Scratch scratch;
    Tokens t{first, count, (count + W - 1) / W, nullptr, nullptr, nullptr};
    const std::int64_t blocks = (t.vectors + tile_vectors - 1) / tile_vectors;
    const std::int64_t words = t.vectors * W * loop.depth, scales = blocks * loop.token_scales() * token_step;
    char* memory =
        static_cast<char*>(scratch.get(static_cast<std::size_t>(4 * (words + scales + t.vectors * W * rank) + 192)));
    t.columns = carve<std::int32_t>(memory, words);
    t.scales = carve<float>(memory, scales);
    t.h = carve<std::int32_t>(memory, t.vectors * W * rank);
    parallel(a.threads, t.vectors, [&](std::int64_t v) { pack_vector(t, v); });
    return t;
  }

  void pack_vector(const Tokens& t, std::int64_t v) const {
    static thread_local Scratch scratch;
    const std::int64_t stride = loop.stride, count = smaller(W, t.count - v * W);
    char* memory =
        static_cast<char*>(scratch.get(static_cast<std::size_t>(4 * W * (stride + rank) + 4 * loop.padded + 256)));
    auto* staged = carve<std::int32_t>(memory, W * stride);
    auto* h = carve<std::int32_t>(memory, W * rank);
    auto* spare = carve<float>(memory, loop.padded);
    const std::int64_t scales = loop.token_scales();
    float* sx = t.scales + v / tile_vectors * scales * token_step + v % tile_vectors * W;
    for (std::int64_t i = 0; i < W; i++) {
      const std::int64_t m = t.first + v * W + smaller(i, count - 1);  // rows without a token repeat the last one
      loop.stage(staged + i * stride, spare, m);
      loop.stage_scales(sx + i, m, token_step);
      if (rank) branch.stage_h(h + i * rank, a.h + m * a.r);
    }
    pack_columns(t.columns + v * W * loop.depth, staged, stride, loop.depth);
    pack_columns(t.h + v * W * rank, h, rank, rank);
  }

  // One panel over tokens [begin, end), counted in vectors.
  void panel(std::int64_t index, const Tokens& t, std::int64_t begin, std::int64_t end) const {
    static thread_local Scratch scratch;
    const Panel p = panel_of(a, index, rows);
    const std::int64_t scales = loop.scale_count(p.rows);
    const std::int64_t words =
        p.rows * (loop.stride + 3 * token_step + rank + 3) + 2 * scales + loop.padded + 6 * loop.w.groups + 2 * W;
    char* memory = static_cast<char*>(scratch.get(static_cast<std::size_t>(4 * words + 1024)));
    Pieces pieces{};
    pieces.weights = carve<std::int32_t>(memory, p.rows * loop.stride);
    pieces.scales = carve<float>(memory, scales);
    pieces.sums = carve<std::int32_t>(memory, p.rows);
    pieces.channels = carve<float>(memory, p.rows);
    pieces.offsets = carve<float>(memory, scales);
    pieces.bytes = carve<std::int8_t>(memory, loop.padded);
    pieces.row_scales = carve<float>(memory, 2 * (loop.w.groups + W));
    pieces.tables = carve<std::int8_t>(memory, 16 * loop.w.groups);
    pieces.integers = carve<std::int32_t>(memory, p.rows * token_step);
    auto* up = carve<std::int32_t>(memory, p.rows * rank);
    float* bias = carve<float>(memory, p.rows);
    float* c = carve<float>(memory, p.rows * token_step);
    float* turned = carve<float>(memory, p.rows * W);
    [[maybe_unused]] const TileScope tiles;
    for (std::int64_t i = 0; i < p.rows; i++) {
      const std::int64_t n = p.channel(i);
      loop.expand_row(pieces, i, n);
      if (rank) branch.stage_up(up + i * rank, a.up, n);
      bias[i] = number(a.bias.data, a.bias.type, n);
    }
    for (std::int64_t v = begin; v < end; v += tile_vectors) {
      const std::int64_t vectors = smaller(tile_vectors, end - v);
      const float* sx = t.scales + v / tile_vectors * loop.token_scales() * token_step;
      loop.multiply(pieces, p.rows, t.columns + v * W * loop.depth, sx, vectors, c);
      branch.add(up, p.rows, t.h + v * W * rank, vectors, c);
      finish(a, p, t.first + v * W, t.first + t.count, c, turned, bias);
    }
  }

  const LinearArguments& a;
  const Loop loop;
  const Branch branch;
  const std::int64_t rank, rows;  // rank: in words
};

}  // namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA
