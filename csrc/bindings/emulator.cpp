// fastrnn's kernels on the emulator, for its tests; not part of an installation.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/gpu.h"
#include "emulator/launch.h"
#include "emulator/primitives.h"

namespace py = pybind11;

PYBIND11_MODULE(_emulator, module) {
  module.doc() = "fastrnn's CUDA kernels on the CPU emulator";
  fastrnn::bind_gpu(module);
  module.def(
      "schedule",
      [](uint64_t seed, bool races, int resident, int64_t in_vain) {
        fastrnn::emulator_options() = {seed, resident, races, in_vain};
      },
      "How the launches to come are scheduled.", py::arg("seed") = 0, py::arg("races") = false,
      py::arg("resident") = 1 << 30, py::arg("in_vain") = -1);
  module.def("stats", [] {
    const simt::Stats& s = fastrnn::emulator_stats();
    return py::dict(py::arg("switches") = s.switches, py::arg("products") = s.products, py::arg("stores") = s.stores,
                    py::arg("waits") = s.waits);
  });
#if defined(FASTRNN_DETECTS_RACES)
  module.attr("detects_races") = true;
#else
  module.attr("detects_races") = false;
#endif
  module.def(
      "primitive",
      [](const std::string& name, const std::vector<float>& in, int bug, int blocks, uint64_t seed, bool races,
         int resident) {
        simt::Options options;
        options.seed = seed, options.races = races, options.resident = resident;
        return fastrnn::primitives::run(name, in, bug, blocks, options);
      },
      py::arg("name"), py::arg("input") = std::vector<float>(), py::arg("bug") = 0, py::arg("blocks") = 1,
      py::arg("seed") = 0, py::arg("races") = false, py::arg("resident") = 1 << 30);
}
