#include "bindings/gpu.h"

#include <pybind11/stl.h>

#include "bindings/cell_sizes.h"
#include "cuda/launch.h"

namespace py = pybind11;

namespace fastrnn {
namespace {

using Address = uintptr_t;

template <class T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

// T, B, H, S, reverse, hidden
Sizes sizes_of(const Plan& plan, const std::vector<int64_t>& sizes) {
  if (!plan.error.empty()) throw std::runtime_error(plan.error);
  if (sizes.size() != 6) throw py::value_error("fastrnn: a malformed call");
  for (int i = 0; i < 4; ++i)
    if (sizes[i] < 0 || sizes[i] > INT32_MAX) throw py::value_error("fastrnn: a size beyond 32 bits");
  if (sizes[5] < 0 || sizes[5] > sizes[2]) throw py::value_error("fastrnn: more units than H");
  const Slice& s = plan.slice;
  return {int(sizes[0]), int(sizes[1]), int(sizes[2]), int(sizes[3]),      s.units,
          s.blocks,      s.tiles,       s.rounds,      uint32_t(sizes[4]), int(sizes[5])};
}

// flags, exchange, error
Meeting meeting_of(const Plan& plan, const Address* a) {
  if (plan.kernel.exchange == kThroughGrid && !(a[0] && a[1] && a[2]))
    throw py::value_error("fastrnn: no memory to meet in");
  return {at<uint64_t>(a[0]), at<void>(a[1]), at<int>(a[2]), plan.items};
}

void check_alignment(const std::vector<Address>& a, int tensors) {
  for (int i = 0; i < tensors; ++i)
    if (a[i] % 16) throw py::value_error("fastrnn: a tensor that does not lie on 16 bytes");
}

constexpr int kParams[] = {
#define FASTRNN_PARAMS(C) C::kParams,
    FASTRNN_FOR_EACH_CELL(FASTRNN_PARAMS)
#undef FASTRNN_PARAMS
};

void check_params(int cell, const void* params) {
  if (!params && kParams[cell]) throw py::value_error("fastrnn: the values of the cell's units are missing");
}

void forward(const Plan& plan, int cell, int number, const std::vector<int64_t>& sizes, const std::vector<Address>& a,
             Address stream, int x_blocks) {
  if (a.size() != 16) throw py::value_error("fastrnn: a malformed call");
  ForwardArgs args;
  args.n = sizes_of(plan, sizes);
  args.x = at<void>(a[0]), args.weights = at<void>(a[1]), args.bias = at<void>(a[2]);
  args.h0 = at<void>(a[3]), args.c0 = at<void>(a[4]), args.y = at<void>(a[5]);
  args.hn = at<void>(a[6]), args.cn = at<void>(a[7]), args.tape = at<void>(a[8]);
  args.x_blocks = x_blocks, args.c = at<float>(a[9]), args.params = at<void>(a[10]);
  args.lengths = at<int64_t>(a[11]), args.resets = at<uint8_t>(a[12]);
  args.meeting = meeting_of(plan, &a[13]);
  check_alignment(a, 10);
  check_params(cell, args.params);
  py::gil_scoped_release release;
  launch(plan, cell, NumberId(number), args, at<void>(stream));
}

void backward(const Plan& plan, int cell, int number, const std::vector<int64_t>& sizes, const std::vector<Address>& a,
              Address stream) {
  if (a.size() != 20) throw py::value_error("fastrnn: a malformed call");
  BackwardArgs args;
  args.n = sizes_of(plan, sizes);
  args.weights = at<void>(a[0]), args.tape = at<void>(a[1]), args.c = at<float>(a[2]), args.y = at<void>(a[3]);
  args.h0 = at<void>(a[4]), args.c0 = at<float>(a[5]), args.dy = at<void>(a[6]), args.dhn = at<void>(a[7]);
  args.dcn = at<void>(a[8]), args.dc = at<void>(a[9]), args.dgates = at<void>(a[10]), args.dh0 = at<void>(a[11]);
  args.dc0 = at<void>(a[12]), args.params = at<void>(a[13]), args.dparams = at<float>(a[14]);
  args.lengths = at<int64_t>(a[15]), args.resets = at<uint8_t>(a[16]);
  args.meeting = meeting_of(plan, &a[17]);
  check_alignment(a, 13);
  check_params(cell, args.params);
  py::gil_scoped_release release;
  launch(plan, cell, NumberId(number), args, at<void>(stream));
}

}  // namespace

void bind_gpu(py::module_& module) {
  py::class_<Limits>(module, "Limits", py::module_local())
      .def(py::init([](int capability, int shared, int cluster, int multiprocessors, uint32_t refused) {
             return Limits{capability, shared, cluster, multiprocessors, refused};
           }),
           py::arg("capability"), py::arg("shared"), py::arg("cluster"), py::arg("multiprocessors"),
           py::arg("refused") = 0)
      .def_readonly("capability", &Limits::capability)
      .def_readonly("shared", &Limits::shared)
      .def_readonly("cluster", &Limits::cluster)
      .def_readonly("multiprocessors", &Limits::multiprocessors);
  py::class_<Plan>(module, "Plan", py::module_local())
      .def("__str__", &describe)
      .def_readonly("error", &Plan::error)
      .def_readonly("variant", &Plan::variant)
      .def_readonly("threads", &Plan::threads)
      .def_readonly("shared", &Plan::shared)
      .def_readonly("cycles", &Plan::cycles)
      .def_property_readonly("grid", [](const Plan& p) { return std::make_pair(p.grid_x, p.grid_y); })
      .def_property_readonly("blocks", [](const Plan& p) { return p.slice.blocks; })
      .def_property_readonly("units", [](const Plan& p) { return p.slice.units; })
      .def_property_readonly("tiles", [](const Plan& p) { return p.slice.tiles; })
      .def_readonly("depth", &Plan::depth)
      .def_property_readonly("kernel", [](const Plan& p) { return p.kernel.exchange == kThroughGrid ? 2 : 1; })
      .def_property_readonly("flags", [](const Plan& p) { return p.grid_x; })
      .def_property_readonly("rounds", [](const Plan& p) { return p.slice.rounds; })
      .def_readonly("exchange", &Plan::exchange)
      .def_readonly("items", &Plan::items)
      .def_property_readonly("register_tiles", [](const Plan& p) { return p.kernel.tiles; })
      .def_property_readonly("batch", [](const Plan& p) { return 8 * p.kernel.batch; });
  module.def("limits", &limits, py::arg("device"));
  module.def(
      "plan",
      [](int cell, int number, bool backward, int S, int B, int H, const Limits& device, int blocks, int variant,
         int kernel, int groups, int warps) {
        Request r{cell, NumberId(number), backward, S, B, H};
        r.blocks = blocks, r.variant = variant, r.kernel = kernel, r.groups = groups, r.warps = warps;
        return plan(r, device);
      },
      py::arg("cell"), py::arg("number"), py::arg("backward"), py::arg("S"), py::arg("B"), py::arg("H"),
      py::arg("limits"), py::arg("blocks") = 0, py::arg("variant") = -1, py::arg("kernel") = 0, py::arg("groups") = 0,
      py::arg("warps") = 0);
  module.def("exists", [](int cell, int number, bool backward, int variant) {
    return exists(Request{cell, NumberId(number), backward, 1, 1, 1}, variant);
  });
  module.def("forward", &forward);
  module.def("backward", &backward);
  module.attr("forward_variants") = kForwardVariants;
  module.attr("backward_variants") = kBackwardVariants;
  module.attr("sizes") = cell_sizes();
  module.attr("cells") = py::list(module.attr("sizes"));
}

}  // namespace fastrnn
