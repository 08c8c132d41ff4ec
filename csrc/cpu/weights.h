// Gradients of the weights and biases from those at the gates: sums over rows of outer products with x and
// with h_{t-1}, for one thread's columns of the gates.
#pragma once

#include <type_traits>

#include "cpu/outer.h"

namespace fastrnn::FASTRNN_ISA {

// Steps begin, begin - 1, ... end + 1 of the backward loop, whose gates are used together; their rows lie together.
struct Chunk {
  int64_t begin, end;
  int64_t row = 0, rows = 0;

  Chunk(const Problem& p, const Steps& at, int64_t s, int64_t k, int64_t most) : begin(k), end(k) {
    for (; end >= 0; --end) {
      const int64_t n = at.active(p.reverse[s] ? p.T - 1 - end : end);
      if (end < k && rows + n > most) break;
      rows += n;
    }
    row = at.row(p.reverse[s] ? p.T - 1 - k : end + 1, 0);
  }
};

template <class C, class T, class E>
class WeightGradients {
  static constexpr int W = Vec<T>::kWidth, G = C::kGates, D = G + C::kSplit, U = G - C::kSplit;

 public:
  // Shares of equal cost. Columns below U * H belong to both weights, then those below G * H to W_ih and the
  // rest, of split gates, to W_hh.
  WeightGradients(const BackwardArgs& a, int part, int parts)
      : a_(a), own_{column(part, parts), column(part + 1, parts)}, outs_(share(a.P, part, parts)) {}

  static bool wanted(const StreamGradients& d) { return d.w_ih || d.w_hh || d.b_ih || d.b_hh || d.w_hr; }

  // Adds a chunk of steps; its gates begin at `gates`, rows of them `pitch` apart.
  void add(const Steps& at, int64_t s, const Chunk& c, const T* gates, int64_t pitch, const Scratch<T>& scratch) const {
    for (int64_t row = 0; row < c.rows; row += kBlockRows) {
      const int64_t rows = c.rows - row < kBlockRows ? c.rows - row : kBlockRows;
      const bool first = c.begin == a_.T - 1 && row == 0;
      for (int64_t begin = own_.begin; begin < own_.end; begin += kBlockColumns) {
        OuterBlock<T> block(part_of(own_, begin), rows, first, scratch);
        block.gather(gates + row * pitch, pitch);
        add_block(block, at, s, c, c.row + row, scratch.in);
      }
      for (int64_t begin = outs_.begin; a_.gradients[s].w_hr && begin < outs_.end; begin += kBlockColumns) {
        OuterBlock<T> block(part_of(outs_, begin), rows, first, scratch);
        add_projection(block, at.rows(), s, c.row + row, scratch.in);
      }
    }
  }

  // All of it from few rows in all, whose gates begin at `dgates`, for granules of units and outputs.
  void few_rows(const Steps& at, int64_t s, const E* dgates, Range units, Range outs) const {
    const E *x[kFewRows], *h[kFewRows], *gates[kFewRows];
    int rows = 0;
    for (int64_t when = 0; when < a_.T; ++when)
      for (int64_t b = 0; b < at.active(when); ++b, ++rows) {
        const int64_t row = at.row(when, b);
        x[rows] = static_cast<const E*>(a_.x) + row * a_.I;
        gates[rows] = dgates + row * D * a_.H;
        h[rows] = previous_h(at, s, when, b);
      }
    const StreamGradients& d = a_.gradients[s];
    const int64_t H = a_.H;
    for (int g = 0; g < G; ++g)
      for (int64_t unit = units.begin * W; unit < units.end * W && unit < H; ++unit) {
        const int64_t at_x = g * H + unit, at_h = (g < U ? g : g + G - U) * H + unit;
        weight_row<T>(rows, gates, at_x, x, a_.I, at_x, d.w_ih, d.b_ih);
        weight_row<T>(rows, gates, at_h, h, a_.P, at_x, d.w_hh, d.b_hh);
      }
    if constexpr (std::is_same_v<T, E>) {
      if (!d.w_hr) return;
      for (int i = 0; i < rows; ++i) {
        gates[i] = static_cast<const T*>(a_.dh) + (s * rows + i) * a_.P;
        h[i] = static_cast<const T*>(a_.m) + (s * rows + i) * H;
      }
      for (int64_t p = outs.begin * W; p < outs.end * W && p < a_.P; ++p)
        weight_row<T>(rows, gates, p, h, H, p, d.w_hr, nullptr);
    }
  }

 private:
  int64_t column(int64_t part, int64_t parts) const {
    const int64_t H = a_.H, widths[] = {U * H, (G - U) * H, (D - G) * H}, costs[] = {a_.I + a_.P, a_.I, a_.P};
    int64_t cost = 0, begin = 0;
    for (int i = 0; i < 3; ++i) cost += widths[i] * costs[i];
    cost = cost * part / parts;
    for (int i = 0; i < 3; ++i) {
      if (cost < widths[i] * costs[i]) return begin + cost / costs[i];
      cost -= widths[i] * costs[i], begin += widths[i];
    }
    return begin;
  }

  static Range part_of(Range r, int64_t begin) {
    return {begin, r.end - begin < kBlockColumns ? r.end : begin + kBlockColumns};
  }

  // The gates of a block, whose first row is `row`.
  void add_block(OuterBlock<T>& block, const Steps& at, int64_t s, const Chunk& c, int64_t row, const T** in) const {
    const int64_t H = a_.H, I = a_.I, P = a_.P;
    const StreamGradients& d = a_.gradients[s];
    const Range of_x = block.clip(0, G * H), shared = block.clip(0, U * H), split = block.clip(G * H, D * H);
    const int64_t split_row = split.begin - (G - U) * H;
    T *w_ih = static_cast<T*>(d.w_ih), *w_hh = static_cast<T*>(d.w_hh);
    T *b_ih = static_cast<T*>(d.b_ih), *b_hh = static_cast<T*>(d.b_hh);
    if (b_ih) block.sum(of_x, b_ih + of_x.begin);
    if (b_hh) block.sum(shared, b_hh + shared.begin);
    if (b_hh) block.sum(split, b_hh + split_row);
    if (w_ih) {
      const Run<T> run{of_x, w_ih + of_x.begin * I};
      for (int64_t k = 0; k < block.rows(); ++k) in[k] = static_cast<const T*>(a_.x) + (row + k) * I;
      block.multiply(in, I, &run, 1);
    }
    if (w_hh) {
      const Run<T> runs[] = {{shared, w_hh + shared.begin * P}, {split, w_hh + split_row * P}};
      previous_rows(at, s, c, row, block.rows(), in);
      block.multiply(in, P, runs, U < G ? 2 : 1);
    }
  }

  // dW_hr += dh^T m, of both of which all rows are at hand.
  void add_projection(OuterBlock<T>& block, int64_t all, int64_t s, int64_t row, const T** in) const {
    const Range r = block.clip(0, a_.P);
    const Run<T> run{r, static_cast<T*>(a_.gradients[s].w_hr) + r.begin * a_.H};
    block.gather(static_cast<const T*>(a_.dh) + (s * all + row) * a_.P, a_.P);
    for (int64_t k = 0; k < block.rows(); ++k) in[k] = static_cast<const T*>(a_.m) + (s * all + row + k) * a_.H;
    block.multiply(in, a_.H, &run, 1);
  }

  const E* previous_h(const Steps& at, int64_t s, int64_t when, int64_t b) const {
    const int64_t before = at.previous(when, b, a_.reverse[s]);
    if (before >= 0) return static_cast<const E*>(a_.y) + (before * a_.S + s) * a_.P;
    return before == -1 && a_.h0 ? static_cast<const E*>(a_.h0) + (s * a_.B + b) * a_.P : nullptr;
  }

  // The h that entered the steps of rows `row` to `row + rows` of a chunk, null for zeros.
  void previous_rows(const Steps& at, int64_t s, const Chunk& c, int64_t row, int64_t rows, const E** h) const {
    for (int64_t k = c.begin; k > c.end; --k) {
      const int64_t when = a_.reverse[s] ? a_.T - 1 - k : k, base = at.row(when, 0) - row;
      const int64_t end = at.active(when) < rows - base ? at.active(when) : rows - base;
      for (int64_t b = base < 0 ? -base : 0; b < end; ++b) h[base + b] = previous_h(at, s, when, b);
    }
  }

  const BackwardArgs& a_;
  Range own_, outs_;
};

}  // namespace fastrnn::FASTRNN_ISA
