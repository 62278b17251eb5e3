// RMSNorm, in one pass each way.
#include <cmath>
#include <vector>

#include "kernels.h"
#include "vectors.h"

namespace mone {

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

}  // namespace mone
