// Makes a library importable as hessreg._C or hessreg._cuda: importing it registers its operators.
#include <Python.h>

#include "common/cpu_isa.h"

#define HESSREG_CONCAT_(a, b) a##b
#define HESSREG_CONCAT(a, b) HESSREG_CONCAT_(a, b)
#define HESSREG_STRING_(a) #a
#define HESSREG_STRING(a) HESSREG_STRING_(a)

PyMODINIT_FUNC HESSREG_CONCAT(PyInit_, HESSREG_MODULE)() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   HESSREG_STRING(HESSREG_MODULE),
                                   nullptr,
                                   -1,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  if (!hessreg::chosen_isa()) {
    PyErr_Format(PyExc_ValueError,
                 "HESSREG_ISA must be baseline, avx2 or avx512 and no more than this processor "
                 "has (%s), got '%s'",
                 hessreg::kIsaNames[static_cast<int>(hessreg::supported_isa())],
                 std::getenv("HESSREG_ISA"));
    return nullptr;
  }
  const char* isa = hessreg::kIsaNames[static_cast<int>(hessreg::active_isa())];
  PyObject* module = PyModule_Create(&definition);
  if (module && (PyModule_AddStringConstant(module, "build_options", HESSREG_BUILD_OPTIONS) < 0 ||
                 PyModule_AddStringConstant(module, "isa", isa) < 0)) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
