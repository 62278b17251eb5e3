// Rotary position embeddings, for kernels/cpu_rotary.py. All fp32; the numbers of a head lie side by side.
#include "vectors.h"

extern "C" {

// The halves (a, b) of a head become (a cos - b sin, b cos + a sin). x: [positions, batch, heads, width], whose first three
// dimensions lie the strides apart; y the same, contiguous; cosines and sines [positions, width / 2].
void rotate(int64_t positions, int64_t batch, int64_t heads, int64_t width, const float *x, int64_t position_stride,
            int64_t batch_stride, int64_t head_stride, const float *cosines, const float *sines, float *y, int64_t threads) {
  const int64_t half = width / 2;
#pragma omp parallel for collapse(2) num_threads(threads) if (positions * batch * heads * width > WORTH_WAKING)
  for (int64_t s = 0; s < positions; s++)
    for (int64_t i = 0; i < batch; i++)
      for (int64_t h = 0; h < heads; h++) {
        const float *a = x + s * position_stride + i * batch_stride + h * head_stride, *b = a + half;
        const float *cosine = cosines + s * half, *sine = sines + s * half;
        float *to_a = y + ((s * batch + i) * heads + h) * width, *to_b = to_a + half;
        each_vector(half, [=](int64_t j, auto count) {
          const Vector of_a = load_first(a + j, count), of_b = load_first(b + j, count);
          const Vector cos = load_first(cosine + j, count), sin = load_first(sine + j, count);
          store_first(to_a + j, of_a * cos - of_b * sin, count);
          store_first(to_b + j, of_b * cos + of_a * sin, count);
        });
      }
}

}  // extern "C"
