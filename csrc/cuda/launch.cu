// Launches on a GPU.
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "cuda/find.cuh"
#include "cuda/launch.h"

namespace fastrnn {
namespace {

constexpr int kOfCluster = 2;  // the first forward variant of K1 in clusters
static_assert(forward_variant(kOfCluster, 4, 2).exchange == kInCluster);

void check(cudaError_t error, const char* what, const Plan* plan = nullptr) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call, which may be torch's, would report it
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error) +
                           (plan ? "; the plan was " + describe(*plan) : ""));
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// Is there room for one cluster at least? The plan has asked for any kernel that fills its multiprocessors (`limits`);
// this is the last guard. The answer is kept: the question takes longer than a launch.
void require_room(const void* entry, const cudaLaunchConfig_t& config, const Plan& plan) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, int>, int> known;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.try_emplace({entry, device, plan.slice.blocks, plan.shared}, -1).first;
  if (found->second < 0)
    check(cudaOccupancyMaxActiveClusters(&found->second, entry, &config), "cudaOccupancyMaxActiveClusters", &plan);
  if (found->second == 0)
    throw std::runtime_error("CUDA: the device has no room for a cluster of " + std::to_string(plan.slice.blocks) +
                             " blocks; the plan was " + describe(plan) + "; use another backend");
}

// A kernel's limit is raised, never lowered: another thread may be about to launch it with more.
void grant_shared_memory(const void* entry, int bytes, const Plan* plan) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> granted;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  int& most = granted[{entry, device}];
  if (bytes <= most) return;
  check(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory", plan);
  most = bytes;
}

// A launch of clusters; `attribute` has to live as long as `config`.
void in_clusters(cudaLaunchConfig_t& config, cudaLaunchAttribute& attribute, int blocks) {
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute, config.numAttrs = 1;
}

void allow_large_clusters(const void* entry, const Plan* plan) {  // more than 8 blocks
  check(cudaFuncSetAttribute(entry, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cluster size", plan);
}

// Which clusters does the current device find room for? None of more than 8 blocks, on some of 16; fewer where no so
// many multiprocessors lie together that are all in use. Asked for a kernel that has a multiprocessor to itself, by its
// shared memory, so that no other needs more. A size that the driver will not hear of is one without room.
void find_clusters(Limits& found) {
  found.cluster = 1;
  if (found.capability < 90) return;
  const void* entry = reinterpret_cast<const void*>(find_forward(0, NumberId::Bf16, kOfCluster));
  cudaFuncAttributes own{};
  check(cudaFuncGetAttributes(&own, entry), "cudaFuncGetAttributes");
  const int bytes = found.shared - int(own.sharedSizeBytes);
  grant_shared_memory(entry, bytes, nullptr);
  const bool sixteen = found.capability == 90 || found.capability == 100 || found.capability == 103;
  if (sixteen) allow_large_clusters(entry, nullptr);
  for (int blocks = 2; blocks <= (sixteen ? 16 : 8); ++blocks) {
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute attribute{};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = size_t(bytes);
    in_clusters(config, attribute, blocks);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, entry, &config) != cudaSuccess) {
      cudaGetLastError();  // or the next call, which may be torch's, would report it
      clusters = 0;
    }
    if (clusters > 0)
      found.cluster = blocks;
    else
      found.refused |= 1u << blocks;
  }
  found.refused &= (1u << found.cluster) - 1;
}

template <class Args>
void run(void (*kernel)(Args), const Plan& plan, const Args& args, void* stream) {
  const void* entry = reinterpret_cast<const void*>(kernel);
  grant_shared_memory(entry, plan.shared, &plan);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.grid_x, plan.grid_y);
  config.blockDim = dim3(unsigned(plan.threads));
  config.dynamicSmemBytes = size_t(plan.shared);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  if (plan.kernel.exchange == kInCluster) {
    if (plan.slice.blocks > 8) allow_large_clusters(entry, &plan);
    in_clusters(config, attribute, plan.slice.blocks);
    require_room(entry, config, plan);
  } else if (plan.kernel.exchange == kThroughGrid) {  // the launch fails where not all blocks are resident at once
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    config.attrs = &attribute, config.numAttrs = 1;
  }
  void* arguments[] = {const_cast<Args*>(&args)};
  check(cudaLaunchKernelExC(&config, entry, arguments), "launch", &plan);
}

}  // namespace

Limits limits(int device) {
  Limits found{};
  found.capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
  found.shared = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  found.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  find_clusters(found);
  return found;
}

void launch(const Plan& plan, int cell, NumberId number, const ForwardArgs& args, void* stream) {
  run(find_forward(cell, number, plan.variant), plan, args, stream);
}

void launch(const Plan& plan, int cell, NumberId number, const BackwardArgs& args, void* stream) {
  run(find_backward(cell, number, plan.variant), plan, args, stream);
}

}  // namespace fastrnn
