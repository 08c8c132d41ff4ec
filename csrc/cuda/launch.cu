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

// Blocks in the largest cluster that this kind of kernel can have: 8 everywhere, 16 where the device allows it.
int largest_cluster(int capability) {
  if (capability < 90) return 1;
  return capability == 90 || capability == 100 || capability == 103 ? 16 : 8;
}

// Is there room for one cluster at least? On some devices no 16 multiprocessors lie together that are all in use. The
// answer is kept: the question takes longer than a launch.
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
void grant_shared_memory(const void* entry, const Plan& plan) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> granted;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  int& most = granted[{entry, device}];
  if (plan.shared <= most) return;
  check(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared), "shared memory", &plan);
  most = plan.shared;
}

template <class Args>
void run(void (*kernel)(Args), const Plan& plan, const Args& args, void* stream) {
  const void* entry = reinterpret_cast<const void*>(kernel);
  grant_shared_memory(entry, plan);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.grid_x, plan.grid_y);
  config.blockDim = dim3(unsigned(plan.threads));
  config.dynamicSmemBytes = size_t(plan.shared);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  if (plan.kernel.exchange == kInCluster) {
    if (plan.slice.blocks > 8)
      check(cudaFuncSetAttribute(entry, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cluster size", &plan);
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(plan.slice.blocks);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute, config.numAttrs = 1;
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
  const int capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
  return {capability, attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device), largest_cluster(capability),
          attribute(cudaDevAttrMultiProcessorCount, device)};
}

void launch(const Plan& plan, int cell, NumberId number, const ForwardArgs& args, void* stream) {
  run(find_forward(cell, number, plan.variant), plan, args, stream);
}

void launch(const Plan& plan, int cell, NumberId number, const BackwardArgs& args, void* stream) {
  run(find_backward(cell, number, plan.variant), plan, args, stream);
}

}  // namespace fastrnn
