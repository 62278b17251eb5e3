// Rotary position embeddings, for kernels/cpu_rotary.py. All fp32; rows of x lie x_stride apart, others side by side.
#include "vectors.h"

extern "C" {

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
