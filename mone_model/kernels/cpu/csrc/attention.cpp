// Causal attention, as in FlashAttention-2 (arXiv 2307.08691). All fp32. A thread takes the heads
// that share keys and values in a sequence, and of each head a block of queries with a chunk of the keys at a time.
#include <cmath>
#include <limits>

#include "kernels.h"
#include "products.h"

namespace {

constexpr int64_t BLOCK = 4 * TALL;   // queries
constexpr int64_t CHUNK = 8 * BLOCK;  // keys, whose rows stay in L2

using mone::Heads;
template <class T>
Heads<T> contiguous(T *data, int64_t sequences, int64_t heads, int64_t width) {
  return {data, sequences * heads * width, heads * width, width};
}

// A chunk of keys, and their products with a block of queries, the first of which comes `later` than the first key: query n
// sees the keys t <= later + n. Rows are filled up with zeros to `padded` numbers; those of scores and weights have CHUNK.
struct Chunk {
  int64_t keys, width, padded;

  int64_t seen(int64_t later, int64_t queries) const { return std::min(later + queries, keys); }

  void read(Heads<const float> from, int64_t sequence, int64_t head, int64_t first, int64_t count, float *rows) const {
    for (int64_t n = 0; n < count; n++, rows += padded) {
      std::copy_n(from.row(first + n, sequence, head), width, rows);
      std::fill(rows + width, rows + padded, 0.0f);
    }
  }
  void write(const float *rows, Heads<float> to, int64_t sequence, int64_t head, int64_t first, int64_t count, bool add) const {
    for (int64_t n = 0; n < count; n++, rows += padded) {
      float *const row = to.row(first + n, sequence, head);
      for (int64_t j = 0; j < width; j++) row[j] = (add ? row[j] : 0) + rows[j];
    }
  }
  void transpose(const float *rows, float *panels) const {
    for (int64_t t = 0; t < keys; t += PANEL) transpose_panel(rows, t, keys, padded, panels + t * padded);
  }
  // scores[n, t] = x[n] . panels[t] of the keys that are seen, and of some more.
  void score(const float *x, const float *panels, int64_t later, int64_t count, float *scores) const {
    for (int64_t t = 0; t < seen(later, count); t += PANEL) {
      const int64_t before = std::max<int64_t>(0, t - later) / TALL * TALL;  // queries that see none of these keys
      each_tile(count - before, [&](int64_t n, auto together) {
        n += before;
        multiply_panel<together>(width, x + n * padded, padded, 1, panels + t * padded, PANEL, scores + n * CHUNK + t, CHUNK);
      });
    }
  }
  // y[n] = sum over t of weights[n, t] x[t].
  void sum_keys(const float *weights, const float *x, int64_t later, int64_t count, float *y) const {
    for (int64_t j = 0; j < padded; j += PANEL)
      each_tile(count, [&](int64_t n, auto together) {
        multiply_panel<together>(seen(later, n + together), weights + n * CHUNK, CHUNK, 1, x + j, padded, y + n * padded + j,
                                 padded);
      });
  }
  // y[t] += sum over n of weights[n, t] x[n].
  void add_queries(const float *weights, const float *x, int64_t later, int64_t count, float *y) const {
    for (int64_t j = 0; j < padded; j += PANEL)
      each_tile(seen(later, count), [&](int64_t t, auto together) {
        const int64_t before = std::max<int64_t>(0, t - later);  // queries that do not see these keys
        multiply_panel<together>(count - before, weights + before * CHUNK + t, 1, CHUNK, x + before * padded + j, padded,
                                 y + t * padded + j, padded, true);
      });
  }
};

// e^x where it counts beside 1, else exactly 0: products of smaller numbers would be denormal, and so slow.
Vector share(Vector x) { return choose(x < all(-64.0f), Vector{}, exponential(x)); }

// Of a query's scores with all keys up to some: the largest, and the sum of e^(score - largest).
struct Running {
  float largest, sum;
};

// Scores with the keys of a chunk that a query sees become e^(score - largest), the largest of these and of the keys before;
// zeros from there to the end.
Running exponentials(float *scores, int64_t seen, int64_t end, float scale, float largest_before) {
  std::fill(scores + seen, scores + rounded_up(seen), -std::numeric_limits<float>::infinity());
  const float largest = std::max(largest_before, largest_of(scores, rounded_up(seen)) * scale);
  Vector sums = {};
  for (int64_t t = 0; t < seen; t += LANES) {
    const Vector p = share(load(scores + t) * scale - largest);
    sums += p;
    store(scores + t, p);
  }
  std::fill(scores + seen, scores + end, 0.0f);
  return {largest, total(sums)};
}

// Scores become probabilities, and gradients of probabilities those of scores; zeros from there to the end. mean: of the
// gradients, weighted by the probabilities with all keys, which is the context times its gradient.
void differentiate(float *scores, float *gradients, int64_t seen, int64_t end, float scale, float logsumexp, float mean) {
  for (int64_t t = 0; t < seen; t += LANES) {
    const Vector p = share(load(scores + t) * scale - logsumexp);
    store(scores + t, p);
    store(gradients + t, p * (load(gradients + t) - mean) * scale);
  }
  std::fill(scores + seen, scores + end, 0.0f);
  std::fill(gradients + seen, gradients + end, 0.0f);
}

// f(sequence, group, first key) for each chunk of keys; a thread takes all those of a sequence's group, in their order.
template <class F>
void each_chunk(int64_t length, int64_t sequences, int64_t groups, F f) {
#pragma omp for collapse(2)
  for (int64_t i = 0; i < sequences; i++)
    for (int64_t g = 0; g < groups; g++)
      for (int64_t begin = 0; begin < length; begin += CHUNK) f(i, g, begin);
}

// f(head, first query, how many) for each block of queries that sees these keys.
template <class F>
void each_block(int64_t length, int64_t begin, int64_t first_head, int64_t heads, F f) {
  for (int64_t h = first_head; h < first_head + heads; h++)
    for (int64_t first = begin; first < length; first += BLOCK) f(h, first, std::min(BLOCK, length - first));
}

}  // namespace

namespace mone {

void attend(int64_t length, int64_t sequences, int64_t heads, int64_t groups, int64_t width, float scale,
            Heads<const float> all_queries, Heads<const float> all_keys, Heads<const float> all_values, float *context,
            float *logsumexp, int64_t threads) {
  const int64_t padded = (width + PANEL - 1) / PANEL * PANEL, heads_of_group = heads / groups;
  const auto contexts = contiguous(context, sequences, heads, width);
#pragma omp parallel num_threads(threads)
  {
    const int64_t whole = CHUNK * padded, block = BLOCK * padded;
    const Aligned<float> keys(whole), panels(whole), values(whole), queries(block), sums(block), scores(BLOCK * CHUNK);
    const Aligned<Running> of_heads(heads_of_group * length);
    each_chunk(length, sequences, groups, [&](int64_t i, int64_t g, int64_t begin) {
      const Chunk chunk{std::min(CHUNK, length - begin), width, padded};
      chunk.read(all_keys, i, g, begin, chunk.keys, keys.data);
      chunk.read(all_values, i, g, begin, chunk.keys, values.data);
      chunk.transpose(keys.data, panels.data);
      each_block(length, begin, g * heads_of_group, heads_of_group, [&](int64_t h, int64_t first, int64_t count) {
        const int64_t later = first - begin;
        chunk.read(all_queries, i, h, first, count, queries.data);
        chunk.score(queries.data, panels.data, later, count, scores.data);
        Running *const running = of_heads.data + (h % heads_of_group) * length + first;
        float kept[BLOCK];  // of what the keys before gave
        for (int64_t n = 0; n < count; n++) {
          const Running before = begin ? running[n] : Running{-std::numeric_limits<float>::infinity(), 0};
          const Running here = exponentials(scores.data + n * CHUNK, chunk.seen(later, n + 1), chunk.seen(later, count), scale,
                                         before.largest);
          kept[n] = begin ? std::exp(before.largest - here.largest) : 0;
          running[n] = {here.largest, before.sum * kept[n] + here.sum};
        }
        chunk.sum_keys(scores.data, values.data, later, count, sums.data);
        for (int64_t n = 0; n < count; n++) {
          float *const to = contexts.row(first + n, i, h), *const row = sums.data + n * padded;
          for (int64_t j = 0; j < width; j++) to[j] = (begin ? to[j] * kept[n] : 0) + row[j];
          if (later >= CHUNK) continue;  // more keys to come
          for (int64_t j = 0; j < width; j++) to[j] /= running[n].sum;
          logsumexp[(i * heads + h) * length + first + n] = running[n].largest + std::log(running[n].sum);
        }
      });
    });
  }
}

void attend_backward(int64_t length, int64_t sequences, int64_t heads, int64_t groups, int64_t width, float scale,
                     Heads<const float> all_queries, Heads<const float> all_keys, Heads<const float> all_values,
                     const float *context, const float *logsumexp, const float *dcontext, float *dq, float *dk, float *dv,
                     int64_t threads) {
  const int64_t padded = (width + PANEL - 1) / PANEL * PANEL, heads_of_group = heads / groups;
  const auto all_contexts = contiguous(context, sequences, heads, width);
  const auto all_dcontexts = contiguous(dcontext, sequences, heads, width);
#pragma omp parallel num_threads(threads)
  {
    const int64_t whole = CHUNK * padded, block = BLOCK * padded;
    const Aligned<float> keys(whole), key_panels(whole), values(whole), value_panels(whole), dkeys(whole), dvalues(whole);
    const Aligned<float> queries(block), contexts(block), dcontexts(block), dqueries(block);
    const Aligned<float> scores(BLOCK * CHUNK), dscores(BLOCK * CHUNK);
    each_chunk(length, sequences, groups, [&](int64_t i, int64_t g, int64_t begin) {
      const Chunk chunk{std::min(CHUNK, length - begin), width, padded};
      chunk.read(all_keys, i, g, begin, chunk.keys, keys.data);
      chunk.read(all_values, i, g, begin, chunk.keys, values.data);
      chunk.transpose(keys.data, key_panels.data);
      chunk.transpose(values.data, value_panels.data);
      std::fill_n(dkeys.data, whole, 0.0f);
      std::fill_n(dvalues.data, whole, 0.0f);
      each_block(length, begin, g * heads_of_group, heads_of_group, [&](int64_t h, int64_t first, int64_t count) {
        const int64_t later = first - begin;
        chunk.read(all_queries, i, h, first, count, queries.data);
        chunk.read(all_contexts, i, h, first, count, contexts.data);
        chunk.read(all_dcontexts, i, h, first, count, dcontexts.data);
        chunk.score(queries.data, key_panels.data, later, count, scores.data);
        chunk.score(dcontexts.data, value_panels.data, later, count, dscores.data);
        for (int64_t n = 0; n < count; n++) {
          Vector products = {};
          for (int64_t j = n * padded; j < (n + 1) * padded; j += LANES)
            products += load(contexts.data + j) * load(dcontexts.data + j);
          differentiate(scores.data + n * CHUNK, dscores.data + n * CHUNK, chunk.seen(later, n + 1), chunk.seen(later, count),
                        scale, logsumexp[(i * heads + h) * length + first + n], total(products));
        }
        chunk.sum_keys(dscores.data, keys.data, later, count, dqueries.data);
        chunk.write(dqueries.data, contiguous(dq, sequences, heads, width), i, h, first, count, begin > 0);
        chunk.add_queries(dscores.data, queries.data, later, count, dkeys.data);
        chunk.add_queries(scores.data, dcontexts.data, later, count, dvalues.data);
      });
      chunk.write(dkeys.data, contiguous(dk, sequences, groups, width), i, g, begin, chunk.keys, false);
      chunk.write(dvalues.data, contiguous(dv, sequences, groups, width), i, g, begin, chunk.keys, false);
    });
  }
}

}  // namespace mone
