// The experts of a layer, forward and backward, computing behind the gate only what is kept.
//
// The gate of an expert is dense. Of everything behind it only the K neurons count that a token keeps: up, down and all
// products of the backward pass are sums over lists of neurons of a token, or of tokens of a neuron. Two loops do all of it:
//
//   dots   out[p]  = x . w[list[p]]              up = x W_up^T, d hidden = dy W_down^T
//   sums   y      += sum_p values[p] w[list[p]]  y = hidden W_down, dx, and over lists of tokens the gradients of the
//   weights
//
// Both hold a row in registers, the gradients of gate and up two, and read the other operand from the L1 cache, where a tile
// of it stays for many rows. Where the balance loss gives dropped neurons a gradient, the products with that of the gate are
// dense.
// Shapes: N rows sorted by expert, E experts, D width (a multiple of 16), H neurons, K kept; offsets [E + 1] rows of
// experts; masks [N, ceil(H / 16)]: bit j % 16 of word j / 16 is neuron j. All fp32 and row-major.
#include <omp.h>

#include <numeric>
#include <utility>
#include <vector>

#include "balance.h"
#include "kernels.h"
#include "products.h"

namespace {

constexpr int BLOCK = 256;                             // about so many tokens pass over a tile
constexpr int LARGEST = BLOCK + BLOCK / 2;             // and at most so many
constexpr int COLUMNS = 8 * LANES;                     // of the width: half of the registers hold them
constexpr int DEPTH = 256;                             // rows of a dense product whose panel stays in L1
constexpr int TILE = std::min(BLOCK, 8192 / COLUMNS);  // rows of weights or of tokens that stay in L1 so wide, in 32 KB
// Columns of two rows at once: there are 32 registers of 16 lanes, but 16 of fewer.
constexpr int PAIRED = LANES == 16 ? COLUMNS : COLUMNS / 2;

// The lists of some rows within one tile of w. Row i of out or y belongs to list[begin[i]] up to list[end[i]]; `list` names
// rows of w, of which those in the lists lie in `tile`, side by side, the first at `tile`.
struct Lists {
  int64_t rows;
  const int32_t *begin, *end;
  const uint16_t *list;
  int first;
};

template <int WIDTH>
void dots(const Lists &of, const float *x, int64_t x_stride, const float *tile, float *out, bool add) {
  const float *w = tile - of.first * WIDTH;
  for (int64_t i = 0; i < of.rows; i++, x += x_stride) {
    const int32_t end = of.end[i];
    Vector row[WIDTH / LANES];
#pragma GCC unroll 16
    for (int v = 0; v < WIDTH / LANES; v++) row[v] = held(load(x + v * LANES));
    for (int32_t p = of.begin[i]; p < end; p += 4) {
      const int32_t last = end - 1;
      const float *w0 = w + of.list[p] * WIDTH, *w1 = w + of.list[std::min(p + 1, last)] * WIDTH;
      const float *w2 = w + of.list[std::min(p + 2, last)] * WIDTH, *w3 = w + of.list[std::min(p + 3, last)] * WIDTH;
      Vector a{}, b{}, c{}, d{};
#pragma GCC unroll 16
      for (int v = 0; v < WIDTH / LANES; v++) {
        a += row[v] * load(w0 + v * LANES);
        b += row[v] * load(w1 + v * LANES);
        c += row[v] * load(w2 + v * LANES);
        d += row[v] * load(w3 + v * LANES);
      }
      store_some(out + p, add_up(a, b, c, d), end - p, add);
    }
  }
}

// N sums at once over the same lists and rows of w. values: [.., N]; the N rows of y for a list lie `apart`.
template <int WIDTH, int N>
void sums(const Lists &of, const float *values, const float *tile, float *y, int64_t y_stride, int64_t apart, bool add) {
  const float *w = tile - of.first * WIDTH;
  for (int64_t i = 0; i < of.rows; i++, y += y_stride) {
    Vector row[N][WIDTH / LANES];
#pragma GCC unroll 2
    for (int n = 0; n < N; n++)
#pragma GCC unroll 16
      for (int v = 0; v < WIDTH / LANES; v++) row[n][v] = add ? load(y + n * apart + v * LANES) : Vector{};
    for (int32_t p = of.begin[i]; p < of.end[i]; p++) {
      const float *from = w + of.list[p] * WIDTH;
      Vector value[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; n++) value[n] = all(values[p * N + n]);
#pragma GCC unroll 16
      for (int v = 0; v < WIDTH / LANES; v++) {
        const Vector part = held(load(from + v * LANES));
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) row[n][v] += value[n] * part;
      }
    }
#pragma GCC unroll 2
    for (int n = 0; n < N; n++)
#pragma GCC unroll 16
      for (int v = 0; v < WIDTH / LANES; v++) store(y + n * apart + v * LANES, row[n][v]);
  }
}

using Dots = void (*)(const Lists &, const float *, int64_t, const float *, float *, bool);
using Sums = void (*)(const Lists &, const float *, const float *, float *, int64_t, int64_t, bool);
template <size_t... V>
struct Table {
  static constexpr Dots dots_of[] = {dots<(V + 1) * WORD>...};
  static constexpr Sums sums_of[][sizeof...(V)] = {{sums<(V + 1) * WORD, 1>...}, {sums<(V + 1) * WORD, 2>...}};
  explicit Table(std::index_sequence<V...>) {}
};
using Widths = decltype(Table(std::make_index_sequence<COLUMNS / WORD>()));

// f(first column, columns) for the fewest pieces of at most `most`, nearly equal.
template <class F>
void for_pieces(int width, int most, F f) {
  const int words = width / WORD, pieces = (width + most - 1) / most;
  for (int piece = 0; piece < pieces; piece++) {
    const int first = words * piece / pieces, last = words * (piece + 1) / pieces;
    f(first * WORD, (last - first) * WORD);
  }
}

struct Experts {
  int64_t rows, experts, width, neurons, kept;
  const int64_t *offsets;
  const float *gate_up, *down;  // [E, 2, H, D], [E, H, D]

  const float *gate_of(int64_t e) const { return gate_up + e * 2 * neurons * width; }
  const float *up_of(int64_t e) const { return gate_of(e) + neurons * width; }
  const float *down_of(int64_t e) const { return down + e * neurons * width; }
};

// Some rows of one expert.
struct Rows {
  int64_t expert, first, count;
};

// The rows of each expert in equal blocks: a rest would cost reading all of the expert's weights for a few rows.
std::vector<Rows> blocks_of(const Experts &of) {
  std::vector<Rows> blocks;
  for (int64_t e = 0; e < of.experts; e++) {
    const int64_t begin = of.offsets[e], rows = of.offsets[e + 1] - begin;
    const int64_t pieces = rows ? std::max<int64_t>(1, (rows + BLOCK / 2) / BLOCK) : 0;
    for (int64_t i = 0; i < pieces; i++) {
      const int64_t first = rows * i / pieces;
      blocks.push_back({e, begin + first, rows * (i + 1) / pieces - first});
    }
  }
  return blocks;
}

// The rows that the balance loss reads, every `stride`-th of an expert. They lie side by side in gates [S, H].
struct Sample {
  Balance balance;
  const int64_t *offsets;
  std::vector<int64_t> first;  // of each expert

  Sample(Balance balance, const Experts &of) : balance(balance), offsets(of.offsets), first(of.experts + 1) {
    for (int64_t e = 0; e < of.experts; e++) first[e + 1] = first[e] + balance.sampled(offsets[e + 1] - offsets[e]);
  }
  // Of an expert's rows before row n.
  int64_t before(int64_t e, int64_t n) const { return balance.sampled(n - offsets[e]); }
  // f(row of the block, row of gates) for those in a block.
  template <class F>
  void each(const Rows &block, F f) const {
    for (int64_t i = before(block.expert, block.first);; i++) {
      const int64_t row = offsets[block.expert] + i * balance.stride - block.first;
      if (row >= block.count) return;
      f(row, first[block.expert] + i);
    }
  }
};

// In which order threads take them: if the longest came last, one would work on it while the others wait.
std::vector<size_t> longest_first(const std::vector<Rows> &blocks) {
  std::vector<size_t> order(blocks.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return blocks[a].count > blocks[b].count; });
  return order;
}

// Which neurons the rows of a block keep: lists [count, K], and where each enters each tile of neurons, counted from the
// beginning of the first: [tiles + 1, count].
struct Kept {
  std::vector<uint16_t> lists;
  std::vector<int32_t> starts;

  void read(const Experts &of, const uint16_t *masks, int64_t count) {
    const int64_t words = words_of(of.neurons), tiles = (of.neurons + TILE - 1) / TILE;
    lists.resize(count * of.kept + LANES);
    starts.resize((tiles + 1) * count);
    for (int64_t n = 0; n < count; n++) {
      const uint16_t *mask = masks + n * words;
      list_row(mask, of.neurons, lists.data() + n * of.kept);
      int32_t at = n * of.kept;
      for (int64_t t = 0; t < tiles; t++) {
        starts[t * count + n] = at;
        for (int64_t w = t * TILE / WORD; w < std::min<int64_t>((t + 1) * TILE / WORD, words); w++)
          at += __builtin_popcount(mask[w]);
      }
      starts[tiles * count + n] = at;
    }
  }
};

// Some columns of some rows, side by side: in place they may share few sets of the cache.
void pack(const float *from, int64_t stride, int64_t rows, int64_t columns, float *to) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t k = 0; k < columns; k += LANES) store(to + i * columns + k, load(from + i * stride + k));
}

// f(lists of the block within a tile, the tile's weights, first column, columns) for all tiles of w.
template <class F>
void for_tiles(const Experts &of, const float *w, int64_t count, const Kept &kept, F f) {
  // Its columns last: pieces of the same rows share pages and lines that are fetched ahead.
  for (int64_t first = 0; first < of.neurons; first += TILE)
    for_pieces(of.width, COLUMNS, [&](int column, int columns) {
      alignas(64) float tile[TILE * COLUMNS];
      pack(w + first * of.width + column, of.width, std::min<int64_t>(TILE, of.neurons - first), columns, tile);
      const int32_t *begin = kept.starts.data() + first / TILE * count;
      f(Lists{count, begin, begin + count, kept.lists.data(), int(first)}, tile, column, columns);
    });
}

// out[n, p] = x[n] . w[lists[n, p]] for a block of rows: [count, K]
void dots_of_block(const Experts &of, const float *x, const float *w, int64_t count, const Kept &kept, float *out) {
  for_tiles(of, w, count, kept, [&](const Lists &here, const float *tile, int column, int columns) {
    Widths::dots_of[columns / WORD - 1](here, x + column, of.width, tile, out, column > 0);
  });
}

// y[n] (+)= sum_p values[n, p] w[lists[n, p]] for a block of rows; values: [count, K]
void sums_of_block(const Experts &of, const float *values, const float *w, int64_t count, const Kept &kept, float *y,
                   bool add) {
  for_tiles(of, w, count, kept, [&](const Lists &here, const float *tile, int column, int columns) {
    Widths::sums_of[0][columns / WORD - 1](here, values, tile, y + column, of.width, 0, add || here.first > 0);
  });
}

}  // namespace

namespace mone {

void experts_forward(int64_t rows, int64_t experts, int64_t width, int64_t neurons, int64_t kept, const int64_t *offsets,
                     int64_t activation, Balance balance, const float *x, const float *gate_up, const float *down,
                     const float *probs, const float *bias, float *out, uint16_t *masks, float *gates, float *ups,
                     float *threshold, double *counts, float *all_gates, float *sizes, int64_t threads) {
  const Experts of{rows, experts, width, neurons, kept, offsets, gate_up, down};
  const std::vector<Rows> blocks = blocks_of(of);
  const int64_t padded = (neurons + PANEL - 1) / PANEL * PANEL, words = words_of(neurons);
  const int padded_row = rounded_up(neurons);
  const std::vector<size_t> order = longest_first(blocks);
  // Block by block, so that the sums do not depend on which thread took which.
  std::vector<float> block_counts(counts ? blocks.size() * 2 * padded : 0);
  std::vector<float> block_sizes(balance.form ? blocks.size() * padded : 0);
  const Sample sample(balance, of);
#pragma omp parallel num_threads(threads)
  {
    Aligned<float> panel(width * PANEL), gate(LARGEST * padded), active(padded), scores(bias ? padded : 0);
    std::vector<int64_t> sampled;  // by row of the block: its row of all_gates, or -1
    Aligned<float> chosen_gates(LARGEST * kept + LANES), hidden(LARGEST * kept + LANES);
    Kept lists;
#pragma omp for schedule(dynamic)
    for (size_t turn = 0; turn < blocks.size(); turn++) {
      const size_t b = order[turn];
      const auto [e, first, count] = blocks[b];
      const float *rows_of_x = x + first * width;
      uint16_t *block_masks = masks + first * words;
      float *block_ups = ups + first * kept;
      multiply_many(rows_of_x, of.gate_of(e), count, width, neurons, panel.data, gate.data, padded);
      sampled.assign(count, -1);
      if (balance.form) sample.each(blocks[b], [&](int64_t n, int64_t to) { sampled[n] = to; });
      int32_t guess = FIRST_GUESS;
      for (int64_t n = 0; n < count; n++) {
        const float *row = gate.data + n * padded;
        uint16_t *mask = block_masks + n * words;
        activate(activation, row, neurons, active.data);
        const float *scored = scores_of(active.data, bias ? bias + e * neurons : nullptr, neurons, scores.data);
        guess = select(scored, neurons, kept, guess, mask);
        std::memcpy(threshold + first + n, &guess, sizeof(float));
        compress_row(row, mask, neurons, chosen_gates.data + n * kept);
        compress_row(active.data, mask, neurons, hidden.data + n * kept);
        if (counts)
          for (int64_t j = 0; j < neurons; j += LANES) {
            float *chosen = block_counts.data() + b * 2 * padded + j, *size = chosen + padded;
            store(chosen, load(chosen) + only(all(1.0f), bits_at(mask, j)));
            store(size, load(size) + magnitude(load(active.data + j)));
          }
        if (sampled[n] < 0) continue;
        add_sizes(balance, active.data, mask, padded_row, block_sizes.data() + b * padded);
        if (balance.is_dense()) std::copy(row, row + neurons, all_gates + sampled[n] * neurons);
      }
      std::copy(chosen_gates.data, chosen_gates.data + count * kept, gates + first * kept);
      lists.read(of, block_masks, count);
      dots_of_block(of, rows_of_x, of.up_of(e), count, lists, block_ups);
      for (int64_t n = 0; n < count; n++)
        for (int64_t p = n * kept; p < (n + 1) * kept; p++) hidden.data[p] *= block_ups[p] * probs[first + n];
      sums_of_block(of, hidden.data, of.down_of(e), count, lists, out + first * width, false);
    }
  }
  if (balance.form) {
    std::vector<double> summed(experts * neurons);
    for (size_t b = 0; b < blocks.size(); b++)
      for (int64_t j = 0; j < neurons; j++) summed[blocks[b].expert * neurons + j] += block_sizes[b * padded + j];
    std::copy(summed.begin(), summed.end(), sizes);
  }
  if (!counts) return;
  std::fill(counts, counts + 2 * experts * neurons, 0.0);
  for (size_t b = 0; b < blocks.size(); b++)
    for (int64_t what = 0; what < 2; what++)
      for (int64_t j = 0; j < neurons; j++)
        counts[(blocks[b].expert * 2 + what) * neurons + j] += block_counts[(b * 2 + what) * padded + j];
}

void experts_backward(int64_t rows, int64_t experts, int64_t width, int64_t neurons, int64_t kept, const int64_t *offsets,
                      int64_t activation, Balance balance, const float *dy, const float *dsizes, const float *x,
                      const float *gate_up, const float *down, const float *probs, const uint16_t *masks,
                      const float *gates, const float *ups, const float *all_gates, float *dx, float *dprobs,
                      float *dgate_up, float *ddown, int64_t add, int64_t threads) {
  const Experts of{rows, experts, width, neurons, kept, offsets, gate_up, down};
  const std::vector<Rows> blocks = blocks_of(of);
  const std::vector<size_t> order = longest_first(blocks);
  // The same numbers in lists of tokens: for TILE rows at a time, neuron by neuron.
  Aligned<uint16_t> tokens(rows * kept);
  // If all rows have a dense gradient of the gate, it holds that of the kept neurons, too.
  const Sample sample(balance, of);
  const bool dense = balance.is_dense(), merged = dense && balance.stride == 1;
  const int64_t slopes_of_one = merged ? 1 : 2;  // of gate and up
  Aligned<float> dense_slopes(dense ? sample.first.back() * neurons : 0);
  Aligned<float> hidden(rows * kept), slopes(rows * kept * slopes_of_one);
  std::vector<Rows> tiles;
  std::vector<size_t> first_tile;
  for (const auto [e, first, count] : blocks) {
    first_tile.push_back(tiles.size());
    for (int64_t from = 0; from < count; from += TILE)
      tiles.push_back({e, first + from, std::min<int64_t>(TILE, count - from)});
  }
  std::vector<std::vector<int32_t>> starts_of(tiles.size());
#pragma omp parallel num_threads(threads)
  {
    Aligned<float> h(LARGEST * kept), dg(LARGEST * kept), du(LARGEST * kept);
    Aligned<float> active(rounded_up(neurons)), panel(std::max(neurons, int64_t(DEPTH)) * PANEL);
    Kept lists;
    std::vector<int32_t> next(neurons + 1);
#pragma omp for schedule(dynamic)
    for (size_t turn = 0; turn < blocks.size(); turn++) {
      const size_t b = order[turn];
      const auto [e, first, count] = blocks[b];
      lists.read(of, masks + first * words_of(neurons), count);
      dots_of_block(of, dy + first * width, of.down_of(e), count, lists, h.data);
      for (int64_t n = 0; n < count; n++) {
        const int64_t at = n * kept, row = first + n;
        dprobs[row] = differentiate(activation, kept, probs[row], h.data + at, gates + row * kept, ups + row * kept,
                                    dg.data + at, du.data + at);
      }
      const float *weights = dsizes + e * neurons;
      if (balance.form) sample.each(blocks[b], [&](int64_t n, int64_t at) {
        const uint16_t *list = lists.lists.data() + n * kept;
        if (!dense) return add_masked_slopes(activation, kept, gates + (first + n) * kept, list, weights, dg.data + n * kept);
        float *to = dense_slopes.data + at * neurons;
        differentiate_sizes(balance, activation, all_gates + at * neurons, neurons, weights, active.data, to);
        for (int64_t p = 0; merged && p < kept; p++) to[list[p]] += dg.data[n * kept + p];
      });
      if (!merged) sums_of_block(of, dg.data, of.gate_of(e), count, lists, dx + first * width, false);
      sums_of_block(of, du.data, of.up_of(e), count, lists, dx + first * width, !merged);
      if (dense) {
        const int64_t begin = sample.before(e, first), end = sample.before(e, first + count);
        add_product(end - begin, neurons, dense_slopes.data + (sample.first[e] + begin) * neurons, neurons, 1, of.gate_of(e),
                    width, width, panel.data, dx + (offsets[e] + begin * balance.stride) * width, balance.stride * width);
      }
      for (int64_t from = 0, t = first_tile[b]; from < count; from += TILE, t++) {
        const int64_t end = std::min<int64_t>(from + TILE, count), base = (first + from) * kept;
        std::vector<int32_t> &of_neuron = starts_of[t];
        of_neuron.assign(neurons + 1, 0);
        for (int64_t p = from * kept; p < end * kept; p++) of_neuron[lists.lists[p] + 1]++;
        for (int64_t j = 0; j < neurons; j++) of_neuron[j + 1] += of_neuron[j];
        std::copy(of_neuron.begin(), of_neuron.end(), next.begin());
        for (int64_t n = from; n < end; n++)
          for (int64_t p = n * kept; p < (n + 1) * kept; p++) {
            const int64_t to = base + next[lists.lists[p]]++;
            tokens.data[to] = n - from;
            hidden.data[to] = h.data[p];
            float *both = slopes.data + slopes_of_one * to;
            if (!merged) *both++ = dg.data[p];
            *both = du.data[p];
          }
      }
    }
    // Each task owns some neurons of an expert, so that nothing is added by two.
    constexpr int64_t OWNED = 128;
    const int64_t shares = (neurons + OWNED - 1) / OWNED;
#pragma omp for schedule(dynamic) collapse(2)
    for (int64_t e = 0; e < experts; e++)
      for (int64_t share = 0; share < shares; share++) {
        const int64_t begin = share * OWNED, end = std::min(begin + OWNED, neurons);
        float *dgate_w = dgate_up + e * 2 * neurons * width, *dup_w = dgate_w + neurons * width,
              *ddown_w = ddown + e * neurons * width;
        const size_t tile_begin = std::lower_bound(tiles.begin(), tiles.end(), e,
                                                   [](const Rows &t, int64_t expert) { return t.expert < expert; }) -
                                  tiles.begin();
        if (offsets[e] == offsets[e + 1]) {
          if (!add)
            for (float *w : {dgate_w, dup_w, ddown_w}) std::fill(w + begin * width, w + end * width, 0.0f);
          continue;
        }
        // out (+)= sums over the tokens of each neuron of value times row, for N values of each and as many outputs.
        const auto add_up_tokens = [&](int N, const float *values, const float *from, float *out, int64_t apart) {
          for_pieces(width, N == 1 ? COLUMNS : PAIRED, [&](int column, int columns) {
            alignas(64) float tile[TILE * COLUMNS];
            for (size_t t = tile_begin; t < tiles.size() && tiles[t].expert == e; t++) {
              const int64_t first = tiles[t].first;
              const int32_t *range = starts_of[t].data();
              pack(from + first * width + column, width, tiles[t].count, columns, tile);
              const Lists here{end - begin, range + begin, range + begin + 1, tokens.data + first * kept, 0};
              Widths::sums_of[N - 1][columns / WORD - 1](here, values + first * kept * N, tile, out + column, width, apart,
                                                         add || t > tile_begin);
            }
          });
        };
        add_up_tokens(slopes_of_one, slopes.data, x, (merged ? dup_w : dgate_w) + begin * width, dup_w - dgate_w);
        add_up_tokens(1, hidden.data, dy, ddown_w + begin * width, 0);
        if (merged && !add) std::fill(dgate_w + begin * width, dgate_w + end * width, 0.0f);
        for (int64_t from = sample.first[e]; dense && from < sample.first[e + 1]; from += DEPTH) {
          const int64_t row = offsets[e] + (from - sample.first[e]) * balance.stride;
          add_product(end - begin, std::min<int64_t>(DEPTH, sample.first[e + 1] - from),
                      dense_slopes.data + from * neurons + begin, 1, neurons, x + row * width, balance.stride * width, width,
                      panel.data, dgate_w + begin * width, width);
        }
      }
  }
}

}  // namespace mone
