// Small kernels that use one operation each, right or with a planted bug: the tests of the emulator run them.
#include "emulator/primitives.h"

#include <stdexcept>

#include "cuda/ptx.cuh"

namespace fastrnn::primitives {
namespace {

using Values = std::vector<float>;
int bug;  // 0: none

// Each thread of a block writes its number, and reads its neighbour's.
void neighbours(float* out) {
  FASTRNN_SHARED(memory);
  float* s = reinterpret_cast<float*>(memory);
  const int i = threadIdx.x, n = blockDim.x;
  s[i] = float(i);
  if (bug == 1) {
  } else if (bug == 2 && i < 32) {
    ptx::sync_threads(0, n - 32);
  } else {
    ptx::sync_block();
  }
  out[i] = s[(i + 1) % n];
}

// The same within a warp.
void lanes(float* out) {
  FASTRNN_SHARED(memory);
  float* s = reinterpret_cast<float*>(memory);
  const int i = threadIdx.x, w = i & ~31;
  s[i] = float(i);
  if (bug == 1) {
  } else if (bug == 2 && i % 32 == 5) {
    ptx::sync_block();
  } else {
    ptx::sync_warp();
  }
  out[i] = s[w + (i + 1) % 32];
}

// Three votes of a block: in the second one thread says yes.
void votes(float* out) {
  const int i = threadIdx.x;
  for (int k = 0; k < 3; ++k) {
    bool any = false;
    if (bug == 1 && i < 32)
      ptx::sync_block();
    else
      any = ptx::sync_block_or(i == 41 && k == 1);
    out[i] += float(int(any) << k);
  }
}

// d = a b^T for a (16, k), b (8, k), both through ldmatrix.
template <class T, int kTile, class Product>
void multiply(const float* a, const float* b, float* d, Product product) {
  FASTRNN_SHARED(memory);
  constexpr int kRow = kTile + 16 / int(sizeof(T));  // 16 bytes of padding
  T* s = reinterpret_cast<T*>(memory);
  const int lane = threadIdx.x, g = lane / 4, q = lane % 4;
  for (int i = lane; i < 24 * kTile; i += 32) {
    const int row = i / kTile, col = i % kTile;
    s[row * kRow + col] = ptx::from_float<T>(row < 16 ? a[row * kTile + col] : b[(row - 16) * kTile + col]);
  }
  ptx::sync_warp();
  uint32_t fa[4], fb[4];
  // The matrices of a: rows 0 to 7 and 8 to 15 of the first 16 bytes, then of the second.
  const int half = bug == 1 ? lane / 8 % 2 : lane / 16, upper = bug == 1 ? lane / 16 : lane / 8 % 2;
  ptx::ldmatrix_x4(fa, ptx::shared_address(s + (upper * 8 + lane % 8) * kRow) + half * 16);
  ptx::ldmatrix_x4(fb, ptx::shared_address(s + (16 + lane % 8) * kRow) + lane / 8 % 2 * 16);
  float acc[4] = {};
  const uint32_t b2[2] = {fb[0], fb[1]};
  product(acc, fa, b2);
  for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * q + i % 2] = acc[i];
}

void copies(const float* in, float* out) {
  FASTRNN_SHARED(memory);
  float* s = reinterpret_cast<float*>(memory);
  const int i = threadIdx.x;
  for (int k = 0; k < 3; ++k) {  // the last copy brings 8 bytes and zeros
    ptx::copy_async16(ptx::shared_address(s + (k * 32 + i) * 4), in + (k * 32 + i) * 4, k == 2 ? 8 : 16);
    if (bug != 3) ptx::copy_commit();
  }
  if (bug != 1) ptx::copy_wait<0>();
  if (bug != 2) ptx::sync_warp();
  const int from = (i + 1) % 32;
  for (int k = 0; k < 3; ++k)
    for (int j = 0; j < 4; ++j) out[(k * 32 + i) * 4 + j] = s[(k * 32 + from) * 4 + j];
}

// Each block of a cluster sends a value to all, in two buffers by turns, and goes on with its neighbour's.
void exchange(float* out, int steps) {
  FASTRNN_SHARED(memory);
  const unsigned rank = ptx::cluster_rank(), n = gridDim.x, i = threadIdx.x;
  Floats* s = reinterpret_cast<Floats*>(memory + 16);
  const uint32_t bar = ptx::shared_address(memory);
  const unsigned bytes = n * 32 * 8;
  float v = float(rank * 32 + i);
  if (i == 0) {
    for (unsigned k = 0; k < 2; ++k) ptx::mbarrier_init(bar + 8 * k, 1);
    ptx::mbarrier_fence();
    for (unsigned k = 0; k < 2; ++k) ptx::mbarrier_expect(bar + 8 * k, bug == 4 ? bytes + 8 : bytes);
  }
  if (bug != 1) ptx::cluster_arrive(), ptx::cluster_wait();
  for (int t = 0; t < steps; ++t) {
    Floats* buffer = s + (bug == 6 ? 0 : t & 1) * n * 32;
    for (unsigned to = 0; to < n; ++to)
      ptx::store_async(ptx::map_to_rank(ptx::shared_address(buffer + rank * 32 + i), to), Floats{v, 0.0f},
                       ptx::map_to_rank(bar + 8 * (t & 1), to));
    if (bug != 2 && !(bug == 5 && t + 1 == steps))
      ptx::mbarrier_wait(bar + 8 * (t & 1), (t >> 1 & 1) ^ (bug == 3 && t == 1));
    if (i == 0 && t + 2 < steps) ptx::mbarrier_expect(bar + 8 * (t & 1), bytes);
    v = buffer[(rank + n - 1) % n * 32 + i].x + 1;
    ptx::sync_warp();
  }
  out[blockIdx.x * 32 + i] = v;
  if (bug != 5) ptx::cluster_arrive(), ptx::cluster_wait();
}

// Blocks without a cluster: each adds to what the one before it has left in global memory.
void relay(float* values, uint64_t* flags, float* failed) {
  const unsigned b = blockIdx.x, i = threadIdx.x;
  if (b > 0) {
    if (i == 0 && !ptx::flag_wait(flags + b, bug == 2 ? 2 : 1)) failed[b] = 1;
    ptx::sync_block();
  }
  values[(b + 1) * 32 + i] = (b > 0 ? values[b * 32 + i] : 0.0f) + 1;
  if (bug != 1) ptx::sync_block();
  if (i == 0) {
    if (bug != 3) ptx::fence();
    ptx::flag_set(flags + b + 1, 1);
  }
}

void beyond(float* out) {
  FASTRNN_SHARED(memory);
  Words w{};
  if (bug == 1) ptx::copy_async16(ptx::shared_address(memory) + 64, out, 16);
  if (bug == 2) ptx::copy_async16(ptx::shared_address(memory) + 8, out, 16);
  if (bug == 3) ptx::copy_async16(ptx::shared_address(memory), out + 1, 16);
  if (bug == 4) ptx::shared_address(&w);
  if (bug == 5) ptx::map_to_rank(ptx::shared_address(memory), 9);
  ptx::copy_commit();
  ptx::copy_wait<0>();
}

}  // namespace

Values run(const std::string& name, const Values& in, int planted, int blocks, const simt::Options& options) {
  bug = planted;
  simt::Launch shape;
  Values out;
  if (name == "neighbours" || name == "lanes" || name == "votes") {
    out.resize(96);
    shape.threads = 96, shape.shared = 96 * 4;
    const auto kernel = name == "votes" ? votes : name == "lanes" ? lanes : neighbours;
    simt::launch(shape, [&] { kernel(out.data()); }, options);
  } else if (name == "bf16" || name == "fp16" || name == "tf32") {
    const int k = name == "tf32" ? 8 : 16;
    if (in.size() != size_t(24 * k)) throw std::runtime_error("wrong sizes");
    out.resize(128);
    shape.shared = 24 * 48;
    const float *a = in.data(), *b = a + 16 * k;
    simt::launch(
        shape,
        [&] {
          if (name == "bf16") multiply<bf16, 16>(a, b, out.data(), [](auto&... x) { ptx::mma_bf16(x...); });
          if (name == "fp16") multiply<fp16, 16>(a, b, out.data(), [](auto&... x) { ptx::mma_fp16(x...); });
          if (name == "tf32") multiply<float, 8>(a, b, out.data(), [](auto&... x) { ptx::mma_tf32(x...); });
        },
        options);
  } else if (name == "copies") {
    if (in.size() != 384) throw std::runtime_error("wrong sizes");
    std::vector<Words> aligned(96), result(96);
    std::memcpy(aligned.data(), in.data(), 384 * 4);
    shape.shared = 384 * 4;
    const auto* from = reinterpret_cast<const float*>(aligned.data());
    simt::launch(shape, [&] { copies(from, reinterpret_cast<float*>(result.data())); }, options);
    out.resize(384);
    std::memcpy(out.data(), result.data(), 384 * 4);
  } else if (name == "exchange") {
    out.resize(blocks * 32);
    shape.grid.x = unsigned(blocks), shape.cluster = blocks, shape.shared = 16 + 2 * blocks * 32 * 8;
    simt::launch(shape, [&] { exchange(out.data(), 9); }, options);
  } else if (name == "relay") {
    std::vector<float> values((blocks + 1) * 32);
    std::vector<uint64_t> flags(blocks + 1);
    out.resize(blocks);
    shape.grid.x = unsigned(blocks);
    simt::launch(shape, [&] { relay(values.data(), flags.data(), out.data()); }, options);
    out.insert(out.end(), values.end() - 32, values.end());
  } else if (name == "beyond") {
    Words w{};
    shape.shared = 64;
    simt::launch(shape, [&] { beyond(reinterpret_cast<float*>(&w)); }, options);
  } else {
    throw std::runtime_error("no such kernel: " + name);
  }
  return out;
}

}  // namespace fastrnn::primitives
