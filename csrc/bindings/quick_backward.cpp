// Backward of one layer in one direction that `quick` has run: what `fastrnn.gradients` and `fastrnn.backends.cpu`
// do in Python for any call. Where a tensor is not as expected the answer is None, and they do it.
#include <cstring>
#include <vector>

#include "bindings/exchange.h"

namespace fastrnn {
namespace {

using namespace exchange;

// Tensors that go into a call and come out of it, all of one type.
class Tensors {
 public:
  explicit Tensors(PyObject* like) : like_(like) {}

  bool start() {
    Look look;
    if (!look(like_)) return false;
    dtype_ = dtype_of(look.t);
    return dtype_ == int(DType::Float32) || dtype_ == int(DType::Float64);
  }
  int dtype() const { return dtype_; }
  int64_t element() const { return dtype_ == int(DType::Float64) ? 8 : 4; }

  // Memory of `count` elements, or null of None. False in `ok` if it is not as expected.
  void* given(const py::handle& tensor, int64_t count, bool& ok) {
    if (tensor.is_none()) return nullptr;
    Look look;
    ok = ok && look(tensor.ptr()) && dtype_of(look.t) == dtype_ && elements(look) == count;
    return ok ? look.data() : nullptr;
  }
  // A gradient that autograd brings: nothing is known of it. A copy takes its place where it is not contiguous.
  void* brought(py::object&& tensor, int64_t count, bool& ok) {
    if (!ok || tensor.is_none()) return nullptr;
    Look look;
    if (!plain(tensor.ptr(), tensor_type, look)) tensor = tensor.attr("contiguous")();
    ok = plain(tensor.ptr(), tensor_type, look);
    void* memory = ok ? given(tensor, count, ok) : nullptr;
    kept_.push_back(std::move(tensor));
    return memory;
  }
  void* made(py::list& into, size_t at, const int64_t* sizes, int ndim, bool& ok) {
    py::object tensor = new_empty(like_, sizes, ndim);
    int64_t count = 1;
    for (int i = 0; i < ndim; ++i) count *= sizes[i];
    void* memory = given(tensor, count, ok);
    into[at] = std::move(tensor);
    return memory;
  }

 private:
  static int64_t elements(const Look& look) {
    int64_t n = 1;
    for (int i = 0; i < look.t.ndim; ++i) n *= look.t.shape[i];
    return n;
  }

  PyObject* like_;
  int dtype_ = -1;
  std::vector<py::object> kept_;
};

// flat: x (T, B, I), or (B, I) of a single step; `states` initial states; w_ih, w_hh, b_ih, b_hh, None.
// y, saved (tape, c, m): as `quick` left them, the tape to be overwritten if this walk of the graph is the `last`.
// douts: of y (but of a single step) and of the final states. needed: of each of `flat`.
// Returns the gradients of `flat`, None where none is needed, or None.
py::object quick_backward(int cell, const py::tuple& flat, int states, const py::object& y, const py::tuple& saved,
                          const py::tuple& douts, const py::tuple& needed, bool last, int threads) {
  const CellSizes sizes = kCells[cell];
  Tensors tensors(flat[0].ptr());
  Look x, w;
  const size_t first = 1 + size_t(states);
  if (!tensors.start() || flat.size() != first + 5 || !x(flat[0].ptr()) || !w(flat[first + 1].ptr())) return py::none();
  if (x.t.ndim != 2 && x.t.ndim != 3) return py::none();
  const bool single = x.t.ndim == 2, two = sizes.states > 1;
  BackwardArgs a = {};
  a.S = 1, a.threads = threads;
  a.T = single ? 1 : x.t.shape[0], a.B = x.t.shape[single ? 0 : 1], a.I = x.t.shape[single ? 1 : 2];
  a.P = a.H = w.t.shape[1];
  const int64_t rows = a.T * a.B, G = sizes.gates * a.H, batch = a.B * a.H;
  if (w.t.shape[0] != G) return py::none();
  bool ok = true;
  StreamWeights weights = {};
  const uint8_t reverse = 0;
  a.weights = &weights, a.reverse = &reverse, a.x = x.data();
  a.h0 = states > 0 ? tensors.given(flat[1], batch, ok) : nullptr;
  a.c0 = states > 1 ? tensors.given(flat[2], batch, ok) : nullptr;
  weights.w_ih = tensors.given(flat[first], G * a.I, ok);
  weights.w_hh = tensors.given(flat[first + 1], G * a.H, ok);
  weights.b_ih = tensors.given(flat[first + 2], G, ok), weights.b_hh = tensors.given(flat[first + 3], G, ok);
  a.y = tensors.given(y, rows * a.H, ok);
  void* tape = tensors.given(saved[0], rows * sizes.tape * a.H, ok);
  a.tape = tape, a.c = tensors.given(saved[1], rows * a.H, ok);
  ok = ok && !tape == !sizes.tape && !a.c == !two && a.y;
  const size_t d = single ? 0 : 1;  // where the gradients of the final states begin
  a.dy = tensors.brought(py::object(douts[0]), rows * a.H, ok);
  a.dhn = single ? nullptr : tensors.brought(py::object(douts[d]), batch, ok);  // of a single step y is that state
  a.dcn = two ? tensors.brought(py::object(douts[d + 1]), batch, ok) : nullptr;
  if (!ok) return py::none();
  if (last && sizes.tape == sizes.dgates) a.dgates = tape;
  const auto wanted = [&](size_t k) { return PyTuple_GET_ITEM(needed.ptr(), Py_ssize_t(k)) == Py_True; };
  py::list grads(flat.size());
  for (size_t k = 0; k < flat.size(); ++k) grads[k] = py::none();
  py::list zeros(1);
  if (!a.dy) {
    const int64_t of_y[] = {a.T, a.B, a.H};
    void* memory = tensors.made(zeros, 0, of_y, 3, ok);
    if (memory) std::memset(memory, 0, size_t(rows * a.H * tensors.element()));
    a.dy = memory;
  }
  StreamGradients of_weights = {};
  void** into[] = {&of_weights.w_ih, &of_weights.w_hh, &of_weights.b_ih, &of_weights.b_hh};
  const int64_t shapes[4][2] = {{G, a.I}, {G, a.H}, {G, 0}, {G, 0}};
  for (size_t k = 0; k < 4; ++k)
    if (wanted(first + k)) *into[k] = tensors.made(grads, first + k, shapes[k], k < 2 ? 2 : 1, ok);
  if (wanted(0)) a.dx = tensors.made(grads, 0, x.t.shape, x.t.ndim, ok);
  const int64_t of_state[] = {1, a.B, a.H};
  if (states > 0) a.dh0 = tensors.made(grads, 1, of_state + single, 3 - single, ok);
  if (states > 1) a.dc0 = tensors.made(grads, 2, of_state + single, 3 - single, ok);
  if (!ok) return py::none();
  a.gradients = &of_weights;
  const auto run = kernels().backward[cell][tensors.dtype()];
  {
    py::gil_scoped_release release;
    run(a);
  }
  return std::move(grads);
}

}  // namespace

void bind_quick_backward(py::module_& module) { module.def("quick_backward", &quick_backward); }

}  // namespace fastrnn
