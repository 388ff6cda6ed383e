// The Python module packedbert._C: functions about the processor, and what prepack.py and shortcut.py need
// beside ops. Importing it also registers the ops of ops*.cpp. It keeps to Python's limited API, so that one
// file serves every Python from 3.10 on.
#include <Python.h>

#include <cstring>
#include <string>

#include "cpu/isa.h"
#include "packed_layout.h"
#include "prepared.h"

namespace {

using packedbert::cpu::Isa;

PyObject* available_isas(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  if (!names) return nullptr;
  for (const Isa isa : packedbert::cpu::available_isas()) {
    PyObject* name = PyUnicode_FromString(packedbert::cpu::isa_name(isa));
    const bool appended = name && PyList_Append(names, name) == 0;
    Py_XDECREF(name);
    if (!appended) {
      Py_DECREF(names);
      return nullptr;
    }
  }
  return names;
}

PyObject* active_isa(PyObject*, PyObject*) {
  return PyUnicode_FromString(packedbert::cpu::isa_name(packedbert::cpu::active_isa()));
}

PyObject* set_isa(PyObject*, PyObject* argument) {
  Py_ssize_t size = 0;
  const char* name = PyUnicode_AsUTF8AndSize(argument, &size);
  if (!name) return nullptr;  // not a str: TypeError is set
  std::string available;
  for (const Isa isa : packedbert::cpu::available_isas()) {
    if (std::strcmp(name, packedbert::cpu::isa_name(isa)) == 0 && packedbert::cpu::set_active_isa(isa))
      Py_RETURN_NONE;
    available += std::string(available.empty() ? "" : ", ") + packedbert::cpu::isa_name(isa);
  }
  return PyErr_Format(PyExc_ValueError, "set_isa: expected one of [%s], which this machine can run, got '%U'",
                      available.c_str(), argument);
}

PyObject* cuda_built(PyObject*, PyObject*) {
#ifdef PACKEDBERT_CUDA
  Py_RETURN_TRUE;
#else
  Py_RETURN_FALSE;
#endif
}

template <void (*kRelease)(int64_t)>
PyObject* release(PyObject*, PyObject* argument) {
  const long long key = PyLong_AsLongLong(argument);
  if (key == -1 && PyErr_Occurred()) return nullptr;
  kRelease(key);
  Py_RETURN_NONE;
}

// In C, because with cold caches each item waits for memory: here a processor waits for several at a time, in
// the interpreter for one after the other.
PyObject* are_same(PyObject*, PyObject* arguments) {
  PyObject *owners, *names, *values;
  if (!PyArg_ParseTuple(arguments, "O!O!O!:are_same", &PyList_Type, &owners, &PyList_Type, &names,
                        &PyList_Type, &values))
    return nullptr;
  const Py_ssize_t count = PyList_Size(owners);
  if (PyList_Size(names) != count || PyList_Size(values) != count) {
    return PyErr_Format(PyExc_ValueError, "are_same: expected lists of one length, got %zd, %zd and %zd",
                        count, PyList_Size(names), PyList_Size(values));
  }
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* found = PyDict_GetItemWithError(PyList_GetItem(owners, i), PyList_GetItem(names, i));
    if (!found && PyErr_Occurred()) return nullptr;
    if ((found ? found : Py_None) != PyList_GetItem(values, i)) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

PyObject* total_size(PyObject*, PyObject* dicts) {
  if (!PyList_Check(dicts)) return PyErr_Format(PyExc_TypeError, "total_size: expected a list of dicts");
  Py_ssize_t total = 0;
  for (Py_ssize_t i = 0; i < PyList_Size(dicts); ++i) {
    const Py_ssize_t size = PyDict_Size(PyList_GetItem(dicts, i));
    if (size < 0) return nullptr;
    total += size;
  }
  return PyLong_FromSsize_t(total);
}

PyMethodDef methods[] = {
    {"available_isas", available_isas, METH_NOARGS,
     "available_isas() -> list[str]\n\nThe instruction sets that this machine runs, slowest first."},
    {"isa", active_isa, METH_NOARGS, "isa() -> str\n\nThe instruction set that the CPU kernels use."},
    {"set_isa", set_isa, METH_O,
     "set_isa(name: str) -> None\n\nUse another instruction set; ValueError where the machine cannot run "
     "it."},
    {"cuda_built", cuda_built, METH_NOARGS,
     "cuda_built() -> bool\n\nWhether this file has the CUDA kernels."},
    {"release_encoder", release<packedbert::release_encoder>, METH_O,
     "release_encoder(key: int) -> None\n\nForget what the op prepare_encoder returned this key for."},
    {"release_bert", release<packedbert::release_bert>, METH_O,
     "release_bert(key: int) -> None\n\nForget what the op prepare_bert returned this key for."},
    {"are_same", are_same, METH_VARARGS,
     "are_same(owners: list[dict], names: list, values: list) -> bool\n\nWhether each dict has the very "
     "object under its name; None stands for none."},
    {"total_size", total_size, METH_O,
     "total_size(dicts: list[dict]) -> int\n\nHow many items they have together."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_C",
                      "packedbert's native kernels.",
                      -1,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  PyObject* self = PyModule_Create(&module);
  if (self && (PyModule_AddIntConstant(self, "PANEL_WIDTH", packedbert::kPanelWidth) < 0 ||
               PyModule_AddIntConstant(self, "TILE_OUTPUTS", packedbert::kTileOutputs) < 0 ||
               PyModule_AddIntConstant(self, "TILE_INPUTS", packedbert::kTileInputs) < 0)) {
    Py_DECREF(self);
    return nullptr;
  }
  return self;
}
