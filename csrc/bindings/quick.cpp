// Forward of one layer on plain tensors, without ceremony: what `fastrnn.layers` and `fastrnn.backends.cpu`
// do in Python for any call is here done in one go for the plainest, of which a step takes a few microseconds.
// Whatever is not exactly as expected is left to them: the answer is then None, never an error.
#include "bindings/exchange.h"

namespace fastrnn {
namespace {

using namespace exchange;

constexpr int kStreams = 2, kFields = 5;  // w_ih, w_hh, b_ih, b_hh, w_hr

struct Layer {
  StreamWeights weights[kStreams];
  py::object owned[kStreams][kFields];  // without the GIL another thread may take a parameter out of its module
  uint8_t reverse[kStreams] = {0, 1};
  int64_t rows = 0, inputs = 0, outputs = 0;
  int dtype = -1, streams = 0;
  bool records = false;  // may a gradient be asked for, and has one of the tensors asked?

  // The parameters of all streams, by name from a module's dictionary; false if one is not as the others want it.
  bool read(PyObject* parameters, PyObject* names, int gates, bool grad) {
    streams = int(PyTuple_GET_SIZE(names));
    for (int s = 0; s < streams; ++s) {
      const void* found[kFields] = {};
      PyObject* own = PyTuple_GET_ITEM(names, s);
      for (int k = 0; k < kFields; ++k) {
        PyObject* name = PyTuple_GET_ITEM(own, k);
        if (name == Py_None) continue;
        PyObject* parameter = PyDict_GetItem(parameters, name);
        if (!parameter) return false;
        if (parameter == Py_None && (k == 2 || k == 3)) continue;  // a bias that is not there
        owned[s][k] = py::reinterpret_borrow<py::object>(parameter);
        Look look;
        if (!plain(parameter, parameter_type, look) || !fits(look, s, k, gates)) return false;
        found[k] = look.data();
        if (grad && !records) records = requires_grad(parameter);
      }
      weights[s] = {found[0], found[1], found[2], found[3], found[4]};
      if (!found[4] && rows != outputs * gates) return false;
      if (!found[2] != !found[3] || !found[2] != !weights[0].b_ih) return false;
    }
    return true;
  }

  bool fits(const Look& look, int s, int k, int gates) {
    const int64_t* n = look.t.shape;
    if (s == 0 && k < 2) {
      if (look.t.ndim != 2) return false;
      if (k == 0) rows = n[0], inputs = n[1], dtype = dtype_of(look.t);
      if (k == 1) outputs = n[1];
    }
    if (dtype < 0 || dtype_of(look.t) != dtype || rows % gates) return false;
    if (k == 0) return look.has_shape(rows, inputs);
    if (k == 1) return look.has_shape(rows, outputs);
    if (k == 4) return look.has_shape(outputs, rows / gates);
    return look.t.ndim == 1 && n[0] == rows;
  }
};

// parameters: a module's; names: per stream its five, None where there is none; x (T, B, I), or (B, I) of a
// single step; hx: None or a tuple of states; grad: is autograd to record what asks for its gradient?
// elsewhere: if it is to be recorded run nothing, and return (None, None): whoever asked does it.
// Returns None, or two things: the outputs (y, h_n[, c_n]), or (h[, c]) of a single step; and None, or what
// backward needs, (tape, c, m), for whoever records the call.
py::object quick(const py::dict& parameters, const py::tuple& names, int cell, const py::object& x,
                 const py::object& hx, bool single, bool batch_first, bool grad, bool elsewhere, int threads) {
  Look input, state[2];
  Layer layer;
  if (!api || cell < 0 || cell >= kCellCount || !plain(x.ptr(), tensor_type, input)) return py::none();
  layer.records = grad && requires_grad(x.ptr());
  const CellSizes sizes = kCells[cell];
  if (sizes.params) return py::none();
  if (input.t.ndim != (single ? 2 : 3) || !layer.read(parameters.ptr(), names.ptr(), sizes.gates, grad))
    return py::none();
  const int64_t* shape = input.t.shape;
  const int64_t T = single ? 1 : shape[0], B = shape[single ? 0 : 1], S = layer.streams, P = layer.outputs;
  const int64_t H = layer.rows / sizes.gates, widths[2] = {P, H};
  if (shape[single ? 1 : 2] != layer.inputs || dtype_of(input.t) != layer.dtype) return py::none();
  if (batch_first && (T != 1 || B != 1)) return py::none();
  const bool given = !hx.is_none();
  if (given && (!PyTuple_CheckExact(hx.ptr()) || PyTuple_GET_SIZE(hx.ptr()) != sizes.states)) return py::none();
  for (int k = 0; given && k < sizes.states; ++k) {
    if (!plain(PyTuple_GET_ITEM(hx.ptr(), k), tensor_type, state[k])) return py::none();
    if (dtype_of(state[k].t) != layer.dtype) return py::none();
    if (!(single ? state[k].has_shape(B, widths[k]) : state[k].has_shape(S, B, widths[k]))) return py::none();
    if (grad && !layer.records) layer.records = requires_grad(PyTuple_GET_ITEM(hx.ptr(), k));
  }
  // What is saved has the type of the arithmetic, which is that of x for these.
  const bool wide = layer.dtype == int(DType::Float32) || layer.dtype == int(DType::Float64);
  if (layer.records && (!wide || layer.weights[0].w_hr)) return py::none();
  if (elsewhere && layer.records) return py::make_tuple(py::none(), py::none());
  const int outs = sizes.states + !single;
  py::tuple result(outs);
  void* data[3] = {};
  for (int k = 0; k < outs; ++k) {
    const bool y = !single && k == 0;
    const int64_t lead = y ? T : S, width = y ? S * P : widths[single ? k : k - 1];
    const int64_t sizes_of[] = {lead, B, width};
    py::object made = new_empty(x.ptr(), sizes_of + single, 3 - single);
    Look look;  // a mode may have made something else of it
    const bool ok = look(made.ptr());
    PyTuple_SET_ITEM(result.ptr(), k, made.release().ptr());
    if (!ok || dtype_of(look.t) != layer.dtype) return py::none();
    if (!(single ? look.has_shape(B, width) : look.has_shape(lead, B, width))) return py::none();
    data[k] = look.t.data;
  }
  ForwardArgs a = {};
  a.T = T, a.B = B, a.I = layer.inputs, a.H = H, a.P = P, a.S = S;
  a.reverse = layer.reverse, a.weights = layer.weights, a.x = input.data(), a.threads = threads;
  a.h0 = given ? state[0].data() : nullptr, a.c0 = given && sizes.states > 1 ? state[1].data() : nullptr;
  a.y = data[0], a.hn = data[single ? 0 : 1], a.cn = sizes.states > 1 ? data[outs - 1] : nullptr;
  py::object saved = py::none();
  if (layer.records) {
    const int64_t kept[2] = {sizes.tape * H, sizes.states > 1 ? H : 0};
    void** into[2] = {&a.tape, &a.c};
    py::tuple tensors = py::make_tuple(py::none(), py::none(), py::none());
    for (int k = 0; k < 2; ++k) {
      if (!kept[k]) continue;
      const int64_t sizes_of[] = {S, T * B, kept[k]};
      tensors[k] = new_empty(x.ptr(), sizes_of, 3);
      Look look;
      if (!look(py::object(tensors[k]).ptr()) || dtype_of(look.t) != layer.dtype) return py::none();
      if (!look.has_shape(S, T * B, kept[k])) return py::none();
      *into[k] = look.t.data;
    }
    saved = std::move(tensors);
  }
  const auto run = kernels().forward[cell][layer.dtype];
  {
    py::gil_scoped_release release;
    run(a);
  }
  return py::make_tuple(std::move(result), std::move(saved));
}

}  // namespace

void bind_quick(py::module_& module) {
  exchange::bind(module);
  module.def("quick", &quick);
}

}  // namespace fastrnn
