// RMSNorm and rotary position embeddings, for kernels/cpu_layers.py. All fp32; rows of x lie x_stride apart, others side by
// side.
#include <cmath>
#include <vector>

#include "vectors.h"

// Numbers of x for which other threads are woken.
constexpr int64_t WORTH_WAKING = 1 << 14;

extern "C" {

// y = x * scale * weight, where scale = 1 / sqrt(mean(x^2) + eps), one of `scales` for each row.
void rms_norm(int64_t rows, int64_t width, const float *x, int64_t x_stride, const float *weight, float eps, float *y,
              float *scales, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > WORTH_WAKING)
  for (int64_t n = 0; n < rows; n++) {
    const float *from = x + n * x_stride;
    Vector squares{};
    each_vector(width, [=, &squares](int64_t j, auto count) {
      const Vector value = load_first(from + j, count);
      squares += value * value;
    });
    const float scale = scales[n] = 1 / std::sqrt(total(squares) / width + eps);
    each_vector(width, [=](int64_t j, auto count) {
      store_first(y + n * width + j, load_first(from + j, count) * scale * load_first(weight + j, count), count);
    });
  }
}

// dx = scale * (dy * weight - x * scale^2 * mean(dy * weight * x)) and dweight = sum over rows of dy * x * scale.
void rms_norm_backward(int64_t rows, int64_t width, const float *dy, const float *x, int64_t x_stride, const float *weight,
                       const float *scales, float *dx, float *dweight, int64_t threads) {
  // Sums of the sums of blocks round less, and are the same whichever thread took which block.
  constexpr int64_t BLOCK = 64;
  const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
  std::vector<float> of_blocks(blocks * width);
#pragma omp parallel for num_threads(threads) if (rows * width > WORTH_WAKING)
  for (int64_t block = 0; block < blocks; block++) {
    float *of_block = of_blocks.data() + block * width;
    for (int64_t n = block * BLOCK; n < std::min((block + 1) * BLOCK, rows); n++) {
      const float *from = x + n * x_stride, *d = dy + n * width, scale = scales[n];
      Vector sum{};
      each_vector(width, [=, &sum](int64_t j, auto count) {
        const Vector product = load_first(d + j, count) * load_first(from + j, count);
        sum += product * load_first(weight + j, count);
        store_first(of_block + j, load_first(of_block + j, count) + product * scale, count);
      });
      const float back = scale * scale * total(sum) / width;
      each_vector(width, [=](int64_t j, auto count) {
        const Vector dscaled = load_first(d + j, count) * load_first(weight + j, count);
        store_first(dx + n * width + j, (dscaled - load_first(from + j, count) * back) * scale, count);
      });
    }
  }
  std::fill(dweight, dweight + width, 0.0f);
  for (int64_t block = 0; block < blocks; block++)
    for (int64_t j = 0; j < width; j++) dweight[j] += of_blocks[block * width + j];
}

// The halves (a, b) of a row become (a cos - b sin, b cos + a sin); cosines and sines [rows / at_once, width / 2]: so many
// rows have the same position.
void rotate(int64_t rows, int64_t width, const float *x, int64_t x_stride, int64_t at_once, const float *cosines,
            const float *sines, float *y, int64_t threads) {
  const int64_t half = width / 2;
#pragma omp parallel for num_threads(threads) if (rows * width > WORTH_WAKING)
  for (int64_t n = 0; n < rows; n++) {
    const int64_t position = n / at_once;
    const float *a = x + n * x_stride, *b = a + half, *cosine = cosines + position * half, *sine = sines + position * half;
    float *to_a = y + n * width, *to_b = to_a + half;
    each_vector(half, [=](int64_t j, auto count) {
      const Vector of_a = load_first(a + j, count), of_b = load_first(b + j, count);
      const Vector cos = load_first(cosine + j, count), sin = load_first(sine + j, count);
      store_first(to_a + j, of_a * cos - of_b * sin, count);
      store_first(to_b + j, of_b * cos + of_a * sin, count);
    });
  }
}

}  // extern "C"
