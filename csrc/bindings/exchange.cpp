#include "bindings/exchange.h"

namespace fastrnn::exchange {

const dlpack::ExchangeApi* api = nullptr;
PyObject *tensor_type = nullptr, *parameter_type = nullptr;

namespace {
PyObject *name_new_empty = nullptr, *name_is_neg = nullptr, *name_requires_grad = nullptr;
}

int dtype_of(const dlpack::Tensor& t) {
  if (t.dtype.lanes != 1) return -1;
  if (t.dtype.code == dlpack::kBFloat) return t.dtype.bits == 16 ? int(DType::BFloat16) : -1;
  if (t.dtype.code != dlpack::kFloat) return -1;
  return t.dtype.bits == 32   ? int(DType::Float32)
         : t.dtype.bits == 64 ? int(DType::Float64)
         : t.dtype.bits == 16 ? int(DType::Float16)
                              : -1;
}

bool Look::operator()(PyObject* object) {
  if (api->look(object, &t) != 0) {
    PyErr_Clear();  // it is none that can be described so; the usual way says why
    return false;
  }
  if (t.device_type != dlpack::kCpu || !t.data) return false;
  int64_t expected = 1;
  for (int i = t.ndim - 1; t.strides && i >= 0; --i) {
    if (t.shape[i] == 0 || (t.shape[i] != 1 && t.strides[i] != expected)) return false;
    expected *= t.shape[i];
  }
  return true;
}

bool requires_grad(PyObject* tensor) {
  PyObject* asked = PyObject_GetAttr(tensor, name_requires_grad);
  if (!asked) throw py::error_already_set();
  Py_DECREF(asked);
  return asked == Py_True;
}

bool plain(PyObject* object, PyObject* type, Look& look) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != type) return false;
  PyObject* negative = PyObject_CallMethodNoArgs(object, name_is_neg);
  const bool ok = negative == Py_False && look(object);
  if (!negative) PyErr_Clear();
  Py_XDECREF(negative);
  return ok;
}

py::object new_empty(PyObject* like, const int64_t* sizes, int ndim) {
  py::int_ boxed[3];
  PyObject* arguments[4] = {like};
  for (int i = 0; i < ndim; ++i) {
    boxed[i] = py::int_(sizes[i]);
    arguments[1 + i] = boxed[i].ptr();
  }
  PyObject* made = PyObject_VectorcallMethod(name_new_empty, arguments, size_t(1 + ndim), nullptr);
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

namespace {

// Gives the interface by which tensors tell where they lie, and the types that they may have.
void set_exchange(const py::capsule& capsule, const py::type& tensor, const py::type& parameter) {
  const auto* found = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
  if (!found) throw py::error_already_set();
  while (found && found->major != dlpack::kMajor) found = found->previous;
  if (!found || !found->look) throw py::value_error("fastrnn._cpu: no DLPack exchange interface of version 1");
  tensor_type = tensor.inc_ref().ptr(), parameter_type = parameter.inc_ref().ptr();
  name_new_empty = PyUnicode_InternFromString("new_empty");
  name_is_neg = PyUnicode_InternFromString("is_neg");
  name_requires_grad = PyUnicode_InternFromString("requires_grad");
  api = found;
}

}  // namespace

void bind(py::module_& module) { module.def("set_exchange", &set_exchange); }

}  // namespace fastrnn::exchange
