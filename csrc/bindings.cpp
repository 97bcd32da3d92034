// The Python face of token_loader.h: the module gpt2._token_loader. Only gpt2/data/loader.py
// imports it.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "token_loader.h"

namespace py = pybind11;
using token_loader::FileError;
using token_loader::ShardSpec;
using token_loader::TokenLoader;

namespace {

using Tokens = py::array_t<int64_t, py::array::c_style>;

void fill(const TokenLoader& loader, int64_t first, Tokens x, Tokens y) {
  const int64_t block_size = loader.block_size();
  if (x.ndim() != 2 || y.ndim() != 2 || x.shape(0) != y.shape(0) || x.shape(1) != block_size ||
      y.shape(1) != block_size) {
    throw std::invalid_argument("x and y must both have the shape (rows, " +
                                std::to_string(block_size) + ")");
  }
  int64_t* x_data = x.mutable_data();  // throws ValueError where the array is read-only
  int64_t* y_data = y.mutable_data();
  const int64_t rows = x.shape(0);
  py::gil_scoped_release release;
  loader.fill(first, rows, x_data, y_data);
}

}  // namespace

PYBIND11_MODULE(_token_loader, m) {
  m.doc() = "Memory-mapped token windows; see csrc/token_loader.h.";

  // std::invalid_argument is ValueError already.
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const FileError& e) {
      py::object error =
          py::reinterpret_borrow<py::object>(PyExc_OSError)(e.error_number, e.what(), e.path);
      PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
    }
  });

  py::class_<TokenLoader>(m, "TokenLoader")
      .def(py::init([](const std::vector<std::tuple<std::string, int64_t, int64_t>>& shards,
                       int64_t block_size, uint64_t seed, bool shuffle, int64_t vocab_size) {
             std::vector<ShardSpec> specs;
             specs.reserve(shards.size());
             for (const auto& [path, offset, n_tokens] : shards)
               specs.push_back({path, offset, n_tokens});
             return new TokenLoader(specs, block_size, seed, shuffle, vocab_size);
           }),
           py::arg("shards"), py::arg("block_size"), py::arg("seed"), py::arg("shuffle"),
           py::arg("vocab_size"))
      .def_property_readonly("n_tokens", &TokenLoader::n_tokens)
      .def_property_readonly("n_windows", &TokenLoader::n_windows)
      .def("window_start", &TokenLoader::window_start, py::arg("sample"))
      .def("fill", &fill, py::arg("first"), py::arg("x").noconvert(), py::arg("y").noconvert())
      .def("prefetch", &TokenLoader::prefetch, py::arg("first"), py::arg("rows"),
           py::call_guard<py::gil_scoped_release>());
}
