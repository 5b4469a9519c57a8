// The plain build as a Python module: cases on named numpy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "emulation/cases.h"

namespace py = pybind11;
using namespace rqk::emulation;

namespace {

Array from_numpy(const py::array& given) {
  const py::array array = py::array::ensure(given, py::array::c_style);
  Array result;
  result.dtype = py::str(array.dtype().attr("str"));
  result.shape.assign(array.shape(), array.shape() + array.ndim());
  const auto* bytes = static_cast<const std::byte*>(array.data());
  result.data.assign(bytes, bytes + array.nbytes());
  return result;
}

py::array to_numpy(const Array& array) {
  py::array result(py::dtype(array.dtype), array.shape);
  if (!array.data.empty()) std::memcpy(result.mutable_data(), array.data.data(), array.data.size());
  return result;
}

}  // namespace

PYBIND11_MODULE(rqk_emulation, module) {
  module.doc() = "CUDA kernels on the CPU, see csrc/emulation";
  module.def(
      "run",
      [](const std::string& name, const std::map<std::string, py::array>& arguments,
         const std::vector<uint64_t>& seeds) {
        std::map<std::string, Array> arrays;
        for (const auto& [argument, value] : arguments) arrays.emplace(argument, from_numpy(value));
        std::vector<py::array> results;
        for (const Array& result : run_case(name, std::move(arrays), seeds)) results.push_back(to_numpy(result));
        return results;
      },
      py::arg("name"), py::arg("arguments"), py::arg("seeds"),
      "Results of a case, run once per schedule seed (0 is in order); RuntimeError where a kernel breaks a rule");
}
