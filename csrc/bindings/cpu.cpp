// fastrnn._cpu: the engine for Python. Tensors come as addresses; fastrnn/backends/cpu.py has
// checked their shapes and types.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "bindings/cell_sizes.h"
#include "cpu/engine.h"

namespace py = pybind11;

namespace {

using fastrnn::BackwardArgs;
using fastrnn::DType;
using fastrnn::ForwardArgs;
using fastrnn::Problem;
using fastrnn::StreamGradients;
using fastrnn::StreamWeights;
using Address = uintptr_t;

template <class T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

// T, B, I, H, P, threads, cell, dtype, batch_sizes, resets, x, h0, c0
constexpr size_t kHead = 13;
constexpr size_t kPerStream = 6;    // w_ih, w_hh, b_ih, b_hh, w_hr, reverse
constexpr size_t kPerGradient = 5;  // w_ih, w_hh, b_ih, b_hh, w_hr

struct Sizes {
  int params;
  bool projects;
};
#define FASTRNN_SIZES(C) Sizes{fastrnn::C::kParams, fastrnn::C::kProjects},
constexpr Sizes kCells[] = {FASTRNN_FOR_EACH_CELL(FASTRNN_SIZES)};
#undef FASTRNN_SIZES

struct Call {
  std::vector<StreamWeights> weights;
  std::vector<uint8_t> reverse;
  std::vector<const void*> params;
  int cell, dtype;

  Call(Problem& p, const std::vector<Address>& head, const std::vector<Address>& streams,
       const std::vector<Address>& own) {
    if (head.size() != kHead || streams.empty() || streams.size() % kPerStream != 0)
      throw py::value_error("fastrnn._cpu: a malformed call");
    for (size_t i = 0; i < streams.size(); i += kPerStream) {
      const Address* w = &streams[i];
      weights.push_back({at<void>(w[0]), at<void>(w[1]), at<void>(w[2]), at<void>(w[3]), at<void>(w[4])});
      reverse.push_back(uint8_t(w[5]));
    }
    p.T = head[0], p.B = head[1], p.I = head[2], p.H = head[3], p.P = head[4], p.S = weights.size();
    p.threads = int(head[5]), cell = int(head[6]), dtype = int(head[7]);
    p.batch_sizes = at<int64_t>(head[8]), p.resets = at<uint8_t>(head[9]);
    p.x = at<void>(head[10]), p.h0 = at<void>(head[11]), p.c0 = at<void>(head[12]);
    p.weights = weights.data(), p.reverse = reverse.data();
    for (const Address a : own) params.push_back(at<void>(a));
    p.params = params.data();
    if (cell < 0 || cell >= fastrnn::kCellCount || dtype < 0 || dtype >= int(DType::Count) || p.H < 1 || p.P < 1 ||
        p.I < 1)
      throw py::value_error("fastrnn._cpu: a malformed call");
    if (int64_t(params.size()) != p.S * kCells[cell].params) throw py::value_error("fastrnn._cpu: a malformed call");
    for (const StreamWeights& w : weights)
      if (w.w_hr ? !kCells[cell].projects : p.P != p.H) throw py::value_error("fastrnn._cpu: a malformed call");
  }
};

void forward(const std::vector<Address>& head, const std::vector<Address>& streams, const std::vector<Address>& params,
             Address y, Address hn, Address cn, Address tape, Address c, Address m) {
  ForwardArgs a;
  const Call call(a, head, streams, params);
  a.y = at<void>(y), a.hn = at<void>(hn), a.cn = at<void>(cn);
  a.tape = at<void>(tape), a.c = at<void>(c), a.m = at<void>(m);
  const auto run = fastrnn::kernels().forward[call.cell][call.dtype];
  py::gil_scoped_release release;
  run(a);
}

void backward(const std::vector<Address>& head, const std::vector<Address>& streams, const std::vector<Address>& params,
              Address y, Address tape, Address c, Address m, Address dy, Address dhn, Address dcn, Address dc,
              Address dgates, Address dh0, Address dc0, Address dh, Address dx, const std::vector<Address>& gradients,
              const std::vector<Address>& dparams) {
  BackwardArgs a;
  const Call call(a, head, streams, params);
  a.y = at<void>(y), a.tape = at<void>(tape), a.c = at<void>(c), a.m = at<void>(m);
  a.dy = at<void>(dy), a.dhn = at<void>(dhn), a.dcn = at<void>(dcn), a.dc = at<void>(dc), a.dgates = at<void>(dgates);
  a.dh0 = at<void>(dh0), a.dc0 = at<void>(dc0), a.dh = at<void>(dh), a.dx = at<void>(dx);
  if (gradients.size() % kPerGradient != 0) throw py::value_error("fastrnn._cpu: a malformed call");
  std::vector<StreamGradients> of_weights;
  for (size_t i = 0; i < gradients.size(); i += kPerGradient) {
    const Address* d = &gradients[i];
    of_weights.push_back({at<void>(d[0]), at<void>(d[1]), at<void>(d[2]), at<void>(d[3]), at<void>(d[4])});
  }
  const bool narrow = call.dtype != int(DType::Float32) && call.dtype != int(DType::Float64);
  if (!of_weights.empty() && (int64_t(of_weights.size()) != a.S || (narrow && a.T * a.B > fastrnn::kFewRows)))
    throw py::value_error("fastrnn._cpu: a malformed call");
  for (size_t s = 0; s < of_weights.size(); ++s)
    if (of_weights[s].w_hr && (narrow || !a.weights[s].w_hr)) throw py::value_error("fastrnn._cpu: a malformed call");
  if (!a.dgates && (narrow || of_weights.empty())) throw py::value_error("fastrnn._cpu: a malformed call");
  a.gradients = of_weights.empty() ? nullptr : of_weights.data();
  if (dparams.size() != params.size()) throw py::value_error("fastrnn._cpu: a malformed call");
  std::vector<void*> of_params;
  for (const Address d : dparams) of_params.push_back(at<void>(d));
  a.dparams = of_params.data();
  const auto run = fastrnn::kernels().backward[call.cell][call.dtype];
  py::gil_scoped_release release;
  run(a);
}

// One step of a cell's C++ text on doubles, for the tests that hold it against the Python text.
template <class C>
std::vector<std::vector<double>> cell_step(const std::vector<double>& a, const std::vector<double>& s,
                                           const std::vector<double>& p, const std::vector<double>& ds) {
  constexpr int D = C::kGates + C::kSplit, V = C::kTape ? C::kTape : 1, NS = C::kStates, K = C::kParams;
  if (a.size() != D || s.size() != NS || p.size() != K || ds.size() != NS)
    throw py::value_error("fastrnn._cpu.step: wrong sizes");
  double av[D], sv[NS], s1[NS], tape[V] = {}, dsv[NS], d[D];
  std::vector<double> dp(K);
  for (int i = 0; i < D; ++i) av[i] = a[i];
  for (int i = 0; i < NS; ++i) sv[i] = s[i], dsv[i] = ds[i];
  C::step(av, sv, p.data(), s1, tape);
  C::step_backward(tape, sv, s1, p.data(), dsv, d, dp.data());
  return {{s1, s1 + NS}, {tape, tape + C::kTape}, {dsv, dsv + NS}, {d, d + D}, dp};
}

std::vector<std::vector<double>> step(const std::string& cell, const std::vector<double>& a,
                                      const std::vector<double>& s, const std::vector<double>& p,
                                      const std::vector<double>& ds) {
#define FASTRNN_STEP(C) \
  if (cell == fastrnn::C::kName) return cell_step<fastrnn::C>(a, s, p, ds);
  FASTRNN_FOR_EACH_CELL(FASTRNN_STEP)
#undef FASTRNN_STEP
  throw py::value_error("fastrnn._cpu.step: unknown cell " + cell);
}

}  // namespace

namespace fastrnn {
void bind_quick(py::module_& module);  // quick.cpp
void bind_quick_backward(py::module_& module);
}  // namespace fastrnn

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "fastrnn's CPU engine";
  fastrnn::bind_quick(module);
  fastrnn::bind_quick_backward(module);
  module.def("forward", &forward);
  module.def("backward", &backward);
  module.def("step", &step);
  module.def("sizes", &fastrnn::cell_sizes);
  module.def("cells", [] { return py::list(fastrnn::cell_sizes()); });
  module.def("isa", &fastrnn::isa);
  module.attr("few_rows") = fastrnn::kFewRows;
  module.def("isas", [] {
    const char* names[4];
    const int n = fastrnn::isas(names);
    return std::vector<std::string>(names, names + n);
  });
}
